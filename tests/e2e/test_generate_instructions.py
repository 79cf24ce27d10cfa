"""generate_instructions.py against a local server: failures, duplicates, limits, going on; sft.py reads the result."""

import itertools
import json

import generate_instructions
import pytest

from support.models import save_llama
from support.openai_stand_in import StandIn, answer
from support.scripts import next_words
from support.server import serving
from utils.core.arguments import InferenceArguments
from utils.core.errors import InputError, Unfinished
from utils.data.cache import CacheSettings
from utils.data.samples import load_sft_samples
from utils.evaluation import endpoints
from utils.generation.loading import EnginePlan
from utils.text.prompts import resolve_template
from utils.text.tokenizer import load_tokenizer

USAGE = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
WORDS = [f"{a}{b}" for a, b in itertools.product("山水风云花鸟鱼虫", "东西南北上下左右")]


def reply(*instructions, usage=USAGE, tail=""):
    lines = [json.dumps({"instruction": text, "input": "", "output": f"答：{text}"}) for text in instructions]
    return answer("\n".join(lines) + tail) | {"usage": usage}


def numbered(number, count=2):
    """Tasks that are new to each other: four other words in each."""
    texts = [
        "说说" + "、".join(WORDS[(4 * (count * number + n) + k) % len(WORDS)] for k in range(4)) for n in range(count)
    ]
    return reply(*texts)


def run_main(server, folder, **settings):
    settings = {"num_connections": 1, "max_tasks": 6, **settings}
    args = generate_instructions.GenerateArguments(server_url=server.url, output_dir=str(folder), **settings)
    return generate_instructions.main(args)


def written(folder):
    return json.loads((folder / "instructions.json").read_text(encoding="utf-8"))


def test_a_run_through_failures_and_duplicates(tmp_path, monkeypatch, caplog, base_tokenizer_folder):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    caplog.set_level("INFO")
    replies = iter(
        [
            (429, {"message": "slow down"}),  # with Retry-After
            (503, {"message": "busy"}),
            reply("写一首关于大海的歌", "写一首关于大山的歌", "把这句话改写得更有礼貌。"),
            b'{"choices": [{"message": {"content": "cut',  # the reply itself breaks off
            reply("列出五种水果的英文名", tail='\n{"instruction": "没写完的'),
            reply("用两句话介绍一种乐器", "看图片写一段话"),
        ]
    )
    with StandIn(lambda body: next(replies)) as server:
        figures = run_main(server, tmp_path / "out", max_tasks=3, price_in=2, price_out=8)
    assert figures["tasks"] == 3 and figures["requests"] == 3 and figures["ended"] == "enough tasks"
    assert (figures["tokens_in"], figures["tokens_out"]) == (3000, 1500)
    assert figures["cost"] == pytest.approx(3000 * 2e-6 + 1500 * 8e-6)
    assert figures["left_out"] == {"too similar": 2, "cut off": 1, "needs more than text": 1}
    assert [task["instruction"] for task in written(tmp_path / "out")] == [
        *("写一首关于大海的歌", "列出五种水果的英文名", "用两句话介绍一种乐器"),
    ]
    assert server.keys and set(server.keys) == {"Bearer secret"}
    assert not any("secret" in path.read_text() for path in (tmp_path / "out").iterdir())
    assert "a request failed: the server's reply is no JSON" in caplog.text and "cost 0.018" in caplog.text
    words = next_words(caplog.text)
    assert words[1:] == [f"DATA={tmp_path}/out/instructions.json", "bash", "scripts/run_sft.sh"]
    shown = server.requests[0]["messages"][0]["content"]
    assert shown.count('"instruction"') == 3 and "8 道新任务" in shown
    check_sft_reads(words[1].removeprefix("DATA="), base_tokenizer_folder, tmp_path)


def check_sft_reads(path, tokenizer_folder, tmp_path):
    """As many samples as tasks, none refused."""
    tokenizer = load_tokenizer(tokenizer_folder)
    template = resolve_template("alpaca-2", tokenizer)
    cache = load_sft_samples([path], tokenizer, template, 512, CacheSettings(tmp_path / "cache"))
    assert cache.counters["samples"] == 3


def test_it_goes_on_where_it_was_and_with_a_higher_limit(tmp_path, caplog):
    caplog.set_level("INFO")
    count = itertools.count()
    with StandIn(lambda body: numbered(next(count))) as server:
        assert run_main(server, tmp_path, max_tasks=4)["requests"] == 2
        record = tmp_path / "requests.jsonl"
        whole = record.read_bytes()
        record.write_bytes(whole[:-40])  # killed while it wrote the second answer
        figures = run_main(server, tmp_path, max_tasks=5)
        assert (figures["tasks"], figures["resumed"], figures["requests"]) == (5, 2, 3)
        assert figures["tokens_in"] == 3000 and len(server.requests) == 4
        assert record.read_bytes().startswith(whole.splitlines(keepends=True)[0])
        # A task beyond the limit is in the record, and counts once the limit is higher: nothing is asked for it.
        assert run_main(server, tmp_path, max_tasks=6)["tasks"] == 6 and len(server.requests) == 4
        assert run_main(server, tmp_path, max_tasks=6)["ended"] == "there were enough already"
        assert len({task["instruction"] for task in written(tmp_path)}) == 6
        with pytest.raises(InputError, match="unfinished run with other temperature"):
            run_main(server, tmp_path, temperature=0.5)


@pytest.mark.slow
def test_the_cost_stays_below_its_limit(tmp_path):
    """A request costs 1000 * 1e-6 + 500 * 2e-6 = 0.002."""
    count = itertools.count()
    with StandIn(lambda body: numbered(next(count))) as server:
        settings = {"max_tasks": 1000, "price_in": 1, "price_out": 2, "num_connections": 4}
        figures = run_main(server, tmp_path, max_cost=0.0101, **settings)
        assert figures["requests"] == len(server.requests) == 5 and figures["cost"] == pytest.approx(0.01)
        assert figures["ended"] == "the limit of the cost is near"
        assert run_main(server, tmp_path, max_cost=0.0125, **settings)["requests"] == 6


@pytest.mark.slow
def test_a_server_that_counts_no_tokens_cannot_keep_a_limit(tmp_path):
    with StandIn(lambda body: reply("写一首关于大海的歌", usage=None)) as server:
        with pytest.raises(InputError, match="--max_cost cannot be kept"):
            run_main(server, tmp_path, max_cost=1, price_in=1)
        assert len(written(tmp_path)) == 1  # what was paid for is kept


@pytest.mark.slow
def test_a_server_that_fails_ends_the_run_and_keeps_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "RETRIES", 1)
    count = itertools.count()
    with StandIn(lambda body: numbered(0) if next(count) == 0 else (500, {"message": "broken"})) as server:
        with pytest.raises(Unfinished, match=r"3 requests in a row failed: .*broken.*run it again to go on"):
            run_main(server, tmp_path)
    assert len(written(tmp_path)) == 2
    with StandIn(lambda body: (401, {"message": "no key"})) as server:
        with pytest.raises(InputError, match="wants a key; set OPENAI_API_KEY"):
            run_main(server, tmp_path / "other")


@pytest.mark.slow
def test_nothing_new_ends_the_run(tmp_path, caplog):
    with StandIn(lambda body: reply("写一首关于大海的歌")) as server:
        figures = run_main(server, tmp_path, rouge_threshold=1.0)
    assert figures["tasks"] == 1 and figures["requests"] == 11 and figures["left_out"] == {"too similar": 10}
    assert "10 requests in a row brought nothing new: more seed tasks" in caplog.text


def test_bad_arguments():
    with pytest.raises(InputError) as caught:
        generate_instructions.GenerateArguments(max_tasks=0, rouge_threshold=0, max_cost=1)
    for flag in ("--max_tasks 0", "--server_url: pass the URL", "--rouge_threshold 0", "pass --price_in"):
        assert flag in str(caught.value)


def test_seeds_of_another_language_are_refused(tmp_path):
    (tmp_path / "seeds.json").write_text('[{"instruction": "Say hello", "output": "Hello!"}]')
    with pytest.raises(InputError, match="none of 1 tasks is in --language zh"):
        generate_instructions.main(
            generate_instructions.GenerateArguments(
                server_url="http://127.0.0.1:9/v1",
                seed_tasks=str(tmp_path / "seeds.json"),
                output_dir=str(tmp_path / "out"),
            )
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_this_projects_own_server(base_tokenizer_folder, tmp_path):
    """Random weights write no task, but the server's tokens are counted, and the run ends by itself."""
    folder = save_llama(tmp_path / "model", load_tokenizer(base_tokenizer_folder), max_position_embeddings=4096)
    engine = EnginePlan(InferenceArguments(model_name_or_path=str(folder))).load()
    try:
        with serving(engine) as live:
            live.url += "/v1"
            figures = run_main(live, tmp_path / "out", max_new_tokens=8, tasks_per_request=1, num_connections=2)
    finally:
        engine.close()
    assert figures["tasks"] == 0 and figures["requests"] >= 10
    assert 0 < figures["tokens_out"] <= 8 * figures["requests"] < figures["tokens_in"]
    assert figures["left_out"].keys() <= {"no JSON in the answer", "cut off"} and written(tmp_path / "out") == []
