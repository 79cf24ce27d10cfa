"""Model folders as others publish them, drawn at random by seed, with what is in them known beforehand.

A Draft is filled by one function an aspect (config, weights, tokenizer ...), each of which draws a spelling and notes
it in `planted`; what the spelling means stands in the fields that tests compare with. Then a fault may be planted into
the written folder: it must be refused with an error that names its file.
"""

import copy
import functools
import json
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from support.families import LLAMA_2, VICUNA
from support.models import model_of
from support.tokenizers import CHATML, PATTERNS, SPECIALS, make_byte_level, read_lines, train_sentencepiece

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 128}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TEMPLATES = {"chatml": CHATML, "llama-2": LLAMA_2, "vicuna": VICUNA}
TEXTS = [
    "The quick brown fox.",
    "你好，世界 😀",
    " two  spaces\n\nand lines",
    "维修手册 of the 维修手册",
    "a",
    "<|im_end|>?",
]


@functools.cache
def base_weights(kind: str, rows: int, kv_heads: int) -> dict[str, Tensor]:
    """The same numbers for all cases of one shape."""
    sizes = {**SIZES, "vocab_size": rows, "num_key_value_heads": kv_heads, "head_dim": 8}
    model = model_of(AutoConfig.for_model(kind, **sizes), scale=0.1)
    return {name: value.clone() for name, value in model.state_dict().items()}


@functools.cache
def sentencepiece_model() -> bytes:
    return train_sentencepiece(read_lines("en_train.txt")[:1500], 400)


@functools.cache
def tokenizer_json(kind: str) -> str:
    """What the library of their time has written for such a model, without the added tokens of a case."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "tokenizer")
        if kind == "byte-level":
            make_byte_level(folder, PATTERNS["qwen2"], False)
        else:
            folder.mkdir()
            (folder / "tokenizer.model").write_bytes(sentencepiece_model())
            LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
        return (folder / "tokenizer.json").read_text(encoding="utf-8")


# ---------------------------------------------------------------- what is in a folder


@dataclass
class Draft:
    """A model's folder in the making, and what it means.

    Attributes:
        model: settings of the config that the model really has.
        weights: the model's own, by transformers' names, as they are stored (rounded).
        added: id and whether it is special, by text, of tokens beyond the model file's own.
        ends: every id that must end an answer.
        rows: of the embeddings.
        template: what writes prompts; None: the folder has none.
        planted: what is not as today's library would write it.
    """

    rng: random.Random
    folder: Path
    kind: str = "llama"
    tokens: str = "sentencepiece"
    model: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, tuple[int, bool]] = field(default_factory=dict)
    bos: str = "<s>"
    eos: str = "</s>"
    ends: set[int] = field(default_factory=set)
    rows: int = 0
    template: str | None = None
    planted: list[str] = field(default_factory=list)

    def draw(self, **choices: float) -> str:
        """One of the names, by weight, which goes into `planted`."""
        name = self.rng.choices(list(choices), list(choices.values()))[0]
        self.planted.append(name)
        return name

    def chance(self, share: float, name: str) -> bool:
        if drawn := self.rng.random() < share:
            self.planted.append(name)
        return drawn

    def write(self, name: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=self.rng.random() < 0.5)
        (self.folder / name).write_text(text, encoding="utf-8")

    # ------------------------------------------------------------ what the tests compare with

    @property
    def base_tokens(self) -> dict[str, int]:
        """The control tokens of the model file itself."""
        if self.tokens != "byte-level":
            return {"<unk>": 0, "<s>": 1, "</s>": 2}
        content = json.loads(tokenizer_json("byte-level"))
        return {token["content"]: token["id"] for token in content["added_tokens"]}

    @property
    def own_size(self) -> int:
        """How many tokens the model file has without the added ones."""
        if self.tokens != "byte-level":
            return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).piece_size()
        vocabulary = json.loads(tokenizer_json("byte-level"))["model"]["vocab"]
        return 1 + max(*vocabulary.values(), *self.base_tokens.values())

    def token_id(self, text: str) -> int:
        return self.added[text][0] if text in self.added else self.base_tokens[text]

    def encode(self, text: str, with_special: bool) -> list[int]:
        """A plain loop: the text is cut at the tokens, each stretch between them is encoded by the model file."""
        found = {token: index for token, (index, special) in self.added.items() if with_special or not special}
        found |= self.base_tokens if with_special else {}
        longest_first = "|".join(re.escape(token) for token in sorted(found, key=len, reverse=True))
        ids = []
        for part in re.split(f"({longest_first})", text) if found else [text]:
            ids += [found[part]] if part in found else self._encode_stretch(part)
        return ids

    def _encode_stretch(self, text: str) -> list[int]:
        if self.tokens != "byte-level":
            return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).encode(text)
        backend = Tokenizer.from_str(tokenizer_json("byte-level"))
        backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """As the template writes the conversation."""
        ends = {"bos_token": self.bos, "eos_token": self.eos}
        (text,), _ = render_jinja_template([messages], chat_template=self.template, add_generation_prompt=True, **ends)
        return self.encode(text, with_special=True)

    def logits(self, ids: list[int], weights: dict[str, Tensor] | None = None) -> Tensor:
        """Of transformers' own model with these weights, in float32, given the config of today."""
        config = AutoConfig.for_model(self.kind, **copy.deepcopy(self.model))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        state = {name: value.float() for name, value in (weights or self.weights).items()}
        model.load_state_dict(state, strict=True)
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]


def draft_folder(seed: int, folder: Path) -> Draft:
    """A written folder, without a fault."""
    folder.mkdir(parents=True)
    draft = Draft(random.Random(seed), folder)
    for aspect in (write_tokenizer, write_template, write_config, write_generation_config, write_weights, add_strays):
        aspect(draft)
    return draft


# ---------------------------------------------------------------- tokenizers


def write_tokenizer(draft: Draft) -> None:
    """The same tokens, told in the files of several ages."""
    draft.tokens = draft.draw(sentencepiece=3, both=2, **{"byte-level": 3})
    size = draft.own_size
    if draft.tokens == "byte-level":
        draft.bos, draft.eos = SPECIALS[:2]
    for tokens, special in ((("<|im_start|>", "<|im_end|>"), draft.rng.random() < 0.6), (("维修手册",), False)):
        if draft.chance(0.5, f"added {tokens[0]} {'special' if special else 'plain'}"):
            for token in tokens:
                draft.added[token] = (size + len(draft.added), special)
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}
    config |= {"bos_token": draft.bos, "eos_token": draft.eos}
    if "<|im_end|>" in draft.added and draft.chance(0.4, "eos <|im_end|>"):
        draft.eos = config["eos_token"] = "<|im_end|>"
        draft.added |= {"<|im_end|>": (draft.added["<|im_end|>"][0], True)}  # what is named so is special
    if draft.tokens != "byte-level":
        config |= {"unk_token": "<unk>", "legacy": draft.rng.choice([None, True, False]), "sp_model_kwargs": {}}
    pad = draft.draw(pad_none=3, pad_null=1, pad_is_eos=2, pad_is_unk=1, pad_added=2)
    if pad == "pad_added":
        draft.added["[PAD]"] = (size + len(draft.added), True)
        config["pad_token"] = "[PAD]"
    elif pad != "pad_none":
        unknown = config.get("unk_token", draft.eos)
        config["pad_token"] = {"pad_null": None, "pad_is_eos": draft.eos, "pad_is_unk": unknown}[pad]
    _name_classes(draft, config)
    _write_added(draft, config)
    if draft.tokens != "byte-level":
        (draft.folder / "tokenizer.model").write_bytes(sentencepiece_model())
    named = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    if draft.chance(0.3, "named in special_tokens_map"):
        as_objects = draft.chance(0.5, "as objects")
        draft.write(
            "special_tokens_map.json",
            {key: _as_object(value, True) if as_objects else value for key, value in named.items()},
        )
        if draft.chance(0.5, "and not in the config"):
            config = {key: value for key, value in config.items() if key not in named}
    elif draft.chance(0.3, "ends as objects"):
        config |= {key: _as_object(value, True, __type="AddedToken") for key, value in named.items()}
    draft.config["tokenizer"] = config


def _name_classes(draft: Draft, config: dict[str, Any]) -> None:
    names = {"sentencepiece": ["LlamaTokenizer", "LlamaTokenizerFast", None]}.get(
        draft.tokens, ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None]
    )
    if draft.tokens == "byte-level":
        names = ["Qwen2Tokenizer", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend", None]
    name = draft.rng.choice(names)
    draft.planted.append(f"class {name}")
    config |= {"tokenizer_class": name} if name else {}
    if draft.tokens != "byte-level" and draft.rng.random() < 0.7:
        config |= {"add_bos_token": True, "add_eos_token": False}
    unneeded = {"use_fast": True, "add_prefix_space": None, "split_special_tokens": False, "errors": "replace"}
    unneeded |= {"extra_special_tokens": {}, "padding_side": "left", "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    for key, value in unneeded.items():
        if draft.rng.random() < 0.2:
            config[key] = value
            draft.planted.append(key)


def _write_added(draft: Draft, config: dict[str, Any]) -> None:
    """Where the added tokens stand: tokenizer.json must have them, beside it one of two other places may."""
    if draft.tokens != "sentencepiece":
        content = json.loads(tokenizer_json(draft.tokens))
        content["added_tokens"] += [
            {"id": index, **_as_object(token, special)} for token, (index, special) in draft.added.items()
        ]
        draft.write("tokenizer.json", content)
    place = draft.draw(added_tokens_decoder=3, added_tokens_json=2, tokenizer_json_only=1)
    if place == "tokenizer_json_only" and draft.tokens == "byte-level":
        return
    if place == "added_tokens_decoder":
        every = {**{token: (index, True) for token, index in draft.base_tokens.items()}, **draft.added}
        config["added_tokens_decoder"] = {
            str(index): _as_object(token, special) for token, (index, special) in every.items()
        }
    elif draft.added:
        draft.write("added_tokens.json", {token: index for token, (index, _) in draft.added.items()})
    # The old files say nothing of kinds: what is special is named so elsewhere.
    named = [token for token, (_, special) in draft.added.items() if special]
    if place != "added_tokens_decoder" or draft.rng.random() < 0.5:
        config["additional_special_tokens"] = named


def _as_object(token: str, special: bool, **more: Any) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": token, "special": special, **flags, **more}


def write_template(draft: Draft) -> None:
    """The chat template: in the config, alone or among others, in its own file, or nowhere."""
    config = draft.config.pop("tokenizer")
    name = draft.draw(chatml=2, vicuna=1, **{"llama-2": 1})
    text, other = TEMPLATES[name], "{{ 'another template' }}"
    place = draft.draw(
        no_template=1, null_template=0.3, in_config=2, in_a_file=2, named=1, folder=0.5, both_places=0.5
    )
    draft.template = None if place in ("no_template", "null_template") else text
    if place == "null_template":
        config["chat_template"] = None
    elif place == "in_config":
        config["chat_template"] = text
    elif place == "named":
        named = [{"name": "default", "template": text}, {"name": "tool_use", "template": other}]
        config["chat_template"] = draft.rng.sample(named, 2)
    elif place in ("in_a_file", "both_places", "folder"):
        draft.write("chat_template.jinja", text)
        if place == "both_places":  # the file counts, as in transformers
            config["chat_template"] = other
        if place == "folder":
            (draft.folder / "additional_chat_templates").mkdir()
            draft.write("additional_chat_templates/rag.jinja", other)
    may_be_absent = draft.tokens != "byte-level" and not {"chat_template", "added_tokens_decoder"} & config.keys()
    is_plain = (draft.bos, draft.eos) == ("<s>", "</s>") and not any(special for _, special in draft.added.values())
    if may_be_absent and is_plain and draft.chance(0.5, "no tokenizer_config.json"):
        return
    draft.write("tokenizer_config.json", config)


# ---------------------------------------------------------------- config.json, generation_config.json

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def write_config(draft: Draft) -> None:
    draft.kind = draft.draw(llama=3, mistral=1, qwen2=1, qwen3=1)
    end = draft.own_size + len(draft.added)
    draft.rows = {"exact": end, "padded": -(-end // 64) * 64, "odd": end + 7}[draft.draw(exact=3, padded=2, odd=0.5)]
    tied = draft.chance(0.3, "tied")
    kv_heads = draft.rng.choice([2, 4])
    own = {**SIZES, "vocab_size": draft.rows, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    if draft.kind == "qwen3":
        own["head_dim"] = 8
    written: dict[str, Any] = {"model_type": draft.kind, **own}
    if kv_heads == 4 and draft.kind == "llama" and draft.chance(0.5, "no num_key_value_heads"):
        del written["num_key_value_heads"]
    if not tied and draft.chance(0.4, "no tie_word_embeddings"):
        del written["tie_word_embeddings"]
    name = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(draft.kind))].__name__
    written["architectures"] = [name]
    if draft.chance(0.1, "no architectures"):
        written["architectures"] = None
    theta = draft.rng.choice([10000.0, 500000.0])
    kind = draft.draw(default=4, linear=1, dynamic=1, yarn=1, llama3=1)
    own["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **ROPES[kind]}
    match draft.draw(rope_scaling_type=1, rope_scaling_rope_type=1, rope_parameters=1):
        case "rope_parameters":
            written["rope_parameters"] = own["rope_parameters"]
        case age:
            written["rope_theta"] = int(theta) if draft.rng.random() < 0.3 else theta
            key = "type" if age == "rope_scaling_type" else "rope_type"
            written["rope_scaling"] = None if kind == "default" else {key: kind, **ROPES[kind]}
    draft.model = own
    eos = draft.token_id(draft.eos)
    match draft.draw(eos_int=3, eos_list=2, eos_null=1, eos_absent=1, eos_negative=0.3):
        case "eos_int":
            written["eos_token_id"] = eos
        case "eos_list":
            more = draft.rng.randrange(3, end)
            written["eos_token_id"] = [eos, more]
            draft.ends |= {more}
        case "eos_null":
            written["eos_token_id"] = None
        case "eos_negative":
            written["eos_token_id"] = -1
    draft.ends.add(eos)
    written["bos_token_id"] = draft.rng.choice([draft.token_id(draft.bos), None])
    pad = draft.rng.choice(["absent", None, 0, -1, eos])
    if pad != "absent":
        written["pad_token_id"] = pad
    unneeded = {"pretraining_tp": 1, "_name_or_path": "/gone/away", "auto_map": {"AutoConfig": "configuration.C"}}
    unneeded |= {"quantization_config": None, "use_cache": True, "head_dim": 8, "attention_dropout": 0.0}
    unneeded |= {"transformers_version": "4.28.1", "rms_norm_eps": 1e-6, "hidden_act": "silu", "unk_token_id": 0}
    for key, value in unneeded.items():
        if draft.rng.random() < 0.25:
            written[key] = value
            draft.planted.append(key)
    own["rms_norm_eps"] = written.setdefault("rms_norm_eps", 1e-6)
    draft.config = written  # the weights' type is written with them


def write_generation_config(draft: Draft) -> None:
    eos = draft.token_id(draft.eos)
    match draft.draw(no_generation_config=2, generation_config=2, with_other_ends=2, greedy=1, empty=0.5):
        case "generation_config":
            content: dict[str, Any] = {"bos_token_id": None, "eos_token_id": eos, "transformers_version": "4.31.0"}
            content |= {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "_from_model_config": True}
        case "with_other_ends":
            ends = draft.rng.sample(range(3, 300), 2)
            content = {"eos_token_id": ends, "pad_token_id": 0, "max_length": 4096, "top_k": 20}
            draft.ends |= set(ends)
        case "greedy":
            content = {"do_sample": False, "temperature": 1.0, "top_p": None, "eos_token_id": None}
        case "empty":
            content = {}
        case _:
            return
    draft.write("generation_config.json", content)


# ---------------------------------------------------------------- weights


def write_weights(draft: Draft) -> None:
    dtype_name = draft.draw(float32=1, float16=2, bfloat16=2)
    dtype = DTYPES[dtype_name]
    mixed = draft.chance(0.1, "norms in float32")
    weights = {
        name: value if mixed and "norm" in name else value.to(dtype)
        for name, value in base_weights(draft.kind, draft.rows, draft.model["num_key_value_heads"]).items()
    }
    tied = draft.model["tie_word_embeddings"]
    if tied:
        weights[HEAD] = weights[EMBEDDING]
        if draft.chance(0.15, "tied by the config, a head of its own in the files"):  # the files count
            weights[HEAD] = weights[EMBEDDING].flip(0)
            draft.model["tie_word_embeddings"] = tied = False
    draft.weights = dict(weights)
    said = draft.draw(dtype=2, torch_dtype=3, no_dtype=1, null_dtype=0.5, other_dtype=0.5)
    key = "torch_dtype" if said == "torch_dtype" else "dtype"
    if said != "no_dtype":
        draft.config[key] = {"null_dtype": None, "other_dtype": "float32"}.get(said, dtype_name)
    draft.write("config.json", draft.config)
    if tied and draft.chance(0.6, "tied head not stored"):
        del weights[HEAD]
    if draft.chance(0.15, "rotary buffers"):
        weights |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    if draft.chance(0.1, "a tensor of something else"):
        weights["vision.weight"] = torch.ones(3)
    match draft.draw(plain=6, module=1, compiled=0.7, no_prefix=1):
        case "module":
            weights = {f"module.{name}": value for name, value in weights.items()}
        case "compiled":
            weights = {f"_orig_mod.{name}": value for name, value in weights.items()}
        case "no_prefix":
            weights = {name.removeprefix("model."): value for name, value in weights.items()}
    suffix = draft.draw(safetensors=3, bin=2)
    shared = tied and draft.chance(0.5, "head shares memory") if suffix == "bin" else False
    if not shared:
        weights = {name: value.clone() for name, value in weights.items()}
    _write_files(draft, weights, suffix)
    if suffix == "safetensors" and draft.chance(0.1, "the same as .bin, too"):
        torch.save(weights, draft.folder / "pytorch_model.bin")


def _write_files(draft: Draft, weights: dict[str, Tensor], suffix: str) -> None:
    """One file or several, with an index or without."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    shape = draft.draw(one_file=4, parts=2, parts_without_index=0.7, index_of_one=0.5, odd_names=0.5)
    names = list(weights)
    draft.rng.shuffle(names)
    if shape in ("one_file", "index_of_one"):
        files = {f"{stem}.{suffix}": names}
    else:
        count = draft.rng.choice([1, 2, 3])
        files = {f"{stem}-{n + 1:05}-of-{count:05}.{suffix}": names[n::count] for n in range(count)}
        if shape == "odd_names":
            files = {f"part_{chr(97 + n)}.{suffix}": part for n, part in enumerate(files.values())}
    old = suffix == "bin" and draft.chance(0.2, "torch's old zip")
    for file, part in files.items():
        tensors = {name: weights[name] for name in part}
        if suffix == "bin":
            torch.save(tensors, draft.folder / file, _use_new_zipfile_serialization=not old)
        else:
            save_file(tensors, draft.folder / file, {"format": "pt"} if draft.rng.random() < 0.8 else None)
    if shape in ("parts", "odd_names", "index_of_one"):
        total = {"metadata": {"total_size": sum(value.nbytes for value in weights.values())}}
        index = {"weight_map": {name: file for file, part in files.items() for name in part}}
        draft.write(
            f"{stem}.{suffix}.index.json",
            index if draft.chance(0.2, "an index without metadata") else total | index,
        )


def add_strays(draft: Draft) -> None:
    """What else lies in such folders."""
    strays = {"README.md": "---\nlicense: other\n---\n# A model", ".gitattributes": "*.bin filter=lfs", "LICENSE": ""}
    strays |= {"trainer_state.json": "{}", "vocab.json": "[not JSON", "merges.txt": "#version: 0.2\n"}
    strays |= {"configuration.json": '{"framework": "Pytorch"}', "model.safetensors.bak": "old", "rng_state.pth": "x"}
    for name, text in strays.items():
        if draft.rng.random() < 0.15:
            draft.write(name, text)
            draft.planted.append(name)
    if draft.chance(0.1, "original/"):
        (draft.folder / "original").mkdir()
        draft.write("original/params.json", "{")


# ---------------------------------------------------------------- faults

Fault = Callable[[Draft], str | None]
FAULTS: dict[str, Fault] = {}


def fault(plant: Fault) -> Fault:
    """What is wrong; returns the pattern that the error must have, or None where the folder has no place for it."""
    FAULTS[plant.__name__] = plant
    return plant


def plant_fault(draft: Draft) -> str:
    """Plant one of the faults. Returns: what the error must name."""
    names = list(FAULTS)
    draft.rng.shuffle(names)
    for name in names:
        if pattern := FAULTS[name](draft):
            draft.planted.append(f"FAULT {name}")
            return pattern
    raise AssertionError("no fault has a place in this folder")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def weight_files(draft: Draft) -> list[Path]:
    """Those that are read: safetensors, else .bin."""
    found = sorted(draft.folder.glob("*.safetensors"))
    return found or sorted(draft.folder.glob("*.bin"))


def _rewrite(draft: Draft, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of every weight file that is read."""
    for path in weight_files(draft):
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        change(tensors)
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


def _one_weight(draft: Draft) -> str:
    """The end of a name that every spelling has, and that must be there."""
    return draft.rng.choice([name for name in draft.weights if name != HEAD]).removeprefix("model.")


@fault
def a_tensor_is_missing(draft):
    lost = _one_weight(draft)

    def change(tensors):
        for name in [name for name in tensors if name.endswith(lost)]:
            del tensors[name]

    _rewrite(draft, change)
    return re.escape(draft.folder.name)


@fault
def a_head_is_missing(draft):
    if draft.model["tie_word_embeddings"]:
        return None
    _rewrite(draft, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(HEAD)])
    return r"lm_head\.weight"


@fault
def a_tensor_has_another_shape(draft):
    changed = _one_weight(draft)

    def change(tensors):
        tensors.update({name: value[:-1].clone() for name, value in tensors.items() if name.endswith(changed)})

    _rewrite(draft, change)
    return re.escape(draft.folder.name)


@fault
def a_tensor_of_integers(draft):
    changed = _one_weight(draft)
    if "bias" in changed:
        return None

    def change(tensors):
        tensors.update({name: value.to(torch.int8) for name, value in tensors.items() if name.endswith(changed)})

    _rewrite(draft, change)
    return "int8"


@fault
def a_layer_too_many(draft):
    """Of a config that belongs to a smaller model."""
    edit_json(draft.folder / "config.json", num_hidden_layers=1)
    return re.escape(draft.folder.name)


@fault
def a_file_is_truncated(draft):
    path = draft.rng.choice(weight_files(draft))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * draft.rng.choice([0, 0.001, 0.1, 0.5, 0.99]))])
    return re.escape(path.name)


@fault
def a_file_is_a_pointer(draft):
    path = draft.rng.choice(weight_files(draft))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return re.escape(path.name)


@fault
def a_file_is_gone(draft):
    path = draft.rng.choice(weight_files(draft))
    path.unlink()
    if path.suffix == ".safetensors" and not (draft.folder / "model.safetensors.index.json").is_file():
        (draft.folder / "pytorch_model.bin").unlink(missing_ok=True)  # else the others are read
    return re.escape(draft.folder.name)


def _damage(name: str, *contents: str) -> None:
    """A fault for each way in which a file of JSON may be damaged."""

    def plant(draft: Draft) -> str | None:
        if not (draft.folder / name).is_file():
            return None
        (draft.folder / name).write_text(draft.rng.choice(contents), encoding="utf-8")
        return re.escape(name)

    plant.__name__ = f"damaged {name}"
    fault(plant)


NO_OBJECTS = ("", "{", "[]", "null", "3", '"text"', '{"a": 1,}', "\x00")
_damage("config.json", *NO_OBJECTS, "{}", '{"model_type": null}', '{"model_type": "no_such_model"}')
_damage("generation_config.json", *NO_OBJECTS)
_damage("tokenizer_config.json", *NO_OBJECTS)
_damage("special_tokens_map.json", *NO_OBJECTS)
_damage("added_tokens.json", *NO_OBJECTS, '{"a": "b"}', '{"a": null}', '{"a": -4}')
_damage("tokenizer.json", *NO_OBJECTS, "{}", '{"version": "1.0"}', '{"model": null}', '{"model": {"vocab": []}}')
_damage("tokenizer.model", "", "text", "\n\x0a\x03abc", "version https://git-lfs.github.com/spec/v1\n")
for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
    _damage(
        index_name, *NO_OBJECTS, "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ".."}}'
    )


def _wrong(name: str, key: str, *values: Any) -> None:
    """A fault for a field that holds what it cannot."""

    def plant(draft: Draft) -> str | None:
        if not (draft.folder / name).is_file() or (key == "chat_template" and draft.template is not None):
            return None
        edit_json(draft.folder / name, **{key: draft.rng.choice(values)})
        return re.escape(name)

    plant.__name__ = f"wrong {key} in {name}"
    fault(plant)


for key, values in {
    "hidden_size": ("32", None, -32, 33, [32]),
    "num_hidden_layers": ("2", None, -1),
    "num_attention_heads": (0, "4", None, 3),
    "vocab_size": ("400", None, -400),
    "rope_scaling": (
        {"type": "spiral", "factor": 2.0},
        {"type": "linear"},
        "linear",
        {"type": "linear", "factor": "x"},
    ),
    "rms_norm_eps": ("small", None),
    "hidden_act": ("no_such_function", 3),
    "eos_token_id": ("</s>", [None], {"a": 1}, 1.5, True),
    "pad_token_id": (10**6, "<pad>", [0]),
    "dtype": ("float99", 3),
    "max_position_embeddings": ("128", None),
    "tie_word_embeddings": ("yes", 3),
}.items():
    _wrong("config.json", key, *values)
for key, values in {
    "eos_token_id": ("</s>", [None], {"a": 1}, 1.5),
    "temperature": ("hot", -1, [1]),
    "top_p": (2, "most"),
    "top_k": (1.5, "many"),
    "do_sample": ("yes", 1),
    "repetition_penalty": (-1, "strong"),
}.items():
    _wrong("generation_config.json", key, *values)
for key, values in {
    "bos_token": (3, ["<s>"], {"text": "<s>"}),
    "pad_token": (0, ["<pad>"], {"__type": "AddedToken"}),
    "added_tokens_decoder": ([], {"a": {"content": "x"}}, {"1": "x"}, {"1": {"contents": "x"}}),
    "additional_special_tokens": (3, "text", [3]),
    "chat_template": (3, [{"name": "default"}], [3]),
    "model_max_length": ("long", [1]),
}.items():
    _wrong("tokenizer_config.json", key, *values)


@fault
def more_tokens_than_rows(draft):
    """The padding token that Alpaca added to Llama, beyond the model's vocabulary."""
    if (draft.folder / "tokenizer.json").is_file() or (draft.folder / "added_tokens.json").is_file():
        return None
    draft.write("added_tokens.json", {"<pad2>": draft.rows})
    path = draft.folder / "tokenizer_config.json"
    if path.is_file() and "added_tokens_decoder" in (config := json.loads(path.read_text(encoding="utf-8"))):
        edit_json(
            path, added_tokens_decoder=config["added_tokens_decoder"] | {str(draft.rows): _as_object("<pad2>", False)}
        )
    return str(draft.rows)


@fault
def no_tokenizer(draft):
    for name in ("tokenizer.model", "tokenizer.json"):
        (draft.folder / name).unlink(missing_ok=True)
    return "no tokenizer"


@fault
def a_tokenizer_of_another_model(draft):
    if draft.tokens != "both":
        return None
    draft.write("tokenizer.json", tokenizer_json("byte-level"))
    return r"tokenizer\.json"


@fault
def a_template_that_is_no_jinja(draft):
    draft.write("chat_template.jinja", draft.rng.choice(["{% for m in messages %}", "{{ bos_token", "{% end %}"]))
    return "template"


# ---------------------------------------------------------------- adapters

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def draft_adapter(draft: Draft, folder: Path) -> dict[str, Tensor]:
    """Write an adapter for a drafted model. Returns: the weights with it, in float32, by the papers' formulas."""
    rng, generator = draft.rng, torch.Generator().manual_seed(draft.rng.randrange(1 << 30))
    folder.mkdir()
    rank, alpha = rng.choice([1, 2, 4]), rng.choice([2, 8, 3.0])
    targets = rng.sample(LINEAR, rng.choice([1, 3, 7]))
    use_rslora, use_dora = draft.chance(0.25, "rsLoRA"), draft.chance(0.25, "DoRA")
    scaling = alpha / rank**0.5 if use_rslora else alpha / rank
    merged = {name: value.float() for name, value in draft.weights.items()}
    tensors: dict[str, Tensor] = {}
    for name in [name for name in merged if name.split(".")[-2] in targets and name.endswith(".weight")]:
        module, weight = name.removesuffix(".weight"), merged[name]
        rows, columns = weight.shape
        tensors[f"{module}.lora_A.weight"] = A = torch.randn(rank, columns, generator=generator) * 0.3
        tensors[f"{module}.lora_B.weight"] = B = torch.randn(rows, rank, generator=generator) * 0.3
        merged[name] = weight + scaling * B @ A
        if use_dora:
            magnitude = torch.rand(rows, generator=generator) + 0.5
            tensors[f"{module}.lora_magnitude_vector"] = magnitude
            merged[name] *= (magnitude / merged[name].norm(dim=1))[:, None]
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets}
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "/gone/base", "bias": "none"}
    config |= {"use_rslora": use_rslora, "use_dora": use_dora}
    whole = not draft.model["tie_word_embeddings"] and draft.chance(0.4, "modules_to_save")
    if whole:
        config["modules_to_save"] = ["embed_tokens", "lm_head"]
        if draft.chance(0.5, "grown to a multiple of 128"):
            draft.model["vocab_size"] = -(-draft.rows // 128) * 128
        shape = (draft.model["vocab_size"], SIZES["hidden_size"])
        for name in (EMBEDDING, HEAD):
            tensors[name] = merged[name] = torch.randn(shape, generator=generator) * 0.5
    _write_adapter(draft, folder, config, tensors)
    return merged


def _write_adapter(draft: Draft, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """In the spelling of one of PEFT's ages."""
    age = draft.draw(peft_of_today=3, peft_0_3=2, without_prefix=1)
    spelled = {}
    for name, value in tensors.items():
        if age == "peft_0_3":
            part = "modules_to_save.default.weight" if "lora_" not in name else "default.weight"
            name = f"{name.removesuffix('.weight')}.{part}" if name.endswith(".weight") else f"{name}.default"
        spelled[name if age == "without_prefix" else f"base_model.model.{name}"] = value
    if draft.chance(0.2, "buffers beside"):
        spelled["base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if draft.chance(0.3, "fields of today and null"):
        config |= {
            "rank_pattern": {},
            "alpha_pattern": {},
            "megatron_config": None,
            "loftq_config": {},
            "eva_config": None,
        }
        config |= {"trainable_token_indices": None, "layer_replication": None, "revision": None, "auto_mapping": None}
        config |= {"init_lora_weights": True, "fan_in_fan_out": False, "inference_mode": True, "lora_dropout": 0.05}
    else:
        config = {name: value for name, value in config.items() if value is not False}
    if draft.chance(0.2, "targets as a pattern"):
        config["target_modules"] = rf".*\.({'|'.join(config['target_modules'])})"
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    if draft.draw(adapter_safetensors=2, adapter_bin=1) == "adapter_bin":
        torch.save(spelled, folder / "adapter_model.bin")
    else:
        save_file(spelled, folder / "adapter_model.safetensors")


def plant_adapter_fault(draft: Draft, folder: Path) -> str:
    """Damage a written adapter. Returns: what the error must name."""
    config = folder / "adapter_config.json"
    weights = next(folder.glob("adapter_model.*"))
    match draft.draw(
        **{f"FAULT adapter {name}": 1 for name in ("json", "fields", "truncated", "gone", "rank", "half")}
    ):
        case "FAULT adapter json":
            config.write_text(draft.rng.choice([*NO_OBJECTS, "{}"]), encoding="utf-8")
            return "adapter_config"
        case "FAULT adapter fields":
            wrong = {"peft_type": "PREFIX_TUNING", "r": draft.rng.choice(["4", 0, None, -1]), "lora_alpha": "much"}
            wrong |= {
                "layer_replication": [[0, 1]],
                "rank_pattern": ["q_proj"],
                "modules_to_save": 3,
                "target_modules": 3,
            }
            name = draft.rng.choice(list(wrong))
            edit_json(config, **{name: wrong[name]})
            return "adapter_config"
        case "FAULT adapter truncated":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
            return re.escape(weights.name)
        case "FAULT adapter gone":
            weights.unlink()
            return "adapter_model"
        case "FAULT adapter rank":
            edit_json(config, r=7)
            return re.escape(str(folder))
    tensors = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
    lost = draft.rng.choice([name for name in tensors if "lora_A" in name])
    del tensors[lost]
    save_file(tensors, weights) if weights.suffix == ".safetensors" else torch.save(tensors, weights)
    return re.escape(str(folder))
