"""A made-up Llama in Meta's own terms, for tests: weights, parts as model-parallel code cuts them, and a forward pass.

Everything is whole-tensor torch written from the papers and shares nothing with what it tests. Rotary embedding is the
complex product of neighbouring pairs (Su et al. 2021), scaled as the Llama 3.1 report says.
"""

import json
import math
from pathlib import Path

import torch

BY_ROWS = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3", "output")
BY_COLUMNS = ("attention.wo", "feed_forward.w2")


def make_params(**changes) -> dict:
    """A Llama 2 with heads of 24 rows, so that row blocks of 128 end inside of one."""
    params = {"dim": 192, "multiple_of": 32, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-5, "vocab_size": -1}
    return {name: value for name, value in (params | changes).items() if value is not None}


def ffn_size(params: dict) -> int:
    size = int(2 * (4 * params["dim"]) / 3)
    size = int(params.get("ffn_dim_multiplier", 1) * size)
    return math.ceil(size / params["multiple_of"]) * params["multiple_of"]


def make_weights(params: dict, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    dim, ffn = params["dim"], ffn_size(params)
    kv = params.get("n_kv_heads", params["n_heads"]) * (dim // params["n_heads"])

    def matrix(rows, columns):
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5 * 2).to(dtype)

    def norm():
        return (1 + 0.2 * torch.randn(dim, generator=generator)).to(dtype)

    weights = {"tok_embeddings.weight": matrix(vocab, dim), "norm.weight": norm(), "output.weight": matrix(vocab, dim)}
    for layer in range(params["n_layers"]):
        shapes = {"attention.wq": (dim, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim)}
        shapes |= {"attention.wo": (dim, dim), "feed_forward.w1": (ffn, dim), "feed_forward.w2": (dim, ffn)}
        shapes |= {"feed_forward.w3": (ffn, dim)}
        weights |= {f"layers.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        weights |= {f"layers.{layer}.{name}.weight": norm() for name in ("attention_norm", "ffn_norm")}
    return weights


def cut(weights: dict, parts: int, embedding_dim: int = 1) -> list[dict]:
    """The state dict of every part. An odd vocabulary leaves the remainder to the last, as the forerunners have it."""
    result = [{} for _ in range(parts)]
    for name, weight in weights.items():
        short = (
            name.removesuffix(".weight").split(".", 2)[-1] if name.startswith("layers.") else name[: -len(".weight")]
        )
        dim = 0 if short in BY_ROWS else 1 if short in BY_COLUMNS else None
        dim = embedding_dim if short == "tok_embeddings" else dim
        pieces = [weight] * parts
        if dim is not None:
            size = weight.shape[dim] // parts
            pieces = weight.split([size] * (parts - 1) + [weight.shape[dim] - size * (parts - 1)], dim=dim)
        for state, piece in zip(result, pieces, strict=True):
            state[name] = piece.clone()
    return result


def save(folder: Path, params: dict, states: list[dict], **how) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for number, state in enumerate(states):
        torch.save(state, folder / f"consolidated.{number:02d}.pth", **how)
    return folder


def frequencies(params: dict) -> torch.Tensor:
    """Radians per position of each pair: (head_dim / 2,)."""
    head_dim = params["dim"] // params["n_heads"]
    freqs = params.get("rope_theta", 10000.0) ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if params.get("use_scaled_rope"):
        factor = params.get("rope_scaling_factor", 32 if params["dim"] <= 3072 else 8)
        turns = 8192 * freqs / (2 * math.pi)  # over the old context length
        share = ((turns - 1) / (4 - 1)).clamp(0, 1)  # 4 turns and more: unchanged; 1 and fewer: scaled
        freqs = share * freqs + (1 - share) * freqs / factor
    return freqs.float()


@torch.no_grad()
def logits(weights: dict, params: dict, tokens: torch.Tensor) -> torch.Tensor:
    """tokens: (T,). Returns: (T, vocabulary)."""
    heads, length = params["n_heads"], len(tokens)
    kv_heads, head_dim = params.get("n_kv_heads", heads), params["dim"] // heads
    turn = torch.exp(1j * torch.outer(torch.arange(length), frequencies(params)))[:, None]  # (T, 1, head_dim / 2)
    mask = torch.full((length, length), -math.inf).triu(1)

    def weight(name):
        return weights[f"{name}.weight"].float()

    def norm(x, name):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * weight(name)

    def rotate(x):
        pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * turn
        return torch.stack([pairs.real, pairs.imag], dim=-1).flatten(-2)

    x = weight("tok_embeddings")[tokens]
    for layer in range(params["n_layers"]):
        at = f"layers.{layer}"
        h = norm(x, f"{at}.attention_norm")
        q, k, v = (
            (h @ weight(f"{at}.attention.w{name}").T).view(length, -1, head_dim) for name in "qkv"
        )  # (T, heads, head_dim)
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / head_dim**0.5 + mask
        h = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(length, -1)
        x = x + h @ weight(f"{at}.attention.wo").T
        h = norm(x, f"{at}.ffn_norm")
        gate = torch.nn.functional.silu(h @ weight(f"{at}.feed_forward.w1").T)
        x = x + (gate * (h @ weight(f"{at}.feed_forward.w3").T)) @ weight(f"{at}.feed_forward.w2").T
    return norm(x, "norm") @ weight("output").T
