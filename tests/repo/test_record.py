"""benchmarks/record.py: one section a benchmark in RESULTS.md."""

import sys

from support.paths import ROOT


def test_a_section_is_replaced_and_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from record import describe_run, record

    path = tmp_path / "RESULTS.md"
    record("One", "first\n\n### detail\n| a |", path)
    record("Two", "second", path)
    before = path.read_text(encoding="utf-8")
    record("One", "first\n\n### detail\n| a |", path)
    assert path.read_text(encoding="utf-8") == before
    record("One", "again 中文", path)
    content = path.read_text(encoding="utf-8")
    assert "## One\n\nagain 中文\n\n## Two\n\nsecond\n" in content
    assert "first" not in content
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench.py", "--text", "a b.txt"])
    described = describe_run("numpy")
    assert "`python benchmarks/bench.py --text 'a b.txt'`" in described
    assert "numpy " in described
    assert "cores" in described
