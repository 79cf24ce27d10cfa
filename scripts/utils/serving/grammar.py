"""Grammars: answers that are JSON, or follow a JSON schema, token by token (through llguidance)."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..text.tokenizer import encode_surface, token_surfaces
from ..text.tool_calls import CallForm, call_forms

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
        added = tokenizer.added_tokens_decoder.items()
        self._specials = {token.content: index for index, token in added if not surfaces[index]}
        vocabulary = _Vocabulary(tokenizer, surfaces, self._stop_ids[0] if self._stop_ids else 0)
        self._tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=self._stop_ids or None)

    def json(self, schema: dict[str, Any]) -> JsonConstraint:
        """Only JSON that follows a schema. Raises: InputError if it is broken or asks for what cannot be held."""
        return self._compile("value: @value_0\n", [schema])

    def calls(
        self, functions: Sequence[dict[str, Any]], form: CallForm, several: bool, or_text: bool = False
    ) -> JsonConstraint:
        """Only calls of these functions; with `or_text` also any text that does not begin with a brace.

        Raises: as `json`.
        """
        one = call_forms(functions, dataclasses.replace(form, start="", end=""))
        written = [
            f"{self._write(before)} @value_{number} {self._write(after)}"
            for number, (before, _, after) in enumerate(one)
        ]
        more = f"({self._write(form.between)} call)*" if several else ""
        lark = f"value: {self._write(form.start)} call {more} {self._write(form.end)}\ncall: {' | '.join(written)}\n"
        return self._compile(lark, [schema for _, schema, _ in one], or_text)

    def _write(self, text: str) -> str:
        """A text as grammars have it; special tokens, which have no text, by their numbers."""
        parts = re.split(f"({'|'.join(map(re.escape, self._specials))})", text) if self._specials else [text]
        quoted = [
            f"<[{self._specials[part]}]>" if part in self._specials else json.dumps(part) for part in parts if part
        ]
        return " ".join(quoted)

    def _compile(self, lark: str, schemas: Sequence[dict[str, Any]], or_text: bool = False) -> JsonConstraint:
        """A grammar whose rule `value` has @value_0, @value_1, ... where JSON of these schemas stands."""
        from llguidance import LLMatcher, LLParserLimits

        # An answer's first token may carry the space that sentencepiece puts before words; the text has it stripped.
        lark = f'start: {"text | " if or_text else ""}" "? value\n' + lark + (_TEXT if or_text else "")
        grammars: list[dict[str, Any]] = [{"name": "answer", "lark_grammar": lark}]
        for number, schema in enumerate(schemas):
            grammars.append({"name": f"value_{number}", "json_schema": {**schema, "x-guidance": _STYLE}})
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
