"""Files: output that is complete or absent, one run at a time, failed writes that name their file."""

import errno
import fcntl
import os
import re
import subprocess
import sys
import threading

import pytest

from support.paths import SCRIPTS
from utils.core import files
from utils.core.errors import InputError
from utils.core.files import atomic_file, atomic_folder


def test_atomic_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()  # left by a killed run
    (tmp_path / ".out.partial" / "stale").write_text("x")
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(target) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as partial:
        (partial / "new").write_text("1")
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(InputError, match="not empty"), atomic_folder(target):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, overwrite=True):
        raise KeyboardInterrupt
    assert (target / "new").read_text() == "1"
    with atomic_folder(target, overwrite=True) as partial:
        (partial / "newer").write_text("2")
    assert [path.name for path in target.iterdir()] == ["newer"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_written_by_one_run_at_a_time(tmp_path):
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "first").write_text("1")
        with pytest.raises(InputError, match="another run is writing"), atomic_folder(tmp_path / "out"):
            pass
        assert [path.name for path in partial.iterdir()] == ["first"]
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "first"]


def test_a_killed_process_holds_no_lock(tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from utils.core.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as partial:\n"
        "    (partial / 'half').touch()\n"
        "    print(flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        with pytest.raises(InputError, match="another run is writing"), atomic_folder(tmp_path / "out"):
            pass
        process.kill()
    with atomic_folder(tmp_path / "out") as partial:
        assert not list(partial.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_waited_for(tmp_path):
    order = []

    def second():
        with files.locked(tmp_path / ".lock", wait=True) as held:
            order.append(held)

    thread = threading.Thread(target=second)
    with files.locked(tmp_path / ".lock"):
        thread.start()
        with files.locked(tmp_path / ".lock") as held:
            assert not held
        order.append("first")
    thread.join(60)
    assert order == ["first", True] and not list(tmp_path.iterdir())


def test_a_file_system_without_locks_still_works(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "a").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    (tmp_path / "file").touch()
    with pytest.raises((NotADirectoryError, FileExistsError)), files.locked(tmp_path / "file" / "lock"):
        pass


def test_atomic_file_keeps_the_old_content_on_failure(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"键": 1})
    with pytest.raises(OSError, match="full"), atomic_file(path) as file:
        file.write("half")
        raise OSError("full")
    assert files.read_json(path) == {"键": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_failed_writes_name_their_file(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path))) as failed, files.named_write_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert failed.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError) as failed, files.named_write_errors(tmp_path):
        os.open(tmp_path / "absent", os.O_RDONLY)
    assert failed.value.filename == str(tmp_path / "absent")  # what is known better stays


def test_read_json_names_the_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n"a": 1,\n}', encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(f"{path}:")):
        files.read_json(path)
    with pytest.raises(InputError, match="file not found"):
        files.read_json(tmp_path / "absent.json")


def test_one_process_holds_a_folder(tmp_path):
    """Another process is refused by name and loses nothing; the same one may take it again; a kill lets it go."""
    folder = tmp_path / "run"
    code = "import sys; from utils.core import files; held = files.HeldFolder(sys.argv[1]); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, cwd=SCRIPTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(InputError, match=rf"--output_dir .*run: another run .*process {other.pid} on "):
            files.HeldFolder(folder)
        other.kill()
    held = files.HeldFolder(folder)
    files.HeldFolder(folder)
    held.release()
    assert list(tmp_path.iterdir()) == []
