"""Where pages are served, and to whom: the flags that all of them have, passwords, and the launch itself."""

from __future__ import annotations

import hmac
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.arguments import arg
from ..core.errors import InputError, raise_problems
from ..core.files import read_text

if TYPE_CHECKING:
    import gradio as gr

logger = logging.getLogger(__name__)

AUTH_VARIABLE = "GRADIO_DEMO_AUTH"


@dataclass
class WebArguments:
    """Where a page is served, to whom, and in which language."""

    host: str = arg("127.0.0.1", help="Address to listen on; 0.0.0.0: every network this machine is in.")
    port: int = arg(7860, help="Port to listen on.")
    share: bool = arg(False, help="Also make a public link through gradio's server.")
    auth: str | None = arg(
        help="Who may come in, as user:password; every user of this machine can read it in the list of processes, "
        f"so better --auth_file, or the environment variable {AUTH_VARIABLE}."
    )
    auth_file: str | None = arg(help="File with a user:password a line.")
    max_batch_size: int = arg(8, help="Answers written at once; further users see their place in the queue.")
    max_queue: int = arg(64, help="Questions that may wait; more are refused with a message.")
    language: Literal["auto", "zh", "en"] = arg("auto", help="Of the page at first; auto: what the browser asks for.")
    title: str | None = arg(help="Heading of the page; default: the model's name.")

    def __post_init__(self) -> None:
        checks = {
            f"--port {self.port}: need 1 to 65535": 1 <= self.port <= 65535,
            f"--max_batch_size {self.max_batch_size}: need at least 1": self.max_batch_size >= 1,
            f"--max_queue {self.max_queue}: need at least 1": self.max_queue >= 1,
            "--auth and --auth_file exclude each other; pass one": not (self.auth and self.auth_file),
        }
        raise_problems([problem for problem, holds in checks.items() if not holds])


def read_accounts(web: WebArguments) -> dict[str, str]:
    """Passwords by user. Raises: InputError for what is no user:password."""
    if web.auth_file:
        path = Path(web.auth_file)
        if not path.is_file():
            raise InputError(f"--auth_file {path}: there is no such file")
        lines = {f"{path}:{n}": line for n, line in enumerate(read_text(path).splitlines(), 1)}
    elif web.auth:
        lines = {"--auth": web.auth}
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
    if web.auth_file and not accounts:
        raise InputError(f"--auth_file {web.auth_file}: need a user:password a line, it has none")
    return accounts


def is_welcome(accounts: dict[str, str], user: str, password: str) -> bool:
    """Whether the password is the user's; takes as long for a wrong one as for the right one."""
    expected = accounts.get(user, "")
    return hmac.compare_digest(expected.encode(), password.encode()) and user in accounts


def launch(blocks: gr.Blocks, web: WebArguments, accounts: dict[str, str], css: str = "") -> None:
    """Serve a page; returns while it is being served. Args: css: beside that of all pages."""
    from .base import launch_settings

    settings: dict[str, Any] = launch_settings()
    blocks.queue(max_size=web.max_queue, status_update_rate=1, api_open=False)
    blocks.launch(
        server_name=web.host,
        server_port=web.port,
        share=web.share,
        auth=(lambda user, password: is_welcome(accounts, user, password)) if accounts else None,
        prevent_thread_lock=True,
        quiet=True,
        **{**settings, "css": settings["css"] + css},
    )
    logger.info("open %s (Ctrl-C ends it)%s", blocks.local_url, "" if accounts else "; there is no password")
    if web.share and blocks.share_url:
        logger.info("public link: %s", blocks.share_url)
    if not accounts and (web.share or web.host not in ("127.0.0.1", "localhost", "::1")):
        logger.warning("everybody who reaches the page can use the model; --auth asks for a password")
