"""The manifest of a merged model: a hash of every file that went in or came out, and the check of a folder by it."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from ..core.errors import InputError
from ..core.files import HashName, hash_file, read_json, remove, write_json
from ..weights.streams import Digest

MANIFEST = "merge_manifest.json"
SMALL_FILES = (".json", ".model", ".jinja", ".txt")  # of an input, besides its weights
WEIGHT_FILES = (".safetensors", ".bin", ".pth")


def describe_file(path: Path, digest: Digest | None = None) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file; it is read unless its hash, of any kind, is known."""
    return {"bytes": path.stat().st_size} | ({"sha256": hash_file(path)} if digest is None else digest)


def describe_folder(folder: Path, weights: Mapping[Path, Digest]) -> dict[str, Any]:
    """The files of an input folder that a merge depends on: `weights` with their hashes, and the small ones."""
    small = [item for item in sorted(folder.iterdir()) if item.is_file() and item.suffix in SMALL_FILES]
    files = {item.name: describe_file(item) for item in small}
    files |= {path.name: describe_file(path, digest) for path, digest in weights.items()}
    return {"folder": str(folder), "files": files}


def write_manifest(
    folder: Path, inputs: dict[str, Any], settings: dict[str, Any], weights: Mapping[str, Digest]
) -> dict[str, Any]:
    """Write merge_manifest.json over all files of a finished folder. Returns: its content.

    Args:
        inputs: what describe_folder said of every input.
        weights: {file name: hash} of the weight files, known from writing them.
    """
    files = sorted(item for item in folder.rglob("*") if item.is_file() and item.name != MANIFEST)
    outputs = {str(item.relative_to(folder)): item for item in files if not item.name.startswith(".")}
    manifest = {
        "format": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "inputs": inputs,
        "outputs": {name: describe_file(item, weights.get(name)) for name, item in outputs.items()},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def verify_manifest(folder: str | Path) -> dict[str, Any]:
    """Compare a merged folder with its manifest, reading every file once.

    Returns: {"files", "gb", "by_size_alone"}: how many files, their size, how many have no hash in the manifest.

    Raises: InputError listing files that are missing, changed, or weights that do not belong there.
    """
    from tqdm import tqdm

    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    outputs = manifest.get("outputs") if isinstance(manifest, dict) else None
    if not isinstance(outputs, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) for entry in outputs.values()
    ):
        raise InputError(f"{folder / MANIFEST} is no merge manifest: it lists no outputs")
    problems = []
    total = sum(entry["bytes"] for entry in outputs.values())
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc="verifying") as bar:
        for name, entry in outputs.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != entry["bytes"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, need {entry['bytes']}")
            elif any(hash_file(path, kind) != entry[kind] for kind in kinds(entry)):
                problems.append(f"{name} was changed: its hash is another")
            bar.update(entry["bytes"])
    strange = [item.name for item in folder.iterdir() if item.suffix in WEIGHT_FILES and item.name not in outputs]
    problems += [f"{name} is not in the manifest; engines may load it" for name in sorted(strange)]
    if problems:
        raise InputError(f"{folder} is not what merge_manifest.json describes:\n  " + "\n  ".join(problems))
    unhashed = sum(not kinds(entry) for entry in outputs.values())
    return {"files": len(outputs), "gb": round(total / 1e9, 3), "by_size_alone": unhashed}


def kinds(entry: Mapping[str, Any]) -> list[HashName]:
    """Which hashes an entry of a manifest has: one, or none where the merge was told so."""
    return [kind for kind in get_args(HashName) if kind in entry]


class Progress:
    """Which shards of an unfinished folder are on the disk, so that a killed merge goes on after the last one."""

    FILE = ".progress.jsonl"

    def __init__(self, folder: Path):
        self.path = folder / self.FILE
        self.shards: dict[str, dict[str, Any]] = {}
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the kill came while this line was written
            shard = folder / entry["name"]
            if shard.is_file() and shard.stat().st_size == entry["bytes"]:
                self.shards[entry["name"]] = entry

    def add(self, name: str, num_bytes: int, digest: Digest, squares: Mapping[str, Iterable[float]]) -> None:
        """Note a finished shard, with the squared norms of its tensors' changes (see MergedModel.squares)."""
        entry = {"name": name, "bytes": num_bytes, "digest": digest, "squares": dict(squares)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.shards[name] = entry

    def discard_rest(self) -> None:
        """Remove what an interrupted merge left besides finished shards and notes: it was made for other files."""
        for item in self.path.parent.iterdir():
            if item.name not in self.shards and not item.name.startswith("."):
                remove(item)
