"""Reward models: a backbone with a scalar head, read at an answer's last token; loading one, and scoring with it.

In files and in memory it is transformers' <Family>ForSequenceClassification with one label, its head `score` without a
bias. Its own pooling reads the rightmost token that is not config.pad_token_id, so that id must be one that no answer
ends with; set_pad_token sees to it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.arguments import LoraArguments, ModelArguments
from ..core.errors import InputError
from ..core.files import read_json
from ..core.hub import find_folder
from ..lora.adapter_folder import load_with_peft, names_experts, read_adapter
from ..lora.config import load_adapter_config
from ..models.gathering import gathered_weights
from ..models.loading import bf16_is_supported, check_loading, load_model
from ..models.training_model import check_bits, check_experts, check_modules, convert_at_borders, warn_beyond_window
from ..text.prompts import OWN_TEMPLATE, resolve_template, stop_token_ids
from ..text.tokenizer import check_embedding_rows, load_tokenizer
from ..weights.config import load_config, local_folder
from ..weights.model_folder import REWARD_MODEL, is_classifier, read_model
from ..weights.names import ADAPTER_CONFIG, SCORE
from ..weights.reader import open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TASK_TYPE = "SEQ_CLS"  # PEFT's name for such models


# ---------------------------------------------------------------- the head


class ScoreHead(nn.Linear):
    """A `score` head that, while `places` is set, scores only those positions, in float32.

    The scores pass through the model's own forward, where DeepSpeed ZeRO-3 and FSDP have gathered the weight: what the
    head returns is the same at every position of a row, so whichever one the model then takes is right.
    """

    places: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """input (B, T, H) -> scores (B, T, 1), or (B, T, n) where `places` names n positions of each row."""
        if self.places is None:
            return super().forward(input)
        rows, length, width = input.shape
        hidden = input.reshape(-1, width)[self.places]
        with torch.autocast(input.device.type, enabled=False):
            # Two answers often differ by less than bfloat16 tells apart.
            scores = nn.functional.linear(hidden.float(), self.weight.float())
        return scores.view(rows, 1, -1).expand(rows, length, -1)


def install_score_head(model: PreTrainedModel) -> None:
    """Replace the model's `score` by a ScoreHead that shares its weight. Raises: InputError if it has none."""
    head: Any = getattr(model, "score", None)
    if type(head) is not nn.Linear or head.bias is not None or head.out_features != 1:
        raise InputError(f"{type(model).__name__} has no plain scalar head 'score'; need a Llama-family model")
    replacement = ScoreHead(head.in_features, 1, bias=False, device="meta")
    replacement.weight = head.weight
    model.score = replacement


@contextlib.contextmanager
def score_places(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Within the block, the model's logits are the scores at `places` of the flattened (B * T,) positions.

    Args: places: (B * n,), n for each row, row after row. Logits are (B, n) float32.
    """
    heads = [module for module in model.modules() if isinstance(module, ScoreHead)]
    assert heads, "install_score_head comes first"
    for head in heads:
        head.places = places
    try:
        yield
    finally:
        for head in heads:
            head.places = None


@torch.no_grad()
def initialise_head(weight: nn.Parameter, seed: int) -> None:
    """Set a head's weight (1, H) to normal numbers of variance 1 / (H + 1), the same for a seed on every machine.

    Source: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix B.1.
    """
    generator = torch.Generator().manual_seed(seed)
    with gathered_weights([weight]):
        weight.copy_(torch.randn(weight.shape, generator=generator) / (weight.shape[-1] + 1) ** 0.5)


# ---------------------------------------------------------------- tokenizers


def set_pad_token(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give the tokenizer a padding token that no answer ends with, unless it has one.

    Raises: InputError if it has no special token for that.
    """
    stops = stop_token_ids(template, tokenizer)
    candidates = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]
    candidates += [index for index, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    chosen = next((index for index in candidates if index is not None and index not in stops), None)
    if chosen is None:
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} has no special token but those that end an answer "
            f"({', '.join(map(str, tokenizer.convert_ids_to_tokens(stops)))}), and a reward model needs one for "
            "padding; add one, for instance <pad>"
        )
    if chosen != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
        logger.info("padding token of the reward model: %s (%d)", tokenizer.pad_token, chosen)


def check_same_tokenizer(reward_tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: InputError unless every id is the same token in both, naming the first that is not."""
    sizes = len(reward_tokenizer), len(policy_tokenizer)
    ours, theirs = (
        tokenizer.convert_ids_to_tokens(list(range(size)))
        for tokenizer, size in zip((reward_tokenizer, policy_tokenizer), sizes, strict=True)
    )
    for index in range(max(sizes)):
        one, other = (tokens[index] if index < len(tokens) else None for tokens in (ours, theirs))
        if one != other:
            raise InputError(
                f"token {index} is {one!r} in the reward model's tokenizer ({reward_tokenizer.name_or_path}, "
                f"{sizes[0]} tokens) but {other!r} in the policy's ({policy_tokenizer.name_or_path}, {sizes[1]} "
                "tokens); train the reward model from the policy's own base with rm.py"
            )


# ---------------------------------------------------------------- loading


def adapter_task(folder: str | Path) -> str | None:
    """The task_type of an adapter's config; TASK_TYPE for reward models."""
    task: str | None = read_json((find_folder(folder) or Path(folder)) / ADAPTER_CONFIG).get("task_type")
    return task


def check_reward_request(
    model_args: ModelArguments, lora_args: LoraArguments, tokenizer: PreTrainedTokenizerBase, length: int = 0
) -> None:
    """Find, before data is read, what would fail once weights are loaded.

    Args: length: the longest pair in tokens, as check_training_request has it.
    Raises: InputError.
    """
    check_loading(model_args)
    if not model_args.model_name_or_path:
        raise InputError("pass --model_name_or_path: the tuned model that the reward model starts from")
    base = read_model(model_args.model_name_or_path, REWARD_MODEL)
    config = base.config
    warn_beyond_window(config, length)
    check_modules(lora_args, config, REWARD_MODEL, num_labels=1)
    if lora_args.output_router_logits:
        raise InputError("--output_router_logits: a reward model has no balancing loss; leave it out")
    check_experts(model_args, lora_args, base)
    if is_classifier(config) and config.num_labels != 1:
        raise InputError(
            f"{model_args.model_name_or_path} is a classifier with {config.num_labels} labels; a reward model has one"
        )
    check_embedding_rows(
        tokenizer,
        config.vocab_size,
        f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size} embedding rows; merge the "
        "adapter that brings the new rows first, or pass the model's own tokenizer",
    )
    check_bits(model_args, lora_args)
    if adapter := lora_args.adapter_name_or_path:
        if adapter_task(adapter) != TASK_TYPE:
            raise InputError(
                f"--adapter_name_or_path {adapter} is no reward model (task_type {adapter_task(adapter)}): merge it "
                "into its base with run_merge.sh and pass the result as --model_name_or_path"
            )
        read_adapter(adapter, base, reward_model=True)


def load_classifier(
    args: ModelArguments,
    compute_dtype: torch.dtype,
    pad_token_id: int | None,
    seed: int = 0,
    device_map: Any = None,
    adapts_experts: bool = False,
) -> PreTrainedModel:
    """Load a model with a ScoreHead; the backbone of a language model gets a new one. Raises: InputError.

    Args: adapts_experts: as load_model has it.
    """
    assert args.model_name_or_path is not None
    new_head = not is_classifier(load_config(args.model_name_or_path))
    model = load_model(
        args, compute_dtype, device_map, REWARD_MODEL, adapts_experts, num_labels=1, pad_token_id=pad_token_id
    )
    install_score_head(model)
    if new_head:
        initialise_head(model.score.weight, seed)
    return model


def find_reward_model(folder: str | Path) -> tuple[Path, Path | None]:
    """(folder of the base or of the complete model, folder of the adapter or None). Raises: InputError."""
    path = local_folder(str(folder))
    if not (path / ADAPTER_CONFIG).is_file():
        if not is_classifier(load_config(str(path))) or open_checkpoint(path).shapes.get(SCORE, (0,))[0] != 1:
            raise InputError(
                f"{path} is no reward model: it has no scalar head ({SCORE}); train one with rm.py, or pass its folder"
            )
        return path, None
    adapter = load_adapter_config(path)
    if adapter_task(path) != TASK_TYPE or not any(name.endswith(SCORE) for name in open_checkpoint(path).shapes):
        raise InputError(f"adapter {path} is no reward model: it has no scalar head ({SCORE}); train one with rm.py")
    return local_folder(adapter.base_model_name_or_path), path


class RewardModel:
    """A trained reward model that scores answers.

    Attributes:
        model: transformers' classification model, or a PEFT model around it, in evaluation mode and frozen.
        template: the chat template it was trained with.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        batch_size: int = 8,
        progress: Callable[[int], Any] | None = None,
    ) -> Tensor:
        """Scores of (prompt ids, answer ids), each read at the answer's last token.

        Args:
            batch_size: sequences of a forward pass; those of about the same length go together.
            progress: told the number of sequences of every finished batch.
        Returns: (N,) float32 on the CPU, in the order given.
        Raises: InputError for an empty answer.
        """
        for number, (_, answer) in enumerate(sequences):
            if not len(answer):
                raise InputError(f"answer {number} has no tokens; a score is read at an answer's last token")
        lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in sequences], dtype=torch.int64)
        order = torch.argsort(lengths, descending=True, stable=True)  # the longest first: a lack of memory shows
        scores = torch.empty(len(sequences), dtype=torch.float32)
        device = next(self.model.parameters()).device
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            length = int(lengths[numbers].max())
            ids = torch.full((len(numbers), length), int(self.tokenizer.pad_token_id or 0), dtype=torch.int64)
            for row, number in enumerate(numbers.tolist()):
                prompt, answer = sequences[number]
                ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            places = torch.arange(len(numbers)) * length + lengths[numbers] - 1
            # Causal attention does not see the padding behind an answer, so no mask is needed.
            positions = torch.arange(length).expand(len(numbers), -1)
            with score_places(self.model, places.to(device)):
                output = self.model(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False)
            scores[numbers] = output.logits[:, 0].float().cpu()
            if progress is not None:
                progress(len(numbers))
        return scores


def load_reward_model(
    folder: str | Path,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    load_in_kbits: int = 16,
    attn_implementation: str = "auto",
    base: str | None = None,
) -> RewardModel:
    """Load what rm.py saved: a complete model, or an adapter with its head, onto the base that it records.

    Args:
        dtype: of the backbone's weights: auto (as stored), bfloat16, float16, float32.
        device: default: the GPU, if there is one.
        base: where the adapter's base lies now; default: where it lay in training.
    Raises: InputError if the folder holds no reward model.
    """
    found, adapter = find_reward_model(folder)
    source = adapter or found
    tokenizer = load_tokenizer(source)
    template = resolve_template(OWN_TEMPLATE, tokenizer)
    place = str(device) if device is not None else "cuda:0" if torch.cuda.is_available() else "cpu"
    place = "cpu" if place.startswith("cpu") else place  # safetensors does not know cpu:0
    args = ModelArguments(
        model_name_or_path=str(local_folder(base) if base and adapter else found),
        dtype=dtype,  # type: ignore[arg-type]
        load_in_kbits=load_in_kbits,  # type: ignore[arg-type]
        attn_implementation=attn_implementation,  # type: ignore[arg-type]
    )
    if adapter:
        read_adapter(str(adapter), read_model(str(args.model_name_or_path), REWARD_MODEL), reward_model=True)
    auto = torch.bfloat16 if bf16_is_supported() else torch.float32
    compute_dtype = auto if dtype == "auto" else getattr(torch, dtype)
    pad_token_id = tokenizer.pad_token_id if adapter else load_config(str(found)).pad_token_id
    single = adapter is not None and names_experts(str(adapter))
    if load_in_kbits == 16:
        model: Any = load_classifier(args, compute_dtype, pad_token_id, adapts_experts=single).to(place)
    else:
        model = load_classifier(args, compute_dtype, pad_token_id, device_map={"": place})
    if adapter:
        model = load_with_peft(model, {"default": str(adapter)}, torch_device=place)
        convert_at_borders(model)
    return RewardModel(model.eval().requires_grad_(False), tokenizer, template)
