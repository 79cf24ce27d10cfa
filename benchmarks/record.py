"""RESULTS.md: one section a benchmark, replaced whenever that benchmark runs again."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
TITLE = "# Measured results\n\nEach section is written by the command it names; run that again to replace it.\n"


def record(section: str, text: str, path: Path = RESULTS) -> None:
    """Replace the section of that name in RESULTS.md, or append it."""
    content = path.read_text(encoding="utf-8") if path.is_file() else TITLE
    head, *sections = re.split(r"^(?=## )", content, flags=re.MULTILINE)
    new = f"## {section}\n\n{text}"
    names = [part.split("\n", 1)[0].removeprefix("## ").strip() for part in sections]
    if section in names:
        sections[names.index(section)] = new
    else:
        sections.append(new)
    path.write_text("\n\n".join(part.strip() for part in [head, *sections]) + "\n", encoding="utf-8")


def describe_run(*packages: str) -> str:
    """Date, machine, package versions and the command line, as Markdown lines."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return (
        f"- {datetime.date.today().isoformat()}, {_cpu_model()}, {cores} cores, "
        f"{_memory_gb():.0f} GB, Python {platform.python_version()}, {versions}\n- `{command}`"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
