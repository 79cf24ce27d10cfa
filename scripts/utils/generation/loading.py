"""Inference: the files of the model that is to answer, whether they belong together, and loading it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.arguments import SAMPLING_DEFAULTS, GenerationArguments, InferenceArguments, SpeculationArguments
from ..core.errors import InputError
from ..gguf.metadata import read_sampling
from ..lora.adapter_folder import load_with_peft, names_experts, read_adapter
from ..lora.config import load_adapter_config
from ..models.loading import bf16_is_supported, load_model
from ..models.rope import find_row_rotary, install_row_rotary, rope_overrides, scale_rope
from ..text.prompts import OWN_TEMPLATE, resolve_template, template_name
from ..text.tokenizer import check_embedding_rows, choose_tokenizer, has_tokenizer, load_tokenizer
from ..weights.config import expert_count, local_folder
from ..weights.generation_config import named_end_ids, named_sampling
from ..weights.model_folder import read_model
from .drafts import EarlyExitDraft, ModelDraft, PromptLookup, RetokenizedDraft, same_vocabulary
from .engine import Engine, Prompter
from .llamacpp_engine import GgufFile
from .prepacking import prepack
from .speculation import Speculation
from .transformers_engine import TransformersEngine
from .vllm_engine import load_vllm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def find_inference_files(args: InferenceArguments) -> InferenceArguments:
    """The arguments with folders filled in: the base an adapter records, the tokenizer of the adapter or the base.

    Raises: InputError if one of them is not there.
    """
    if "," in (args.adapter_name_or_path or ""):
        raise InputError(
            f"--lora_model {args.adapter_name_or_path}: one adapter can be used here; merge several first"
        )
    adapter = str(local_folder(args.adapter_name_or_path, "adapter")) if args.adapter_name_or_path else None
    recorded = load_adapter_config(adapter).base_model_name_or_path if adapter else None
    if not (args.model_name_or_path or recorded):
        raise InputError("pass --base_model: a model folder or hub id")
    base = str(local_folder(args.model_name_or_path or recorded or ""))
    return dataclasses.replace(
        args,
        model_name_or_path=base,
        adapter_name_or_path=adapter,
        tokenizer_name_or_path=args.tokenizer_name_or_path or choose_tokenizer(adapter, base),
    )


def answering_folders(args: InferenceArguments) -> list[Path]:
    """The folders of find_inference_files as weights.generation_config takes them."""
    return [Path(name) for name in (args.adapter_name_or_path, args.model_name_or_path) if name is not None]


def check_inference_request(args: InferenceArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Find, before weights are read, whether base, adapter and tokenizer belong together; `args` has its folders.

    Returns: the config; its vocab_size counts the rows that an adapter adds, its window is the one asked for.
    Raises: InputError.
    """
    assert args.model_name_or_path is not None
    base = read_model(args.model_name_or_path)
    config = base.config
    scale_rope(config, args)
    old_rows = config.vocab_size
    if args.adapter_name_or_path:
        config.vocab_size = read_adapter(args.adapter_name_or_path, base).rows or old_rows
    check_tokenizer(tokenizer, config.vocab_size, old_rows, args.adapter_name_or_path)
    return config


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, old_rows: int, adapter: str | None) -> None:
    """Raises: InputError unless `rows` embeddings, grown by an adapter from `old_rows`, are this tokenizer's."""
    owner = f"adapter's embeddings have {rows} rows (the base has {old_rows})" if adapter else f"model has {rows} rows"
    remedy = f"pass --tokenizer_path {adapter}, or the" if adapter else "pass the model's own --tokenizer_path, or the"
    mismatch = f"the tokenizer has {len(tokenizer)} tokens but the {owner}"
    check_embedding_rows(
        tokenizer,
        rows,
        f"{mismatch}: they come from different runs; {remedy} {'adapter' if adapter else 'model'} that was "
        "trained with this tokenizer",
        old_rows,
        f"{mismatch}: it is the tokenizer from before the vocabulary grew; {remedy} folder of the trained tokenizer",
    )


def load_for_inference(
    args: InferenceArguments, config: PreTrainedConfig, adapters: Mapping[str, str] | None = None
) -> Any:
    """The model, ready to answer: 16-bit or k-bit weights, the adapter with its grown vocabulary, no dropout.

    Args:
        args: with the folders of find_inference_files.
        config: what check_inference_request returned.
        adapters: folders of further adapters by name; with them the result is a PeftModel that has them.
    """
    from transformers import GenerationConfig

    device_map: Any = {"": "cpu"}
    if torch.cuda.is_available() and not args.only_cpu:
        device_map = "auto" if torch.cuda.device_count() > 1 else {"": 0}
    compute_dtype = torch.bfloat16 if bf16_is_supported() else torch.float32
    if args.dtype != "auto":
        compute_dtype = getattr(torch, args.dtype)
    elif compute_dtype == torch.float32 and torch.cuda.is_available():  # older GPUs; CPUs are slow in float16
        compute_dtype = torch.float16
    named = [*([args.adapter_name_or_path] if args.adapter_name_or_path else []), *(adapters or {}).values()]
    single = expert_count(config) > 0 and adapts_single_experts(named, args.load_in_kbits)
    model = load_model(args, compute_dtype, device_map, adapts_experts=single, **rope_overrides(config))
    if args.adapter_name_or_path:
        if config.vocab_size > model.get_input_embeddings().weight.shape[0]:
            # The adapter brings the values of the new rows, so none have to be made up.
            model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        model = _add_adapter(model, args.adapter_name_or_path)
    if auto_ntk := getattr(config, "auto_ntk", None):
        model.config.auto_ntk = auto_ntk
        install_row_rotary(model)
    if args.torch_compile:
        compile_layers(model)
    # What the model's own file says about sampling would mix with the settings asked for.
    model.generation_config = GenerationConfig()
    if adapters:
        return _wrap(model, adapters).eval()
    return model.eval()


def load_for_decoding(
    what: str, args: InferenceArguments, config: PreTrainedConfig, adapters: Mapping[str, str] | None = None
) -> Any:
    """The model of load_for_inference, made fast at tokens that come one by one; the log calls it `what`.

    Its weights are no longer there to be read, as likelihoods in chunks would.
    """
    start = time.perf_counter()
    model = load_for_inference(args, config, adapters)
    logger.info(
        "%s loaded in %.1f s: %.3g parameters, %s on %s",
        *(what, time.perf_counter() - start, model.num_parameters(), model.dtype, model.device),
    )
    prepack(model, compiled=args.torch_compile)
    return model


def adapts_single_experts(adapters: Sequence[str], kbits: int) -> bool:
    """Whether these adapters of a mixture need its experts as linear layers.

    Raises: InputError if some need them otherwise.
    """
    single = [name for name in adapters if names_experts(name)]
    stacked = [name for name in adapters if not names_experts(name, True)]
    if stacked and (single or kbits != 16):
        asked = f"{single[0]} one by one" if single else f"{kbits} bits need them one by one"
        raise InputError(
            f"adapter {stacked[0]} holds a layer's experts in stacks, {asked}: merge one of them into its base first, "
            f"with run_merge.sh"
        )
    return bool(single)


def compile_layers(model: PreTrainedModel) -> None:
    """Let torch.compile fuse what stands around attention in every layer: the norms, and the experts or the MLP.

    Attention itself reads a cache whose shape changes with every pass, which would be compiled anew each time.
    """
    for layer in model.get_decoder().layers:
        for name, part in layer.named_children():
            if name != "self_attn":
                part.compile(dynamic=True)


def _add_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with the adapter's layers in it, in the model's own precision."""
    inner: PreTrainedModel = _wrap(model, {"default": adapter}).get_base_model()
    return inner


def _wrap(model: PreTrainedModel, adapters: Mapping[str, str]) -> Any:
    """A PeftModel with these adapters, by name, in the model's own precision."""
    dtype = model.dtype
    wrapped = load_with_peft(model, adapters, torch_device=str(model.device))
    # PEFT keeps float32 for training; here each pass would convert.
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or ".modules_to_save." in name or "token_adapter" in name:
            parameter.data = parameter.data.to(dtype)
    return wrapped


class EnginePlan(Prompter):
    """An engine whose weights are not read yet: prompts can be written and checked.

    Attributes:
        args: with the folders that were found.
        template_name: of the chat template; None for plain text.
        own_sampling: settings that the model's own files ask for, see complete_settings.
    """

    def __init__(
        self, args: InferenceArguments, chat: bool = True, speculation: SpeculationArguments | None = None
    ) -> None:
        """
        Args:
            chat: questions are put into a template.
            speculation: what drafts, if anything does.
        Raises: InputError if the files do not belong together.
        """
        drafts = speculation is not None and speculation.drafts
        if drafts and args.engine != "transformers":
            raise InputError(f"--engine {args.engine} has no speculative decoding here; use --engine transformers")
        context: int | None
        self._gguf = GgufFile(args) if args.engine == "llama.cpp" else None
        self.args, self._drafts = args, None
        if self._gguf:
            tokenizer, context = self._gguf.tokenizer, self._gguf.context
            end_ids, self.own_sampling = list[int](), read_sampling(self._gguf.metadata, self._gguf.path.name)
        else:
            self.args = find_inference_files(args)
            folders = answering_folders(self.args)
            end_ids, self.own_sampling = named_end_ids(folders), named_sampling(folders)
            assert self.args.tokenizer_name_or_path is not None
            tokenizer = load_tokenizer(self.args.tokenizer_name_or_path)
            self.config: PreTrainedConfig = check_inference_request(self.args, tokenizer)
            context = getattr(self.config, "max_position_embeddings", None)
            if speculation and drafts:
                self._drafts = DraftPlan(speculation, self.args, tokenizer, self.config)
        self.template_name = template_name(args.prompt_template, tokenizer) if chat else None
        template = resolve_template(self.template_name, tokenizer) if self.template_name else None
        super().__init__(tokenizer, template, context, end_ids)
        if self.template_name:
            named = "the tokenizer's own" if self.template_name == OWN_TEMPLATE else self.template_name
            logger.info("prompt template: %s", named)

    def complete_settings(self, settings: GenerationArguments) -> GenerationArguments:
        """The settings, with the model's own where nobody asked for others; the log says which."""
        completed = settings.with_model_defaults(self.own_sampling)
        sources: dict[str, list[str]] = {"flags": [], "the model's own files": [], "defaults": []}
        for name in SAMPLING_DEFAULTS:
            left = name in settings.given
            source = "flags" if not left else "the model's own files" if self.own_sampling else "defaults"
            sources[source].append(f"{name} {getattr(completed, name)}")
        found = [f"{', '.join(values)} ({source})" for source, values in sources.items() if values]
        logger.info("sampling: %s", "; ".join(found))
        return completed

    def load(
        self, max_batch_size: int = 8, context: int | None = None, adapters: Mapping[str, str] | None = None
    ) -> Engine:
        """Read the weights.

        Args:
            max_batch_size: requests answered at once.
            context: tokens of prompt and answer together, at most the model's own.
            adapters: folders of adapters by the names of the models they make, beside the model itself.
        Raises: InputError if an adapter does not belong to the base and its tokenizer.
        """
        if self._gguf:
            if adapters:
                raise InputError("--lora_models: a GGUF file holds one model; export each adapter with export_gguf.py")
            return self._gguf.load(self.template, max_batch_size, context)
        if adapters and self.args.adapter_name_or_path:
            raise InputError("--lora_model is part of the model itself; name it among --lora_models instead")
        for name, folder in (adapters or {}).items():
            # All adapters share one embedding, so none may bring rows of its own.
            grown = check_inference_request(replace(self.args, adapter_name_or_path=folder), self.tokenizer)
            if grown.vocab_size != self.config.vocab_size:
                raise InputError(f"adapter {name} ({folder}) brings rows of its own; merge it with run_merge.sh")
        if self.args.engine == "vllm":
            return load_vllm(
                self,
                self.template_name,
                self.args,
                self.config,
                max_batch_size=max_batch_size,
                context=context,
                adapters=adapters,
                url=self.args.vllm_url,
            )
        model = load_for_decoding("model", self.args, self.config, adapters)
        return TransformersEngine(
            model,
            self.tokenizer,
            self.template,
            max_batch_size=max_batch_size,
            context=context,
            adapters=list(adapters or ()),
            speculation=self._drafts.load() if self._drafts else None,
            request_rope=find_row_rotary(model),
            end_ids=self.stop_ids,
        )


class DraftPlan:
    """What is to draft, before its weights are read."""

    def __init__(
        self,
        speculation: SpeculationArguments,
        args: InferenceArguments,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
    ) -> None:
        """
        Args:
            args, tokenizer, config: those of the model that checks, from utils.generation.loading.
        Raises: InputError if the model cannot be drafted for in this way.
        """
        self._speculation, self._own_tokenizer = speculation, tokenizer
        layers = speculation.draft_layers
        if layers is not None and layers >= config.num_hidden_layers:
            raise InputError(
                f"--draft_layers {layers}: the model has {config.num_hidden_layers} layers; need fewer, such as "
                f"{max(1, config.num_hidden_layers // 8)}"
            )
        self._args: InferenceArguments | None = None
        if speculation.draft_base_model or speculation.draft_lora_model:
            self._plan_model(args)

    def _plan_model(self, args: InferenceArguments) -> None:
        speculation = self._speculation
        found = find_inference_files(
            replace(
                args,
                model_name_or_path=speculation.draft_base_model,
                adapter_name_or_path=speculation.draft_lora_model,
                tokenizer_name_or_path=None,
                load_in_kbits=16,
                load_in_8bit=speculation.draft_model_load_in_8bit,
                load_in_4bit=speculation.draft_model_load_in_4bit,
            )
        )
        assert found.tokenizer_name_or_path is not None
        # A draft cut out of the model itself often comes without a tokenizer.
        if has_tokenizer(local_folder(found.tokenizer_name_or_path)):
            self._tokenizer = load_tokenizer(found.tokenizer_name_or_path)
        else:
            self._tokenizer = self._own_tokenizer
        try:
            self._config = check_inference_request(found, self._tokenizer)
        except InputError as error:
            raise InputError(f"the draft model: {error}") from None
        self._args = found

    def load(self) -> Speculation:
        """Read the weights of what drafts, if it has any of its own."""
        speculation = self._speculation
        if self._args is not None:
            model = load_for_decoding("draft model", self._args, self._config)
            if same_vocabulary(self._tokenizer, self._own_tokenizer):
                return Speculation(partial(ModelDraft, model), speculation.draft_k)
            logger.info("the draft model has another vocabulary: its text is cut into tokens anew")
            make_draft = partial(RetokenizedDraft, model, self._tokenizer, self._own_tokenizer)
            return Speculation(make_draft, speculation.draft_k)
        if speculation.draft_layers is not None:
            return Speculation(partial(EarlyExitDraft, speculation.draft_layers), speculation.draft_k)
        return Speculation(PromptLookup, speculation.draft_k)
