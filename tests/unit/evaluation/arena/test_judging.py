"""judging, endpoints and players, against a stand-in for the server: verdicts, orders, failures, resuming."""

import json
import re

import pytest

from support.openai_stand_in import StandIn
from support.paths import ROOT
from utils.core.arguments import GenerationArguments, InferenceArguments
from utils.core.errors import InputError
from utils.evaluation import endpoints
from utils.evaluation.arena.judging import (
    JUDGE_PROMPT,
    NO_ANSWER,
    Judge,
    combine,
    describe_judges,
    fill_judge_prompt,
    judge_battles,
    list_battles,
    read_judge_prompt,
    read_verdict,
)
from utils.evaluation.arena.matchmaking import Question
from utils.evaluation.arena.players import (
    AnswersPlayer,
    ServerPlayer,
    answer_bank,
    check_sources,
    find_players,
    split_name,
)
from utils.evaluation.arena.votes import Vote, VoteFile, read_votes
from utils.evaluation.endpoints import Endpoint, EndpointError, answer_options

QUESTIONS = [Question(f"问题 {number}", "c", f"q{number}", "42" if number else None) for number in range(3)]
ANSWERS = {
    "long": ["a long answer", "another long answer", "same"],
    "short": ["brief", "no", "same"],
    "none": ["", "x", "same"],
}


def shown(prompt):
    """The two answers as the judge sees them."""
    return re.findall(r"【回答 [AB]】\n(.*?)\n【回答 [AB] 结束】", prompt, re.S)


def prefers_longer(body):
    first, second = (len(text.replace(NO_ANSWER, "")) for text in shown(body["messages"][-1]["content"]))
    return "理由。\n[[" + ("A" if first > second else "B" if second > first else "C") + "]]"


def run(server, tmp_path, answers=ANSWERS, prompt=JUDGE_PROMPT, retries=3, workers=3):
    """Judge all; returns the votes by models and question, and the counts."""
    votes = VoteFile(tmp_path / "verdicts.jsonl")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(endpoints, "RETRIES", retries)
            judge = Judge(Endpoint("judge", server.url), prompt)
        counts = judge_battles(judge, list_battles(QUESTIONS, answers), votes, workers)
    finally:
        votes.close()
    found = read_votes([tmp_path / "verdicts.jsonl"]).votes
    return {(one.models, one.question_id): one for one in found}, counts


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A 更好。\n[[A]]", "A"),
        ("[[B]]", "B"),
        ("[[ C ]]。", "tie"),
        ("起初想写 [[A]]，其实 [[B]]", "B"),
        ("A", None),
        ("[A]", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_the_last_mark_is_the_verdict(reply, verdict):
    assert read_verdict(reply) == verdict


def test_both_orders_decide():
    """With the left answer first, A speaks for it; with the right one first, B does."""
    said = {
        ("A", "B"): "left",
        ("B", "A"): "right",
        ("tie", "tie"): "tie",
        ("A", "A"): "tie",
        ("B", "B"): "tie",
        ("A", "tie"): "tie",
        ("tie", "A"): "tie",
        (None, "A"): None,
        ("B", None): None,
    }
    assert {pair: combine(pair) for pair in said} == said


def test_the_prompt_takes_texts_as_they_are():
    texts = ("{answer_b} {question}", "\\1 [[A]] {x}")
    prompt = fill_judge_prompt("{question}|{answer_a}|{answer_b}|{reference}|{other}", QUESTIONS[1], texts)
    assert prompt == "问题 1|{answer_b} {question}|\\1 [[A]] {x}|42|{other}"
    within = Question(
        "那么雪呢？", before=({"role": "user", "content": "天空呢？"}, {"role": "assistant", "content": "蓝。"})
    )
    asked = fill_judge_prompt("{question}", within, texts)
    assert asked == "[user] 天空呢？\n[assistant] 蓝。\n那么雪呢？", "a judge sees the turns before it"
    prompt = fill_judge_prompt(JUDGE_PROMPT, QUESTIONS[0], ("x", " \n"))
    assert shown(prompt) == ["x", NO_ANSWER] and "【参考答案】\n（没有）" in prompt and "问题 0" in prompt


@pytest.mark.parametrize("name", ["arena.md", "arena_EN.md"])
def test_the_documents_show_the_prompt(name):
    assert f"```text\n{JUDGE_PROMPT}```" in (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_a_prompt_of_ones_own(tmp_path):
    assert read_judge_prompt(None) == JUDGE_PROMPT
    path = tmp_path / "prompt.txt"
    path.write_text("Which? {question} {answer_a} {answer_b}", encoding="utf-8")
    assert read_judge_prompt(str(path)).startswith("Which?")
    path.write_text("{question} {answer_b}", encoding="utf-8")
    with pytest.raises(InputError, match=r"it has no \{answer_a\}"):
        read_judge_prompt(str(path))
    path.write_bytes("{question} 问".encode("gb18030"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_judge_prompt(str(path))
    with pytest.raises(InputError, match="no such file"):
        read_judge_prompt(str(tmp_path / "none"))


# ---------------------------------------------------------------- judging


def test_a_judge_with_an_opinion(tmp_path):
    with StandIn(prefers_longer) as server:
        votes, counts = run(server, tmp_path)
    assert counts == {"asked": 9, "resumed": 0, "errors": 0} and len(votes) == 9
    assert [votes[("long", "short"), f"q{n}"].vote for n in range(3)] == ["left", "left", "tie"]
    assert votes[("short", "none"), "q0"].vote == "left" and votes[("short", "none"), "q1"].vote == "left"
    one = votes[("long", "short"), "q1"]
    assert one.verdicts == ("A", "B") and one.answers == ("another long answer", "no") and one.judge == "stand-in"
    asked = [tuple(shown(prompt)) for prompt in server.prompts()]
    assert len(asked) == 12, "equal answers are a tie without asking"
    assert all(pair[::-1] in asked for pair in asked), "each pair in both orders"
    assert all(body["temperature"] == 0 and body["max_tokens"] == 1024 for body in server.requests)
    assert describe_judges(list(votes.values()))["stand-in"]["consistent"] == 100.0


@pytest.mark.parametrize(("mark", "bias"), [("A", "prefers_first"), ("B", "prefers_second")])
def test_a_judge_that_looks_at_places_gives_ties_only(tmp_path, mark, bias):
    with StandIn(lambda body: f"[[{mark}]]") as server:
        votes, _ = run(server, tmp_path)
    assert {one.vote for one in votes.values()} == {"tie"}
    figures = describe_judges(list(votes.values()))["stand-in"]
    assert (figures["consistent"], figures[bias], figures["battles"]) == (0.0, 100.0, 9)


def test_what_is_no_verdict_is_counted_and_not_asked_again(tmp_path):
    def reply(body):
        return "我不知道" if "问题 0" in body["messages"][-1]["content"] else prefers_longer(body)

    with StandIn(reply) as server:
        votes, counts = run(server, tmp_path)
        assert sum(one.vote is None for one in votes.values()) == 3 and counts["errors"] == 0
        assert describe_judges(list(votes.values()))["stand-in"]["unparsed"] == 3
        before = len(server.requests)
        assert run(server, tmp_path)[1] == {"asked": 0, "resumed": 9, "errors": 0} and len(server.requests) == before


def test_a_server_that_fails_now_and_then_is_asked_again(tmp_path):
    calls = []

    def reply(body):
        calls.append(1)
        busy = len(calls) % 3 == 0, len(calls) % 7 == 0
        return (
            (429, {"message": "busy"}) if busy[0] else (500, {"message": "oops"}) if busy[1] else prefers_longer(body)
        )

    with StandIn(reply) as server:
        votes, counts = run(server, tmp_path, retries=8)
    assert counts["errors"] == 0 and len(votes) == 9 and len(calls) > 12
    assert votes[("long", "short"), "q0"].vote == "left"


def test_what_fails_for_good_is_counted_and_asked_in_the_next_run(tmp_path, caplog):
    fails = [True]

    def reply(body):
        too_bad = fails[0] and "问题 1" in body["messages"][-1]["content"]
        return (400, {"message": "too long for me"}) if too_bad else prefers_longer(body)

    with StandIn(reply) as server:
        votes, counts = run(server, tmp_path)
        assert counts == {"asked": 6, "resumed": 0, "errors": 3} and len(votes) == 6
        assert "3 battles without a verdict" in caplog.text and "too long for me" in caplog.text
        fails.clear()
        fails.append(False)
        before = len(server.requests)
        votes, counts = run(server, tmp_path)
        assert counts == {"asked": 3, "resumed": 6, "errors": 0} and len(votes) == 9
        assert len(server.requests) == before + 6, "nothing is asked twice"


def test_verdicts_on_other_answers_or_by_another_prompt_are_not_mixed_in(tmp_path):
    with StandIn(prefers_longer) as server:
        run(server, tmp_path)
        with pytest.raises(InputError, match="3 verdicts on other answers"):
            run(server, tmp_path, {**ANSWERS, "long": ["new", *ANSWERS["long"][1:]], "short": ["x", "no", "same"]})
        with pytest.raises(InputError, match="9 verdicts on other answers, or by another judge or prompt"):
            run(server, tmp_path, prompt=JUDGE_PROMPT + ".")
        more = {**ANSWERS, "fourth": ["d", "e", "f"]}
        assert run(server, tmp_path, more)[1] == {"asked": 9, "resumed": 9, "errors": 0}


def test_a_judge_is_measured_by_peoples_votes():
    answers, judged = ("a", "b"), {"judge": "m", "verdicts": ("A", "B")}
    people = [Vote(str(n), ("x", "y"), "left", "c", f"q{n}", answers) for n in range(3)]
    people.append(Vote("3", ("x", "y"), "both_bad", "c", "q3", answers))
    votes = [
        Vote("4", ("x", "y"), "left", "c", "q0", answers, **judged),
        Vote("5", ("y", "x"), "right", "c", "q1", ("b", "a"), **judged),  # the same, sides changed
        Vote("6", ("x", "y"), "right", "c", "q2", answers, **judged),
        Vote("7", ("x", "y"), "tie", "c", "q3", answers, judge="m", verdicts=("A", "A")),
        Vote("8", ("x", "y"), "left", "c", "q0", ("a", "other"), **judged),
    ]
    figures = describe_judges([*people, *votes])
    assert figures["human"] == {"battles": 4}
    assert (figures["m"]["common_votes"], figures["m"]["agrees_with_people"]) == (4, 75.0)
    assert (figures["m"]["consistent"], figures["m"]["prefers_first"]) == (80.0, 20.0)


# ---------------------------------------------------------------- endpoints


def test_each_server_gets_its_own_key_only(monkeypatch):
    monkeypatch.setenv("MY_JUDGE_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    with StandIn(lambda body: "hi") as server:
        for name, key in (("my-judge", "Bearer secret"), ("other", "Bearer none")):
            assert Endpoint(name, server.url).ask([{"role": "user", "content": "?"}], {}) == "hi"
            assert server.keys[-1] == key


def test_requests_that_cannot_succeed_end_the_run(monkeypatch):
    question = [{"role": "user", "content": "?"}]
    with StandIn(lambda body: (401, {"message": "bad key"})) as server:
        with pytest.raises(InputError, match=r"wants a key; set JUDGE_API_KEY .*bad key"):
            Endpoint("judge", server.url).ask(question, {})
    with StandIn(lambda body: (404, {"message": "who?"}), models=None) as server:
        with pytest.raises(InputError, match="has no model 'm' to chat with"):
            Endpoint("judge", f"{server.url}#m").ask(question, {})
        with pytest.raises(InputError, match="lists no model; pass http"):
            Endpoint("judge", server.url).model.upper()
    with pytest.raises(InputError, match="does not answer: APIConnectionError"):
        Endpoint("judge", server.url).model.upper()  # it is gone
    for address in ("localhost:8000", "ftp://x", "http://", ""):
        with pytest.raises(InputError, match="is no address"):
            Endpoint("judge", address)


def test_parameters_that_a_server_refuses_are_renamed_or_left_out(caplog):
    def reply(body):
        refused = next((name for name in ("max_tokens", "temperature") if name in body), None)
        return (400, {"message": f"no {refused}", "param": refused}) if refused else "hi"

    with StandIn(reply) as server:
        endpoint = Endpoint("e", server.url)
        for _ in range(2):
            assert (
                endpoint.ask([{"role": "user", "content": "?"}], {"max_tokens": 5, "temperature": 0, "seed": 1})
                == "hi"
            )
        assert len(server.requests) == 4 and caplog.text.count("going on without it") == 2
        assert server.requests[-1]["max_completion_tokens"] == 5 and server.requests[-1]["seed"] == 1
    refused = (400, {"message": "no", "param": "presence_penalty"})
    with StandIn(lambda body: refused if "presence_penalty" in body else "hi") as server:  # of a text to be continued
        assert Endpoint("e", server.url).complete("?", answer_options(GenerationArguments(), 3)) == "hi"
        first, second = server.requests
        assert first["presence_penalty"] == 0 and "presence_penalty" not in second and second["seed"] == 3
    with StandIn(lambda body: (400, {"message": "no", "param": "messages"})) as server:
        with pytest.raises(EndpointError, match="BadRequestError"):
            Endpoint("e", server.url).ask([], {"seed": 1})


# ---------------------------------------------------------------- players


def ask(player, question, **settings):
    player.load(2)
    try:
        deltas = []
        answer = player.submit(question, GenerationArguments(**settings), 7, deltas.append)
        while not (deltas and (deltas[-1].finish_reason or deltas[-1].error)):
            pass
        return answer, deltas
    finally:
        player.close()


def test_a_server_streams_its_answer():
    with StandIn(lambda body: "一二三四五六七") as server:
        player = ServerPlayer("s", server.url, "be brief")
        answer, deltas = ask(player, QUESTIONS[0], max_new_tokens=9, temperature=0.5, stop=["。"])
        assert [delta.text for delta in deltas] == ["一二三", "四五六", "七", "", ""]
        assert answer.completion.text == "一二三四五六七" and answer.completion.finish_reason == "stop"
        [body] = server.requests
        assert body["messages"] == [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "问题 0"},
        ]
        sent = {"model": "stand-in", "max_tokens": 9, "temperature": 0.5, "seed": 7, "stop": ["。"]}
        assert "top_p" not in body and {name: body[name] for name in sent} == sent
        assert player.source == {"from": server.url, "model": "stand-in"}
        ask(player, QUESTIONS[0], do_sample=False)
        assert server.requests[-1]["temperature"] == 0


@pytest.mark.parametrize(
    ("said", "error"), [("abc!!!def", "broke off"), ((400, {"message": "too long"}), "too long"), ((401, {}), "KEY")]
)
def test_whoever_waits_is_told_that_a_server_failed(said, error):
    with StandIn(lambda body: said) as server:
        _, deltas = ask(ServerPlayer("s", server.url, None), QUESTIONS[0])
        assert error in str(deltas[-1].error) and isinstance(deltas[-1].error, EndpointError | InputError)


def test_answers_made_before(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"id": "q0", "answer": "zero"}, {"Input": "问题 1 ", "Output": "one"}]
    rows.append({"Input": [{"role": "user", "content": "问题 2"}], "Output": ""})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    player = AnswersPlayer("a", str(path))
    found = answer_bank(player, QUESTIONS, GenerationArguments(), tmp_path / "x", batch_size=1, overwrite=False)
    assert found == ["zero", "one", ""] and not (tmp_path / "x").exists()
    assert not player.can_answer(Question("typed"))
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    rows.append({"Input": [*turns, {"role": "user", "content": "问题 0"}], "Output": "within"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    player = AnswersPlayer("a", str(path))
    within = [Question("问题 0", before=tuple(turns)), Question("问题 0", before=(turns[0],) * 2)]
    assert [player.can_answer(question) for question in within] == [True, False]
    assert player.submit(within[0], GenerationArguments(), 0).wait().text == "within"
    with pytest.raises(InputError, match="a: no answer to 1 of 4 questions, such as 'new'"):
        questions = [*QUESTIONS, Question("new", "c", "q9")]
        answer_bank(player, questions, GenerationArguments(), tmp_path / "x", batch_size=1, overwrite=False)
    for row, message in (
        ({"id": "q0", "answer": "another"}, "answers.jsonl:5: a second, other answer to 'q0'"),
        ({"id": "q5"}, "answers.jsonl:5: need 'id' and 'answer'"),
    ):
        path.write_text("".join(json.dumps(one) + "\n" for one in [*rows, row]), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            AnswersPlayer("a", str(path))


def test_a_servers_answers_are_written_as_they_come_and_resumed(tmp_path):
    fails = [False]

    def reply(body):
        return (400, {"message": "not now"}) if fails[0] and "问题 2" in str(body) else body["messages"][-1]["content"]

    how = {"batch_size": 1, "overwrite": False}
    with StandIn(reply) as server:
        player, path = ServerPlayer("s", server.url, None), tmp_path / "s.jsonl"
        fails[0] = True
        with pytest.raises(InputError, match=r"s: BadRequestError.*not now.*run the same command again"):
            answer_bank(player, QUESTIONS, GenerationArguments(), path, **how)
        fails[0], before = False, len(server.requests)
        answers = answer_bank(player, QUESTIONS, GenerationArguments(), path, **how)
        assert answers == [question.text for question in QUESTIONS] and len(server.requests) == before + 1
        with pytest.raises(InputError, match=r"other settings .*--output_dir"):
            answer_bank(player, QUESTIONS, GenerationArguments(seed=1), path, **how)


def test_who_takes_part(tmp_path, tiny_model_folder):
    answers = tmp_path / "one.jsonl"
    answers.write_text('{"id": "q0", "answer": "x"}\n')
    (tmp_path / "two.jsonl").write_text('{"id": "q0", "answer": "y"}\n')
    none, first = InferenceArguments(), InferenceArguments(model_name_or_path=str(tiny_model_folder))
    players = find_players(first, [], [f"b={answers}", str(tmp_path / "two.jsonl")], [])
    assert [player.name for player in players] == ["tiny", "b", "two"]
    assert len(players[0].source["weights"]) == 1 and players[0].source["template"] == "alpaca-2"
    for models, files, servers, message in [
        ([], [f"x={answers}", f"x={tmp_path / 'two.jsonl'}"], [], "two models are called x"),
        ([], [f"x={answers}", f"y={answers}"], [], "x and y are the same"),
        ([], ["x=nowhere.jsonl"], [], "--answers x=nowhere.jsonl: no such file"),
        (["x=/nowhere"], [], [], "nowhere"),
        ([], [], ["http://127.0.0.1:1/v1"], "need NAME=URL"),
        ([], ["a/b=x"], [], "cannot be a name"),
        ([], [], ["x=nothing"], "is no address"),
    ]:
        with pytest.raises(InputError, match=message):
            find_players(none, models, files, servers)
    assert split_name("org/model-7b") == ("model-7b", "org/model-7b")


def test_a_name_stands_for_one_model(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "q0", "answer": "x"}\n')
    player = AnswersPlayer("a", str(tmp_path / "a.jsonl"))
    recorded = check_sources({}, [player], tmp_path)
    assert check_sources({**recorded, "b": {"from": "elsewhere"}}, [player], tmp_path).keys() == {"a", "b"}
    (tmp_path / "a.jsonl").rename(tmp_path / "moved.jsonl")
    check_sources(recorded, [AnswersPlayer("a", str(tmp_path / "moved.jsonl"))], tmp_path)
    (tmp_path / "moved.jsonl").write_text('{"id": "q0", "answer": "y"}\n')
    with pytest.raises(InputError, match="votes on one do not count for the other"):
        check_sources(recorded, [AnswersPlayer("a", str(tmp_path / "moved.jsonl"))], tmp_path)
