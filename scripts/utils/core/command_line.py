"""The command line: flags and config files into dataclasses, what a run records of them, and how a script ends.

A config file is only a saved command line: `python scripts/sft.py config.yaml --learning_rate 1e-4`; what the command
line says counts more than the file, and the file more than defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import errno
import gc
import importlib.util
import inspect
import json
import logging
import math
import os
import shlex
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, raise_problems
from .files import atomic_file, read_text
from .language import with_faq
from .old_flags import DROPPED, NTK_FLAGS, RENAMED, REPLACED_SWITCHES, translate_old_flags

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from .arguments import InferenceArguments

CHECKOUT = Path(__file__).parents[3]  # the folder of scripts and examples
EXAMPLE_PAIRS = "examples/data/rlhf/preferences_heldout.jsonl"  # what a new reward model may be tried on
RUN_CONFIG = "run_config.yaml"
NULL = "null"  # no value: how YAML and JSON spell it, and so the command line
RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "sentencepiece",
    "bitsandbytes",
    "deepspeed",
)


INSTALL = (
    "run `make setup`, or in an environment of your own: pip install -r requirements.txt -c constraints.txt; "
    "python scripts/doctor.py says what else is missing"
)

# ---------------------------------------------------------------- parsing


def build_parser(types: Sequence[type], description: str | None = None) -> ArgumentParser:
    """The argparse parser of some dataclasses; its help text is the scripts' reference: a part for each of them.

    What a class inherits of transformers comes last, and but for its USUAL_FLAGS with --help_all alone.
    """
    import argparse

    try:
        base = _parser_class()
    except ImportError as error:  # absent, or beside other packages than it needs
        return _plain_parser(types, description, str(error).strip().partition("\n")[0])

    class Parser(base):  # type: ignore[misc, valid-type]
        def error(self, message: str) -> typing.NoReturn:
            raise InputError(f"{message}; --help tells of every flag")  # without the list of all in front of it

    parser: ArgumentParser = Parser(
        types,
        allow_abbrev=False,
        description=description,
        usage="%(prog)s [config.yaml] [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _group_flags(parser, types)
    optional = _optional_names(types)
    for action in parser._actions:
        if action.dest in optional and action.choices is None and callable(action.type):
            action.type = _or_null(action.type)
    return parser


def _parser_class() -> type[ArgumentParser]:
    """transformers' parser of dataclasses, from its file alone: the package around it takes a second.

    Raises: ImportError.
    """
    package = None if "transformers" in sys.modules else importlib.util.find_spec("transformers")
    if package is not None and package.submodule_search_locations:
        file = Path(package.submodule_search_locations[0]) / "hf_argparser.py"
        spec = importlib.util.spec_from_file_location("hf_argparser", file)
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            with contextlib.suppress(ImportError, FileNotFoundError):  # a version in which it needs the package
                spec.loader.exec_module(module)
                alone: type[ArgumentParser] = module.HfArgumentParser
                return alone
    from transformers.hf_argparser import HfArgumentParser

    return HfArgumentParser


def _plain_parser(types: Sequence[type], description: str | None, reason: str) -> ArgumentParser:
    """The same where transformers cannot be imported, for what says why: texts and switches alone.

    Raises: InputError for flags of other kinds: such a script would not get far.
    """
    from argparse import ArgumentParser, RawDescriptionHelpFormatter

    parser = ArgumentParser(allow_abbrev=False, description=description, formatter_class=RawDescriptionHelpFormatter)
    for kind in types:
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            name, help_text = f"--{item.name}", item.metadata["help"]
            if hints[item.name] is bool and item.default is False:
                parser.add_argument(name, action="store_true", help=help_text)
            elif hints[item.name] in (str, str | None):
                parser.add_argument(name, default=item.default, help=help_text)
            else:
                raise InputError(f"transformers cannot be imported ({reason}); {INSTALL}")
    return parser


def _group_flags(parser: ArgumentParser, types: Sequence[type]) -> None:
    """Put the flags of each dataclass under its docstring's first line, and hide what few ask for."""
    import argparse

    hidden: dict[argparse.Action, str | None] = {}

    def move(names: Sequence[str], title: str) -> list[argparse.Action]:
        group = parser.add_argument_group(title)
        moved = [action for action in parser._optionals._group_actions if action.dest in names]
        for action in moved:  # of a switch that is on by default there are two, --x and --no_x
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)
        return moved

    foreign: list[tuple[type, list[str]]] = []
    for kind in types:
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        own = {name for part in kind.__mro__ if not _is_foreign(part) for name in inspect.get_annotations(part)}
        title = (kind.__doc__ or kind.__name__).strip().partition("\n")[0].rstrip(".")
        move([name for name in names if name in own], title)
        if others := [name for name in names if name not in own]:
            foreign.append((kind, others))
    for kind, names in foreign:
        usual = getattr(kind, "USUAL_FLAGS", names)
        move([name for name in names if name in usual], "Of transformers, those most asked for")
        if rest := [name for name in names if name not in usual]:
            hidden |= {
                action: action.help for action in move(rest, f"Of transformers, {len(rest)} others (--help_all)")
            }
    if not hidden:
        return
    for action in hidden:
        action.help = argparse.SUPPRESS

    class HelpAll(argparse.Action):
        def __call__(self, parser: ArgumentParser, *_: Any) -> None:
            for action, text in hidden.items():
                action.help = text
            parser.print_help()
            parser.exit()

    parser.add_argument(
        "--help_all",
        action=HelpAll,
        nargs=0,
        help="this help, with all flags of transformers",
        dest="help",
        default=argparse.SUPPRESS,
    )


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "transformers"


def _optional_names(types: Sequence[type]) -> set[str]:
    """The flags that may have no value."""
    hints = [(name, hint) for kind in types for name, hint in typing.get_type_hints(kind).items()]
    return {name for name, hint in hints if type(None) in typing.get_args(hint)}


def _or_null(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """The conversion of a flag that may also have no value, which the command line spells as YAML does."""

    def converted(text: str) -> Any:
        return None if text == NULL else convert(text)

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse names it where a value is wrong
    return converted


def parse_args(
    *types: type | str,
    argv: Sequence[str] | None = None,
    documented: Sequence[str] = (),
    description: str | None = None,
) -> tuple[Any, ...]:
    """Parse `[config.yaml|json] [--flag value ...]` into one instance of each dataclass in `types`.

    Args:
        types: dataclasses, or "module:name" of one whose import takes seconds (Ctrl-C then ends those well too).
    Raises: InputError for an unknown key or flag, with the nearest known name; argparse exits with 2 on a bad value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _refuse_other_encodings(argv)
    kinds = [resolve_type(kind) for kind in types]
    parser = build_parser(kinds, description)
    known = {action.dest for action in parser._actions}
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        flags, lists = _read_config(argv[0], known, _optional_names(kinds), documented)
        _set_lists(argv[0], parser, lists)
        argv = flags + argv[1:]
    argv = translate_old_flags(argv, known, documented)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(_describe_unknown("command line", [flag.removeprefix("--") for flag in unknown], known))
    raise_problems(
        [
            f"--{name} {value}: need a finite number"
            for name, value in vars(namespace).items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
    )
    instances = []
    for kind in kinds:
        names = {field.name for field in dataclasses.fields(kind) if field.init}
        try:
            instances.append(kind(**{name: value for name, value in vars(namespace).items() if name in names}))
        except ValueError as error:  # transformers' own checks of its arguments
            raise InputError(str(error)) from None
    return tuple(instances)


def _refuse_other_encodings(argv: Sequence[str]) -> None:
    """Raises: InputError for words whose bytes are no UTF-8: no tokenizer or file of settings takes such text."""
    flag = "command line"
    for word in argv:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = word.encode(errors="backslashreplace").decode()
            raise InputError(
                f"{flag}: not UTF-8: {shown}; set the terminal to UTF-8 (its locale, such as C.UTF-8), or put the "
                "text into a file"
            ) from None


def resolve_type(kind: type | str) -> type:
    """The dataclass itself, or the one that "module:name" names."""
    if not isinstance(kind, str):
        return kind
    module, _, name = kind.partition(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _describe_unknown(where: str, names: Sequence[str], known: set[str]) -> str:
    described = []
    for name in names:
        near = difflib.get_close_matches(name.partition("=")[0], sorted(known), n=1)
        described.append(f"'{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
    return f"{where}: unknown: {', '.join(described)}"


def _read_config(
    path: str, known: set[str], optional: set[str], documented: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """A config file as words of a command line, and its lists by their flag's name."""
    import yaml

    if not Path(path).is_file():
        raise InputError(f"config file not found: {path}")
    try:
        settings = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        raise InputError(f"{path}{'' if line is None else f':{line + 1}'}: broken YAML: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: need 'name: value' lines, got {type(settings).__name__}")
    accepted = known | {old for old, new in RENAMED.items() if new in known} | set(REPLACED_SWITCHES) | set(DROPPED)
    accepted |= set(NTK_FLAGS if "rope_scaling" in known else ())
    if unknown := [str(name) for name in settings if name not in accepted]:
        raise InputError(_describe_unknown(path, unknown, known))
    flags: list[str] = []
    lists: dict[str, list[str]] = {}
    for name, value in settings.items():
        if isinstance(value, list):
            for flag in translate_old_flags([f"--{name}="], known, documented):
                lists[flag[2:-1]] = [_to_word(item) for item in value]
        elif value is not None or name in optional:
            flags.append(f"--{name}={_to_word(value)}")  # by "=", since a value may begin with dashes
    return flags, lists


def _to_word(value: Any) -> str:
    """A value as the command line spells it, for the parser to convert: YAML reads 1e-4 as a string."""
    return json.dumps(value) if value is None or isinstance(value, (bool, dict)) else str(value)


def _set_lists(path: str, parser: ArgumentParser, lists: dict[str, list[str]]) -> None:
    """Make a file's lists the parser's defaults: as words of a command line, none of theirs could begin with dashes.

    A flag that takes one text has its parts joined by commas, as --target_modules.
    """
    actions = {action.dest: action for action in reversed(parser._actions)}
    for name, words in lists.items():
        action, convert = actions[name], actions[name].type
        values: Any = words
        if action.nargs == "+" and callable(convert):
            try:
                values = [convert(word) for word in words]
            except (ValueError, TypeError):
                raise InputError(f"{path}: {name}: {words}: not all are {getattr(convert, '__name__', '')}") from None
        elif action.nargs != "+":
            values = ",".join(words) or action.default
        parser.set_defaults(**{name: values})


# ---------------------------------------------------------------- the record of a run


def describe_arguments(*arguments: Any) -> dict[str, Any]:
    """The plain settings that differ from their defaults: what run_config.yaml holds."""
    settings: dict[str, Any] = {}
    for instance in arguments:
        given = getattr(instance, "given", {})  # what was asked for, where the dataclass filled it in from the machine
        for field in dataclasses.fields(instance):
            if not field.init:
                continue
            value = given.get(field.name, getattr(instance, field.name))
            value = _plain(value)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            default = _plain(default)
            plain = value is None or isinstance(value, (str, int, float, bool, list, dict))
            if plain and value != default:
                settings[field.name] = value
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def save_run_config(folder: str | Path, settings: dict[str, Any], notes: dict[str, str] | None = None) -> None:
    """Write run_config.yaml: valid as a config file; package versions and `notes` stand in its comments."""
    import yaml

    lines = [f"# {name}: {value}" for name, value in (notes or {}).items()]
    lines += [f"# {name}: {version}" for name, version in describe_environment().items()]
    with atomic_file(Path(folder) / RUN_CONFIG) as file:
        file.write("\n".join(lines) + "\n")
        file.write(yaml.safe_dump(settings, allow_unicode=True, sort_keys=True))


def describe_environment(*others: str) -> dict[str, str]:
    """Versions of Python and of the packages that decide results: RECORDED_PACKAGES and `others`."""
    names = (*RECORDED_PACKAGES, *others)
    return {"python": sys.version.split()[0], **{name: installed_version(name) or "not installed" for name in names}}


def installed_version(package: str) -> str | None:
    """None: not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------- running a script


def shell_command(*words: str | Path, **variables: str | Path) -> str:
    """A command to paste into a shell: NAME=value ... word ..., quoted where the shell would read them otherwise.

    scripts/... and examples/... are this project's own, wherever the shell stands.
    """
    settings = [f"{name}={shlex.quote(_from_here(value))}" for name, value in variables.items()]
    return " ".join([*settings, shlex.join(map(_from_here, words))])


def _from_here(word: str | Path) -> str:
    text = str(word)
    if text.startswith(("scripts/", "examples/")) and not Path(text).exists() and (CHECKOUT / text).exists():
        return str(CHECKOUT / text)
    return text


def select_gpus(args: InferenceArguments) -> None:
    """Let this process see only the GPUs asked for; before torch first looks for them."""
    if args.only_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif args.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpus


def run(
    main: Callable[..., Any], *types: type | str, documented: Sequence[str] = (), description: str | None = None
) -> None:
    """Parse, call `main`, and end with one clear line and a non-zero status where the user can mend it.

    Exit status: 2 bad input, 1 the system refused (no space left), 130 interrupted.
    """
    # No telemetry from the libraries below; set before they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    start_log()
    # torch.compile does nothing unless it is asked for: bitsandbytes calls it when it is imported, and loading the
    # compiler is a third of a start.
    undecided = "TORCHDYNAMO_DISABLE" not in os.environ
    if undecided:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Nearly all that imports make stays: looking for cycles as often as Python does takes a seventh of a start.
    gc.set_threshold(10_000, 10, 10)
    try:
        arguments = parse_args(*types, documented=documented, description=description)
        if undecided and any(getattr(part, "torch_compile", False) for part in arguments):
            del os.environ["TORCHDYNAMO_DISABLE"]
        main(*arguments)
        # The end of the process need not look through all that was loaded, which takes a second. (What then stands in
        # a cycle is not told of the end; files are closed where they are opened.)
        gc.freeze()
    except InputError as error:
        _fail(with_faq(f"error: {error}"), 2)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("utils", "None"):
            raise  # this project's own fault
        _fail(f"error: the package {error.name} is not installed; {INSTALL}", 2)
    except ImportError as error:
        if error.name:
            raise  # a module lacks what another wants of it
        reason = str(error).strip().partition("\n")[0]  # transformers, of packages that it needs otherwise
        _fail(f"error: packages do not go together: {reason}; {INSTALL}", 2)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):  # of reading, too: the system does not say which it was
            place = f"{error.filename}: " if error.filename else ""
            _fail(
                with_faq(
                    f"error: {place}{error.strerror}; pass files that you may read and folders that you may write to"
                ),
                2,
            )
        if error.errno == errno.EROFS:
            _fail(f"error: {error.strerror}{_named(error)}; pass a folder that you may write to", 2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = f"no space left on the device{_named(error)}; free some, then run the same command again"
        _fail(with_faq(f"error: {problem}"), 1)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to go on", 130)


def start_log() -> None:
    """Begin the log: lines with their time, without what libraries say of themselves."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    # It warns about an optional kernel whenever it is imported without a GPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # The tensors that a reward model's base lacks, in a table: what is missing unasked has been refused before.
    logging.getLogger("transformers.utils.loading_report").setLevel(logging.ERROR)
    # It is imported on machines without a GPU, too, where nobody asked for it.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in str(record.msg))
    for client in ("httpx", "httpx2"):  # they name every request
        logging.getLogger(client).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # from one library to another


def _named(error: OSError) -> str:
    return f" while writing {error.filename}" if error.filename else ""


def _fail(message: str, status: int) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    sys.exit(status)
