"""The web demo in a real browser: headless Chromium clicks and types, a real engine answers.

SCREENSHOT_MODEL=output/demo/assistant SCREENSHOT_LORA=output/demo/dpo pytest tests/e2e/test_gradio_demo.py -k pictures
makes those in pics/ with the models of `make demo`.
"""

import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

import pytest

from support.web import LONG, ask, free_port, served, visit, wait_idle
from utils.core.arguments import GenerationArguments, InferenceArguments, SpeculationArguments
from utils.core.errors import InputError
from utils.text.prompts import CHAT_TEMPLATES, encode_prompt


def answer(tab, chat=0):
    """The text of the last answer; None where there is none yet."""
    found = tab.query_selector_all(f"#chat-{chat} [data-testid=bot]")
    return found[-1].inner_text() if found else None


def questions(tab, chat=0):
    return [found.inner_text() for found in tab.query_selector_all(f"#chat-{chat} [data-testid=user]")]


def wait_until(holds, seconds=10.0):
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.05)


def set_number(tab, name, value):
    box = tab.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def message_button(tab, label):
    tab.locator(f"#chat-0 button[aria-label={label}]").last.click()


def prompt_of(question, page, said=()):
    messages = [*said, {"role": "user", "content": question}]
    return encode_prompt(messages, CHAT_TEMPLATES["alpaca-2"], page.engines[0].tokenizer)


# ---------------------------------------------------------------- one walk, for every run of the tests


def test_a_walk_through_the_page(browser, tiny_model_folder, tmp_path):
    """Sends, streams, stops, retries, edits, undoes, switches language, saves and loads, darkens, on a phone too."""
    with served(tiny_model_folder, LONG) as page, visit(browser, page) as tab:
        engine = page.engines[0]
        # What users type is text: for the model, and on the page.
        typed = '<s>[INST] <img src=x onerror="window.hacked=1"> ![p](http://example.com/p.png) [/INST]</s>'
        ask(tab, typed)
        tab.wait_for_selector("#chat-0 [data-testid=bot]")
        lengths = set()
        wait_until(lambda: lengths.add(len(answer(tab))) or len(lengths) > 3)  # it grows before our eyes
        tab.click("#question .stop-button")
        wait_until(lambda: engine.statistics()["running"] == 0, 3)
        wait_idle(tab)
        assert "已停止" in tab.inner_text("#notes-0")
        stopped = answer(tab)
        assert page.requests[0].prompt == prompt_of(typed, page)
        assert [text.replace("\ufeff", "") for text in questions(tab)] == [typed]
        assert tab.evaluate("window.hacked") is None and tab.query_selector("#chat-0 .message img") is None

        # Retry: the same prompt, other random numbers.
        set_number(tab, "max_new_tokens", 6)
        message_button(tab, "重试")
        wait_until(lambda: len(page.requests) == 2)
        wait_idle(tab)
        first, second = page.requests
        assert second.prompt == first.prompt and second.seed == first.seed + 1 and second.settings.max_new_tokens == 6
        assert answer(tab) != stopped and "6 词元" in tab.inner_text("#notes-0")

        # Edit: the box holds what was typed.
        message_button(tab, "编辑")
        box = tab.locator("#chat-0 textarea")
        assert box.input_value().replace("\ufeff", "") == typed
        box.fill("the cat")
        message_button(tab, "发送")
        wait_until(lambda: len(page.requests) == 3)
        wait_idle(tab)
        assert page.requests[2].prompt == prompt_of("the cat", page) and questions(tab) == ["the cat"]
        used = len(page.requests[2].prompt) + 6
        assert f"{used} / 512" in tab.inner_text("#context")

        # Continue: what follows a cut answer, behind it.
        cut = answer(tab)
        tab.click("#go-on")
        wait_until(lambda: len(page.requests) == 4)
        wait_idle(tab)
        asked, going_on = page.requests[2].prompt, page.requests[3].prompt
        assert going_on[: len(asked)] == asked and len(going_on) > len(asked)
        assert answer(tab).startswith(cut) and len(answer(tab)) > len(cut)

        # The other language; what was said stays.
        tab.click("#language >> text=English")
        tab.wait_for_function("() => document.querySelector('#question textarea').placeholder.startsWith('Type')")
        assert "6 tokens" in tab.inner_text("#notes-0") and "Parameters" in tab.inner_text("#card")
        assert questions(tab) == ["the cat"] and not re.search("[\u4e00-\u9fff]", tab.inner_text("#panel"))

        # A file of the conversation, and back.
        with tab.expect_download() as download:
            tab.click("#save")
        download.value.save_as(tmp_path / "chat.json")
        record = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
        assert record["messages"][0]["content"] == "the cat" and record["settings"]["max_new_tokens"] == 6
        message_button(tab, "撤销")
        tab.wait_for_function("() => document.querySelector('#question textarea').value === 'the cat'")
        assert questions(tab) == []
        set_number(tab, "max_new_tokens", 7)
        tab.set_input_files("input[type=file]", tmp_path / "chat.json")
        tab.wait_for_selector("#chat-0 [data-testid=bot]")
        assert questions(tab) == ["the cat"] and answer(tab) == record["messages"][1]["content"].strip()
        assert tab.locator("#max_new_tokens input[type=number]").input_value() == "6"
        (tmp_path / "bad.json").write_text("{")
        tab.set_input_files("input[type=file]", tmp_path / "bad.json")
        assert "bad.json" in tab.locator("[data-testid=toast-body]").inner_text()
        assert questions(tab) == ["the cat"]
        tab.click(".toast-close")

        # Dark, and still dark after coming back.
        tab.click("#dark")
        assert "dark" in tab.get_attribute("body", "class")
        tab.reload()
        tab.wait_for_selector("#question textarea")
        tab.wait_for_function("() => document.body.classList.contains('dark')")

        # On a phone nothing sticks out.
        tab.set_viewport_size({"width": 375, "height": 700})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 375
        assert tab.locator("#question textarea").bounding_box()["width"] > 200
        assert tab.elsewhere == [] and tab.errors == []


# ---------------------------------------------------------------- the rest, for make test-all


@pytest.mark.slow
def test_two_users_at_once_and_one_who_waits(browser, tiny_model_folder):
    """Conversations are separate, the queue tells its places, and stopping leaves it."""
    with served(tiny_model_folder, LONG, max_batch_size=2) as page:
        with visit(browser, page) as one, visit(browser, page) as two, visit(browser, page) as three:
            for tab, text in ((one, "first"), (two, "second")):
                ask(tab, text)
                tab.wait_for_selector("#chat-0 [data-testid=bot]")
            wait_until(lambda: page.engines[0].statistics()["running"] == 2)
            ask(three, "third")
            three.wait_for_function("() => /1\\s*\\/\\s*1/.test(document.querySelector('#chat-0').innerText)")
            assert len(page.requests) == 2 and answer(three) is None
            three.click("#question .stop-button")  # while it waits
            wait_idle(three)
            assert answer(three) == "■"
            message_button(three, "重试")
            one.click("#question .stop-button")
            wait_until(lambda: len(page.requests) == 3)
            assert [questions(tab) for tab in (one, two, three)] == [["first"], ["second"], ["third"]]
            for number, (text, tab) in enumerate((("first", one), ("second", two), ("third", three))):
                assert page.requests[number].prompt == prompt_of(text, page)
                if tab is not one:
                    tab.click("#question .stop-button")
                wait_idle(tab)


@pytest.mark.slow
def test_two_users_get_the_answers_that_one_alone_gets(browser, tiny_model_folder):
    settings = GenerationArguments(max_new_tokens=40, temperature=0)
    with served(tiny_model_folder, settings) as page:
        alone = []
        for text in ("the cat", "a dog and"):
            with visit(browser, page) as tab:
                ask(tab, text)
                wait_idle(tab)
                alone.append(answer(tab))
        with visit(browser, page) as one, visit(browser, page) as two:
            ask(one, "the cat")
            ask(two, "a dog and")
            wait_idle(one)
            wait_idle(two)
            assert [answer(one), answer(two)] == alone and alone[0] != alone[1]


@pytest.mark.slow
def test_leaving_the_page_frees_the_engine(browser, tiny_model_folder):
    with served(tiny_model_folder, LONG) as page:
        with visit(browser, page) as tab:
            ask(tab, "the cat")
            tab.wait_for_selector("#chat-0 [data-testid=bot]")
            assert page.engines[0].statistics()["running"] == 1
            start = page.engines[0].statistics()["new_tokens"]
        wait_until(lambda: page.engines[0].statistics()["running"] == 0, 5)
        assert page.engines[0].statistics()["new_tokens"] - start < 340, "it was cancelled, not written to its end"


@pytest.mark.slow
def test_two_models_side_by_side(browser, tiny_model_folder, tmp_path):
    """Both answer, each from its own history; stop, edit and files are for both."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    with served(tiny_model_folder, LONG, compare_model=str(other)) as page, visit(browser, page) as tab:
        set_number(tab, "max_new_tokens", 12)
        ask(tab, "the cat")
        wait_idle(tab)
        assert answer(tab, 0) == answer(tab, 1), "the same weights and the same seed"
        assert "12 词元" in tab.inner_text("#notes-1") and "other" in tab.inner_text("#card")
        set_number(tab, "max_new_tokens", 400)
        ask(tab, "and the dog")
        tab.wait_for_function("() => document.querySelectorAll('#chat-1 [data-testid=bot]').length === 2")
        tab.click("#question .stop-button")
        wait_until(lambda: all(engine.statistics()["running"] == 0 for engine in page.engines), 3)
        wait_idle(tab)
        set_number(tab, "max_new_tokens", 5)
        tab.locator("#chat-1 button[aria-label=编辑]").first.click()
        tab.locator("#chat-1 textarea").fill("a house")
        tab.locator("#chat-1 button[aria-label=发送]").click()
        wait_until(lambda: len(page.requests) == 6)
        wait_idle(tab)
        assert questions(tab, 0) == questions(tab, 1) == ["a house"]
        with tab.expect_download() as download:
            tab.click("#save")
        record = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
        assert record["compared"][0]["model"] == "other" and len(record["compared"][0]["answers"]) == 1


@pytest.mark.slow
def test_controls_reach_the_engine(browser, tiny_model_folder):
    with served(tiny_model_folder, max_memory=60) as page, visit(browser, page) as tab:
        values = {"temperature": 0.8, "top_p": 0.75, "top_k": 33, "guidance_scale": 1.5}
        for name, value in values.items():
            set_number(tab, name, value)
        tab.click("#more button.label-wrap")
        more = {"min_p": 0.02, "repetition_penalty": 1.25, "presence_penalty": 0.5, "frequency_penalty": -0.5}
        for name, value in more.items():
            set_number(tab, name, value)
        tab.fill("#seed input", "7")
        tab.fill("#stop textarea", "END\n\\nUser:")
        tab.fill("#system_prompt textarea", "be brief\nand kind")
        tab.fill("#negative_prompt textarea", "be long\nand rude")
        for text in ("the cat", "the dog", "the house"):
            ask(tab, text)
            wait_until(lambda text=text: page.requests and text in page.engines[0].decode(page.requests[-1].prompt))
            wait_idle(tab)
        request = page.requests[0]
        assert {name: getattr(request.settings, name) for name in values | more} == values | more
        assert request.settings.stop == ["END", "\nUser:"] and request.seed == 7 and page.requests[1].seed == 8
        assert "be brief\nand kind" in page.engines[0].decode(request.prompt)
        assert "be long\nand rude" in page.engines[0].decode(request.negative_prompt)
        assert "舍去" in tab.inner_text("#context") and len(page.requests[-1].prompt) <= 60 + 20


@pytest.mark.slow
def test_speculation_is_told_about(browser, tiny_model_folder):
    settings = GenerationArguments(max_new_tokens=60, temperature=0)
    with served(tiny_model_folder, settings, SpeculationArguments(prompt_lookup=True)) as page:
        with visit(browser, page, locale="en-GB") as tab:
            ask(tab, "the cat and the dog and the cat and the dog")
            wait_idle(tab)
            counts = page.engines[0].statistics()
            told = f"({int(counts['accepted'])}/{int(counts['drafted'])} since the start)"
            assert counts["drafted"] and told in tab.inner_text("#notes-0")
            # Guidance goes with no drafts: the engine says so, the page passes it on, and the question comes back.
            tab.fill("#negative_prompt textarea", "be rude")
            set_number(tab, "guidance_scale", 1.5)
            ask(tab, "the dog")
            assert "guidance" in tab.locator("[data-testid=toast-body]").inner_text()
            tab.wait_for_function("() => document.querySelector('#question textarea').value === 'the dog'")


@pytest.mark.slow
def test_too_long_a_question_comes_back(browser, tiny_model_folder):
    with served(tiny_model_folder) as page, visit(browser, page) as tab:
        ask(tab, "the cat and the dog " * 200)
        assert "512" in tab.locator("[data-testid=toast-body]").inner_text()
        tab.wait_for_function("() => document.querySelector('#question textarea').value.length > 1000")
        assert questions(tab) == []
        ask(tab, "the cat")
        wait_idle(tab)
        assert questions(tab) == ["the cat"]


@pytest.mark.slow
def test_enter_while_an_answer_is_written_changes_nothing(browser, tiny_model_folder):
    with served(tiny_model_folder, LONG) as page, visit(browser, page) as tab:
        ask(tab, "the cat")
        tab.wait_for_selector("#chat-0 [data-testid=bot]")
        ask(tab, "the dog")
        tab.wait_for_selector("[data-testid=toast-body]")
        assert tab.input_value("#question textarea") == "the dog" and questions(tab) == ["the cat"]
        assert tab.query_selector("#question .stop-button"), "it can still be stopped"
        tab.click("#question .stop-button")
        wait_idle(tab)


@pytest.mark.slow
def test_english_for_english_browsers(browser, tiny_model_folder):
    with served(tiny_model_folder) as page, visit(browser, page, locale="en-GB") as tab:
        tab.wait_for_function("() => document.querySelector('#question textarea').placeholder.startsWith('Type')")
    with served(tiny_model_folder, language="zh") as page, visit(browser, page, locale="en-GB") as tab:
        tab.wait_for_timeout(500)
        assert tab.get_attribute("#question textarea", "placeholder").startswith("输入")


@pytest.mark.slow
def test_a_password_is_asked_for(browser, tiny_model_folder, tmp_path):
    (tmp_path / "users").write_text("ann:right:word\n\nbob:other\n")
    with served(tiny_model_folder, auth_file=str(tmp_path / "users")) as page:
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(page.blocks.local_url)
        for password, inside in (("wrong", False), ("right:word", True)):
            tab.fill("input[type=text], input:not([type])", "ann")
            tab.fill("input[type=password]", password)
            tab.press("input[type=password]", "Enter")
            tab.wait_for_timeout(700)
            assert bool(tab.query_selector("#question")) == inside
        context.close()


@pytest.mark.slow
def test_nothing_of_a_conversation_is_left_on_the_disk(browser, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "temporary"))
    with served(tiny_model_folder) as page, visit(browser, page) as tab:
        ask(tab, "a secret of mine")
        wait_idle(tab)
        with tab.expect_download() as download:
            tab.click("#save")
        file = Path(download.value.path())
        copy = tmp_path / "upload.json"
        copy.write_bytes(file.read_bytes())
        tab.set_input_files("input[type=file]", copy)
        tab.wait_for_timeout(500)
        left = [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]
        assert not any(b"a secret of mine" in path.read_bytes() for path in left)


EVIL = (
    '<img src="x" onerror="window.hacked=1"><script>window.hacked=1</script><b onclick="window.hacked=1">b</b> '
    "![p](http://example.com/p.png) ![q][r] [l](javascript:window.hacked=1)\n\n[r]: http://example.com/q.png"
)


@pytest.mark.slow
def test_neither_users_nor_models_can_put_scripts_into_the_page(browser, tiny_model_folder, tmp_path):
    messages = [{"role": "system", "content": EVIL}]
    messages += [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]
    (tmp_path / "evil<img src=x onerror='window.hacked=1'>.json").write_text("{")
    (tmp_path / "chat.json").write_text(json.dumps({"messages": messages}))
    with served(tiny_model_folder, title=EVIL) as page, visit(browser, page) as tab:
        assert "default-src 'self'" in tab.goto(page.blocks.local_url).headers["content-security-policy"]
        tab.wait_for_selector("#question textarea")
        tab.set_input_files("input[type=file]", tmp_path / "chat.json")
        tab.wait_for_selector("#chat-0 [data-testid=bot]")
        for link in tab.query_selector_all("#chat-0 .message a, #chat-0 .message b"):
            link.click()
        tab.set_input_files("input[type=file]", next(tmp_path.glob("evil*")))
        tab.wait_for_selector("[data-testid=toast-body]")
        tab.wait_for_timeout(500)
        assert tab.evaluate("window.hacked") is None and tab.elsewhere == []
        assert questions(tab)[0].replace("\ufeff", "").startswith('<img src="x" onerror="window.hacked=1"><script>')
        assert tab.locator("#system_prompt textarea").input_value() == EVIL


MARKED_UP = """**bold** *a* _b_ ~~c~~ `code` $$x^2$$ \\(y\\) \\* &amp; <b>
# heading
1. one
- two
> three
| a | b |
|---|---|
===
    indented  twice
```python
x * y * z
```"""


@pytest.mark.slow
def test_a_users_text_is_shown_as_it_was_typed(browser, tiny_model_folder, tmp_path):
    messages = [{"role": "user", "content": MARKED_UP}, {"role": "assistant", "content": "**bold**"}]
    (tmp_path / "chat.json").write_text(json.dumps({"messages": messages}))
    with served(tiny_model_folder) as page, visit(browser, page) as tab:
        tab.set_input_files("input[type=file]", tmp_path / "chat.json")
        tab.wait_for_selector("#chat-0 [data-testid=bot] strong")
        shown = tab.inner_text("#chat-0 [data-testid=user]").replace("\ufeff", "")
        assert shown.strip() == MARKED_UP
        assert (
            tab.query_selector("#chat-0 [data-testid=user] :is(strong, em, del, code, h1, li, table, .katex)") is None
        )


# ---------------------------------------------------------------- the notebook


def test_the_notebook_runs(tiny_model_folder, monkeypatch):
    """Its cells, one after the other, as written for Colab; a small model and a free port take the place of theirs."""
    import httpx

    root = Path(__file__).parents[2]
    notebook = json.loads((root / "notebooks" / "gradio_web_demo.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
    monkeypatch.setenv("PORT", str(free_port()))
    monkeypatch.setenv("MODEL", str(tiny_model_folder))
    monkeypatch.chdir(root / "notebooks")
    names = {}
    for number, cell in enumerate(cells, 1):
        exec(compile(cell, f"cell {number}", "exec"), names)
        if "start(" in cell:
            assert httpx.get(names["page"].blocks.local_url).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(names["page"].blocks.local_url)


# ---------------------------------------------------------------- pictures for the documents

PICTURES = Path(__file__).parents[2] / "pics"
ASKED = [
    "喂兔子的时候给它吃什么？",
    "如果有人问你“长”的反义词是什么，你怎么回答？",
    "巴西这个国家的首都叫什么名字？",
    "儿童节是几月几日？",
]
COMPARED = ["羊爱吃什么，你知道吗？", "请问国庆节在哪一天？", "牛发出的声音是什么样的？"]


def converse(tab, texts):
    for number, text in enumerate(texts, 1):
        ask(tab, text)
        tab.wait_for_function(f"() => document.querySelectorAll('#chat-0 [data-testid=bot]').length === {number}")
        wait_idle(tab)
    tab.wait_for_timeout(500)


@pytest.mark.skipif("SCREENSHOT_MODEL" not in os.environ, reason="set SCREENSHOT_MODEL to make the pictures")
def test_pictures(browser):
    model, adapter = os.environ["SCREENSHOT_MODEL"], os.environ["SCREENSHOT_LORA"]
    settings = GenerationArguments(max_new_tokens=100)
    with served(model, settings) as page:
        with visit(browser, page) as tab:
            converse(tab, ASKED)
            tab.screenshot(path=PICTURES / "web_demo.png")
        with visit(browser, page, locale="en-GB", color_scheme="dark") as tab:
            converse(tab, ASKED[:3])
            for number in (0, 2, 3):  # the model and the first settings folded, the further ones shown
                tab.click(f"#panel button.label-wrap >> nth={number}")
            tab.wait_for_timeout(500)
            tab.screenshot(path=PICTURES / "web_demo_dark.png")
        with visit(browser, page, viewport={"width": 390, "height": 780}) as tab:
            converse(tab, ASKED[:3])
            tab.screenshot(path=PICTURES / "web_demo_phone.png")
    with served(model, settings, compare_lora=adapter) as page, visit(browser, page) as tab:
        converse(tab, COMPARED)
        tab.screenshot(path=PICTURES / "web_demo_compare.png")
    assert all(path.stat().st_size < 300_000 for path in PICTURES.glob("web_demo*.png"))


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"auth": "nobody"}, "user:password"),
        ({"auth_file": "/does/not/exist"}, "no such file"),
        ({"port": 70000}, "port"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"auth": "a:b", "auth_file": "f"}, "exclude"),
    ],
)
def test_mistakes_are_found_before_the_model_is_read(options, named):
    import gradio_demo

    with pytest.raises(InputError, match=named) as raised:
        demo = gradio_demo.DemoArguments(**options)
        gradio_demo.start(InferenceArguments(model_name_or_path="/does/not/exist"), GenerationArguments(), demo)
    assert "nobody" not in str(raised.value), "what may be a password is not repeated"


def test_a_taken_port_is_named_at_once():
    import gradio_demo

    with socket.create_server(("127.0.0.1", 0)) as taken:
        demo = gradio_demo.DemoArguments(port=taken.getsockname()[1])
        with pytest.raises(InputError, match=f"--port {demo.port}"):
            gradio_demo.start(InferenceArguments(model_name_or_path="/does/not/exist"), GenerationArguments(), demo)


def test_flags_of_the_forerunners_are_accepted():
    import gradio_demo

    from utils.core.command_line import parse_args

    line = "--base_model m --lora_model l --tokenizer_path t --gpus 0 --only_cpu --load_in_4bit --share True"
    line += " --port 19324 --max_memory 1024 --use_flash_attention_2"
    model, _, demo = parse_args(InferenceArguments, GenerationArguments, gradio_demo.DemoArguments, argv=line.split())
    assert (model.model_name_or_path, model.adapter_name_or_path, model.load_in_kbits) == ("m", "l", 4)
    assert (demo.share, demo.port, demo.max_memory) == (True, 19324, 1024)
    assert not gradio_demo.DemoArguments().share and gradio_demo.DemoArguments().host == "127.0.0.1"
