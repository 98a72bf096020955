"""Errors of requests: a status and one sentence, which never holds a document's text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

# Names of errors in answers, as OpenAI's and vLLM's clients know them.
_TYPES = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}
# What pydantic and its JSON parser put around their messages.
_VALUE_ERROR = "Value error, "
# What pydantic calls the types that a field may have, in the place of an error.
_TYPE_NAME = re.compile(r"str|[\w-]+\[.*\]")


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: HTTP status, 4xx.
        message: One sentence for whoever sent the request.
        headers: Further headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Make the answer `{"error": {"message", "type", "code"}}`."""
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    content = to_json({"error": {"message": message, "type": kind, "code": status}})
    return Response(content, status, headers, media_type="application/json")


def validation_sentence(errors: Sequence[Mapping[str, Any]]) -> str:
    """Describe the first of pydantic's errors in one sentence, by its place and never by its value.

    Example:
        ```python
        >>> validation_sentence([{"loc": ("body", "documents", 3), "msg": "Input should be a valid string"}])
        'documents[3]: input should be a valid string.'
        ```
    """
    # Of the types that a field may have, the one that fits best says the place most exactly.
    error = max(
        (error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]), key=lambda error: len(error["loc"])
    )
    # The field's name may be any text: one that is unknown comes from the request.
    parts = [*error["loc"][1:2], *(part for part in error["loc"][2:] if not _TYPE_NAME.fullmatch(str(part)))]
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{re.sub(r'[^ -~]', '?', str(part))[:40]}" for part in parts
    ).lstrip(".")
    place = place or "The body"
    if error.get("type") == "extra_forbidden":
        return f"{place}: there is no such field."
    if error.get("type") == "missing":
        return f"{place} is missing."
    message = str(error["msg"]).removeprefix(_VALUE_ERROR).rstrip(".")
    return f"{place}: {message[:1].lower()}{message[1:]}."
