"""A server of a tiny model, in a thread of this process."""

import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from modeling_querit.serving.run import address_of, listen, make_server
from modeling_querit.serving.settings import ServerSettings


@contextmanager
def running(model, **kwargs):
    """Serve a model while the block runs: the server's address."""
    settings = ServerSettings(port=0, name="tiny", **kwargs)
    with listen(settings) as listener:
        server = make_server(model, settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield address_of(listener)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serve():
    """Serve a model under other settings."""
    return running


@pytest.fixture(scope="session")
def served_model(models):
    return models("qwen3")


@pytest.fixture(scope="session")
def address(served_model):
    with running(served_model) as address:
        yield address


@pytest.fixture(scope="session")
def client(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
