"""The arena as people meet it: the script, headless Chromium, real models; a judge behind a server; kills.

SCREENSHOTS=1 pytest tests/e2e/test_arena.py -k pictures makes those in pics/.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import arena
import eval_alignment
import pytest
from arena import ArenaArguments

from support.openai_stand_in import StandIn
from support.paths import EXAMPLES, SCRIPTS
from support.scripts import next_words
from support.web import free_port, visit_url
from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.core.errors import InputError
from utils.evaluation.arena.matchmaking import read_bank
from utils.evaluation.arena.players import LocalPlayer, answer_bank
from utils.evaluation.arena.votes import read_votes
from utils.web.access import WebArguments

BANK = EXAMPLES / "arena" / "questions.jsonl"


def read(path):
    text = Path(path).read_text(encoding="utf-8")
    return json.loads(text) if Path(path).suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def english_bank(tmp_path_factory):
    """Questions in words that the tiny models' tokenizer has."""
    rows = [{"id": f"e{n}", "category": "ab"[n % 2], "question": f"Tell me of the cat number {n}."} for n in range(4)]
    path = tmp_path_factory.mktemp("bank") / "bank.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def two_models(tiny_model_folder, tmp_path_factory):
    """alpha is the tiny model, beta another one."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("contestants") / "beta"
    shutil.copytree(tiny_model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(1).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"alpha": tiny_model_folder, "beta": folder}


@contextlib.contextmanager
def served(folder, settings=None, web=None, **who):
    """The arena's page, served by this process."""
    settings = GenerationArguments(**{"max_new_tokens": 8, "temperature": 0, **(settings or {})})
    args = ArenaArguments(output_dir=str(folder), **who)
    page = arena.start(InferenceArguments(), settings, WebArguments(port=free_port(), **(web or {})), args)
    try:
        yield page
    finally:
        arena.stop(page)


def slow_down(player, seconds):
    """A pause after each token makes a tiny model as slow as a large one."""
    submit = type(player).submit

    def submit_slowly(question, settings, seed, on_delta):
        return submit(player, question, settings, seed, lambda delta: (time.sleep(seconds), on_delta(delta)))

    player.submit = submit_slowly


def named(places):
    return [f"{name}={place}" for name, place in places.items()]


def visit(browser, url, **options):
    """A visitor of the arena."""
    return visit_url(browser, url, "#next", **options)


def answer(tab, side):
    """The text of an answer; None where there is none yet."""
    found = tab.query_selector(f"#chat-{side} [data-testid=bot]")
    return found.inner_text() if found else None


def wait_to_vote(tab):
    tab.wait_for_function("() => !document.querySelector('#vote-left').disabled")


def vote(tab, verdict):
    """Vote, and wait until the names are shown."""
    tab.click(f"#vote-{verdict}")
    tab.wait_for_function("() => document.querySelector('#status b')")
    return re.findall(r"(?:A 是|A is) (\S+?)[，,] ?(?:B 是|B is) (\S+?)[。.]", tab.inner_text("#status"))[0]


# ---------------------------------------------------------------- one walk


@pytest.mark.slow
def test_a_battle_from_the_question_to_the_results(browser, two_models, english_bank, tmp_path):
    """Next, stream, vote, reveal, type, vote, results, language."""
    who = {"models": named(two_models), "questions": [str(english_bank)]}
    length = {"max_new_tokens": 40, "min_new_tokens": 40}
    with served(tmp_path, length, **who) as page, visit(browser, page.blocks.local_url) as tab:
        for player in page.players.values():
            slow_down(player, 0.015)
        tab.click("#next")
        tab.wait_for_selector("#chat-0 [data-testid=bot]")
        lengths = set()
        while tab.is_disabled("#vote-left"):
            lengths.add(len(answer(tab, 0) or ""))
        assert len(lengths) > 2, "it grows before our eyes"
        seen = tab.content()
        assert "alpha" not in seen and "beta" not in seen, "blind"
        question = tab.inner_text("#chat-1 [data-testid=user]")
        answers = [answer(tab, side) for side in range(2)]
        models = vote(tab, "left")
        [first] = read_votes([tmp_path / "votes.jsonl"]).votes  # on the disk as soon as the names are shown
        assert set(models) == {"alpha", "beta"} and tab.is_disabled("#vote-tie")
        assert (first.models, first.vote, first.question) == (models, "left", question)
        shown, written = ([re.sub("[^a-zA-Z]", "", text) for text in texts] for texts in (answers, first.answers))
        assert shown == written  # random models write bytes, too, that no page shows
        assert answers[0] != answers[1] and first.category in "ab" and first.question_id in ("e0", "e1", "e2", "e3")

        # A question of one's own, in the other language.
        tab.click("#language >> text=English")
        tab.wait_for_function("() => document.querySelector('#next').innerText.startsWith('Next')")
        tab.fill("#question textarea", "the cat <b>and</b>")
        tab.press("#question textarea", "Enter")
        wait_to_vote(tab)
        assert tab.inner_text("#chat-0 [data-testid=user]").replace("\ufeff", "") == "the cat <b>and</b>"
        vote(tab, "both_bad")
        second = read_votes([tmp_path / "votes.jsonl"]).votes[1]
        assert (second.vote, second.category, second.question) == ("both_bad", "typed", "the cat <b>and</b>")

        tab.click("button[role=tab] >> text=Results")
        tab.wait_for_function("() => document.querySelector('#results').innerText.includes('2 battles')")
        table = tab.inner_text("#results")
        assert "1 / 0 / 0 / 1" in table and "0 / 1 / 0 / 1" in table
        assert tab.locator("#results .heat td").count() == 6
        tab.click("#results-category input")
        tab.click("[role=option] >> text=Typed questions")
        tab.wait_for_function("() => document.querySelector('#results').innerText.includes('1 battles')")
        assert tab.elsewhere == [] and tab.errors == []
    sources = read(tmp_path / "votes.jsonl.settings.json")["models"]
    assert sources["alpha"]["weights"] != sources["beta"]["weights"]


def test_the_quicker_answer_waits_for_the_slower_one():
    """Files answer at once, small models quickly: what is shown does not tell."""
    from utils.evaluation.arena.page import AHEAD, in_step
    from utils.web.chat import Reply

    file, slow = Reply("x" * 500, "stop"), Reply("y" * 30)
    assert in_step([file, slow], 0) == "x" * (30 + AHEAD) and in_step([file, slow], 1) == slow.text
    assert in_step([slow, Reply("")], 0) == "y" * AHEAD
    slow.finish_reason = "length"
    assert in_step([file, slow], 0) == file.text and in_step([slow, file], 0) == slow.text


# ---------------------------------------------------------------- a judge, and reports


def first_letters(body):
    """A judge that likes the answer that comes first in the alphabet, whatever its place, and "zzz" never."""
    texts = re.findall(r"【回答 [AB]】\n(.*?)\n【回答", body["messages"][-1]["content"], re.S)
    first, second = ((text == "zzz", text) for text in texts)
    return f"[[{'AB'[first > second]}]]"


@pytest.fixture(scope="module")
def answers(english_bank, tmp_path_factory):
    """Three files of answers; "a" comes first in the alphabet."""
    folder = tmp_path_factory.mktemp("answers")
    for name in "abc":
        rows = [{"id": row["id"], "answer": f"{name} says: {row['question']}"} for row in read(english_bank)]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return {name: folder / f"{name}.json" for name in "abc"}


def run(folder, settings=None, **what):
    settings = GenerationArguments(**{"max_new_tokens": 8, "temperature": 0, **(settings or {})})
    return arena.main(InferenceArguments(), settings, WebArguments(), ArenaArguments(output_dir=str(folder), **what))


@pytest.mark.slow
def test_a_judge_compares_models_files_and_servers(two_models, answers, english_bank, tmp_path, capsys, caplog):
    """A model loaded here, a file and a server, judged without a browser; killed half-way, it goes on."""
    caplog.set_level("INFO")
    who = {"models": [f"alpha={two_models['alpha']}"], "answers": [f"a={answers['a']}"]}
    with StandIn(lambda body: "zzz") as server, StandIn(first_letters) as judge:
        who |= {"servers": [f"far={server.url}"], "judge": judge.url, "questions": [str(english_bank)]}
        whole = run(tmp_path / "out", bootstrap_rounds=50, **who)
        asked = len(judge.requests), len(server.requests)
        assert run(tmp_path / "out", bootstrap_rounds=50, **who)["models"] == whole["models"]
        assert (len(judge.requests), len(server.requests)) == asked == (24, 4), "nothing is asked twice"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "answers",
        "arena.json",
        "arena.png",
        "arena_pairs.png",
        "verdicts.jsonl",
        "verdicts.jsonl.settings.json",
    }
    result = read(tmp_path / "out" / "arena.json")
    assert result["kind"] == "arena" and result["battles"] == 12 and set(result["categories"]) == {"a", "b"}
    assert [model["name"] for model in result["models"]][-1] == "far" and "torch" in result["environment"]
    found = {model["name"]: model for model in result["models"]}
    assert (found["far"]["wins"], found["far"]["losses"], found["far"]["win_rate"]) == (0, 8, 0.0)
    assert result["judges"]["stand-in"]["consistent"] == 100.0
    assert set(result["sources"]) == {"alpha", "a", "far"} and result["left_out"]["unparsed"] == 0
    assert all(len(one["models"]) == 3 for one in result["categories"].values())
    written = [row["Output"] for row in read(tmp_path / "out" / "answers" / "alpha.jsonl")]
    assert len(written) == 4 and not (tmp_path / "out" / "answers" / "a.jsonl").exists()
    printed = capsys.readouterr().out
    assert "Bradley-Terry" in printed and re.search(r"far +\d+ \(\d+ - \d+\)", printed)
    assert next_words(caplog.text)[:4] == ["bash", "scripts/run_arena.sh", "--report", "--votes"]


def test_players_sample_as_their_own_files_say(two_models, english_bank, tmp_path):
    """Each its own where no flag says otherwise; of the record, which decides whether votes count together, too."""
    own = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.05}
    folder = shutil.copytree(two_models["alpha"], tmp_path / "own")
    (folder / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    plain, special = (
        LocalPlayer(name, InferenceArguments(model_name_or_path=str(path)))
        for name, path in (("alpha", two_models["alpha"]), ("own", folder))
    )
    question = read_bank([str(english_bank)], [])[0]
    asked = GenerationArguments(top_p=0.5)
    sent = [player._request(question, asked, 1).settings for player in (plain, special)]
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    assert [[getattr(one, name) for name in names] for one in sent] == [[0.2, 40, 0.5, 1.1], [0.7, 5, 0.5, 1.05]]
    assert "sampling" not in plain.source and own.items() <= special.source["sampling"].items()


def test_players_are_led_away_from_the_negative_prompt(two_models, english_bank, tmp_path):
    """As eval_alignment.py's answers are, which a plain loop checks."""
    settings = GenerationArguments(
        max_new_tokens=6, temperature=0, repetition_penalty=1.0, guidance_scale=3.0, negative_prompt="Be rude."
    )
    player = LocalPlayer("alpha", InferenceArguments(model_name_or_path=str(two_models["alpha"])))
    bank = read_bank([str(english_bank)], [])
    answers = answer_bank(player, bank, settings, tmp_path / "a.jsonl", batch_size=4, overwrite=False)
    rows = [{"id": q.id, "category": "x", "question": q.text, "expected": "yes"} for q in bank]
    (tmp_path / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    eval_alignment.main(
        InferenceArguments(model_name_or_path=str(two_models["alpha"])),
        eval_alignment.AnswerArguments(max_new_tokens=6, guidance_scale=3.0, negative_prompt="Be rude."),
        eval_alignment.EvalArguments(questions=[str(tmp_path / "questions.json")], output_dir=str(tmp_path / "out")),
    )
    assert answers == [row["answer"] for row in read(tmp_path / "out" / "alignment.json")["answers"]]


def test_a_judge_that_always_says_a_gives_ties_only(answers, english_bank, tmp_path, capsys):
    with StandIn(lambda body: "[[A]]") as judge:
        who = {"answers": named(answers), "questions": [str(english_bank)], "judge": judge.url}
        result = run(tmp_path, bootstrap_rounds=20, **who)
    assert [(model["ties"], model["wins"], model["rating"]) for model in result["models"]] == [(8, 0, 1500.0)] * 3
    assert result["judges"]["stand-in"]["prefers_first"] == 100.0 and " -  " in capsys.readouterr().out


def test_a_report_of_votes_by_people_and_by_a_judge(tmp_path, capsys):
    def line(number, **changes):
        row = {"id": str(number), "models": ["x", "y"], "vote": "left", "category": "c", "question": "q"}
        return json.dumps({**row, "answers": ["1", "2"], **changes}) + "\n"

    people = [line(n, vote=vote) for n, vote in enumerate(["left"] * 3 + ["right", "tie", "both_bad"])]
    people += [line(0), line(6, category="d", models=["y", "x"])]
    (tmp_path / "votes.jsonl").write_text("".join(people) + '{"id": "torn', encoding="utf-8")
    judged = [line(n, judge="m", vote=None if n == 10 else "left", verdicts=["A", "B"]) for n in (10, 11)]
    (tmp_path / "verdicts.jsonl").write_text("".join(judged), encoding="utf-8")
    result = run(tmp_path, report=True, bootstrap_rounds=20)
    assert result["left_out"] == {"unparsed": 1, "duplicates": 1, "torn": 1} and result["battles"] == 8
    found = {model["name"]: model for model in result["models"]}
    assert [found["x"][name] for name in ("wins", "losses", "ties", "both_bad")] == [4, 2, 1, 1]
    assert found["x"]["win_rate"] == 66.67 and result["judges"]["m"]["unparsed"] == 1
    one = run(tmp_path, report=True, categories=["d"], bootstrap_rounds=20)
    assert one["battles"] == 1 and list(one["categories"]) == ["d"]
    assert (
        run(tmp_path / "new", report=True, votes=[str(tmp_path / "votes.jsonl")], bootstrap_rounds=2)["battles"] == 7
    )
    with pytest.raises(InputError, match=r"--categories e: need some of c, d"):
        run(tmp_path, report=True, categories=["e"])
    with pytest.raises(InputError, match=r"no votes\.jsonl or verdicts\.jsonl in .*vote first"):
        run(tmp_path / "empty", report=True)
    with pytest.raises(InputError, match="no such file"):
        run(tmp_path, report=True, votes=["nowhere.jsonl"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"judge": "http://x", "report": True}, "--judge and --report exclude each other"),
        ({"votes": ["x"]}, "--votes is for --report"),
        ({"judge_prompt": "x"}, "--judge_prompt needs --judge"),
        ({"workers": 0, "bootstrap_rounds": 0, "elo_k": 0}, "--workers 0.*\n--bootstrap_rounds 0.*\n--elo_k 0"),
    ],
)
def test_flags_that_contradict(what, message):
    with pytest.raises(InputError, match=message):
        ArenaArguments(**what)


def test_mistakes_are_found_before_weights_are_read(two_models, answers, english_bank, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.generation.loading.load_for_inference", lambda *_: pytest.fail("the weights were read"))
    start = {"questions": [str(english_bank)]}
    with pytest.raises(InputError, match="--num_beams 2: evaluations are answered without beams"):
        run(tmp_path, {"num_beams": 2}, models=named(two_models))
    for who, message in [
        ({"models": [f"alpha={two_models['alpha']}"]}, "a battle takes two models; got 1: alpha"),
        ({"models": [*named(two_models), f"gamma={two_models['beta']}"]}, "beta and gamma are the same"),
        ({"models": named(two_models), "categories": ["c"]}, "--categories c: need some of a, b"),
        ({"models": named(two_models), "servers": ["far=http://127.0.0.1:9/v1"]}, "is it running"),
    ]:
        with pytest.raises(InputError, match=message), served(tmp_path, **start, **who):
            pass
    with StandIn(first_letters) as judge, pytest.raises(InputError, match=r"alpha, question e0: the prompt has \d+"):
        long = tmp_path / "long.json"
        long.write_text(json.dumps([{"id": "e0", "category": "c", "question": "坏" * 600}]), encoding="utf-8")
        run(tmp_path / "j", models=named(two_models), judge=judge.url, questions=[str(long)])


# ---------------------------------------------------------------- the rest, for make test-all


class Running:
    """arena.py in a process of its own, on a free port."""

    def __init__(self, folder, *flags):
        self.port, self.log = free_port(), folder / "log.txt"
        command = [sys.executable, str(SCRIPTS / "arena.py"), "--port", str(self.port), "--output_dir", str(folder)]
        folder.mkdir(exist_ok=True)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*command, *map(str, flags)], stderr=log, stdout=log)
        self.url = f"http://127.0.0.1:{self.port}"

    def wait(self):
        """Until it serves the page."""
        limit = time.monotonic() + 90
        while self.process.poll() is None and time.monotonic() < limit:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def end(self, how=signal.SIGKILL):
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(60)


@pytest.mark.slow
def test_killed_right_after_votes_the_arena_has_them_all(browser, answers, english_bank, tmp_path):
    """SIGKILL as soon as names are shown, and in the middle of a click; each arena goes on where the last one died."""
    flags = ["--answers", *named(answers), "--questions", english_bank, "--bootstrap_rounds", 20]
    cast, rng = [], random.Random(0)
    for kill in range(4):
        running = Running(tmp_path / "out", *flags)
        try:
            with visit(browser, running.wait().url) as tab:
                for _ in range(rng.randrange(1, 5)):
                    tab.click("#next")
                    wait_to_vote(tab)
                    verdict = rng.choice(["left", "right", "tie", "both_bad"])
                    cast.append((vote(tab, verdict), verdict))
                if kill % 2:
                    tab.click("#next")
                    wait_to_vote(tab)
                    tab.locator("#vote-left").dispatch_event("click")
                    time.sleep(rng.random() / 20)
                running.end()
        finally:
            running.end()
        log = read_votes([tmp_path / "out" / "votes.jsonl"])
        found = [(one.models, one.vote) for one in log.votes]
        unseen = len(found) - len(cast)  # a vote whose names were not shown any more may be there, whole
        assert found[: len(cast)] == cast and 0 <= unseen <= 1 and not log.duplicates
        cast = found
    pairs = Counter(frozenset(models) for models, _ in cast)
    assert len(pairs) == 3 and max(pairs.values()) - min(pairs.values()) <= 1


@pytest.mark.slow
def test_ctrl_c_ends_with_a_report(browser, answers, english_bank, tmp_path):
    running = Running(tmp_path / "out", "--answers", *named(answers), "--questions", english_bank)
    try:
        with visit(browser, running.wait().url) as tab:
            tab.click("#next")
            wait_to_vote(tab)
            vote(tab, "left")
            assert running.end(signal.SIGINT) == 0
    finally:
        running.end()
    assert read(tmp_path / "out" / "arena.json")["battles"] == 1
    assert "next: bash scripts/run_arena.sh --report" in running.log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_visitors_have_battles_of_their_own(browser, answers, english_bank, tmp_path):
    """Fair pairs over open battles too; a login stands in the vote; a phone shows all."""
    (tmp_path / "users").write_text("ann:word\n")
    who = {"answers": named(answers), "questions": [str(english_bank)], "web": {"auth_file": str(tmp_path / "users")}}
    with served(tmp_path, **who) as page:
        context = browser.new_context(locale="en-GB", viewport={"width": 375, "height": 700})
        tabs = [context.new_page() for _ in range(3)]
        for tab in tabs:
            tab.goto(page.blocks.local_url)
            if tab is tabs[0]:
                tab.fill("input[type=text], input:not([type])", "ann")
                tab.fill("input[type=password]", "word")
                tab.press("input[type=password]", "Enter")
            tab.wait_for_selector("#next")
        for tab in tabs:
            tab.click("#next")
            wait_to_vote(tab)
        models = [vote(tab, "tie") for tab in tabs]
        assert len(set(map(frozenset, models))) == 3
        log = read_votes([tmp_path / "votes.jsonl"])
        assert [one.models for one in log.votes] == models and {one.voter for one in log.votes} == {"ann"}
        assert tabs[0].evaluate("document.documentElement.scrollWidth") <= 375
        for name in ("left", "right", "tie", "both_bad"):
            box = tabs[0].locator(f"#vote-{name}").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 375
        context.close()


@pytest.mark.slow
def test_the_next_question_stops_the_answers_to_the_last(browser, two_models, english_bank, tmp_path):
    long = {"max_new_tokens": 300, "min_new_tokens": 300}
    with served(tmp_path, long, models=named(two_models), questions=[str(english_bank)]) as page:
        engines = [player._engine for player in page.players.values()]
        for player in page.players.values():
            slow_down(player, 0.02)
        with visit(browser, page.blocks.local_url) as tab:
            tab.click("#next")
            tab.wait_for_selector("#chat-0 [data-testid=bot]")
            tab.fill("#question textarea", "the dog")
            tab.press("#question textarea", "Enter")
            tab.wait_for_function("() => document.querySelector('#chat-0').innerText.includes('the dog')")
            time.sleep(0.5)
            assert [engine.statistics()["running"] for engine in engines] == [1, 1], "of two battles one is left"
            wait_to_vote(tab)
            assert "the dog" in tab.inner_text("#chat-0") and not tab.query_selector("#status b")
            assert len(tab.query_selector_all("#chat-0 [data-testid=bot]")) == 1
            vote(tab, "right")
            tab.click("#next")
            tab.wait_for_function("() => document.querySelector('#chat-0').innerText.includes('the cat')")
            tab.wait_for_selector("#chat-0 [data-testid=bot]")
            assert [engine.statistics()["running"] for engine in engines] == [1, 1]
        limit = time.monotonic() + 4
        while any(engine.statistics()["running"] for engine in engines):  # leaving the page frees them
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert [one.question for one in read_votes([tmp_path / "votes.jsonl"]).votes] == ["the dog"]


@pytest.mark.slow
def test_a_server_that_fails_is_not_named_and_cannot_be_voted_on(browser, answers, english_bank, tmp_path, caplog):
    fails = [True]

    def reply(body):
        return (400, {"message": "far-model has no room"}) if fails[0] else "a fine answer"

    with StandIn(reply) as server:
        who = {"answers": [f"a={answers['a']}"], "servers": [f"far={server.url}"], "questions": [str(english_bank)]}
        with served(tmp_path, **who) as page, visit(browser, page.blocks.local_url, locale="en-GB") as tab:
            tab.click("#next")
            tab.wait_for_function("() => document.querySelector('#status').innerText.includes('failed')")
            assert "far" not in tab.content() and tab.is_disabled("#vote-left")
            assert "far-model has no room" in caplog.text
            fails[0] = False
            tab.click("#next")
            wait_to_vote(tab)
            models = vote(tab, "right")
            [only] = read_votes([tmp_path / "votes.jsonl"]).votes
            assert only.answers[models.index("far")] == "a fine answer"
            # No two of them have an answer to what is typed.
            tab.fill("#question textarea", "what nobody asked before")
            tab.press("#question textarea", "Enter")
            assert "no two of the models" in tab.locator("[data-testid=toast-body]").inner_text()


@pytest.mark.slow
def test_a_vote_that_cannot_be_written_is_told_and_may_be_cast_again(
    browser, answers, english_bank, tmp_path, monkeypatch
):
    with served(tmp_path, answers=named(answers), questions=[str(english_bank)]) as page:
        with visit(browser, page.blocks.local_url) as tab:
            tab.click("#next")
            wait_to_vote(tab)
            full = OSError(28, "No space left on device")
            monkeypatch.setattr(
                "utils.evaluation.arena.votes.os.fsync", lambda descriptor: (_ for _ in ()).throw(full)
            )
            tab.click("#vote-left")
            assert "No space left" in tab.locator("[data-testid=toast-body]").inner_text()
            assert not tab.query_selector("#status b")
            monkeypatch.undo()
            vote(tab, "right")
        assert [one.vote for one in read_votes([tmp_path / "votes.jsonl"]).votes] == ["right"]


EVIL = '<img src="x" onerror="window.hacked=1"><b onclick="window.hacked=1">b</b> ![p](http://example.com/p.png)'


@pytest.mark.slow
def test_neither_models_nor_names_can_put_scripts_into_the_page(browser, tmp_path):
    (tmp_path / "bank.json").write_text(json.dumps([{"id": "1", "category": EVIL, "question": EVIL}]))
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": "1", "answer": name + EVIL}]))
    names = {"<b>a": tmp_path / "a.json", "<img src onerror>": tmp_path / "b.json"}
    with served(tmp_path / "out", answers=named(names), questions=[str(tmp_path / "bank.json")]) as page:
        with visit(browser, page.blocks.local_url) as tab:
            tab.click("#next")
            wait_to_vote(tab)
            tab.click("#vote-left")
            tab.wait_for_function("() => document.querySelector('#status').innerText.includes('<b>a')")
            tab.click("button[role=tab] >> text=结果")
            tab.wait_for_selector("#results .standings")
            assert "<b>a" in tab.inner_text("#results") and "<img" in tab.inner_text("#results")
            assert tab.evaluate("window.hacked") is None and tab.elsewhere == []


@pytest.mark.slow
def test_a_file_of_votes_is_for_one_arena_and_one_meaning_of_names(answers, english_bank, tmp_path):
    # Beside a file of votes stands what its names stood for.
    with served(tmp_path, questions=[str(english_bank)], answers=named(answers)):
        with (
            pytest.raises(InputError, match="another arena is writing it"),
            served(tmp_path, questions=[str(english_bank)], answers=named(answers)),
        ):
            pass
    other = {"a": answers["b"], "b": answers["a"]}
    with (
        pytest.raises(InputError, match="votes on one do not count for the other"),
        served(tmp_path, questions=[str(english_bank)], answers=named(other)),
    ):
        pass


# ---------------------------------------------------------------- pictures for the documents

PICTURES = Path(__file__).parents[2] / "pics"
WRITTEN = {  # for the pictures
    "水在高山上烧不到一百度就开了，这是为什么？": [
        "因为山上的**气压比较低**。水的沸点随气压变化：气压越低，水分子越容易离开水面，所以不到 100 ℃ 就沸腾了。\n\n"
        "海拔每升高约 300 米，沸点大约降低 1 ℃。在海拔 4000 米的地方，水到 87 ℃ 左右就开了，用普通的锅煮饭容易夹生，"
        "要用高压锅。",
        "山上的温度比较低，所以水的温度也比较低，烧水的时候很快就开了。山越高，温度越低，水开得越早。",
        "高山上空气稀薄，气压低，水的沸点也就低，所以不到一百度就开了。",
        "水在高山上不到一百度就开，是因为高山上的水里杂质少，沸点比较低。",
    ]
}
STRENGTHS = {"model-1": 1640, "model-2": 1545, "model-3": 1470, "model-4": 1345}


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="set SCREENSHOTS to make the pictures")
def test_pictures(browser, tmp_path):
    """The page over answers written for the picture; results of 600 simulated votes."""
    rng, lines = random.Random(4), []
    categories = ["math", "writing", "reasoning", "knowledge"]
    for number in range(600):
        left, right = rng.sample(list(STRENGTHS), 2)
        chance = 1 / (1 + 10 ** ((STRENGTHS[right] - STRENGTHS[left]) / 400))
        vote_ = rng.choice(["tie", "both_bad"]) if rng.random() < 0.2 else "left" if rng.random() < chance else "right"
        row = {"id": str(number), "models": [left, right], "vote": vote_, "category": rng.choice(categories)}
        lines.append(json.dumps({**row, "question": "q", "answers": ["", ""]}) + "\n")
    (tmp_path / "votes.jsonl").write_text("".join(lines), encoding="utf-8")
    bank = [row for row in read(BANK) if row["question"] in WRITTEN]
    (tmp_path / "bank.json").write_text(json.dumps(bank), encoding="utf-8")
    files = {}
    for place, name in enumerate(STRENGTHS):
        rows = [{"id": row["id"], "answer": WRITTEN[row["question"]][place]} for row in bank]
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(rows), encoding="utf-8")
    files = {name: files[name] for name in ("model-1", "model-4")}
    with served(tmp_path, answers=named(files), questions=[str(tmp_path / "bank.json")]) as page:
        with visit(browser, page.blocks.local_url, viewport={"width": 1200, "height": 640}) as tab:
            tab.click("#next")
            wait_to_vote(tab)
            tab.wait_for_timeout(500)
            tab.screenshot(path=PICTURES / "arena.png")
        with visit(browser, page.blocks.local_url, viewport={"width": 1200, "height": 720}) as tab:
            tab.click("button[role=tab] >> text=结果")
            tab.wait_for_selector("#results .standings")
            tab.wait_for_timeout(500)
            tab.screenshot(path=PICTURES / "arena_results.png")
