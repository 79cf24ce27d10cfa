"""Storage formats of a model, into RESULTS.md: the table of scripts/compare_formats.py, with its flags but --output.

python benchmarks/quantization.py --model output/demo/pretrained --texts examples/data/pretrain/zh_heldout.txt
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import describe_run, record

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "compare_formats.py"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "formats.json"
        command = [sys.executable, str(SCRIPT), *sys.argv[1:], "--output", str(output)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(finished.stdout)
        if finished.returncode or not output.is_file():  # --help measures nothing
            sys.exit(finished.returncode)
        result = json.loads(output.read_text(encoding="utf-8"))
    name = Path(result["model"]).name
    record(f"Storage formats of {name}", f"{describe_run(*result['packages'])}\n\n{finished.stdout}")


if __name__ == "__main__":
    main()
