"""The web demo in a browser."""

import contextlib
import socket
import time

from utils.core.arguments import GenerationArguments, InferenceArguments

LONG = GenerationArguments(max_new_tokens=350, min_new_tokens=350)

SHORT = GenerationArguments(max_new_tokens=8)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(model, settings=SHORT, speculation=None, **options):
    """The demo's page, with the requests its engines get."""
    import gradio_demo

    demo = gradio_demo.DemoArguments(**{"port": free_port(), **options})
    page = gradio_demo.start(InferenceArguments(model_name_or_path=str(model)), settings, demo, speculation)
    page.requests = []
    for engine in page.engines:
        engine.submit = recorded(engine.submit, page.requests, pause=0.015 if settings is LONG else 0)
    try:
        yield page
    finally:
        gradio_demo.stop(page)


def recorded(submit, requests, pause):
    """Remembers requests; the pause after each token makes a tiny model as slow as a large one."""

    def wrapper(request, on_delta):
        requests.append(request)
        return submit(request, lambda delta: (time.sleep(pause), on_delta(delta)))

    return wrapper


@contextlib.contextmanager
def visit_url(browser, url, ready, **options):
    """A visitor's tab, once `ready` is there; `.elsewhere` lists what it wanted to load from other places."""
    context = browser.new_context(**{"locale": "zh-CN", "viewport": {"width": 1280, "height": 800}, **options})
    tab = context.new_page()
    tab.set_default_timeout(20_000)
    tab.elsewhere, tab.errors = [], []
    local = ("data:", "blob:", url)
    tab.on("request", lambda request: None if request.url.startswith(local) else tab.elsewhere.append(request.url))
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.goto(url)
    tab.wait_for_selector(ready)
    yield tab
    context.close()


def visit(browser, page, **options):
    """A visitor of the web demo's page."""
    return visit_url(browser, page.blocks.local_url, "#question textarea", **options)


def ask(tab, text):
    tab.fill("#question textarea", text)
    tab.press("#question textarea", "Enter")


def wait_idle(tab):
    """Until the last question has its answer: the button that stops is gone, the notes say what it took."""
    tab.wait_for_function(
        "() => !document.querySelector('#question .stop-button')"
        " && document.querySelector('#notes-0 .prose').innerText"
    )
