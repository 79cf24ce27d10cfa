"""Download a model or a data set of Hugging Face or ModelScope -> a folder that is complete and checked, or absent.

  python scripts/download.py --repo_id Qwen/Qwen2.5-0.5B
  python scripts/download.py --hub modelscope --kind dataset --repo_id OWNER/NAME --include '*.jsonl'
An interrupted download goes on when it is run again. On a folder that exists: whether it is complete. Keys are read
from the environment: HF_TOKEN, MODELSCOPE_API_TOKEN; HF_ENDPOINT is a mirror of Hugging Face.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.core.arguments import arg, list_arg
from utils.core.command_line import describe_arguments, run, save_run_config, shell_command
from utils.core.downloads import (
    RemoteFile,
    Repository,
    bytes_here,
    check_space,
    choose_files,
    download_files,
    list_hugging_face,
    list_modelscope,
)
from utils.core.errors import InputError, raise_problems
from utils.core.files import atomic_folder, unfinished_folder
from utils.weights.names import ADAPTER_CONFIG

logger = logging.getLogger("download")

CHAT = ("bash", "scripts/run_inference.sh", "--interactive")

NAMED = 5  # of many files, in messages


@dataclass
class DownloadArguments:
    """What is downloaded, and where to."""

    repo_id: str | None = arg(help="Owner and name on the hub, such as Qwen/Qwen2.5-0.5B.")
    hub: Literal["huggingface", "modelscope"] = arg("huggingface", help="Which hub.")
    kind: Literal["model", "dataset"] = arg("model", help="What the name is of.")
    revision: str | None = arg(help="Branch, tag or commit; default: the hub's own (main, master).")
    output_dir: str | None = arg(help="New folder for it; default: output/models/NAME, output/datasets/NAME.")
    include: list[str] = list_arg(
        help="Patterns of the files that are wanted, such as '*.json' or data/; default: of a model its settings and "
        "one kind of weights (safetensors before .bin before .pth), of a data set everything."
    )
    exclude: list[str] = list_arg(help="Patterns of files to leave out.")
    num_connections: int = arg(4, help="Files that are downloaded at once.")
    dry_run: bool = arg(False, help="Only list the files with their sizes.")
    overwrite: bool = arg(False, help="Replace a folder that holds something else.")

    def __post_init__(self) -> None:
        problems = []
        if self.repo_id is None:
            problems.append("--repo_id: name what is to be downloaded, such as Qwen/Qwen2.5-0.5B")
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo_id):
            problems.append(f"--repo_id {self.repo_id}: need OWNER/NAME as the hub's page has it, no address")
        if not 1 <= self.num_connections <= 32:
            problems.append(f"--num_connections {self.num_connections}: need 1 to 32")
        raise_problems(problems)


def main(args: DownloadArguments) -> dict[str, Any]:
    """Download; returns how much there is and came."""
    listing = list_hugging_face if args.hub == "huggingface" else list_modelscope
    found = listing(str(args.repo_id), args.kind, args.revision)
    files = choose_files(found, args.include, args.exclude)
    repository = Repository(found.name, found.kind, found.revision, tuple(files), found.headers)
    folder = Path(args.output_dir or f"output/{args.kind}s/{found.name.partition('/')[2]}")
    size = sum(file.size for file in files)
    metrics = {"files": len(files), "bytes": size, "downloaded": 0, "output_dir": str(folder)}
    logger.info(
        "%s at %s: %d of %d files, %.3f GB", found.name, found.revision[:12], len(files), len(found.files), size / 1e9
    )
    if args.dry_run:
        print_files(files)
        return metrics
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        check_complete(folder, files)
        report(folder, repository, f"complete already: {len(files)} files, each as the hub has it")
        return metrics

    unfinished = unfinished_folder(folder, repository.key)
    here = sum(bytes_here(unfinished, file) for file in files) if unfinished else 0
    check_space(folder, size - here)
    if here:
        logger.info("going on: %.3f of %.3f GB are there", here / 1e9, size / 1e9)
    began = time.monotonic()
    with atomic_folder(folder, args.overwrite, resume_key=repository.key) as partial:
        fetch_files(repository, partial, here, size, args.num_connections)
        save_run_config(partial, describe_arguments(args), describe(args.hub, repository))
    seconds = max(time.monotonic() - began, 1e-3)
    metrics["downloaded"] = size - here
    rate = (size - here) / 1e6 / seconds
    report(
        folder, repository, f"{len(files)} files, {size / 1e9:.3f} GB, checked; {rate:.1f} MB/s over {seconds:.0f} s"
    )
    return metrics


def fetch_files(repository: Repository, folder: Path, here: int, size: int, connections: int) -> None:
    """Bring the files, with a bar of bytes, their rate and the time that is left."""
    from tqdm import tqdm

    with tqdm(total=size, initial=here, unit="B", unit_scale=True, desc=repository.name, smoothing=0.1) as bar:

        def advance(count: int) -> None:
            with bar.get_lock():  # several threads count
                bar.update(count)

        download_files(repository, folder, connections, advance)


def check_complete(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Raises: InputError naming the files of a half or changed folder."""
    missing = [file.path for file in files if not (folder / file.path).is_file()]
    changed = [file.path for file in files if file.path not in missing and not file.matches(folder / file.path)]
    if missing or changed:
        counts = f"of {len(files)} files {len(missing)} are missing and {len(changed)} are not what the hub has"
        names = ", ".join([*missing, *changed][:NAMED])
        raise InputError(
            f"--output_dir {folder} is there already, but {counts} ({names}); pass another folder, or --overwrite to "
            "download it anew"
        )


def describe(hub: str, repository: Repository) -> dict[str, str]:
    """For the comments of run_config.yaml: the commit, and each file with its published hash."""
    hashes = {
        f"file {file.path}": f"{file.size} {file.sha256 or file.git_hash or 'no hash'}" for file in repository.files
    }
    return {"hub": hub, "revision": repository.revision, **hashes}


def print_files(files: Sequence[RemoteFile]) -> None:
    """Size and name of each."""
    for file in files:
        print(f"{file.size:>15,}  {file.path}")


def report(folder: Path, repository: Repository, done: str) -> None:
    """The summary, the folder and the next command, in the log."""
    unhashed = sum(file.sha256 is None and file.git_hash is None for file in repository.files)
    if unhashed:
        logger.warning("%d files were checked by their size alone: the hub publishes no hash of them", unhashed)
    logger.info("%s\n  files in %s\n  %s", done, folder, next_step(folder, repository.kind))


def next_step(folder: Path, kind: str) -> str:
    """What is mostly done with such a folder."""
    with_base = "then, with the folder of the base model for BASE: "
    if kind == "dataset":
        return with_base + shell_command("bash", "scripts/run_sft.sh", MODEL="BASE", DATA=folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return with_base + shell_command("bash", "scripts/run_merge.sh", MODEL="BASE", LORA=folder)
    packed = sorted(folder.rglob("*.gguf"))
    if packed and not (folder / "config.json").is_file():
        return f"next: {shell_command(*CHAT, '--engine', 'llama.cpp', MODEL=packed[0])}"
    return f"next: {shell_command(*CHAT, MODEL=folder)}"


if __name__ == "__main__":
    run(main, DownloadArguments, description=__doc__)
