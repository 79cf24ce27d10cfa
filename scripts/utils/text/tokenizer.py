"""Tokenizers: loading any so that it segments exactly as its own model file does, bulk encoding, saving.

A folder with tokenizer.model is read by sentencepiece itself: transformers 5 rebuilds merges from piece ids, which
cuts text otherwise wherever scores and ids disagree. A folder with tokenizer.json alone is read by tokenizers.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from ..core.errors import InputError
from ..core.files import Fields, hash_json, read_object, write_json
from ..core.hub import fetch, find_folder, is_hub_id, not_found
from .pieces import (
    CONTROL,
    SAMPLE,
    SPACE,
    build_tokenizer_json,
    inexact_rate,
    inexact_reason,
    is_byte_level,
    parse_sentencepiece_model,
    piece_surface,
    processor_without_prefix,
    read_sentencepiece_model,
    to_byte_characters,
    token_surface,
)

logger = logging.getLogger(__name__)

SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZERS_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
TOKENIZER_FILES = (
    SENTENCEPIECE_FILE,
    TOKENIZERS_FILE,
    CONFIG_FILE,
    SPECIALS_FILE,
    ADDED_FILE,
    "chat_template.jinja",
)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


# ---------------------------------------------------------------- added tokens


class TokenFinder:
    """Finds added tokens in text, as transformers does: the leftmost, the longest, with the spaces that they take.

    Attributes:
        tokens: by id.
    """

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self.tokens = dict(tokens)
        self._ids = {token.content: index for index, token in tokens.items()}
        longest_first = sorted(tokens.values(), key=lambda token: len(token.content), reverse=True)
        forms = [_token_pattern(token) for token in longest_first]
        self._pattern = re.compile("|".join(forms)) if forms else None

    def find(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of each token in the text."""
        if self._pattern is None:
            return []
        found = []
        for match in self._pattern.finditer(text):
            index = self._ids.get(match.group())
            found.append((*match.span(), self._ids[match.group().strip()] if index is None else index))
        return found


def _token_pattern(token: AddedToken) -> str:
    pattern = re.escape(token.content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else "")


# ---------------------------------------------------------------- the sentencepiece tokenizer


class SentencePieceTokenizer(SentencePieceBackend):
    """A transformers tokenizer whose every stretch of text is cut by sentencepiece itself.

    Special tokens in templates are split off first; each stretch between them is encoded as a text of its own, with
    its dummy prefix, as the exported tokenizer.json does.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    _words: TokenFinder | None = None

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        # legacy=False would take the dummy prefix out of the model file's own rules.
        super().__init__(vocab_file=vocab_file, **{**kwargs, "legacy": True})
        self._read_model()

    def _read_model(self) -> None:
        proto = self.proto
        self.surfaces = [piece_surface(piece.piece, piece.type) for piece in proto.pieces]
        self.has_dummy_prefix = bool(proto.normalizer_spec.add_dummy_prefix)
        # What a stretch of text inside a line becomes.
        self.plain_processor = processor_without_prefix(proto)

    @property
    def proto(self) -> Any:
        """The model file's content, a parsed ModelProto."""
        return parse_sentencepiece_model(self.sp_model.serialized_model_proto())

    def _add_tokens(self, *args: Any, **kwargs: Any) -> int:
        self._words = None
        return int(super()._add_tokens(*args, **kwargs))

    @property
    def words(self) -> TokenFinder:
        """Finds the added tokens that are not special."""
        if self._words is None:
            self._words = _find_words(self)
        return self._words

    def _convert_id_to_token(self, index: int) -> str:
        # Embeddings may be padded beyond the vocabulary; such an id stands for nothing.
        return str(self.sp_model.IdToPiece(index)) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        # The library's version strips spaces and writes byte pieces as "<0x0A>".
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        surfaces, added = self.surfaces, self._added_tokens_decoder
        parts = []
        for index in ids:
            if index in skipped:
                continue
            if index in added:
                parts.append(added[index].content.encode())
            elif index < len(surfaces):
                parts.append(surfaces[index])
        text = b"".join(parts).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.has_dummy_prefix else text


# ---------------------------------------------------------------- loading


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that segments exactly as its own model file does. `folder` may also be a hub id.

    Raises: InputError if there is no tokenizer, or its files contradict each other.
    """
    folder = _local_folder(folder)
    if (folder / SENTENCEPIECE_FILE).is_file() and not _is_tiktoken(folder / SENTENCEPIECE_FILE):
        return _load_sentencepiece(folder)
    if (folder / TOKENIZERS_FILE).is_file():
        return _load_tokenizers(folder)
    if (folder / SENTENCEPIECE_FILE).is_file():
        raise InputError(
            f"{folder / SENTENCEPIECE_FILE} is in tiktoken's format, which is not read here; copy {TOKENIZERS_FILE} "
            "from the model's Hugging Face version there, or pass a folder that has it"
        )
    found = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
    raise InputError(
        f"no tokenizer in {folder}: need {SENTENCEPIECE_FILE} or {TOKENIZERS_FILE}, found {found}; "
        "copy the tokenizer's files there or pass the folder that has them"
    )


def share_cut_otherwise(folder: str | Path) -> float:
    """Share of sample lines that transformers' AutoTokenizer, which other programs open a folder with, cuts otherwise.

    Raises: InputError as load_tokenizer, or if AutoTokenizer cannot open it.
    """
    from transformers import AutoTokenizer

    own = load_tokenizer(folder)
    try:
        other = AutoTokenizer.from_pretrained(str(_local_folder(folder)), local_files_only=True)
    except Exception as error:  # whatever it makes of the files
        raise InputError(f"{folder}: transformers' AutoTokenizer cannot open it: {error}") from None
    ids = [[each(text, add_special_tokens=False)["input_ids"] for text in SAMPLE] for each in (own, other)]
    return sum(a != b for a, b in zip(*ids, strict=True)) / len(SAMPLE)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer to open in the folder, whole or damaged."""
    model = folder / SENTENCEPIECE_FILE
    return (folder / TOKENIZERS_FILE).is_file() or (model.is_file() and not _is_tiktoken(model))


def choose_tokenizer(*names: str | None) -> str | None:
    """The first of these models' and adapters' folders or hub ids that has a tokenizer; the last, if none has."""
    given = [name for name in names if name]
    found = (name for name in given if has_tokenizer(_local_folder(name, "model")))
    return next(found, given[-1] if given else None)


def _local_folder(name: str | Path, kind: str = "tokenizer") -> Path:
    if folder := find_folder(name):
        return folder
    if not is_hub_id(name):
        raise not_found(name, kind)
    from huggingface_hub import snapshot_download

    patterns = [*TOKENIZER_FILES, "config.json"]
    return fetch(name, kind, functools.partial(snapshot_download, allow_patterns=patterns))


def _is_tiktoken(path: Path) -> bool:
    # Llama-3 repositories ship a base64 list under the name tokenizer.model, beside the real tokenizer.json.
    with open(path, "rb") as file:
        return re.match(rb"[A-Za-z0-9+/=]+ \d+\n", file.read(256)) is not None


def _load_sentencepiece(folder: Path) -> SentencePieceTokenizer:
    proto = read_sentencepiece_model(folder / SENTENCEPIECE_FILE)
    exported = _read_tokenizers_file(folder) if (folder / TOKENIZERS_FILE).is_file() else {}
    _check_same_pieces(folder, proto, exported["model"]["vocab"] if exported else {})
    settings, named = _read_settings(folder)
    spec = proto.trainer_spec
    numbered = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    missing = {
        name: proto.pieces[index].piece
        for name, index in numbered.items()
        if name not in named and 0 <= index < len(proto.pieces)
    }
    add_bos, add_eos = _added_ends(settings, exported)
    tokenizer: SentencePieceTokenizer = _open(
        SentencePieceTokenizer,
        folder,
        vocab_file=str(folder / SENTENCEPIECE_FILE),
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        special_tokens_pattern={(1, 0): "bos", (1, 1): "bos_eos", (0, 1): "eos", (0, 0): "none"}[add_bos, add_eos],
        **missing,
        **_left_out(settings, named),
    )
    # Control pieces, such as Mistral's brackets, are split off in templates whether a config names them or not.
    controls = [piece.piece for piece in proto.pieces if piece.type == CONTROL]
    unnamed = [piece for piece in controls if piece not in tokenizer._added_tokens_encoder]
    if unnamed:
        tokenizer.add_tokens([AddedToken(piece, special=True, normalized=False) for piece in unnamed], True)
    return tokenizer


def _check_same_pieces(folder: Path, proto: Any, vocab: dict[str, int] | list[list[Any]]) -> None:
    # A Unigram model lists its pieces, each with its score.
    listed = {piece: index for index, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    for piece, index in listed.items():
        if index < len(proto.pieces) and proto.pieces[index].piece != piece:
            raise InputError(
                f"{folder}: {TOKENIZERS_FILE} has {piece!r} at id {index}, {SENTENCEPIECE_FILE} "
                f"{proto.pieces[index].piece!r}: they come from different tokenizers; remove the wrong one"
            )


def _added_ends(settings: dict[str, Any], exported: dict[str, Any]) -> tuple[bool, bool]:
    """Whether plain calls add BOS and EOS: as the config says, else as tokenizer.json does, else as Llama does."""
    single = (exported.get("post_processor") or {}).get("single")
    first, last = ("SpecialToken" in single[0], "SpecialToken" in single[-1]) if single else (not exported, False)
    add_bos, add_eos = settings.get("add_bos_token"), settings.get("add_eos_token")
    return bool(first if add_bos is None else add_bos), bool(last if add_eos is None else add_eos)


def _load_tokenizers(folder: Path) -> PreTrainedTokenizerFast:
    _read_tokenizers_file(folder)
    tokenizer: PreTrainedTokenizerFast = _open(PreTrainedTokenizerFast, folder, **_left_out(*_read_settings(folder)))
    return tokenizer


def _open(tokenizer_class: Any, folder: Path, **settings: Any) -> Any:
    try:
        return tokenizer_class.from_pretrained(str(folder), local_files_only=True, **settings)
    except Exception as error:  # whatever the libraries make of the files
        files = ", ".join(name for name in TOKENIZER_FILES if (folder / name).is_file())
        raise InputError(
            f"{folder}: its tokenizer ({files}) cannot be opened: {error}; copy the files again"
        ) from None


# ---------------------------------------------------------------- the files beside a tokenizer


def _read_tokenizers_file(folder: Path) -> dict[str, Any]:
    """tokenizer.json. Raises: InputError for a file that is broken, or something else."""
    content = read_object(folder / TOKENIZERS_FILE)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise InputError(f"{folder / TOKENIZERS_FILE}: need a tokenizer's 'model' with its 'vocab'; copy it again")
    return content


def _read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(tokenizer_config.json, the special tokens that it or special_tokens_map.json name, by name).

    Raises: InputError naming file and field, for what transformers would fail at or take for something else.
    """
    files = {CONFIG_FILE: _FIELDS, SPECIALS_FILE: _FIELDS, ADDED_FILE: None}
    settings, older, added = (
        read_object(folder / name, fields) if (folder / name).is_file() else {} for name, fields in files.items()
    )
    if strange := [token for token, index in added.items() if type(index) is not int or index < 0]:
        raise InputError(f"{folder / ADDED_FILE}: {strange[0]!r} has the id {added[strange[0]]!r}, need a number")
    given = {name: older.get(name) or settings.get(name) for name in SPECIAL_NAMES}
    return settings, {
        name: value if isinstance(value, str) else value["content"] for name, value in given.items() if value
    }


def _left_out(settings: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, str]:
    """The special tokens of special_tokens_map.json, where transformers does not look into that file."""
    if "added_tokens_decoder" not in settings:
        return {}
    return {name: token for name, token in named.items() if not settings.get(name)}


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _are_tokens(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [None]
    return all(map(_is_token, values))


def _are_numbered(value: Any) -> bool:
    return isinstance(value, dict) and all(
        index.isdecimal() and isinstance(token, dict) and _is_token(token) for index, token in value.items()
    )


def _are_templates(value: Any) -> bool:
    if not isinstance(value, list):
        return isinstance(value, str) or (isinstance(value, dict) and all(isinstance(v, str) for v in value.values()))
    return all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in value
    )


# Of tokenizer_config.json and special_tokens_map.json.
_TOKEN = (_is_token, "text, or an object with 'content'")
_TOKENS = (_are_tokens, "a list of tokens, each text or an object with 'content'")
_FIELDS: Fields = {
    **dict.fromkeys((*SPECIAL_NAMES, "sep_token", "cls_token", "mask_token"), _TOKEN),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), _TOKENS),
    "added_tokens_decoder": (_are_numbered, "an object of ids, each with an object that has 'content'"),
    "chat_template": (_are_templates, "a template's text, or a list of them, each with 'name' and 'template'"),
    "model_max_length": (lambda value: type(value) in (int, float), "a number"),
}


# ---------------------------------------------------------------- encoding text as text


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, literal: Collection[str] = (), inner: bool = False
) -> list[int]:
    """The ids of `text` as text: no BOS or EOS, and what looks like a special token is cut into ordinary pieces.

    Other added tokens are found in text, as transformers does, but for those in `literal`.
    Args: inner: it follows a token, see _inner_backend.
    """
    if any(token in text for token in literal):
        return _encode_around(tokenizer, text, literal, inner)
    if inner and not isinstance(tokenizer, SentencePieceTokenizer):
        return _encode_batch(_inner_backend(tokenizer), [text])[0]
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], num_threads: int = 1) -> list[list[int]]:
    """`encode_text` of many texts, without Python work per text.

    `num_threads` rules sentencepiece; the tokenizers library takes RAYON_NUM_THREADS from the environment.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        ids: list[list[int]] = tokenizer.sp_model.encode(texts, num_threads=num_threads)
        if tokenizer.words.tokens:
            for number, text in enumerate(texts):
                if tokenizer.words.find(text):
                    ids[number] = _encode_around(tokenizer, text)
        return ids
    return _encode_batch(tokenizer.backend_tokenizer, texts)


def _encode_batch(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    # Calls of the tokenizer leave their settings behind in the backend, and set them anew themselves.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _inner_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The backend as it cuts text that follows a token.

    The pre-tokenizer Metaspace with the scheme "first", which transformers 5 saves for Llamas, puts its space before
    the first word of a whole text alone, and not behind special tokens.
    """
    return _make_inner_backend(tokenizer, len(tokenizer))  # scripts add tokens


@functools.lru_cache(maxsize=4)
def _make_inner_backend(tokenizer: PreTrainedTokenizerBase, _: int) -> Tokenizer:
    backend: Tokenizer = tokenizer.backend_tokenizer
    if "prepend_scheme=first" not in repr(backend.pre_tokenizer):
        return backend
    state = json.loads(backend.to_str())
    steps = [state["pre_tokenizer"], *state["pre_tokenizer"].get("pretokenizers", ())]
    for step in steps:
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return Tokenizer.from_str(json.dumps(state))


def _encode_around(
    tokenizer: PreTrainedTokenizerBase, text: str, literal: Collection[str] = (), inner: bool = False
) -> list[int]:
    """The ids of text whose added tokens are looked for here: all that are not special, but for those in `literal`."""
    words = tokenizer.words if isinstance(tokenizer, SentencePieceTokenizer) else _find_words(tokenizer)
    if literal:
        kept = {index: token for index, token in words.tokens.items() if token.content not in literal}
        words = TokenFinder(kept)
    ids: list[int] = []
    position = 0
    for start, end, index in [*words.find(text), (len(text), len(text), None)]:
        if position < start:
            ids += _encode_without_added(tokenizer, text[position:start], inner or position > 0)
        if index is not None:
            ids.append(index)
        position = end
    return ids


def _find_words(tokenizer: PreTrainedTokenizerBase) -> TokenFinder:
    """Finds the added tokens that are not special: they are words of ordinary text."""
    return TokenFinder({index: token for index, token in tokenizer.added_tokens_decoder.items() if not token.special})


def _encode_without_added(tokenizer: PreTrainedTokenizerBase, text: str, inner: bool) -> list[int]:
    """The ids of text that holds no added token, whatever it looks like."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        ids: list[int] = tokenizer.sp_model.encode(text)
        return ids
    backend = _inner_backend(tokenizer) if inner else tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = (
        [text] if backend.pre_tokenizer is None else [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    )
    return [token.id for word in words for token in backend.model.tokenize(word)]


def encode_raw(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text to be continued, as pre-training documents begin."""
    return start_ids(tokenizer) + encode_text(tokenizer, text)


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before the ids of a text: BOS, where the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


# ---------------------------------------------------------------- what ids stand for


def token_surfaces(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The UTF-8 bytes each id stands for: special tokens none, other added tokens their text, unused ids none."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        surfaces = list(tokenizer.surfaces)
    else:
        backend = tokenizer.backend_tokenizer
        vocab, byte_level = backend.get_vocab(with_added_tokens=False), is_byte_level(backend)
        surfaces = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, index in vocab.items():
            surfaces[index] = token_surface(token, byte_level)
    for index, token in tokenizer.added_tokens_decoder.items():
        surfaces += [b""] * (index + 1 - len(surfaces))
        surfaces[index] = b"" if token.special else token.content.encode()
    return surfaces


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """How many UTF-8 bytes each id stands for: (ids,) int32, specials 0, byte pieces 1."""
    return np.array([len(surface) for surface in token_surfaces(tokenizer)], dtype=np.int32)


def segment_with(
    old_tokenizer: PreTrainedTokenizerBase, new_tokenizer: PreTrainedTokenizerBase, token_id: int
) -> list[int]:
    """The old tokenizer's ids for what a token of the new one stands for, without a dummy prefix.

    A token that both have, byte pieces included, maps to itself; a special token only the new one has is cut as text;
    an unused id gives none.
    """
    token = new_tokenizer.convert_ids_to_tokens(token_id)
    if not token:
        return []
    if (same := _token_id(old_tokenizer, token)) is not None:
        return [same]
    if isinstance(new_tokenizer, SentencePieceTokenizer):
        surface = new_tokenizer.surfaces[token_id] if token_id < new_tokenizer.vocab_size else b""
    else:
        surface = token_surface(token, is_byte_level(new_tokenizer.backend_tokenizer))
    return encode_surface(old_tokenizer, surface or token.encode())


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    if not isinstance(tokenizer, SentencePieceTokenizer):
        index: int | None = tokenizer.backend_tokenizer.token_to_id(token)
        return index
    if token in tokenizer._added_tokens_encoder:
        return int(tokenizer._added_tokens_encoder[token])
    found = int(tokenizer.sp_model.piece_to_id(token))  # the unknown piece's id if there is none
    return found if tokenizer.sp_model.IdToPiece(found) == token else None


def encode_surface(tokenizer: PreTrainedTokenizerBase, surface: bytes) -> list[int]:
    """The ids of bytes inside a line: no dummy prefix, and what is no whole character becomes byte pieces."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        try:
            return list(tokenizer.plain_processor.encode(surface.decode()))
        except UnicodeDecodeError:
            return [tokenizer.sp_model.piece_to_id(f"<0x{byte:02X}>") for byte in surface]
    backend = tokenizer.backend_tokenizer
    byte_level = is_byte_level(backend)
    text = to_byte_characters(surface) if byte_level else surface.decode(errors="replace").replace(" ", SPACE)
    # The model alone, past normaliser and pre-tokenizer: the stretch lies within one word.
    return [token.id for token in backend.model.tokenize(text)]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides segmentation and special ids; equal for equal tokenizers wherever they lie."""
    added = [[index, str(token), token.special] for index, token in sorted(tokenizer.added_tokens_decoder.items())]
    content: dict[str, Any] = {"added": added, "special": dict(tokenizer.special_tokens_map)}
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = tokenizer.proto
        trainer = proto.trainer_spec  # holds paths and other traces of training too
        content["pieces"] = [[piece.piece, piece.score, piece.type] for piece in proto.pieces]
        content["normalizer"] = proto.normalizer_spec.SerializeToString().hex()
        content["rules"] = [trainer.model_type, trainer.byte_fallback, trainer.treat_whitespace_as_suffix]
    else:
        content["backend"] = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding", "post_processor"):
            content["backend"].pop(state, None)
    return hash_json(content)


def vocabulary_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id, which is more than there are tokens where added tokens leave ids out."""
    return max(len(tokenizer), 1 + max(tokenizer.added_tokens_decoder, default=-1))


def embedding_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows the model's embeddings should have: the vocabulary, padded as --pad_to_multiple_of asked when merging."""
    return max(vocabulary_end(tokenizer), int(tokenizer.init_kwargs.get("embedding_rows") or 0))


def is_padded_size(tokenizer: PreTrainedTokenizerBase, rows: int) -> bool:
    """Whether `rows` are the vocabulary, padded as recorded or, as others do, to a multiple of a power of two."""
    size = vocabulary_end(tokenizer)
    return rows == embedding_rows(tokenizer) or any(rows == -(-size // 2**n) * 2**n for n in range(10))


def check_embedding_rows(
    tokenizer: PreTrainedTokenizerBase, rows: int, too_few: str, old_rows: int | None = None, outdated: str = ""
) -> None:
    """Check that a model whose embeddings have `rows` rows can be this tokenizer's.

    Args:
        too_few: what to say if some tokens have no row.
        old_rows: the rows before adapters grew them. A tokenizer for which these were enough is the one from before,
            unless the new rows are its padding.
        outdated: what to say then.
    Raises: InputError.
    """
    if (end := vocabulary_end(tokenizer)) > rows:
        gaps = f" (the largest id is {end - 1}: added tokens leave ids out)" if end > len(tokenizer) else ""
        raise InputError(too_few + gaps)
    if old_rows is not None and end <= old_rows < rows and not is_padded_size(tokenizer, rows):
        raise InputError(outdated)


# ---------------------------------------------------------------- saving


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write every file an engine may look for, so that `load_tokenizer(folder)` gives the same tokenizer.

    With tokenizer.json, AutoTokenizer gives the same ids too. Where no exact tokenizer.json exists there is none, and
    a warning gives the measured share of lines that transformers alone would cut otherwise.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = saved_settings(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        exact = _save_sentencepiece(tokenizer, folder)
    else:
        exact = True
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()  # left behind by calls
        backend.no_padding()
        backend.save(str(folder / TOKENIZERS_FILE))
    if not exact:
        settings |= {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added_settings(tokenizer)}
    settings, _ = tokenizer.save_chat_templates(str(folder), settings, None, True)
    write_json(folder / CONFIG_FILE, settings)
    write_json(folder / SPECIALS_FILE, {name: str(token) for name, token in tokenizer.special_tokens_map.items()})


def _save_sentencepiece(tokenizer: SentencePieceTokenizer, folder: Path) -> bool:
    source, target = Path(tokenizer.vocab_file), folder / SENTENCEPIECE_FILE
    if not source.is_file():
        target.write_bytes(tokenizer.sp_model.serialized_model_proto())
    elif source.resolve() != target.resolve():
        shutil.copyfile(source, target)
    proto = tokenizer.proto
    if inexact_reason(proto, tokenizer.added_tokens_decoder) is not None:
        (folder / TOKENIZERS_FILE).unlink(missing_ok=True)
        _warn_inexact(tokenizer.sp_model.serialized_model_proto(), tuple(tokenizer.added_tokens_decoder))
        return False
    settings = tokenizer.init_kwargs
    build_tokenizer_json(
        proto,
        tokenizer.added_tokens_decoder,
        tokenizer.bos_token if settings.get("add_bos_token") else None,
        tokenizer.eos_token if settings.get("add_eos_token") else None,
    ).save(str(folder / TOKENIZERS_FILE))
    return True


def saved_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer_config.json that every engine reads alike."""
    # LlamaTokenizer would replace tokenizer.json's normaliser by its own, so the generic class is named.
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {name: getattr(tokenizer, name) for name in SPECIAL_NAMES}
    if tokenizer.extra_special_tokens:
        settings["extra_special_tokens"] = [str(token) for token in tokenizer.extra_special_tokens]
    kept = ("add_bos_token", "add_eos_token", "embedding_rows", "padding_side", "model_input_names")
    settings |= {name: tokenizer.init_kwargs[name] for name in kept if name in tokenizer.init_kwargs}
    settings["model_max_length"] = tokenizer.model_max_length
    return settings


def added_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The added tokens by id, as tokenizer_config.json has them."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        str(index): {flag: getattr(token, flag) for flag in flags}
        for index, token in tokenizer.added_tokens_decoder.items()
    }


@functools.lru_cache(maxsize=8)  # once per tokenizer and process, however many checkpoints are saved
def _warn_inexact(model: bytes, added_ids: tuple[int, ...]) -> None:
    logger.warning(
        "no tokenizer.json can segment as this tokenizer.model does (%s): sentencepiece, llama.cpp and this project's "
        "load_tokenizer are exact, transformers' own LlamaTokenizer cuts %.0f %% of %d sample lines otherwise; "
        "vocabularies made by merge_tokenizers.py are exact everywhere",
        inexact_reason(parse_sentencepiece_model(model), added_ids),
        100 * inexact_rate(model),
        len(SAMPLE),
    )
