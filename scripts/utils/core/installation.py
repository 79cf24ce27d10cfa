"""The installation: required packages and what is there, processor, memory, GPUs, compiler, network.

Written with the standard library alone: it has to say what is missing where nothing is installed yet.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from .command_line import installed_version
from .machine import available_bytes, available_cores

OLDEST_PYTHON = (3, 11)
CONSTRAINTS = "constraints.txt"
IMPORT_SECONDS = 120  # for all of IMPORTED
NETWORK_SECONDS = 5
LEAST_DISK, LEAST_MEMORY = 2.5e9, 2.5e9  # bytes that the demo takes
ROOT = Path(__file__).resolve().parents[3]

# What holds compiled code, or leans on what does, by the name of its package: that a version fits does not say yet
# that it can be imported. In the order of who needs whom.
IMPORTED = {
    "numpy": "numpy",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "protobuf": "google.protobuf",
    "pyarrow": "pyarrow",
    "torch": "torch",
    "transformers": "transformers",
    "bitsandbytes": "bitsandbytes",
    "peft": "peft",
    "deepspeed": "deepspeed",
    "flash-attn": "flash_attn",
    "vllm": "vllm",
}


# ---------------------------------------------------------------- findings

State = Literal["ok", "absent", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, in words, and the command that mends it where there is one."""

    name: str
    state: State
    text: str
    remedy: str | None = None


@dataclass(frozen=True)
class Capability:
    """Something that the toolkit does.

    Attributes:
        packages: all that it needs, as the requirement files call them.
        core: whether the recipe cannot do without it.
        cuda: whether it needs a GPU of NVIDIA's.
    """

    name: str
    scripts: tuple[str, ...]
    packages: tuple[str, ...]
    core: bool = False
    cuda: bool = False


_MODELS = (
    *("torch", "transformers", "tokenizers", "safetensors", "sentencepiece", "protobuf", "numpy", "huggingface_hub"),
    *("PyYAML", "Jinja2", "tqdm", "filelock"),
)
_TRAINING = (*_MODELS, "peft", "accelerate", "matplotlib", "pyarrow")
CAPABILITIES = (
    Capability("vocabulary", ("train_tokenizer", "merge_tokenizers"), (*_MODELS, "pyarrow"), core=True),
    Capability("training", ("pt", "sft", "rm", "ppo", "dpo", "plan_memory"), _TRAINING, core=True),
    Capability(
        "merging, layer cut", ("merge_llama2_with_chinese_lora_low_mem", "prune_layers"), (*_MODELS, "peft"), core=True
    ),
    Capability("chat", ("inference_hf",), _TRAINING, core=True),
    Capability(
        "evaluation",
        (
            "eval_alignment",
            "eval_longbench",
            "eval_multiple_choice",
            "eval_perplexity",
            "eval_answers",
            "report",
            "demo",
        ),
        (*_TRAINING, "jieba", "rouge", "rapidfuzz"),
    ),
    Capability("web chat, arena", ("gradio_demo", "arena"), (*_TRAINING, "gradio")),
    Capability("server", ("openai_api_server",), (*_TRAINING, "fastapi", "uvicorn", "pydantic", "starlette")),
    Capability("answers in JSON", (), ("llguidance",)),
    Capability("downloads", ("download",), ("huggingface_hub", "tqdm", "filelock", "PyYAML")),
    Capability("models behind servers", ("generate_instructions",), ("openai", "rapidfuzz", "tqdm", "PyYAML")),
    Capability("GGUF", ("export_gguf",), (*_MODELS, "gguf")),
    Capability("K-quants, GGUF files as models", (), ("llama-cpp-python",)),
    Capability("4- and 8-bit bases", ("quantize", "compare_formats"), (*_TRAINING, "bitsandbytes", "gguf")),
    Capability("GPTQ, AWQ, FP8", (), (*_MODELS, "llmcompressor")),
    Capability("ZeRO: several GPUs or nodes", (), (*_TRAINING, "deepspeed")),
    Capability("flash-attention", (), ("flash-attn",), cuda=True),
    Capability("vLLM", (), ("vllm",), cuda=True),
    Capability("tests", (), ("pytest", "pytest-xdist", "ruff", "mypy")),
)


# ---------------------------------------------------------------- requirement files


@dataclass(frozen=True)
class Requirement:
    """A line of a requirements file."""

    package: str
    versions: str  # ">=2.11,<3"; empty: any
    file: str


def read_requirements(root: Path = ROOT) -> list[Requirement]:
    """What requirements*.txt ask for on this system, those that `make setup` installs first."""
    found = []
    for path in sorted(root.glob("requirements*.txt"), key=lambda path: (path.name not in _BOUNDED, path.stem)):
        for line in path.read_text(encoding="utf-8").splitlines():
            text, _, marker = line.partition("#")[0].partition(";")
            system = re.search(r'sys_platform\s*==\s*["\'](\w+)', marker)
            match = re.match(r"([\w.-]+)(?:\[[\w,-]*\])?\s*([<>=!][^\s]*)?", text.strip())
            if match and (system is None or system[1] == sys.platform):
                found.append(Requirement(match[1], match[2] or "", path.name))
    return found


def read_pins(root: Path = ROOT) -> dict[str, str]:
    """The versions that were tested together, by package in lower case."""
    path = root / CONSTRAINTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pairs = (line.partition("#")[0].strip().split("==") for line in lines)
    return {pair[0].lower(): pair[1] for pair in pairs if len(pair) == 2}


def version_fits(version: str, versions: str) -> bool:
    """Whether a version lies in a range such as ">=2.11,<3"; what follows its numbers (2.13.0+cpu) does not count."""
    ours = _numbers(version)
    compare = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    for clause in filter(None, versions.split(",")):
        match = re.match(r"\s*(>=|<=|==|!=|>|<)\s*([\w.]+)", clause)
        if match and not compare[match[1]](*_same_length(ours, _numbers(match[2]))):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else (0,)


def _same_length(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    width = max(len(a), len(b))
    return a + (0,) * (width - len(a)), b + (0,) * (width - len(b))


_BOUNDED = ("requirements.txt", "requirements-serve.txt", "requirements-dev.txt")  # whose versions CONSTRAINTS pins
GPU_FILE = "requirements-gpu.txt"


def install_command(file: str) -> str:
    """How a requirements file is installed, to paste into a shell."""
    others = {
        GPU_FILE: f"pip install --no-build-isolation -r {GPU_FILE}",
        "requirements-llamacpp.txt": "make setup-llamacpp  # or: pip install -r requirements-llamacpp.txt",
    }
    own_environment = f"pip install -r requirements.txt -r {file}  # in an environment of its own"
    return f"pip install -r {file} -c {CONSTRAINTS}" if file in _BOUNDED else others.get(file, own_environment)


# ---------------------------------------------------------------- packages


def check_python() -> Finding:
    """The interpreter."""
    oldest = ".".join(map(str, OLDEST_PYTHON))
    own = "in a virtual environment" if sys.prefix != sys.base_prefix else "not in a virtual environment"
    text = f"{platform.python_version()} ({platform.python_implementation()}, {own})"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "wrong", f"{text}; need {oldest} or newer", f"make setup PYTHON=python{oldest}")
    return Finding("python", "ok", text)


def check_packages(
    requirements: Sequence[Requirement], pins: Mapping[str, str], imports: Mapping[str, str | None], cuda: bool
) -> list[Finding]:
    """A finding for each required package.

    Args:
        imports: what went wrong where a package was imported, None for nothing, by package.
        cuda: whether there is a GPU; without one nobody is told to install what only GPUs run.
    """
    findings = []
    for requirement in requirements:
        remedy = install_command(requirement.file) if cuda or requirement.file != GPU_FILE else None
        version = installed_version(requirement.package)
        asked = f"{requirement.file} asks for {requirement.versions or 'any'}"
        if version is None:
            findings.append(Finding(requirement.package, "absent", asked, remedy))
        elif not version_fits(version, requirement.versions):
            findings.append(Finding(requirement.package, "wrong", f"{version}; {asked}", remedy))
        elif problem := imports.get(requirement.package):
            findings.append(Finding(requirement.package, "wrong", f"{version} cannot be imported: {problem}", remedy))
        else:
            pin = pins.get(requirement.package.lower())
            other = f" (tested: {pin})" if pin and _numbers(pin) != _numbers(version) else ""
            findings.append(Finding(requirement.package, "ok", f"{version}{other}"))
    return findings


@dataclass
class Imports:
    """What became of importing packages in processes of their own.

    Attributes:
        problems: by package; None: it can be imported.
        torch: what torch says of GPUs.
    """

    problems: dict[str, str | None] = field(default_factory=dict)
    torch: dict[str, Any] = field(default_factory=dict)


def try_imports(packages: Collection[str], seconds: float = IMPORT_SECONDS) -> Imports:
    """Import packages of IMPORTED; one that ends its process (built for another processor) is named, others go on."""
    done = Imports()
    waiting = [package for package in IMPORTED if package in packages]
    code = "import sys\nfrom utils.core.installation import report_imports\nreport_imports(sys.argv[1:])"
    paths = filter(None, (str(ROOT / "scripts"), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_DISABLE_TELEMETRY": "1"}
    while waiting:
        command = [sys.executable, "-c", code, *(f"{package}={IMPORTED[package]}" for package in waiting)]
        try:
            child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
            lines, ended = child.stdout.splitlines(), _describe_end(child.returncode)
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            lines, ended = output.decode(errors="replace").splitlines(), None
        for line in lines:
            if line.startswith(_REPORT):
                report = json.loads(line[len(_REPORT) :])
                done.problems[report["package"]] = report["problem"]
                done.torch |= report["torch"]
        waiting = [package for package in waiting if package not in done.problems]
        if ended is None:
            return Imports(done.problems | dict.fromkeys(waiting, f"not done after {seconds:g} s"), done.torch)
        if waiting:  # the first of them ended the process
            done.problems[waiting.pop(0)] = ended
    return done


_REPORT = "imported: "  # begins the lines that count among what libraries print


def report_imports(packages: Sequence[str]) -> None:
    """In a process of its own: import PACKAGE=MODULE, and write a line of JSON on each as soon as it is there."""
    for package, _, name in (word.partition("=") for word in packages):
        problem, torch = None, {}
        try:
            module = import_module(name)
            torch = _describe_torch(module) if package == "torch" else {}
        except Exception as error:  # whatever an installation may be broken by
            problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
        report = {"package": package, "problem": problem, "torch": torch}
        sys.stdout.write(f"\n{_REPORT}{json.dumps(report)}\n")
        sys.stdout.flush()


def _describe_torch(torch: Any) -> dict[str, Any]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"{properties.name}, {properties.total_memory / 1e9:.1f} GB")
    return {"cuda": torch.version.cuda, "devices": devices}


def _describe_end(status: int) -> str:
    if status >= 0:
        return f"its import ended the process with status {status}"
    name = signal.Signals(-status).name
    other = ": it is built for another processor" if name == "SIGILL" else ""
    return f"its import was ended by {name}{other}"


# ---------------------------------------------------------------- the machine


def check_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """The kind of processor, the cores for this process, and the instructions that decide how fast it is."""
    content = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", content, re.M)
    flags = set((re.search(r"^flags\s*:\s*(.+)$", content, re.M) or [" ", ""])[1].split())
    kinds = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 BF16": "avx512_bf16", "AMX BF16": "amx_bf16"}
    has = ", ".join(f"{kind} {'yes' if flag in flags else 'no'}" for kind, flag in kinds.items()) if flags else ""
    parts = [name[1] if name else platform.machine(), f"{available_cores()} cores", has]
    slow = bool(flags) and "avx2" not in flags
    text = "; ".join(filter(None, parts)) + ("; without AVX2 everything is very slow" if slow else "")
    return Finding("processor", "wrong" if slow else "ok", text)


def check_memory() -> Finding:
    """Memory that can be taken now."""
    free, all_bytes = available_bytes(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{free / 1e9:.1f} of {all_bytes / 1e9:.1f} GB free"
    return Finding("memory", "ok", text) if free >= LEAST_MEMORY else Finding(
        "memory", "wrong", f"{text}; the demo takes {LEAST_MEMORY / 1e9:g} GB"
    )  # fmt: skip


def check_disk(folder: Path) -> Finding:
    """The disk that results are written to."""
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free in this folder"
    return Finding("disk", "ok", text) if free >= LEAST_DISK else Finding(
        "disk", "wrong", f"{text}; installation and demo take {LEAST_DISK / 1e9:g} GB"
    )  # fmt: skip


def check_compiler() -> Finding:
    """A C++ compiler, which llama.cpp, DeepSpeed's own operations and torch.compile are built with."""
    names = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        text = "none; only llama.cpp, DeepSpeed's own operations and --torch_compile need one"
        return Finding("C++ compiler", "absent", text, "sudo apt install g++")
    return Finding("C++ compiler", "ok", _first_line([path, "--version"]) or path)


def check_gpus(torch: Mapping[str, Any]) -> list[Finding]:
    """NVIDIA's driver, and whether torch finds the same GPUs.

    Args: torch: of `try_imports`; empty where torch cannot be imported.
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    listed = [line for line in _output(query).splitlines() if line.strip()]
    findings = [Finding("GPU", "ok", line) for line in listed] or [Finding("GPU", "absent", "none of NVIDIA's found")]
    if torch:
        cuda, devices = torch["cuda"], torch["devices"]
        if listed and not devices:
            build = f"for CUDA {cuda}" if cuda else "for processors alone"
            remedy = f"pip uninstall --yes torch && {install_command('requirements.txt')}"
            text = f"torch is built {build} and finds no GPU"
            findings.append(Finding("CUDA", "wrong", f"{text}; the driver may be too old for it", remedy))
        else:
            found = "; ".join(devices)
            text = f"torch is built for CUDA {cuda}" if cuda else "torch is built for processors alone"
            findings.append(Finding("CUDA", "ok" if devices else "absent", f"{text}; {found}" if found else text))
    return findings


def check_network(addresses: Sequence[str]) -> list[Finding]:
    """Whether servers answer, each asked once for its header."""
    findings = []
    for address in addresses:
        try:
            request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "doctor"})
            with urllib.request.urlopen(request, timeout=NETWORK_SECONDS):
                findings.append(Finding("network", "ok", f"{address} answers"))
        except urllib.error.HTTPError:
            findings.append(Finding("network", "ok", f"{address} answers"))  # with a refusal, but it is there
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            findings.append(Finding("network", "absent", f"{address} does not answer: {reason}"))
    return findings


def _output(command: Sequence[str]) -> str:
    """What a command prints; nothing, if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _first_line(command: Sequence[str]) -> str:
    return _output(command).partition("\n")[0].strip()


# ---------------------------------------------------------------- what works


def find_works(findings: Sequence[Finding], cuda: bool) -> Iterator[tuple[Capability, list[str]]]:
    """Each capability, and what it lacks: packages that are not ok, a GPU."""
    ok = {finding.name for finding in findings if finding.state == "ok"}
    for capability in CAPABILITIES:
        lacks = [package for package in capability.packages if package not in ok]
        yield capability, [*lacks, *(["a GPU with CUDA"] if capability.cuda and not cuda else [])]
