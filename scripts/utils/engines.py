"""Engines: which one answers, whether its files belong together, and loading it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .arguments import InferenceArguments, SpeculationArguments
from .drafts import DraftPlan
from .files import InputError
from .generation import Engine, Prompter
from .inference import check_inference_request, find_inference_files, load_for_inference
from .llamacpp_engine import GgufFile
from .prompts import OWN_TEMPLATE, resolve_template, template_name
from .rope import find_row_rotary
from .tokenization import load_tokenizer
from .transformers_engine import TransformersEngine
from .vllm_engine import load_vllm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


class EnginePlan(Prompter):
    """An engine whose weights are not read yet: prompts can be written and checked.

    Attributes:
        args: with the folders that were found.
        template_name: of the chat template; None for plain text.
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
        else:
            self.args = find_inference_files(args)
            assert self.args.tokenizer_name_or_path is not None
            tokenizer = load_tokenizer(self.args.tokenizer_name_or_path)
            self.config: PreTrainedConfig = check_inference_request(self.args, tokenizer)
            context = getattr(self.config, "max_position_embeddings", None)
            if speculation and drafts:
                self._drafts = DraftPlan(speculation, self.args, tokenizer, self.config)
        self.template_name = template_name(args.prompt_template, tokenizer) if chat else None
        template = resolve_template(self.template_name, tokenizer) if self.template_name else None
        super().__init__(tokenizer, template, context)
        if self.template_name:
            named = "the tokenizer's own" if self.template_name == OWN_TEMPLATE else self.template_name
            logger.info("prompt template: %s", named)

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
        start = time.perf_counter()
        model = load_for_inference(self.args, self.config, adapters)
        logger.info(
            "model loaded in %.1f s: %.3g parameters, %s on %s",
            *(time.perf_counter() - start, model.num_parameters(), model.dtype, model.device),
        )
        return TransformersEngine(
            model,
            self.tokenizer,
            self.template,
            max_batch_size=max_batch_size,
            context=context,
            adapters=list(adapters or ()),
            speculation=self._drafts.load() if self._drafts else None,
            rotations=find_row_rotary(model),
        )
