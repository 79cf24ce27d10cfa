"""Write what plan_memory.py says into the header of every config file here; shapes/ holds the models' config.json.

python examples/configs/plan_headers.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))

MARK = "# Memory of each GPU as planned, not measured: "
ZERO2 = "scripts/configs/ds_zero2_no_offload.json"


def main() -> None:
    """Every file's line anew."""
    for path in sorted(HERE.glob("*.yaml")):
        line = memory_line(path)
        text = path.read_text(encoding="utf-8")
        others = [old for old in text.splitlines(keepends=True) if not old.startswith(MARK)]
        header = next(number for number, old in enumerate(others) if not old.startswith("#"))
        path.write_text("".join([*others[:header], line + "\n", *others[header:]]), encoding="utf-8")
        print(f"{path.name}: {line.removeprefix(MARK)}")


def memory_line(path: Path) -> str:
    """The header line: as the file stands, shared among 8 GPUs, and an adapter's base in other bits."""
    import yaml

    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    alone, shared = planned_gb(path)
    parts = [f"{alone:.1f} GB", f"8 GPUs with --deepspeed {ZERO2} {shared:.1f} GB"]
    if not settings.get("full_finetuning"):
        other = "4" if settings["load_in_kbits"] == 16 else "16"
        parts.append(f"--load_in_kbits {other} {planned_gb(path, '--load_in_kbits', other)[0]:.1f} GB")
    return MARK + "; ".join(parts)


def planned_gb(path: Path, *flags: str) -> tuple[float, float]:
    """GB (1e9 bytes) of each GPU that a run of this file needs on one GPU, and on 8 with ZeRO-2."""
    from utils.core.command_line import parse_args
    from utils.planning.advice import Footprints
    from utils.planning.memory import plan
    from utils.planning.request import STAGES, PlannedRun, read_request

    size, _, stage = path.stem.rpartition("_")
    shape = HERE / "shapes" / (size or "7b")
    with tempfile.TemporaryDirectory() as folder:
        argv = [str(path), "--model_name_or_path", str(shape), "--output_dir", folder, *flags]
        if stage == "ppo":
            argv += ["--reward_model", str(write_reward_adapter(Path(folder) / "rm", shape))]

        def setting(*more: str, processes: int) -> Any:
            *arguments, run = parse_args(*STAGES[stage], PlannedRun, argv=[*argv, *more])
            return read_request(stage, arguments, run, on_gpu=True, processes=processes)  # type: ignore[arg-type]

        alone, shared = setting(processes=1), setting("--deepspeed", str(HERE.parents[1] / ZERO2), processes=8)
        # A process computes the same step in both; what it keeps of the weights' state differs.
        footprint = Footprints().of(alone.job)
        return plan(alone, footprint).needed / 1e9, plan(shared, footprint).needed / 1e9


def write_reward_adapter(folder: Path, shape: Path) -> Path:
    """What a reward model's folder tells the planner: an adapter of rank 64 on the policy's own base."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    hidden = json.loads((shape / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": str(shape), "r": 64}
    config |= {"lora_alpha": 128, "target_modules": ["q_proj"], "modules_to_save": ["score"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    head = {"base_model.model.score.weight": np.zeros((1, hidden), np.float32)}
    save_file(head, folder / "adapter_model.safetensors")
    return folder


if __name__ == "__main__":
    main()
