"""Settings of the server: where it listens, what it refuses, how it computes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from ..files import read_text

TOKEN_VARIABLE = "QUERIT_API_KEY"
# Shorter tokens can be guessed.
_MIN_TOKEN_CHARS = 8
_LARGEST_PORT = 65_535


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What `querit serve` may be told, apart from the model.

    Args:
        host: Address to listen at.
        port: Port to listen at; 0 lets the system choose one.
        name: Name under which the model is served.
        token: Bearer token that requests must carry; None lets everybody in.
        max_documents: Maximum number of documents, or pairs, of a request.
        max_chars: Maximum number of characters of a request's query and documents together.
        max_body_mb: Maximum size of a request's body, in MB.
        max_queue: Maximum number of pairs that wait to be scored; further requests are answered by 429.
        max_length: Maximum number of tokens of a pair; by default the model's.
        batch_tokens: Maximum number of tokens of a forward pass; by default that of `rank`.
        cache_mb: Memory for the scores of earlier pairs, in MB; 0 keeps none.
        drain_seconds: Time that accepted requests have to be answered after SIGTERM, in seconds.
        access_log: Whether a line is logged for each request, without its body.

    Raises:
        ValueError: if a number is out of its range, or the token is too short.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "mini"
    token: str | None = None
    max_documents: int = 1000
    max_chars: int = 2_000_000
    max_body_mb: int = 16
    max_queue: int = 10_000
    max_length: int | None = None
    batch_tokens: int | None = None
    cache_mb: int = 16
    drain_seconds: int = 60
    access_log: bool = False

    def __post_init__(self) -> None:
        at_least_one = ("max_documents", "max_chars", "max_body_mb", "max_queue", "max_length", "batch_tokens")
        for name in (*at_least_one, "cache_mb", "drain_seconds"):
            value, smallest = getattr(self, name), 1 if name in at_least_one else 0
            if value is not None and value < smallest:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: give at least {smallest}.")
        if not 0 <= self.port <= _LARGEST_PORT:
            raise ValueError(f"--port is {self.port}: give a number from 0 to {_LARGEST_PORT}.")
        if self.token is not None and len(self.token) < _MIN_TOKEN_CHARS:
            raise ValueError(f"The token has fewer than {_MIN_TOKEN_CHARS} characters: give one that is hard to guess.")

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_token(file: str | os.PathLike[str] | None) -> str | None:
    """Read the bearer token from a file, or from the environment variable `QUERIT_API_KEY`; None if neither is there.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is empty or has more than one line, or the token holds other characters than visible ASCII.
    """
    if file is None:
        token, source = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    else:
        token, source = read_text(file).strip(), str(file)
    if token is None:
        return None
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError(f"{source} holds no token: give one line of letters, digits and punctuation, without spaces.")
    return token


def served_name(model: str) -> str:
    """Return the name of a model in answers: a folder's last part, so that no path of this machine is told.

    Example:
        ```python
        >>> served_name("runs/law/model/")
        'model'
        ```
    """
    return Path(model).resolve().name if Path(model).is_dir() else model
