"""Endpoints: models behind OpenAI-compatible servers, asked through the official client."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..core.arguments import GenerationArguments
from ..core.errors import InputError
from ..text.prompts import Message
from .arguments import changed_flags

logger = logging.getLogger(__name__)

RENAMED = {"max_tokens": "max_completion_tokens"}  # in a chat: what to call a parameter that a server refuses
RETRIES = 5  # further tries, at growing intervals, when the server is busy, fails or cannot be reached
TIMEOUT = 600  # seconds for an answer
# Settings that the protocol has; a server's own defaults decide the others.
SHARED_SETTINGS = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
SENT = (*SHARED_SETTINGS, "max_new_tokens", "do_sample", "seed", "stop")


def answer_options(settings: GenerationArguments, seed: int) -> dict[str, Any]:
    """How answers are drawn, in the words of OpenAI's protocol; what nobody asked for is left to the server."""
    options: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "seed": seed}
    options |= {name: getattr(settings, name) for name in SHARED_SETTINGS if name not in settings.given}
    if not settings.samples:
        options["temperature"] = 0
    return options | ({"stop": settings.stop} if settings.stop else {})


def unsent_flags(settings: GenerationArguments) -> list[str]:
    """The flags that were given and no server is told, since the protocol has no word for them."""
    return changed_flags(settings, but=SENT)


def key_variable(name: str) -> str:
    """The variable of the environment that holds an endpoint's key."""
    return f"{re.sub(r'[^A-Z0-9]', '_', name.upper())}_API_KEY"


def check_key_variables(names: Sequence[str]) -> None:
    """Raises: InputError if two endpoints would read one variable, and one would be sent the other's key."""
    seen: dict[str, str] = {}
    for name in names:
        if (variable := key_variable(name)) in seen:
            raise InputError(
                f"the servers {seen[variable]} and {name} would both take their key from {variable}; call one of them "
                "otherwise, with other letters from A to Z or digits"
            )
        seen[variable] = name


class EndpointError(Exception):
    """A request that failed, after all tries; its message says how."""


@dataclass(frozen=True)
class ServerAnswer:
    """An answer in a chat.

    Attributes:
        tokens: of the prompt and of the answer, as the server counts them; None: it does not.
        finish_reason: why it ended: stop, length and others.
    """

    text: str
    tokens: tuple[int, int] | None
    finish_reason: str | None


class Endpoint:
    """A model behind a server.

    Attributes:
        url: where its API begins, such as http://127.0.0.1:8000/v1.
        key_variable: the variable of the environment that holds the key; every endpoint has its own, so that no server
            is sent another one's key.
    """

    def __init__(self, name: str, address: str) -> None:
        """`address`: URL, or URL#MODEL; without a model the first one that the server lists.

        Raises: InputError for what is no address.
        """
        try:
            import openai
        except ImportError:
            raise InputError("asking servers needs the openai package: pip install 'openai>=2,<4'") from None
        self.name = name
        self.url, _, self._model = address.partition("#")
        if not re.match(r"https?://[^/\s]", self.url):
            raise InputError(f"{name}: '{address}' is no address; need URL or URL#MODEL, http://127.0.0.1:8000/v1 say")
        self.key_variable = key_variable(name)
        key = os.environ.get(self.key_variable) or "none"
        self._refused: set[str] = set()
        self._client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)

    @cached_property
    def model(self) -> str:
        """The model's name on the server. Raises: InputError if the server cannot be reached, or has no model."""
        import openai

        try:
            names = [model.id for model in self._client.with_options(max_retries=1, timeout=20).models.list()]
        except openai.NotFoundError:
            names = []  # it lists none
        except openai.APIError as error:
            self._refuse(error)
            raise InputError(f"{self.name}: {self.url} does not answer: {_describe(error)}; is it running?") from None
        if not self._model and not names:
            raise InputError(f"{self.name}: {self.url} lists no model; pass {self.url}#MODEL")
        return self._model or names[0]

    def ask(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        """The answer. Raises: EndpointError; InputError where no request can succeed."""
        return self.answer(messages, options).text

    def answer(self, messages: Sequence[Message], options: Mapping[str, Any]) -> ServerAnswer:
        """The answer, and what it took. Raises: as `ask`."""
        import openai

        try:
            response = self._create(messages, options, stream=False)
        except openai.APIError as error:
            raise EndpointError(_describe(error)) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:  # the client lets it pass
            raise EndpointError(f"the server's reply is no JSON: {error}") from None
        if not getattr(response, "choices", None):
            raise EndpointError("the server's answer has no choice in it")
        choice, usage = response.choices[0], response.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else None
        return ServerAnswer(str(choice.message.content or ""), tokens, choice.finish_reason)

    def complete(self, text: str, options: Mapping[str, Any]) -> str:
        """How a text goes on. Raises: EndpointError; InputError where no request can succeed."""
        import openai

        try:
            response = self._request(self._client.completions.create, options, prompt=text)
        except openai.APIError as error:
            raise EndpointError(_describe(error)) from None
        if not response.choices:
            raise EndpointError("the server's answer has no choice in it")
        return str(response.choices[0].text or "")

    def stream(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        """Pieces of the answer as they come, and at last why it ended; leaving early closes the connection.

        Raises: EndpointError, InputError, and what a connection raises that breaks meanwhile.
        """
        import openai

        ended = None
        try:
            with self._create(messages, options, stream=True) as chunks:
                for chunk in chunks:
                    for choice in chunk.choices[:1]:
                        ended = choice.finish_reason or ended
                        yield choice.delta.content or "", choice.finish_reason
        except openai.APIError as error:
            raise EndpointError(_describe(error)) from None
        if ended is None:
            raise EndpointError("the connection broke off in the middle of the answer")

    def _create(self, messages: Sequence[Message], options: Mapping[str, Any], stream: bool) -> Any:
        return self._request(self._client.chat.completions.create, options, messages=list(messages), stream=stream)

    def _request(self, create: Any, options: Mapping[str, Any], **question: Any) -> Any:
        """Ask; a parameter that the server refuses goes by its other name, or is left out from then on."""
        import openai

        renamed = RENAMED if "messages" in question else {}
        while True:
            sent = {renamed.get(name, name) if name in self._refused else name: options[name] for name in options}
            sent = {name: value for name, value in sent.items() if name not in self._refused}
            try:
                return create(model=self.model, **question, **sent)
            except openai.BadRequestError as error:
                if error.param not in sent:
                    raise
                logger.warning("%s refuses %s; going on without it", self.name, error.param)
                self._refused.add(error.param)
            except openai.APIStatusError as error:
                self._refuse(error)
                raise

    def _refuse(self, error: Any) -> None:
        """Raises: InputError if every request will fail like this one."""
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            raise InputError(f"{self.name}: {self.url} wants a key; set {self.key_variable} ({error})") from None
        if status == 404:
            raise InputError(f"{self.name}: {self.url} has no model '{self._model}' to chat with ({error})") from None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
