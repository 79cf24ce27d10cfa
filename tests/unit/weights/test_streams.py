"""streams: files come out byte for byte with their hashes, threads end, and their errors reach the caller."""

import errno
import hashlib
import os
import random
import subprocess
import threading

import pytest

from utils.weights import streams
from utils.weights.streams import PAGE, WRITE_BYTES, FileHasher, FileWriter, prefetch


def test_prefetch_keeps_order_and_runs_ahead():
    done = []

    def items():
        for number in range(100):
            done.append(number)
            yield number

    ahead = prefetch(items())
    assert next(ahead) == 0
    assert list(ahead) == list(range(1, 100))
    assert done == list(range(100))


def test_prefetch_hands_over_errors_and_ends_its_thread():
    def broken():
        yield 1
        raise OSError(errno.EIO, "gone")

    before = threading.active_count()
    ahead = prefetch(broken())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)
    endless = prefetch(iter(int, 1))
    assert next(endless) == 0
    endless.close()  # the consumer stops early
    assert threading.active_count() == before


def pieces(size: int) -> list[bytes]:
    chance, result = random.Random(size), []
    while size > 0:
        result.append(chance.randbytes(min(size, chance.choice([1, 7, PAGE, 100_000, WRITE_BYTES + 3]))))
        size -= len(result[-1])
    return result


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, WRITE_BYTES, 2 * WRITE_BYTES + 12_345])
def test_files_are_what_was_written(tmp_path, size, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(os, "O_DIRECT", 0)
    content = pieces(size)
    with FileWriter(tmp_path / "file") as file:
        for piece in content:
            file.write(piece)
    written = (tmp_path / "file").read_bytes()
    assert written == b"".join(content)
    assert file.digest == {"sha256": hashlib.sha256(written).hexdigest()}
    assert file.size == size


def test_a_file_is_hashed_as_asked(tmp_path):
    blake3 = pytest.importorskip("blake3")
    content = os.urandom(100_000)
    digests = {}
    for kind in ("blake3", None):
        with FileWriter(tmp_path / "file", kind) as file:
            file.write(content)
        digests[kind] = file.digest
    assert digests == {"blake3": {"blake3": blake3.blake3(content).hexdigest()}, None: {}}
    hasher = FileHasher("blake3")
    hasher.update(tmp_path / "file", 5, content[5:70_000])
    assert hasher.finish(tmp_path / "file") == digests["blake3"]["blake3"]


def test_a_file_system_without_direct_writes(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(streams.os, "open", refuse)
    with FileWriter(tmp_path / "file") as file:
        file.write(b"abc")
    assert (tmp_path / "file").read_bytes() == b"abc"


@pytest.mark.parametrize("megabytes", [100, 13])  # met while writing, and with the last bytes
def test_a_failed_write_names_the_file_and_never_hangs(tmp_path, megabytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    before = threading.active_count()
    try:
        with pytest.raises(OSError) as caught, FileWriter(disk / "file") as file:
            for _ in range(megabytes):
                file.write(bytes(1 << 20))
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(disk / "file"))
        assert threading.active_count() == before
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_error_elsewhere_ends_the_writer(tmp_path):
    before = threading.active_count()
    with pytest.raises(ValueError, match="elsewhere"), FileWriter(tmp_path / "file") as file:
        file.write(b"abc")
        raise ValueError("elsewhere")
    assert file.digest == {}
    assert threading.active_count() == before


def test_hashes_of_files_read_in_parts(tmp_path, monkeypatch):
    content = random.Random(0).randbytes(300_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    read = []
    original = FileHasher._read
    monkeypatch.setattr(
        FileHasher,
        "_read",
        staticmethod(lambda file, digest, a, b: (read.append((a, b)), original(file, digest, a, b))),
    )
    hasher = FileHasher()
    hasher.update(path, 100, content[100:1000])  # what comes before is read
    hasher.update(path, 1000, content[1000:5000])
    hasher.update(path, 500, content[500:6000])  # a second look at some bytes, and new ones
    hasher.update(path, 50, content[50:60])
    assert hasher.finish(path) == hashlib.sha256(content).hexdigest() == hasher.finish(path)
    assert read == [(0, 100), (6000, 300_000)]
    assert FileHasher().finish(path) == hashlib.sha256(content).hexdigest()
