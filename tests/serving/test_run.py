"""Where the server listens; how it ends is in tests/benchmarks/test_serving_soak.py, with a process of its own."""

import socket
import sys

import httpx
import pytest

from modeling_querit.serving.run import address_of, listen, serve
from modeling_querit.serving.settings import ServerSettings


def test_an_address_in_use_is_refused_before_a_model_is_loaded(querit):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = querit("serve", "no-such-model", "--port", port)
    assert code == 2
    assert err == (
        f"querit: Cannot listen at 127.0.0.1, port {port} (Address already in use): name others by --host and --port.\n"
    )


def test_a_server_that_took_the_address_meanwhile_is_said(served_model):
    """Both bind it before either has loaded its model."""
    with listen(ServerSettings(port=0)) as other:
        settings = ServerSettings(port=other.getsockname()[1])

        def load():
            other.listen()
            return served_model

        with pytest.raises(ValueError, match=r"Cannot listen at 127\.0\.0\.1, port \d+ \(Address already in use\)"):
            serve(load, settings, print)


@pytest.mark.parametrize(("host", "prefix"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_addresses_are_urls(host, prefix):
    with listen(ServerSettings(host=host, port=0)) as listener:
        assert address_of(listener).startswith(prefix)


def test_a_host_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"Cannot listen at 192\.0\.2\.1, port 8000"):
        listen(ServerSettings(host="192.0.2.1"))


def test_nothing_is_answered_before_the_server_runs():
    with listen(ServerSettings(port=0)) as listener, pytest.raises(httpx.ConnectError):
        httpx.get(address_of(listener), timeout=5)


def test_a_model_that_is_missing_is_one_line(querit, tmp_path):
    code, out, err = querit("serve", tmp_path / "missing", "--port", 0)
    assert code == 2
    assert out == ""
    assert "missing" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--max-documents", 0], "--max-documents is 0"), (["--api-key-file", "missing.txt"], "missing.txt")],
)
def test_settings_are_checked_first(querit, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = querit("serve", "no-such-model", *arguments)
    assert code == 2
    assert words in err


def test_the_extra_is_named_where_it_is_missing(querit, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "modeling_querit.serving.run", raising=False)
    code, _, err = querit("serve", "no-such-model")
    assert code == 2
    assert "pip install 'modeling-querit[serve]'" in err
