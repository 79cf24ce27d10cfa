"""Errors in the form of OpenAI's protocol."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any


class ApiError(Exception):
    """A reply that is an error, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.type = status, message, param, code, type
        self.headers = dict(headers or {})

    def json(self) -> bytes:
        """The reply."""
        # A request's own text may stand in the message, with half characters that UTF-8 does not have.
        message, param = (
            text if text is None else text.encode("utf-8", "replace").decode() for text in (self.message, self.param)
        )
        body = {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}
        return json.dumps(body, ensure_ascii=False).encode()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered."""
    return ApiError(400, message, param=param, code=code)


def missing(param: str) -> ApiError:
    """A request without something that it needs."""
    return bad_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")


def context_error(num_tokens: int, context: int, param: str) -> ApiError:
    """A prompt that leaves no room for an answer."""
    return bad_request(
        f"This model's maximum context length is {context} tokens, for prompt and answer together. The prompt has "
        f"{num_tokens} tokens, so nothing is left for an answer; shorten it.",
        param,
        "context_length_exceeded",
    )


def describe_validation_error(errors: Sequence[Mapping[str, Any]], body: Any, known: Sequence[str]) -> ApiError:
    """Pydantic's errors as one reply, about the first of them.

    Args: body: the JSON of the request; known: its fields.
    """
    error = errors[0]
    param = _param(error["loc"], body)
    if error["type"] == "json_invalid":
        return bad_request(f"The request body is not valid JSON: {error['ctx']['error']}.")
    if error["type"] == TOO_MANY:
        return bad_request(f"{error['msg']}.", param)
    if param is None:
        return bad_request("The request body must be a JSON object, sent with Content-Type: application/json.")
    if error["type"] == "missing":
        return missing(param)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, known, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return bad_request(f"Unrecognized request argument supplied: {param[:100]}.{hint}", param[:100])
    return bad_request(f"Invalid value for '{param[:100]}': {error['msg']}.", param[:100], "invalid_value")


def _param(location: Sequence[str | int], body: Any) -> str | None:
    """The path of a field as OpenAI writes it, messages[0].content; None: the body itself."""
    path = ""
    for number, part in enumerate(location[1:], 2):
        if isinstance(body, list) and isinstance(part, int):
            path += f"[{part}]"
            body = body[part] if part < len(body) else None
        elif isinstance(body, dict) and (part in body or number == len(location)):
            path += f".{part}" if path else str(part)
            body = body.get(part)
        # Else it is the name of a union's branch, which the request does not have.
    return path or None


TOO_MANY = "too_many_fields"
