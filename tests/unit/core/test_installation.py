"""installation: packages against the requirement files, imports that fail or end their process, processors, GPUs."""

import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement as PipRequirement

from support.paths import ROOT, SCRIPTS
from utils.core import installation
from utils.core.installation import (
    CAPABILITIES,
    GPU_FILE,
    IMPORTED,
    Finding,
    Requirement,
    check_compiler,
    check_gpus,
    check_network,
    check_packages,
    check_processor,
    check_python,
    find_works,
    install_command,
    read_pins,
    read_requirements,
    try_imports,
    version_fits,
)


def test_requirement_files_are_read_as_pip_reads_them():
    """The oracle is packaging, which pip reads them with."""
    ours = read_requirements()
    assert ours[0].file == "requirements.txt" and len(ours) > 40
    for each in ours:
        lines = (ROOT / each.file).read_text(encoding="utf-8").splitlines()
        texts = [line.partition("#")[0].partition(" -C")[0].strip() for line in lines]
        theirs = {each.name: each for each in map(PipRequirement, filter(None, texts))}
        for version in ("0.1", "1.0.1", "2.0", "2.11", "2.11.5", "3", "4.66", "5.23.0", "0.3.36", "30"):
            expected = theirs[each.package].specifier.contains(version)
            assert version_fits(version, each.versions) == expected, (each, version)
    names = {each.package for each in ours}
    assert names >= set(IMPORTED) and names >= {package for one in CAPABILITIES for package in one.packages}


@pytest.mark.parametrize(
    ("version", "versions", "fits"),
    [("2.13.0+cpu", ">=2.11,<3", True), ("3.0", ">=2.11,<3", False), ("2.9", ">=2.11,<3", False), ("1.0", "", True)],
)
def test_what_follows_the_numbers_of_a_version_does_not_count(version, versions, fits):
    assert version_fits(version, versions) is fits


def test_a_line_for_another_system_is_not_asked_for(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text('a>=1\nb; sys_platform == "plan9"\n# c\nd[extra]>=2  # why\n')
    assert [(each.package, each.versions) for each in read_requirements(tmp_path)] == [("a", ">=1"), ("d", ">=2")]


def test_packages_are_ok_absent_or_wrong(monkeypatch):
    numpy = metadata.version("numpy")
    asked = [
        Requirement("numpy", ">=2", "requirements.txt"),
        Requirement("numpy", ">=99", "requirements.txt"),
        Requirement("torch", ">=1", "requirements.txt"),
        Requirement("no-such-package", ">=1", "requirements-serve.txt"),
        Requirement("no-such-kernel", ">=1", GPU_FILE),
    ]
    findings = check_packages(asked, {"numpy": "1.0"}, {"torch": "ImportError: undefined symbol"}, cuda=False)
    assert [each.state for each in findings] == ["ok", "wrong", "wrong", "absent", "absent"]
    assert findings[0].text == f"{numpy} (tested: 1.0)" and "asks for >=99" in findings[1].text
    assert "undefined symbol" in findings[2].text
    assert findings[3].remedy == "pip install -r requirements-serve.txt -c constraints.txt"
    assert findings[4].remedy is None  # nobody without a GPU is told to install what only GPUs run
    assert check_packages(asked, {}, {}, cuda=True)[4].remedy == install_command(GPU_FILE)
    assert read_pins()["torch"] == "2.13.0"


def test_an_import_that_fails_or_ends_its_process_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    """Each in a process of its own, with modules that stand where broken packages would."""
    (tmp_path / "broken.py").write_text("raise OSError('libx.so: cannot open\\nmore')")
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    (tmp_path / "left.py").write_text("import os\nprint('noise', end='')\nos._exit(3)")
    (tmp_path / "good.py").write_text("print('noise', end='')")
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)")
    names = ("broken", "killed", "left", "good")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(installation, "IMPORTED", {name: name for name in (*names, "slow")})
    problems = try_imports(names).problems
    assert problems["good"] is None and problems["broken"] == "OSError: libx.so: cannot open"
    assert "SIGILL: it is built for another processor" in problems["killed"] and "status 3" in problems["left"]
    assert try_imports(["slow"], seconds=1).problems == {"slow": "not done after 1 s"}


def test_processors(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Some Kind\nflags\t\t: sse avx2 avx512f amx_bf16\nmodel name\t: Some Kind\n")
    found = check_processor(cpuinfo)
    assert found.state == "ok" and found.text.startswith("Some Kind; ")
    assert found.text.endswith("AVX2 yes, AVX-512 yes, AVX-512 BF16 no, AMX BF16 yes")
    cpuinfo.write_text("model name\t: Old\nflags\t\t: sse\n")
    assert check_processor(cpuinfo).state == "wrong"
    assert check_processor(tmp_path / "none").state == "ok"  # another system


def test_a_gpu_that_torch_does_not_find_is_wrong(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu, cuda = check_gpus({"cuda": None, "devices": []})
    assert gpu.state == "ok" and "H200" in gpu.text
    assert cuda.state == "wrong" and "pip uninstall --yes torch && pip install" in cuda.remedy
    assert [each.state for each in check_gpus({"cuda": "13.0", "devices": ["NVIDIA H200, 150.1 GB"]})] == ["ok", "ok"]
    assert len(check_gpus({})) == 1  # torch cannot be imported: that stands elsewhere
    tool.write_text("#!/bin/sh\necho 'cannot talk to the driver'\nexit 9\n")
    assert [each.state for each in check_gpus({"cuda": None, "devices": []})] == ["absent", "absent"]


def test_no_compiler_is_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert check_compiler().state == "absent" and check_compiler().remedy
    assert check_python().state == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert check_python().state == "wrong"


def test_a_server_that_is_not_there_is_said_and_raises_nothing():
    closed, bad = check_network(["http://127.0.0.1:9", "no address"])
    assert closed.state == bad.state == "absent" and "refused" in closed.text


def test_what_works_follows_from_what_is_there():
    findings = [Finding(package, "ok", "") for one in CAPABILITIES for package in one.packages if package != "peft"]
    lacks = {capability.name: missing for capability, missing in find_works(findings, cuda=False)}
    assert lacks["training"] == ["peft"] and lacks["vocabulary"] == [] and lacks["vLLM"] == ["a GPU with CUDA"]
    assert lacks["training"] and not dict(find_works(findings, cuda=True))[CAPABILITIES[0]]


def test_every_script_stands_in_one_capability():
    named = sorted(script for one in CAPABILITIES for script in one.scripts)
    assert named == sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "doctor")
