"""votes, matchmaking: votes that survive kills, each counted once; fair pairs, sides and questions."""

import itertools
import json
import random
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest

from support.paths import EXAMPLES, SCRIPTS
from utils.core.errors import InputError
from utils.evaluation.arena.matchmaking import Arena, Question, new_id, read_bank
from utils.evaluation.arena.votes import Vote, VoteFile, read_votes

BANK = [Question(f"question {number}", "ab"[number % 2], f"q{number}") for number in range(6)]


def vote(name="", **changes):
    fields = {
        "models": ("x", "y"),
        "vote": "left",
        "category": "c",
        "question": "你好？\n",
        "answers": ("a", "b\u2028"),
    }
    return Vote(name or new_id(), **{**fields, **changes})


def add(path, *votes):
    file = VoteFile(path)
    added = [file.append(one) for one in votes]
    file.close()
    return added


# ---------------------------------------------------------------- the file


def test_votes_come_back_as_they_were(tmp_path):
    votes = [
        vote(verdicts=("A", None), vote=None, judge="m"),
        vote(question_id="q1", voter="ann"),
        vote(vote="both_bad"),
    ]
    assert add(tmp_path / "new" / "votes.jsonl", *votes) == [True] * 3
    log = read_votes([tmp_path / "new" / "votes.jsonl"])
    assert log.votes == votes and log.counted == votes[1:] and (log.torn, log.duplicates) == (0, 0)
    assert len((tmp_path / "new" / "votes.jsonl").read_bytes().split(b"\n")) == 4, "a line a vote"


def test_no_battle_counts_twice(tmp_path):
    path = tmp_path / "votes.jsonl"
    first, again = vote("1"), vote("1", vote="right")
    assert add(path, first, again) == [True, False]
    assert add(path, again, vote("2")) == [False, True]
    path.write_bytes(path.read_bytes() * 2)  # two copies of a file, joined
    log = read_votes([path, path])
    assert [(one.id, one.vote) for one in log.votes] == [("1", "left"), ("2", "left")] and log.duplicates == 6
    file = VoteFile(path)
    assert not file.append(first)
    file.close()


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_torn_last_line_is_set_aside_and_counted(tmp_path, kept, caplog):
    path = tmp_path / "votes.jsonl"
    add(path, vote("1"), vote("2"))
    whole = path.read_bytes()
    last = whole.split(b"\n")[1] + b"\n"
    torn = last[:kept]
    path.write_bytes(whole[: -len(last)] + torn)
    assert read_votes([path]).torn == 1 and path.read_bytes().endswith(torn), "reading changes nothing"
    file = VoteFile(path)
    assert file.log.torn == 1 and [one.id for one in file.log.votes] == ["1"]
    file.append(vote("3"))
    file.close()
    assert (tmp_path / "votes.jsonl.torn").read_bytes() == torn + b"\n" and "torn by a crash" in caplog.text
    assert [one.id for one in read_votes([path]).votes] == ["1", "3"]


def test_a_line_that_lacks_nothing_but_its_end_is_whole(tmp_path):
    path = tmp_path / "votes.jsonl"
    add(path, vote("1"))
    path.write_bytes(path.read_bytes()[:-1])
    add(path, vote("2"))
    log = read_votes([path])
    assert [one.id for one in log.votes] == ["1", "2"] and log.torn == 0
    assert not (tmp_path / "votes.jsonl.torn").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "votes.jsonl:2: no vote"),
        ("[]", "votes.jsonl:2: need an object"),
        ('{"id": 3}', "'id' is 3, need text"),
        ({"vote": "A"}, "'vote' is 'A', need one of left, right, tie, both_bad"),
        ({"models": ["x", "x"]}, "'models' has 'x' twice"),
        ({"models": ["x"]}, "'models' is .*need two texts"),
        ({"answers": "ab"}, "'answers' is 'ab', need two texts"),
    ],
)
def test_a_line_that_is_no_vote_is_named(tmp_path, line, message):
    path = tmp_path / "votes.jsonl"
    add(path, vote("1"))
    good = path.read_text(encoding="utf-8")
    bad = line if isinstance(line, str) else json.dumps({**json.loads(good), **line})
    path.write_text(good + bad + "\n" + good, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_votes([path])
    with pytest.raises(InputError, match="mend or delete the line"):
        VoteFile(path)
    VoteFile(tmp_path / "other").close()


def test_one_process_at_a_time(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    with pytest.raises(InputError, match="another arena is writing it"):
        VoteFile(tmp_path / "votes.jsonl")
    file.close()
    VoteFile(tmp_path / "votes.jsonl").close()


def test_a_vote_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = VoteFile(tmp_path / "votes.jsonl")
    file.append(vote("1"))
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left.*votes\.jsonl"):
        file.append(vote("2"))
    monkeypatch.undo()
    assert file.append(vote("2")), "it may be cast again"
    file.close()
    assert [one.id for one in read_votes([tmp_path / "votes.jsonl"]).votes] == ["1", "2"]


def test_threads_do_not_mix_lines(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    votes = [vote(str(number), answers=("x" * 3000, "y")) for number in range(40)]
    threads = [
        threading.Thread(target=lambda part: [file.append(one) for one in part], args=[votes]) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    log = read_votes([tmp_path / "votes.jsonl"])
    assert sorted(one.id for one in log.votes) == sorted(one.id for one in votes) and not log.duplicates


VOTER = """
import sys; sys.path.insert(0, sys.argv[1])
from utils.evaluation.arena.votes import Vote, VoteFile
file = VoteFile(sys.argv[2])
for number in range(int(sys.argv[3]), 10**6):
    file.append(Vote(str(number), ("x", "y"), "tie", "c", "q" * 5000, ("a", "b")))
    print(number, flush=True)
"""


def kill_a_voter(path, start, after):
    """Kill a process right after it has told of so many votes; returns the last one it told of."""
    command = [sys.executable, "-c", VOTER, str(SCRIPTS), str(path), str(start)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        told = [int(line) for line in itertools.islice(process.stdout, after)]
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().split()]
    return told[-1]


def test_a_kill_loses_no_vote(tmp_path):
    path = tmp_path / "votes.jsonl"
    last = kill_a_voter(path, 0, 25)
    log = read_votes([path])
    assert [one.id for one in log.votes[: last + 1]] == [str(number) for number in range(last + 1)]
    assert add(path, vote("next")) == [True], "the lock went with the process"


@pytest.mark.slow
def test_many_kills_lose_no_vote(tmp_path):
    path, rng, start = tmp_path / "votes.jsonl", random.Random(1), 0
    for _ in range(30):
        last = kill_a_voter(path, start, rng.randrange(1, 60))
        ids = [one.id for one in read_votes([path]).votes]
        assert ids[: last + 1] == [str(number) for number in range(last + 1)] and len(ids) <= last + 2
        start = len(ids)


# ---------------------------------------------------------------- the bank


def test_the_example_bank():
    bank = read_bank([str(EXAMPLES / "arena")])
    counts = Counter(question.category for question in bank)
    assert len(bank) >= 80 and len(counts) >= 8 and min(counts.values()) >= 8
    assert len({question.text for question in bank}) == len(bank)
    assert all(question.reference for question in bank if question.category in ("math", "reasoning"))
    some = read_bank([str(EXAMPLES / "arena")], ["math"])
    assert {question.category for question in some} == {"math"}
    with pytest.raises(InputError, match="--categories maths: need some of writing, "):
        read_bank([str(EXAMPLES / "arena")], ["maths"])


def test_bad_banks_are_named(tmp_path):
    row = {"id": 1, "category": "c", "question": " q "}
    for rows, message in [
        ([], "no question in it"),
        ([row, row], "bank.json:.*the id '1' is that of"),
        ([{**row, "question": ""}], "field 'question' is ''"),
        ([{"id": "1", "question": "q"}], "field 'category' is missing"),
        ([{**row, "reference": 4}], "field 'reference' is 4"),
    ]:
        (tmp_path / "bank.json").write_text(json.dumps(rows))
        with pytest.raises(InputError, match=message):
            read_bank([str(tmp_path / "bank.json")])
    (tmp_path / "bank.json").write_text(json.dumps([row]))
    assert read_bank([str(tmp_path / "bank.json")]) == [Question("q", "c", "1")]


# ---------------------------------------------------------------- who meets whom


@pytest.fixture
def file(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    yield file
    file.close()


def hold(arena, rounds, **how):
    """Begin and vote, a visitor a battle; returns the battles."""
    battles = []
    for number in range(rounds):
        battle = arena.begin(str(number), **how)
        question = battle.question
        arena.vote(
            str(number),
            Vote(battle.id, battle.models, "left", question.category, question.text, ("", ""), question.id),
        )
        battles.append(battle)
    return battles


def test_pairs_sides_and_questions_are_even(file):
    names = ["m1", "m2", "m3", "m4"]
    battles = hold(Arena(names, file, BANK, rng=random.Random(3)), 120)
    pairs = Counter(frozenset(battle.models) for battle in battles)
    assert set(pairs.values()) == {20} and len(pairs) == 6
    together = Counter((frozenset(battle.models), battle.question.id) for battle in battles)
    assert max(together.values()) - min(together.values()) <= 1 and len(together) == 36
    asked = Counter(battle.question.id for battle in battles)
    assert max(asked.values()) - min(asked.values()) <= 4
    lefts = Counter(battle.models[0] for battle in battles)
    assert all(20 <= lefts[name] <= 40 for name in names), "60 battles each: half of them, give or take"


def test_battles_that_wait_for_a_vote_count_too_until_their_visitor_leaves(file):
    arena = Arena(["m1", "m2", "m3"], file, BANK, rng=random.Random(0))
    open_pairs = [frozenset(arena.begin(visitor).models) for visitor in "abc"]
    assert len(set(open_pairs)) == 3
    arena.leave("b")
    assert frozenset(arena.begin("d").models) == open_pairs[1]
    # The same visitor's next battle takes the place of the one before.
    assert frozenset(arena.begin("a").models) == open_pairs[0]


def test_earlier_votes_count(tmp_path):
    add(tmp_path / "votes.jsonl", *(vote(models=("m1", "m2"), question_id="q0") for _ in range(3)))
    file = VoteFile(tmp_path / "votes.jsonl")
    battles = hold(Arena(["m1", "m2", "m3"], file, BANK), 6)
    assert not any(set(battle.models) == {"m1", "m2"} for battle in battles)
    file.close()


def test_categories_and_typed_questions(file):
    arena = Arena(["m1", "m2"], file, BANK)
    assert arena.categories == ["a", "b"]
    assert {battle.question.category for battle in hold(arena, 6, category="b")} == {"b"}
    typed = arena.begin("v", text="why?")
    assert (typed.question.text, typed.question.id, typed.question.category) == ("why?", None, "typed")


def test_models_meet_over_what_both_can_answer(file):
    known = {"file": {"q0", "q1"}, "other": {"q1", "q2"}, "all": {question.id for question in BANK}}
    arena = Arena(list(known), file, BANK, lambda name, question: question.id in known[name] or name == "all")
    for battle in hold(arena, 30):
        assert all(battle.question.id in known[name] for name in battle.models)
    with pytest.raises(InputError, match="no two of the models can answer this"):
        arena.begin("v", text="what nobody else has")


def test_too_few_models(file):
    with pytest.raises(InputError, match="a battle takes two models; got 1: m"):
        Arena(["m"], file, BANK)
    with pytest.raises(InputError, match="m1 and m2 have no question of the bank that both can answer"):
        Arena(["m1", "m2"], file, BANK, lambda name, question: (name == "m1") == (question.id == "q0"))
