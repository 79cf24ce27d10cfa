"""Look at the installation and the machine -> a line on each thing, what works here, and what mends the rest.

  python scripts/doctor.py
  python scripts/doctor.py --model output/demo/assistant --json
Exit status 1: the core (vocabularies, training, merging, chat) cannot work, or the model would be refused. Starts
without any package; nothing is sent anywhere, and no server asked unless --network is given.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.core.arguments import InferenceArguments, arg
from utils.core.command_line import installed_version, run
from utils.core.errors import InputError
from utils.core.installation import (
    Capability,
    Finding,
    check_compiler,
    check_disk,
    check_gpus,
    check_memory,
    check_network,
    check_packages,
    check_processor,
    check_python,
    find_works,
    read_pins,
    read_requirements,
    try_imports,
)

logger = logging.getLogger("doctor")

NAMED = 5  # of what something lacks
HUBS = ("https://huggingface.co", "https://modelscope.cn")


@dataclass
class DoctorArguments:
    """What else is looked at, and how it is told."""

    model: str | None = arg(
        help="Folder of a model: what lies in it, what would be refused, whether tokenizers agree."
    )
    network: bool = arg(False, help="Ask the hubs whether they answer, 5 s each at most.")
    json: bool = arg(False, help="One JSON object instead of lines.")


def main(args: DoctorArguments) -> dict[str, Any]:
    """Print what is found; returns it. Raises: SystemExit(1) if the core cannot work, or the model be opened."""
    requirements = read_requirements()
    imports = try_imports({requirement.package for requirement in requirements if is_installed(requirement.package)})
    cuda = bool(imports.torch.get("devices"))
    findings = [
        check_python(),
        check_processor(),
        check_memory(),
        check_disk(Path.cwd()),
        check_compiler(),
        *check_gpus(imports.torch),
        *(check_network([os.environ.get("HF_ENDPOINT") or HUBS[0], HUBS[1]]) if args.network else []),
        *check_packages(requirements, read_pins(), imports.problems | check_llama_cpp(), cuda),
    ]
    works = list(find_works(findings, cuda))
    core = findings[0].state == "ok" and all(not lacks for capability, lacks in works if capability.core)
    model = check_model(args.model) if args.model and core else []
    mends = remedies(findings)
    result = {
        "core_works": core,
        "findings": [asdict(finding) for finding in [*findings, *model]],
        "works": {capability.name: {"works": not lacks, "lacks": lacks} for capability, lacks in works},
        "remedies": mends,
    }
    if args.json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        print_findings([*findings, *model])
        print_works(works, mends)
        if args.model and not core:
            logger.warning("--model %s is not looked at before the core works", args.model)
    if not core or any(finding.state == "wrong" for finding in model):
        raise SystemExit(1)
    return result


# ---------------------------------------------------------------- looking


def is_installed(package: str) -> bool:
    """Whether there is any version of it."""
    return installed_version(package) is not None


def check_llama_cpp() -> dict[str, str | None]:
    """Whether llama.cpp computes on this processor, where it is installed; it is tried in a process of its own."""
    if not is_installed("llama-cpp-python"):
        return {}
    logging.getLogger("gguf").setLevel(logging.WARNING)
    try:
        from utils.gguf.llamacpp import require_llama_cpp

        require_llama_cpp("doctor.py")
    except (ImportError, InputError) as error:
        return {"llama-cpp-python": str(error)}
    return {}


def check_model(model: str) -> list[Finding]:
    """What inference_hf.py --check says of a folder, and whether other programs cut text as its model file does."""
    from utils.generation.folder_check import FolderCheck
    from utils.text.tokenizer import share_cut_otherwise

    check = FolderCheck(InferenceArguments(model_name_or_path=model))
    findings = [Finding("model", "ok", line.strip()) for line in check.found]
    findings += [Finding("model", "wrong", line) for line in check.refused]
    try:
        share = share_cut_otherwise(model)
    except InputError as error:
        return findings if str(error) in check.refused else [*findings, Finding("same tokens", "wrong", str(error))]
    if share:
        text = f"other programs (AutoTokenizer) cut {100 * share:.0f} % of sample lines unlike the model's own file"
        return [*findings, Finding("same tokens", "wrong", text)]
    return [*findings, Finding("same tokens", "ok", "other programs (AutoTokenizer) cut all sample lines alike")]


# ---------------------------------------------------------------- telling


def remedies(findings: Sequence[Finding]) -> list[str]:
    """Commands that mend what is not there or wrong, each once."""
    return list(dict.fromkeys(finding.remedy for finding in findings if finding.state != "ok" and finding.remedy))


def print_findings(findings: Sequence[Finding]) -> None:
    """A line on each."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.state:6}  {finding.name:{width}}  {finding.text}")


def print_works(works: Sequence[tuple[Capability, list[str]]], commands: Sequence[str]) -> None:
    """What of the toolkit works here, and the commands for the rest."""
    print("\nwhat works here:")
    width = max(len(capability.name) for capability, _ in works)
    for capability, lacks in works:
        more = f" and {len(lacks) - NAMED} more" if len(lacks) > NAMED else ""
        scripts = ", ".join(f"{script}.py" for script in capability.scripts)
        told = f"lacks {', '.join(lacks[:NAMED])}{more}" if lacks else scripts
        print(f"{'no' if lacks else 'yes':6}  {capability.name:{width}}  {told}".rstrip())
    if commands:
        print("\nwhat mends the rest:")
        for command in commands:
            print(f"  {command}")


if __name__ == "__main__":
    run(main, DoctorArguments, description=__doc__)
