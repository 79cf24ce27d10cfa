"""The two ways to reach vLLM, a `vllm serve` somewhere and its Python class here, and the options of both."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shlex
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..core.arguments import InferenceArguments
from ..core.command_line import shell_command
from ..core.errors import InputError
from ..lora.config import load_adapter_config
from ..models.rope import need_one_rotation, rope_overrides
from ..text.tokenizer import encode_texts
from .engine import BASE, TokenSequence
from .sampling import TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM lets --max-lora-rank be
TEMPLATE_FILE = "chat_template.jinja"
KEY_VARIABLE = "VLLM_API_KEY"  # the one that `vllm serve` itself reads
Tokens = AsyncGenerator[tuple[int, TokenLogprob | None]]
ADVICE = "need vLLM 0.11 or later"


class VllmBackend(Protocol):
    """Where tokens come from."""

    def tokens(self, sequence: TokenSequence, model: str) -> Tokens:
        """The tokens of an answer as they come, with log-probabilities where they were asked for.

        Closing it early ends the answer in vLLM. Raises: InputError for what vLLM refuses.
        """

    async def close(self) -> None:
        """Stop."""


# ---------------------------------------------------------------- options of both


def engine_options(
    args: InferenceArguments,
    config: PreTrainedConfig,
    adapters: Mapping[str, str],
    max_batch_size: int,
    context: int,
) -> dict[str, Any]:
    """What vllm.AsyncEngineArgs takes; `vllm serve` takes the same with dashes. Raises: InputError."""
    if args.only_cpu:
        raise InputError("--only_cpu: vLLM needs GPUs; use --engine llama.cpp or transformers on the CPU")
    if args.load_in_kbits == 8:
        raise InputError("--load_in_8bit: vLLM's bitsandbytes has 4 bits only; use quantize.py --method fp8 or gptq")
    options: dict[str, Any] = {"model": args.model_name_or_path}
    if args.tokenizer_name_or_path != args.model_name_or_path:
        options["tokenizer"] = args.tokenizer_name_or_path
    if args.dtype != "auto":
        options["dtype"] = args.dtype
    options |= {"max_model_len": context, "max_num_seqs": max_batch_size}
    if args.rope_scaling != "none":
        need_one_rotation(config, "vLLM")
        options["hf_overrides"] = rope_overrides(config)
    if args.load_in_kbits == 4:
        options["quantization"] = "bitsandbytes"
    if args.gpus and (count := len(args.gpus.split(","))) > 1:
        options["tensor_parallel_size"] = count
    if adapters:
        rank = max(_lora_rank(name, folder) for name, folder in adapters.items())
        if rank > LORA_RANKS[-1]:
            raise InputError(
                f"an adapter has rank {rank}, vLLM takes up to {LORA_RANKS[-1]}; merge it with run_merge.sh"
            )
        options |= {"enable_lora": True, "max_loras": len(adapters)}
        options["max_lora_rank"] = next(size for size in LORA_RANKS if size >= rank)
    return options


def _lora_rank(name: str, folder: str) -> int:
    """The largest rank in an adapter. Raises: InputError if it is more than low-rank updates of linear layers."""
    adapter = load_adapter_config(folder)
    more = [*adapter.modules_to_save, *adapter.trainable_token_indices, *(["DoRA"] if adapter.use_dora else [])]
    if more:
        base = adapter.base_model_name_or_path or "BASE"
        raise InputError(
            f"adapter {name} ({folder}) has {', '.join(more)} besides LoRA, which vLLM cannot add to a base; merge it:"
            f" {shell_command('bash', 'scripts/run_merge.sh', MODEL=base, LORA=folder)}"
        )
    return max([adapter.rank, *adapter.rank_pattern.values()])


def serve_command(
    options: Mapping[str, Any], adapters: Mapping[str, str], gpus: str | None, template: str | None
) -> str:
    """The `vllm serve` command of some engine options; a chat template is written into a file first."""
    words = ["vllm", "serve", str(options["model"]), "--host", "127.0.0.1"]
    for name, value in options.items():
        if name not in ("model", "max_num_seqs"):  # a server's own limit is its own
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [json.dumps(value) if isinstance(value, dict) else str(value)]
    if adapters:
        words += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    command = ("" if gpus is None else f"CUDA_VISIBLE_DEVICES={gpus} ") + shlex.join(words)
    if template is None:
        return command
    return f"printf %s {shlex.quote(template)} > {TEMPLATE_FILE} && {command} --chat-template {TEMPLATE_FILE}"


def sampling_settings(sequence: TokenSequence) -> dict[str, Any]:
    """A request in vLLM's names, which its Python class and its server share."""
    request, settings = sequence.request, sequence.request.settings
    found: dict[str, Any] = {
        "max_tokens": sequence.room,
        "min_tokens": min(settings.min_new_tokens, sequence.room),
        "temperature": float(settings.temperature) if settings.samples else 0.0,
        "top_k": settings.top_k,
        "top_p": float(settings.top_p),
        "min_p": float(settings.min_p),
        "repetition_penalty": float(settings.repetition_penalty),
        "presence_penalty": float(settings.presence_penalty),
        "frequency_penalty": float(settings.frequency_penalty),
        # Ours only, not those that vLLM finds in the model's files: all engines end answers by the same tokens.
        "stop_token_ids": sequence.stop_ids,
        "ignore_eos": True,
    }
    if settings.samples:
        found["seed"] = settings.seed if request.seed is None else request.seed
    if request.logit_bias:
        found["logit_bias"] = dict(request.logit_bias)
    if request.top_logprobs is not None:
        found["logprobs"] = request.top_logprobs
    return found


def _logprob(token: int, found: Mapping[int, float], count: int) -> TokenLogprob:
    """`found`: of the token and of the likeliest."""
    likeliest = sorted(found.items(), key=lambda pair: -pair[1])[:count]
    return TokenLogprob(token, found[token], tuple(likeliest))


# ---------------------------------------------------------------- a server


class VllmServer:
    """A running `vllm serve`, through its /v1/completions."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """`api_key`: what that server was started with, if anything."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client: Any = None

    def find_models(self, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, str], int]:
        """What the server calls these models, and its window in tokens. Raises: InputError if it has another model."""
        listed = self._ask("GET", "/v1/models")["data"]
        base = next((item for item in listed if not item.get("parent")), listed[0])
        served = {BASE: base["id"]} | {item["id"]: item["id"] for item in listed}
        if missing := [name for name in names if name not in served]:
            raise InputError(
                f"--vllm_url {self.url}: it serves {', '.join(item['id'] for item in listed)}, not "
                f"{', '.join(missing)}; start it with --lora-modules name=folder"
            )
        # A model of another vocabulary would take our token ids for other words, and answer fluently.
        text = "你好，今天天气怎么样？ Hello."
        ids = encode_texts(tokenizer, [text])[0]
        found = self._detokenize(base["id"], ids)
        if found is not None and found.strip() != text:
            raise InputError(
                f"--vllm_url {self.url}: its model {base['id']} has another vocabulary ({text!r} becomes {found!r}); "
                "pass the model that it serves as --base_model"
            )
        return {name: served[name] for name in names}, int(base["max_model_len"])

    def _detokenize(self, model: str, ids: Sequence[int]) -> str | None:
        """The text of token ids by vLLM's tokenizer; None if this server does not tell."""
        with contextlib.suppress(InputError):
            return str(self._ask("POST", "/detokenize", {"model": model, "tokens": list(ids)})["prompt"])
        return None

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        import httpx

        try:
            response = httpx.request(method, self.url + path, json=body, headers=self._headers, timeout=10)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise InputError(f"--vllm_url {self.url}: no vLLM server answers there ({error})") from None
        if response.status_code == 401:
            raise InputError(f"--vllm_url {self.url}: it wants a key; set {KEY_VARIABLE} to what it was started with")
        if response.status_code != 200:
            raise InputError(f"--vllm_url {self.url}{path}: {_complaint(response)}")
        return response.json()

    async def tokens(self, sequence: TokenSequence, model: str) -> Tokens:
        import httpx

        if self._client is None:
            limits = httpx.Limits(max_connections=None)
            timeout = httpx.Timeout(10, read=None, pool=None)  # the first token may wait for other requests
            self._client = httpx.AsyncClient(headers=self._headers, limits=limits, timeout=timeout)
        body = {"model": model, "prompt": list(sequence.request.prompt), "stream": True, "return_token_ids": True}
        body |= sampling_settings(sequence)
        body["return_tokens_as_token_ids"] = True  # in log-probabilities
        async with self._client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                # The server refuses this request, or it is the server that fails.
                kind = InputError if response.status_code in (400, 404, 413, 422) else RuntimeError
                raise kind(f"vLLM: {_complaint(response)}")
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                chunk = json.loads(line.removeprefix("data:"))
                if "error" in chunk:
                    raise RuntimeError(f"vLLM: {chunk['error'].get('message', chunk['error'])}")
                for choice in chunk["choices"]:
                    for pair in _choice_tokens(choice, sequence.request.top_logprobs):
                        yield pair

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()


def _complaint(response: Any) -> str:
    try:
        content = response.json()
        error = content.get("error", content)
        return str(error.get("message", error))
    except (ValueError, AttributeError):
        return f"status {response.status_code}: {response.text[:200]}"


def _choice_tokens(choice: Mapping[str, Any], top_logprobs: int | None) -> list[tuple[int, TokenLogprob | None]]:
    ids = choice.get("token_ids")
    if ids is None:
        if choice.get("text"):
            raise InputError(f"vLLM's answers come without token_ids; {ADVICE}")
        return []
    if top_logprobs is None or not ids:
        return [(token, None) for token in ids]
    # Keys are "token_id:123"; the chosen token is put in, should it not be among the likeliest.
    rows = choice["logprobs"]["top_logprobs"]
    found = [{int(name.rpartition(":")[2]): value for name, value in row.items()} for row in rows]
    for token, row, value in zip(ids, found, choice["logprobs"]["token_logprobs"], strict=True):
        row[token] = value
    return [(token, _logprob(token, row, top_logprobs)) for token, row in zip(ids, found, strict=True)]


# ---------------------------------------------------------------- the library


def is_installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


class VllmLibrary:
    """vLLM within this process (its model runs in processes of its own)."""

    def __init__(self, options: Mapping[str, Any], adapters: Mapping[str, str]) -> None:
        """`options`: of vllm.AsyncEngineArgs; `adapters`: folders by name."""
        import vllm
        from vllm.lora.request import LoRARequest

        self._vllm: Any = vllm
        # Prompts and answers are token ids: its own tokenizer would only cost memory and start-up.
        arguments = vllm.AsyncEngineArgs(**options, skip_tokenizer_init=True)
        self._engine = vllm.AsyncLLMEngine.from_engine_args(arguments)
        self._adapters = {
            name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(adapters.items(), 1)
        }

    async def tokens(self, sequence: TokenSequence, model: str) -> Tokens:
        from vllm.sampling_params import RequestOutputKind

        count = sequence.request.top_logprobs
        try:
            settings = self._vllm.SamplingParams(
                **sampling_settings(sequence), detokenize=False, output_kind=RequestOutputKind.DELTA
            )
            outputs = self._engine.generate(
                self._vllm.TokensPrompt(prompt_token_ids=list(sequence.request.prompt)),
                settings,
                request_id=uuid.uuid4().hex,
                lora_request=self._adapters.get(model),
            )
            async with contextlib.aclosing(outputs):  # leaving early must end the answer in vLLM too
                async for output in outputs:
                    sequence.answer.num_cached_tokens = output.num_cached_tokens or sequence.answer.num_cached_tokens
                    piece = output.outputs[0]
                    for number, token in enumerate(piece.token_ids):
                        found = None
                        if count is not None:
                            row = {index: item.logprob for index, item in piece.logprobs[number].items()}
                            found = _logprob(token, row, count)
                        yield token, found
        except ValueError as error:  # what vLLM calls bad input
            raise InputError(f"vLLM: {error}") from None

    async def close(self) -> None:
        self._engine.shutdown()
