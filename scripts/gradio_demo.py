"""A web page to chat with a model, or with two side by side.

  python scripts/gradio_demo.py --base_model MERGED
  python scripts/gradio_demo.py --base_model BASE --lora_model ADAPTER --compare_model OTHER
The page is served to this machine only (http://127.0.0.1:7860); see --host, --auth and --share for others.
"""

from __future__ import annotations

import hmac
import logging
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from utils.arguments import (
    GenerationArguments,
    InferenceArguments,
    SpeculationArguments,
    arg,
    raise_problems,
    run,
    select_gpus,
)
from utils.files import InputError

if TYPE_CHECKING:
    from utils.generation import Engine
    from utils.web_page import ChatPage

logger = logging.getLogger("gradio_demo")

AUTH_VARIABLE = "GRADIO_DEMO_AUTH"


@dataclass
class DemoArguments:
    """Where the page is served, to whom, and what it compares."""

    host: str = arg("127.0.0.1", help="Address to listen on; 0.0.0.0: every network this machine is in.")
    port: int = arg(7860, help="Port to listen on.")
    share: bool = arg(False, help="Also make a public link through gradio's server.")
    auth: str | None = arg(
        help="Who may come in, as user:password; every user of this machine can read it in the list of processes, "
        f"so better --auth_file, or the environment variable {AUTH_VARIABLE}."
    )
    auth_file: str | None = arg(help="File with a user:password a line.")
    compare_model: str | None = arg(help="Second model: every question goes to both, side by side.")
    compare_lora: str | None = arg(help="Adapter of the second model; without --compare_model on the same base.")
    max_batch_size: int = arg(8, help="Answers written at once; further users see their place in the queue.")
    max_queue: int = arg(64, help="Questions that may wait; more are refused with a message.")
    max_memory: int | None = arg(
        help="Most tokens of a prompt, system prompt and history included; the oldest exchanges are left out. "
        "Default: what the model's context has beside the answer."
    )
    language: Literal["auto", "zh", "en"] = arg("auto", help="Of the page at first; auto: what the browser asks for.")
    title: str | None = arg(help="Heading of the page; default: the model's name.")

    def __post_init__(self) -> None:
        checks = {
            f"--port {self.port}: need 1 to 65535": 1 <= self.port <= 65535,
            f"--max_batch_size {self.max_batch_size}: need at least 1": self.max_batch_size >= 1,
            f"--max_queue {self.max_queue}: need at least 1": self.max_queue >= 1,
            f"--max_memory {self.max_memory}: need at least 1": self.max_memory is None or self.max_memory >= 1,
            "--auth and --auth_file exclude each other; pass one": not (self.auth and self.auth_file),
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])


def main(
    model_args: InferenceArguments,
    settings: GenerationArguments,
    demo: DemoArguments,
    speculation: SpeculationArguments | None = None,
) -> None:
    """Serve the page until Ctrl-C."""
    page = start(model_args, settings, demo, speculation)
    try:
        page.blocks.block_thread()
    finally:
        stop(page)


def start(
    model_args: InferenceArguments,
    settings: GenerationArguments,
    demo: DemoArguments,
    speculation: SpeculationArguments | None = None,
) -> ChatPage:
    """Load the models and serve the page; returns while it is being served (for notebooks, and tests)."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks its own server whether it is there
    accounts = read_accounts(demo)
    check_port(demo.host, demo.port)
    select_gpus(model_args)  # before torch is imported
    from utils.engines import EnginePlan
    from utils.web_chat import model_card
    from utils.web_page import ChatPage
    from utils.web_style import launch_settings

    plans = [EnginePlan(model_args, speculation=speculation)]
    if demo.compare_model or demo.compare_lora:
        plans.append(EnginePlan(compared_model(model_args, demo)))
    engines: list[Engine] = []
    try:
        engines += [plan.load(max_batch_size=demo.max_batch_size) for plan in plans]
        page = ChatPage(
            engines,
            [model_card(engine, plan.args) for engine, plan in zip(engines, plans, strict=True)],
            settings,
            model_args.system_prompt,
            title=demo.title,
            language=demo.language,
            max_memory=demo.max_memory,
            max_answers=demo.max_batch_size,
        )
        page.blocks.queue(max_size=demo.max_queue, status_update_rate=1, api_open=False)
        page.blocks.launch(
            server_name=demo.host,
            server_port=demo.port,
            share=demo.share,
            auth=(lambda user, password: is_welcome(accounts, user, password)) if accounts else None,
            prevent_thread_lock=True,
            quiet=True,
            **launch_settings(),
        )
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    logger.info("open %s (Ctrl-C ends it)%s", page.blocks.local_url, "" if accounts else "; there is no password")
    if demo.share and page.blocks.share_url:
        logger.info("public link: %s", page.blocks.share_url)
    if not accounts and (demo.share or demo.host not in ("127.0.0.1", "localhost", "::1")):
        logger.warning("everybody who reaches the page can use the model; --auth asks for a password")
    return page


def stop(page: ChatPage) -> None:
    """End the page and its engines."""
    page.blocks.close(verbose=False)
    for engine in page.engines:
        engine.close()


def compared_model(model_args: InferenceArguments, demo: DemoArguments) -> InferenceArguments:
    """The second model, which has its own tokenizer, and its own template unless the base is the same."""
    return replace(
        model_args,
        model_name_or_path=demo.compare_model or model_args.model_name_or_path,
        adapter_name_or_path=demo.compare_lora,
        tokenizer_name_or_path=None,
        prompt_template=None if demo.compare_model else model_args.prompt_template,
    )


# ---------------------------------------------------------------- who may come in


def read_accounts(demo: DemoArguments) -> dict[str, str]:
    """Passwords by user. Raises: InputError for what is no user:password."""
    if demo.auth_file:
        path = Path(demo.auth_file)
        if not path.is_file():
            raise InputError(f"--auth_file {path}: there is no such file")
        lines = {f"{path}:{n}": line for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)}
    elif demo.auth:
        lines = {"--auth": demo.auth}
    else:
        lines = {AUTH_VARIABLE: os.environ.get(AUTH_VARIABLE, "")}
    accounts = {}
    for place, line in lines.items():
        if not line.strip():
            continue
        user, colon, password = line.strip().partition(":")
        if not (user and colon and password):
            raise InputError(f"{place}: need user:password")  # what was given is not repeated: it may be a password
        accounts[user] = password
    if demo.auth_file and not accounts:
        raise InputError(f"--auth_file {demo.auth_file}: need a user:password a line, it has none")
    return accounts


def is_welcome(accounts: dict[str, str], user: str, password: str) -> bool:
    """Whether the password is the user's; takes as long for a wrong one as for the right one."""
    expected = accounts.get(user, "")
    return hmac.compare_digest(expected.encode(), password.encode()) and user in accounts


def check_port(host: str, port: int) -> None:
    """Raises: InputError if it cannot be listened on, before minutes are spent on loading a model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"--host {host} --port {port}: {error.strerror}; pass another --port") from None


if __name__ == "__main__":
    run(
        main,
        InferenceArguments,
        GenerationArguments,
        DemoArguments,
        SpeculationArguments,
        documented=("base_model", "lora_model", "tokenizer_path"),
        description=__doc__,
    )
