"""From settings to a server that answers until SIGTERM or Ctrl-C."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import uvicorn

from .app import create_app
from .engine import Engine
from .metrics import Metrics
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..modeling_querit import QueritForSequenceRanking


def listen(settings: ServerSettings) -> socket.socket:
    """Bind the address, before a model is loaded for it; connections are refused until the server runs.

    Raises:
        ValueError: if the address is not one of this machine, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise _cannot_listen(settings, error) from None
    return listener


def _cannot_listen(settings: ServerSettings, error: OSError) -> ValueError:
    return ValueError(
        f"Cannot listen at {settings.host}, port {settings.port} ({error.strerror}): name others by --host and --port."
    )


def address_of(listener: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(model: QueritForSequenceRanking, settings: ServerSettings) -> uvicorn.Server:
    """Make a server that is not running yet."""
    metrics = Metrics()
    app = create_app(Engine(model, settings, metrics), settings, metrics)
    config = uvicorn.Config(
        app,
        log_level=logging.INFO if settings.access_log else logging.WARNING,
        access_log=settings.access_log,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds,
        # The same parser and loop wherever it is installed.
        http="h11",
        loop="asyncio",
        ws="none",
    )
    return uvicorn.Server(config)


def serve(load: Callable[[], QueritForSequenceRanking], settings: ServerSettings, echo: Callable[[str], None]) -> None:
    """Load a model and serve it until SIGTERM or Ctrl-C; requests that were accepted by then are answered.

    Args:
        load: Function that returns the model.
        settings: Settings of the server.
        echo: Function that prints a line.

    Raises:
        ValueError: if the address cannot be used.
    """
    with closing(listen(settings)) as listener:
        server = make_server(load(), settings)
        try:
            # Several servers may bind an address while their models load; only the first one listens there.
            listener.listen()
        except OSError as error:
            raise _cannot_listen(settings, error) from None
        if threading.current_thread() is threading.main_thread():
            # uvicorn repeats the signal when all is done: SIGTERM then ends the process with code 0.
            signal.signal(signal.SIGTERM, lambda number, frame: None)
        echo(f"Serving {settings.name} at {address_of(listener)} (Ctrl-C ends it)")
        server.run(sockets=[listener])
