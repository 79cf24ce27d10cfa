"""Runs: who may write into an output folder, what is resumed, and when a checkpoint or a run counts as complete."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.arguments import ExtendArguments, LoraArguments
from ..core.command_line import RUN_CONFIG, describe_arguments, save_run_config
from ..core.errors import InputError
from ..core.files import HeldFolder, atomic_file, read_json, remove, write_json
from .arguments import RunArguments, check_embeddings
from .flags import check_shared_rows

logger = logging.getLogger(__name__)

FINISHED = "all_results.json"  # the last file a run writes; a folder without it is unfinished
COMPLETE = "complete"  # the last file of a checkpoint; a checkpoint without it is removed
INPUTS = "run_inputs.json"  # hashes of what the run learns from; other data cannot go on where it stopped
CHECKPOINT_PREFIX = "checkpoint-"
# Settings that may change between the two halves of an interrupted run without changing the weights it ends with.
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "restart", "seed", "data_cache_dir", "preprocessing_num_workers",
    "ddp_timeout", "dataloader_num_workers", "disable_tqdm", "log_level", "logging_first_step", "logging_steps",
    "logging_strategy", "questions", "report_to", "run_name", "save_steps", "save_strategy", "save_total_limit",
    "do_train", "local_rank", "resume_from_checkpoint",
}  # fmt: skip


@dataclass
class Run:
    """What open_run decided.

    Attributes:
        checkpoint: where to resume, None to start.
        settings: what run_config.yaml records.
        replaces: whether the folder holds a run that the user allowed to go.
        held: keeps other runs out of the folder; None in processes other than the first.
    """

    folder: Path
    checkpoint: Path | None
    settings: dict[str, Any]
    replaces: bool
    held: HeldFolder | None = None

    def release(self) -> None:
        """Let other runs write the folder."""
        if self.held is not None:
            self.held.release()


def open_run(args: RunArguments, *arguments: Any) -> Run:
    """Decide whether this run starts, resumes or is refused; nothing in the folder changes yet, so that bad data costs
    nothing. From here on no other run writes it.

    Sets the recorded seed in `args` when a run is resumed, and seeds the process.
    Raises: InputError if output_dir holds a finished run, a run with other settings, or anything else, or another run
        is writing it; or if a flag of the run has no effect beside the other arguments.
    """
    assert args.output_dir is not None
    kinds = {type(each): each for each in arguments}
    if LoraArguments in kinds:
        check_embeddings(args, kinds.get(ExtendArguments), kinds[LoraArguments])
    check_shared_rows(args, args.sequence_parallel_size, args.world_size)
    folder = Path(args.output_dir)
    run = Run(folder, None, describe_arguments(*arguments, args), replaces=False)
    if folder.is_file():
        raise InputError(f"--output_dir {folder} is a file; pass the name of a folder")
    if args.process_index == 0:
        run.held = HeldFolder(folder)
    if folder.is_dir() and any(not item.name.startswith(".") for item in folder.iterdir()):  # a killed write's rest
        _inspect(run, args)
    prepare_process(args.seed)  # last: a run that resumes has the recorded seed by now
    return run


def _inspect(run: Run, args: RunArguments) -> None:
    folder = run.folder
    if not (folder / RUN_CONFIG).is_file():
        raise InputError(f"--output_dir {folder} holds files that are no training run; pass another folder")
    finished = (folder / FINISHED).is_file()
    if finished and not (args.overwrite_output_dir or args.restart):
        raise InputError(f"--output_dir {folder} holds a finished run; pass another folder, or --overwrite_output_dir")
    checkpoint = last_checkpoint(folder)
    # A run that stopped before its first checkpoint has nothing to keep.
    if finished or args.restart or checkpoint is None:
        run.replaces = True
        return
    recorded = _read_settings(folder)
    # Refused rather than mixed: the result would be that of neither command.
    if changed := changed_settings(recorded, run.settings):
        raise InputError(
            f"--output_dir {folder} holds an unfinished run with other settings ({', '.join(changed)}); repeat them "
            "to resume, pass another folder, or --restart to start over"
        )
    if recorded.get("seed", 42) != args.seed:
        logger.warning("resuming with the recorded seed %s, not %s", recorded.get("seed", 42), args.seed)
        args.seed = recorded.get("seed", 42)
    logger.info("resuming from %s", checkpoint)
    run.checkpoint = checkpoint


def start_run(run: Run, inputs: dict[str, Any], is_main_process: bool) -> None:
    """Take the folder: remove what is replaced or was cut off, and record settings and the hashes of the inputs.

    Args: inputs: JSON-like, for instance the tokenizer's fingerprint and the keys of the token caches.
    Raises: InputError if the run being resumed learned from other inputs.
    """
    if not is_main_process:
        return
    inputs = json.loads(json.dumps(inputs))  # as they are read back: tuples are lists, and keys are strings
    if run.checkpoint is not None:
        recorded = read_json(run.folder / INPUTS)
        if changed := [name for name in inputs if recorded.get(name) != inputs[name]]:
            # Older versions recorded "train" and "zh" where "train/zh" stands now, and made other keys.
            if not all("/" in name for name in recorded.get("data", {})):
                raise InputError(
                    f"--output_dir {run.folder} holds an unfinished run of an older version of this program, which "
                    "recorded its data in another way, so that nothing says whether it is the same; resume it with "
                    "that version, pass another folder, or --restart to start over"
                )
            raise InputError(
                f"--output_dir {run.folder} holds an unfinished run with other {', '.join(changed)} (the contents "
                "changed since it began); restore them to resume, pass another folder, or --restart to start over"
            )
        for checkpoint in run.folder.glob(f"{CHECKPOINT_PREFIX}*"):
            if not (checkpoint / COMPLETE).is_file():
                remove(checkpoint)  # its writing was cut off
        return
    if run.replaces:
        logger.info("replacing the run in %s", run.folder)
        remove(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    # The settings first: they say that this is a run, and one that is killed here starts over.
    save_run_config(run.folder, run.settings, {"command": shlex.join(sys.argv)})
    write_json(run.folder / INPUTS, inputs)


def _read_settings(folder: Path) -> dict[str, Any]:
    import yaml

    settings: dict[str, Any] = yaml.safe_load((folder / RUN_CONFIG).read_text(encoding="utf-8")) or {}
    return settings


def changed_settings(recorded: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The settings that differ and would change the weights, each as "name old -> new"."""
    current = json.loads(json.dumps(settings))  # as YAML gives them back, so that equal settings compare equal
    names = sorted((recorded.keys() | current.keys()) - FREE_TO_CHANGE)
    # What is not there has its default, which None need not be.
    default = object()
    changed = [name for name in names if recorded.get(name, default) != current.get(name, default)]
    return [f"{name} {recorded.get(name)!r} -> {current.get(name)!r}" for name in changed]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    # By number: sorted as names, checkpoint-1000 would come before checkpoint-200.
    complete = [path.parent for path in folder.glob(f"{CHECKPOINT_PREFIX}*/{COMPLETE}")]
    return max(complete, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step a checkpoint folder's name tells."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def seal_checkpoint(folder: Path, step: int, keep: int | None, best: str | None) -> None:
    """Mark checkpoint `step` complete, then remove all but the newest `keep` (and the best)."""
    with atomic_file(folder / f"{CHECKPOINT_PREFIX}{step}" / COMPLETE) as file:
        file.write(f"{step}\n")
    if not keep:
        return
    # A kill between the two leaves a checkpoint too many, never one too few.
    for checkpoint in sorted(folder.glob(f"{CHECKPOINT_PREFIX}*"), key=checkpoint_step)[:-keep]:
        if best is None or checkpoint.name != Path(best).name:
            shutil.rmtree(checkpoint, ignore_errors=True)


@contextlib.contextmanager
def named_disk_errors(folder: Path) -> Iterator[None]:
    """Turn what torch and safetensors raise on a full disk into the OSError the system gave them."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        # Their messages differ with version and place of failure, so the disk itself is asked too.
        if "No space left" in str(error) or shutil.disk_usage(folder).free < 1 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def prepare_process(seed: int) -> None:
    """Seed every generator."""
    from transformers import set_seed

    set_seed(seed)
    # fp16 leaves out a step whose gradients overflow, and PPO's schedule begins one step ahead.
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")


def format_number(value: Any) -> str:
    """For a person: four digits that count, thousands set off; what is no number, or a name's, as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def finish_run(folder: Path, metrics: dict[str, Any], next_command: str) -> None:
    """Write the results, which marks the run finished, and log its summary."""
    write_json(folder / FINISHED, metrics)
    figures = {name: value for name, value in metrics.items() if not isinstance(value, list)}
    width = max(map(len, figures))
    lines = [f"  {name:<{width}}  {format_number(value)}" for name, value in figures.items()]
    logger.info("finished\n%s\n  files in %s\n  next: %s", "\n".join(lines), folder, next_command)
