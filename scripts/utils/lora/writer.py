"""The merge writer: which files a merged model becomes, writing them from the stream, and what went into them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.files import HashName, hash_file, hash_json, unfinished_folder
from ..core.machine import peak_resident_bytes
from ..weights.meta_writer import plan_meta_checkpoint, write_meta_checkpoint
from ..weights.reader import BLOCK_BYTES, Checkpoint, TensorSpec
from ..weights.streams import QUEUE_LENGTH, WRITE_BYTES, Digest, FileHasher
from ..weights.writer import plan_shards, safetensors_header, write_index, write_shard
from .inputs import MergeInputs
from .manifest import Progress, describe_folder
from .merged_model import worker_count
from .updates import LowRank

FORMAT = 3  # of what is written; a merge is not resumed from another one


class MergeWriter:
    """Writes a merge in one of the two layouts, hashing what it reads and what it writes unless `kind` is None."""

    def __init__(self, inputs: MergeInputs, specs: Sequence[TensorSpec], kind: HashName | None = "sha256"):
        self.inputs, self.model, self.specs, self.kind = inputs, inputs.model, list(specs), kind
        self.num_bytes = sum(spec.num_bytes for spec in self.specs)
        self._hasher = FileHasher(kind) if kind else None
        self._other_hashes: dict[Path, Future[str]] = {}

    @property
    def _others(self) -> list[Checkpoint]:
        """What is merged into the base, opened."""
        vector = self.model.chat_vector
        return [*(opened for _, opened in self.model.adapters), *([vector.tuned, vector.plain] if vector else [])]

    # -------------------------------- before writing

    def files(self) -> dict[str, int]:
        """{file name: bytes} of the weights to come."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """What decides every byte of the result, hashed: an interrupted merge of the same key can go on."""
        opened = [self.model.base, *self._others]
        files = [file for checkpoint in opened for file in checkpoint.files]
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        sources = self.model.weights
        specs = [(spec.name, str(spec.dtype), spec.shape, sources[spec.name].source) for spec in self.specs]
        settings = [config.__dict__ | {"folder": str(config.folder)} for config, _ in self.model.adapters]
        shares = [*self.model.adapter_weights, self.model.chat_vector.share if self.model.chat_vector else None]
        return hash_json([FORMAT, stats, specs, settings, shares, self.kind, self.files()])

    def expected_memory(self) -> int:
        """Bytes of peak memory: what the process has now, the blocks on their way, and the largest factors."""
        workers = worker_count()
        blocks = (2 * QUEUE_LENGTH + 5 * workers) * BLOCK_BYTES + len(self.files()) * WRITE_BYTES
        shapes = [checkpoint.shapes for _, checkpoint in self.model.adapters]
        factors = [
            8 * sum(math.prod(shapes[number][name]) for name in (update.name_A, update.name_B))
            for weight in self.model.weights.values()
            for number, update in weight.updates
            if isinstance(update, LowRank)
        ]
        return peak_resident_bytes() + blocks + 4 * max(factors, default=0)

    def expected_seconds(self) -> float:
        """Seconds of the merge, from merging a part of it for two seconds; a slow disk can make it longer."""
        changed = sorted((spec for spec in self.specs if self.model.weights[spec.name].updates), key=_size)
        started, done = time.perf_counter(), 0
        for _, block in self.model.stream(reversed(changed or self.specs)):
            done += block.nbytes
            if time.perf_counter() - started > 2:
                break
        return self.num_bytes / max(done, 1) * (time.perf_counter() - started)

    def finished_bytes(self, output: str | Path) -> int:
        """Bytes that an interrupted merge of the same key has on the disk."""
        folder = unfinished_folder(output, self.key)
        return sum(entry["bytes"] for entry in Progress(folder).shards.values()) if folder else 0

    # -------------------------------- writing

    def write(self, folder: Path, progress: Callable[[int], Any]) -> dict[str, Digest]:
        """Write the weights. Returns: {file name: hash}. `progress` is told the bytes of every block.

        Raises: InputError as MergedModel.stream, OSError naming the file.
        """
        Progress(folder).discard_rest()
        with ThreadPoolExecutor(1) as pool:
            # The others are read in the order of the base, so their hashes are taken beside that.
            files = [file for checkpoint in self._others for file in checkpoint.files]
            if self.kind:
                self._other_hashes = {file: pool.submit(hash_file, file, self.kind) for file in files}
            return self._write(folder, progress)

    def _write(self, folder: Path, progress: Callable[[int], Any]) -> dict[str, Digest]:
        raise NotImplementedError

    def _stream(
        self, specs: Sequence[TensorSpec], progress: Callable[[int], Any]
    ) -> Iterator[tuple[TensorSpec, Tensor]]:
        for spec, block in self.model.stream(specs, hasher=self._hasher):
            yield spec, block
            progress(block.nbytes)

    def describe_inputs(self) -> dict[str, Any]:
        """The input folders with every file's size and hash; after `write`."""
        base = describe_folder(self.inputs.base_folder, {file: self._digest(file) for file in self.model.base.files})
        others = [
            describe_folder(checkpoint.folder, {file: self._digest(file) for file in checkpoint.files})
            for checkpoint in self._others
        ]
        adapters, vector = others[: len(self.model.adapters)], others[len(self.model.adapters) :]
        described: dict[str, Any] = {"base": base, "adapters": adapters}
        described |= {"chat_vector": vector} if vector else {}
        if self.inputs.tokenizer is not None:
            described["tokenizer"] = describe_folder(Path(self.inputs.tokenizer.name_or_path), {})
        return described

    def _digest(self, file: Path) -> Digest:
        """The hash of a weight file that was read."""
        if self.kind is None or self._hasher is None:
            return {}
        known = self._other_hashes.get(file)
        return {self.kind: known.result() if known else self._hasher.finish(file)}


class HuggingFaceWriter(MergeWriter):
    """Safetensors shards with their index; a merge that was stopped goes on after the last finished shard."""

    def __init__(
        self, inputs: MergeInputs, specs: Sequence[TensorSpec], max_shard_bytes: int, kind: HashName | None = "sha256"
    ):
        super().__init__(inputs, specs, kind)
        self.shards = plan_shards(self.specs, max_shard_bytes)

    def files(self) -> dict[str, int]:
        return {
            name: len(safetensors_header(shard)) + sum(spec.num_bytes for spec in shard)
            for name, shard in self.shards.items()
        }

    def _write(self, folder: Path, progress: Callable[[int], Any]) -> dict[str, Digest]:
        finished = Progress(folder)
        for name, entry in finished.shards.items():
            self.model.squares.update({tensor: tuple(pair) for tensor, pair in entry["squares"].items()})
            progress(sum(spec.num_bytes for spec in self.shards[name]))
        remaining = {name: shard for name, shard in self.shards.items() if name not in finished.shards}
        stream = self._stream([spec for shard in remaining.values() for spec in shard], progress)
        for name, shard in remaining.items():
            digest = write_shard(folder / name, shard, stream, self.kind)
            squares = {spec.name: self.model.squares[spec.name] for spec in shard if spec.name in self.model.squares}
            finished.add(name, (folder / name).stat().st_size, digest, squares)
        write_index(folder, self.shards)
        return {name: finished.shards[name]["digest"] for name in self.shards}


class MetaWriter(MergeWriter):
    """Meta's consolidated.NN.pth and params.json; all parts grow together, so a stopped merge begins anew."""

    def __init__(self, inputs: MergeInputs, specs: Sequence[TensorSpec], num_parts: int | None, kind: HashName | None):
        super().__init__(inputs, specs, kind)
        self.plan = plan_meta_checkpoint(inputs.config, self.specs, num_parts)

    def files(self) -> dict[str, int]:
        parts = range(self.plan.num_parts)
        sizes = {part: sum(weight.spec(part).num_bytes for weight in self.plan.weights) for part in parts}
        return {f"consolidated.{part:02d}.pth": sizes[part] for part in parts}

    def _write(self, folder: Path, progress: Callable[[int], Any]) -> dict[str, Digest]:
        def stream(specs: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, Tensor]]:
            return self._stream(specs, progress)

        return write_meta_checkpoint(folder, self.inputs.config, self.specs, stream, self.plan.num_parts, self.kind)


def _size(spec: TensorSpec) -> int:
    return spec.num_bytes
