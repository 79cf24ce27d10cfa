"""Files that are written as answers come: one at a time, several in a row, killed anywhere; parts of a result."""

import json
from contextlib import contextmanager

import pytest

from utils.core.errors import InputError
from utils.evaluation.progress import Parts, Predictions, answer_all, refuse_finished
from utils.generation.engine import Completion


class Model:
    """Answers in capitals; notes when its weights are there, and what was asked before the answer was waited for."""

    def __init__(self) -> None:
        self.events: list = []

    @contextmanager
    def load(self):
        self.events.append("loaded")
        try:
            yield self
        finally:
            self.events.append("closed")

    def submit(self, model, file, number):
        assert model is self
        self.events.append(number)
        answer = file.questions[number].upper()

        def wait() -> Completion:
            self.events.append(answer)
            if answer == "KILL":
                raise KeyboardInterrupt
            return Completion(answer, [1, 2], 1, "stop")

        return wait


def outputs(path) -> list[str]:
    return [json.loads(line)["Output"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_written_in_order_and_a_killed_run_goes_on(tmp_path):
    path, questions, settings = tmp_path / "a.jsonl", ["a", "b", "kill", "c"], {"weights": 1, "pair": (1, 2)}
    killed = Model()
    with pytest.raises(KeyboardInterrupt):
        answer_all(killed.load, killed.submit, Predictions(path, questions, settings, False))
    assert killed.events == ["loaded", 0, 1, 2, 3, "A", "B", "KILL", "closed"]
    assert outputs(path) == ["A", "B"]
    with open(path, "ab") as file:
        file.write('{"Input": "kill", "Output": "半'.encode()[:-1])
    again, model = Predictions(path, questions, settings, False), Model()
    assert [row["Output"] for row in again.rows] == ["A", "B"] and again.metrics is None
    answer_all(
        model.load,
        lambda loaded, file, number: lambda: Completion(f"{number}", [], 1, "stop"),
        again,
        write=lambda bar, completion: f"<{completion.text}>",
    )
    assert outputs(path) == ["A", "B", "<2>", "<3>"] and again.metrics == {"answers": 4, "resumed": 2}
    done = Predictions(path, questions, settings, False)
    answer_all(model.load, model.submit, done)
    assert model.events == ["loaded", "closed"] and done.metrics == again.metrics  # nothing was asked


def test_files_are_answered_in_a_row_with_so_many_under_way(tmp_path):
    files = [Predictions(tmp_path / f"{name}.json", list(name), {}, False) for name in ("ab", "cd")]
    model = Model()
    answer_all(model.load, model.submit, *files, ahead=1, measure=lambda file: {"name": file.path.stem})
    assert model.events == ["loaded", 0, 1, "A", 0, "B", 1, "C", "D", "closed"]
    assert json.loads((tmp_path / "cd.json").read_text()) == [
        {"Input": "c", "Output": "C"},
        {"Input": "d", "Output": "D"},
    ]
    assert [file.metrics for file in files] == [{"name": "ab"}, {"name": "cd"}]
    names = ["ab.json", "ab.json.settings.json", "cd.json", "cd.json.settings.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_record_that_a_kill_left_out_is_made_up_for(tmp_path):
    path, model = tmp_path / "a.jsonl", Model()
    Predictions(path, ["a"], {}, False).append("A")
    whole = Predictions(path, ["a"], {}, False)
    assert whole.is_complete and whole.metrics is None
    answer_all(model.load, model.submit, whole)
    assert Predictions(path, ["a"], {}, False).metrics == {"answers": 1, "resumed": 1} and not model.events


def test_errors_name_the_flag_that_the_path_comes_from(tmp_path):
    path = tmp_path / "a.jsonl"
    Predictions(path, ["a"], {"weights": 1}, False, flag="--output_dir").append("A")
    with pytest.raises(InputError, match=r"\(weights 1 -> 2\); pass another --output_dir, or --overwrite"):
        Predictions(path, ["a"], {"weights": 2}, False, flag="--output_dir")
    with pytest.raises(InputError, match=r"--predictions_file .* is a folder"):
        Predictions(tmp_path, ["a"], {}, False)


def test_a_failed_write_names_its_file(tmp_path):
    path = tmp_path / "gone" / "a.jsonl"
    predictions = Predictions(path, ["a"], {}, False)
    (path.parent / "a.jsonl.settings.json").unlink()
    path.parent.rmdir()
    with pytest.raises(OSError, match=r"gone/a\.jsonl"):
        predictions.append("A")


def test_a_finished_result_stays_unless_told(tmp_path):
    refuse_finished(tmp_path / "result.json", overwrite=False)
    (tmp_path / "result.json").write_text("{}")
    refuse_finished(tmp_path / "result.json", overwrite=True)
    with pytest.raises(InputError, match=r"result\.json is finished; pass another --output_dir, or --overwrite"):
        refuse_finished(tmp_path / "result.json", overwrite=False)


# ---------------------------------------------------------------- parts


def test_parts_go_on_after_a_kill(tmp_path):
    path, settings_ = tmp_path / "out" / "parts.jsonl", {"window": 8, "texts": {"a": "1"}}
    parts = Parts(path, settings_, False)
    parts.add([0.1, 1 / 3], "model", "text", 0)
    parts.add({"figures": None}, "model", "text", 7)
    with open(path, "ab") as file:
        file.write(b'[["model", "text", 9], [1.0,')  # killed while it wrote
    again = Parts(path, settings_, False)
    assert again.get("model", "text", 0) == [0.1, 1 / 3] and again.get("model", "text", 9) is None
    again.add([5.0], "model", "text", 9)
    assert Parts(path, settings_, False).get("model", "text", 9) == [5.0]
    with pytest.raises(InputError, match=r"unfinished run with other window; .*--overwrite"):
        Parts(path, {**settings_, "window": 9}, False)
    assert Parts(path, {**settings_, "window": 9}, True).get("model", "text", 0) is None
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="unfinished run"):
        Parts(path, settings_, False)
    Parts(path, settings_, True).finish()
    assert not path.exists()


@pytest.mark.parametrize("end", [0, 1, 9, -1])
def test_parts_that_were_killed_in_their_first_line_begin_anew(tmp_path, end):
    path = tmp_path / "parts.jsonl"
    Parts(path, {"window": 8, "name": "猫"}, False)
    path.write_bytes(path.read_bytes()[:end])
    Parts(path, {"window": 8, "name": "猫"}, False).add(1, "a")
    assert Parts(path, {"window": 8, "name": "猫"}, False).get("a") == 1


def test_a_part_may_hold_what_some_take_for_the_end_of_a_line(tmp_path):
    text = "one\u2028two\x85three\n"
    Parts(tmp_path / "parts.jsonl", {}, False).add({"text": text}, "question")
    assert Parts(tmp_path / "parts.jsonl", {}, False).get("question") == {"text": text}
