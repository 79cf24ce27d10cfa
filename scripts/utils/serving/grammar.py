"""Grammars: answers that are JSON, or follow a JSON schema, token by token (through llguidance)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..text.tokenizer import encode_surface, token_surfaces

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# One space at most between JSON's parts: free white space lets a weak model write it until its tokens are spent.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Text that cannot be taken for JSON.
_TEXT = "text: /[ \\n]*[^ \\n{](.|\\n)*/\n"

JSON_OBJECT: dict[str, Any] = {"type": "object"}
MAX_CHARACTERS = 64_000  # of schemas in one grammar; compiling takes up to a second for as many


class Grammars:
    """Makes constraints for one tokenizer; its tables take a second for large vocabularies."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        """`stop_ids`: the tokens that end an answer; where there is none, an answer ends at its longest."""
        from llguidance import LLTokenizer, TokenizerWrapper

        surfaces = token_surfaces(tokenizer)
        self._size, self._stop_ids = len(surfaces), [index for index in stop_ids if index < len(surfaces)]
        vocabulary = _Vocabulary(tokenizer, surfaces, self._stop_ids[0] if self._stop_ids else 0)
        self._tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=self._stop_ids or None)

    def json(self, *forms: tuple[str, dict[str, Any], str], or_text: bool = False) -> JsonConstraint:
        """Only JSON of one of these forms, with `or_text` also any text that does not begin with a brace.

        Args: forms: what stands before a value, the value's JSON schema, what stands after.
        Raises: InputError if a schema is broken or asks for what cannot be held.
        """
        from llguidance import LLMatcher, LLParserLimits

        names = [f"json_{number}" for number in range(len(forms))]
        written = [f"{_quote(form[0])} @{name} {_quote(form[2])}" for form, name in zip(forms, names, strict=True)]
        # An answer's first token may carry the space that sentencepiece puts before words; the text has it stripped.
        lark = f'start: {"text | " if or_text else ""}" "? json\njson: {" | ".join(written)}\n'
        grammars: list[dict[str, Any]] = [{"name": "answer", "lark_grammar": lark + (_TEXT if or_text else "")}]
        for name, (_, schema, _) in zip(names, forms, strict=True):
            grammars.append({"name": name, "json_schema": {**schema, "x-guidance": _STYLE}})
        try:
            text = json.dumps({"grammars": grammars})
        except RecursionError:
            raise InputError("the JSON schema cannot be followed: it is nested too deeply") from None
        if len(text) > MAX_CHARACTERS:
            raise InputError(
                f"the JSON schema cannot be followed: it has {len(text)} characters, {MAX_CHARACTERS} at most are read"
            )
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, text, limits=limits, log_level=0)
        if matcher.is_error():
            raise InputError(f"the JSON schema cannot be followed: {matcher.get_error().strip()[:500]}")
        return JsonConstraint(matcher, self._size, self._stop_ids)


def _quote(text: str) -> str:
    return json.dumps(text) if text else ""


class JsonConstraint:
    """What may come next in one answer; see utils.generation.sampling.Constraint."""

    def __init__(self, matcher: LLMatcher, size: int, stop_ids: Sequence[int]) -> None:
        self._matcher, self._size, self._stop_ids = matcher, size, stop_ids
        self._only_stop = torch.zeros(size, dtype=torch.bool)
        self._only_stop[list(stop_ids)] = True

    def copy(self) -> JsonConstraint:
        """The same for another answer, without compiling anew; before either has begun."""
        return JsonConstraint(self._matcher.deep_copy(), self._size, self._stop_ids)

    def allowed(self) -> Tensor:
        """Which tokens may come now, (V,) bool."""
        if self._matcher.is_stopped():  # complete, or an error of the library, which would last
            return self._only_stop
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[: self._size] > 0
        if self._matcher.is_error():
            logger.warning("an answer's grammar gave up: %s", self._matcher.get_error().strip()[:500])
            return self._only_stop
        return mask

    def advance(self, token_id: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token_id)


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, surfaces: Sequence[bytes], end: int) -> None:
        self.eos_token_id, self.tokens = end, surfaces
        self.special_token_ids = [index for index, surface in enumerate(surfaces) if not surface]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return encode_surface(self._tokenizer, text)
