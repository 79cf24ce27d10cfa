"""Settings of the server: its flags, and who may use it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..core.arguments import arg, list_arg
from ..core.errors import InputError, raise_problems
from ..core.files import read_text

KEYS_VARIABLE = "API_KEYS"


@dataclass
class ServingArguments:
    """Where the server listens, what it is called, and how much it takes on."""

    host: str = arg("127.0.0.1", help="Address to listen on; 0.0.0.0: every network, then set API keys.")
    port: int = arg(19327, help="Port to listen on; 0: any free one, named in the log.")
    served_model_name: list[str] = list_arg(
        help="Names clients call the model by, the first of them shown in answers; default: its folder's name."
    )
    lora_models: list[str] = list_arg(
        help="Adapters on the same base, each a model of its own beside it, instead of --lora_model: name=folder."
    )
    api_key_file: str | None = arg(
        help=f"File of API keys, one a line (# begins a comment); the environment may have more: {KEYS_VARIABLE}=a,b."
    )
    cors_origins: list[str] = list_arg(
        help="Web sites whose pages may call the server from a browser, such as http://localhost:3000, or *; "
        "default: none."
    )
    max_batch_size: int = arg(8, help="Answers written at once; memory grows with it.")
    max_queue: int = arg(64, help="Answers that may wait for their turn; beyond it the server replies 429.")
    max_context: int | None = arg(help="Tokens of prompt and answer together; default: the model's context.")
    max_body_bytes: int = arg(1 << 20, help="Largest request body in bytes.")
    stream_interval: float = arg(
        0.1, help="Least seconds between two events of a stream, which then carry several tokens; 0: an event each."
    )
    request_timeout: float = arg(600.0, help="Seconds that a request may take altogether, waiting included.")
    shutdown_grace: float = arg(30.0, help="Seconds that running answers have to finish after SIGTERM or Ctrl-C.")
    completions_template: bool = arg(
        False, help="/v1/completions puts prompts into the chat template, as the forerunner's server does."
    )

    def __post_init__(self) -> None:
        checks = {
            f"--port {self.port}: need 0 to 65535": 0 <= self.port <= 65535,
            f"--max_batch_size {self.max_batch_size}: need at least 1": self.max_batch_size >= 1,
            f"--max_queue {self.max_queue}: need 0 or more": self.max_queue >= 0,
            f"--max_context {self.max_context}: need at least 2": self.max_context is None or self.max_context >= 2,
            f"--max_body_bytes {self.max_body_bytes}: need at least 1024": self.max_body_bytes >= 1024,
            f"--stream_interval {self.stream_interval}: need 0 or more": self.stream_interval >= 0,
            f"--request_timeout {self.request_timeout}: need more than 0": self.request_timeout > 0,
            f"--shutdown_grace {self.shutdown_grace}: need 0 or more": self.shutdown_grace >= 0,
        }
        problems = [problem for problem, holds in checks.items() if not holds]
        names = [*self.served_model_name, *(entry.partition("=")[0] for entry in self.lora_models)]
        problems += [f"--lora_models {entry}: need name=folder" for entry in self.lora_models if not _is_pair(entry)]
        problems += [f"model name {name!r} is given twice" for name in sorted(set(names)) if names.count(name) > 1]
        if not all(names):
            problems.append("--served_model_name '': need a name of at least a character")
        raise_problems(problems)

    @property
    def adapters(self) -> dict[str, str]:
        """Folders of --lora_models by name."""
        return dict(entry.split("=", 1) for entry in self.lora_models)


def _is_pair(entry: str) -> bool:
    name, _, folder = entry.partition("=")
    return bool(name and folder)


def load_api_keys(file: str | None) -> list[str]:
    """The keys of a file and of the environment; none: everyone may use the server. Raises: InputError."""
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        if not Path(file).is_file():
            raise InputError(f"--api_key_file {file}: no such file")
        lines = read_text(file).splitlines()
        found = [line.partition("#")[0].strip() for line in lines]
        if not any(found):
            raise InputError(f"--api_key_file {file}: no key in it; write one a line")
        keys += found
    return list(dict.fromkeys(key for key in keys if key))
