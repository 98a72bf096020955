"""What is refused before a route sees it, over real connections."""

import asyncio
import gzip
import json
import logging
import socket
import time

import httpx
import pytest
import tiny

from modeling_querit.serving import middleware
from modeling_querit.serving.app import create_app
from modeling_querit.serving.engine import Engine
from modeling_querit.serving.metrics import Metrics
from modeling_querit.serving.settings import ServerSettings

BODY = {"query": tiny.QUERY, "documents": ["a novel"]}
JSON = {"content-type": "application/json"}
TOKEN = "secret-token"


@pytest.fixture(scope="module")
def small(served_model, serve):
    """A server with a token that takes bodies of at most 1 MB."""
    with serve(served_model, token=TOKEN, max_body_mb=1) as address:
        yield address


@pytest.fixture(scope="module")
def guarded(small):
    with httpx.Client(base_url=small, timeout=30, headers={"authorization": f"Bearer {TOKEN}"}) as client:
        yield client


def message(response):
    return response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/rerank", "/score", "/v1/models", "/metrics", "/nowhere"])
@pytest.mark.parametrize("header", [None, "Bearer wrong-token"])
def test_routes_need_the_token(small, path, header):
    headers = {} if header is None else {"authorization": header}
    response = httpx.post(small + path, json=BODY, headers=headers)
    assert response.status_code == 401
    assert "needs a token" in message(response)
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/docs", "/page/style.css", "/health", "/ready", "/openapi.json"])
def test_what_holds_no_data_is_open(small, path):
    assert httpx.get(small + path).status_code == 200


def test_the_token_lets_in(guarded):
    assert guarded.post("/rerank", json=BODY).status_code == 200


def test_a_large_body_is_refused_before_it_is_read(small):
    """The answer comes while the client has sent only its headers."""
    host, port = small.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = (
            f"POST /rerank HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        )
        connection.sendall(f"{head}Content-Length: 50000000\r\n\r\n".encode())
        answer = b""
        while b"}}" not in answer:
            answer += connection.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"larger than 1 MB" in answer


@pytest.mark.parametrize("is_chunked", [False, True])
def test_whoever_sends_a_large_body_gets_the_sentence(guarded, is_chunked):
    body = b"x" * 5_000_000
    chunks = (body[start : start + 65536] for start in range(0, len(body), 65536))
    response = guarded.post("/rerank", content=chunks if is_chunked else body, headers=JSON)
    assert response.status_code == 413
    assert "larger than 1 MB" in message(response)


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}, {"content-type": "multipart/form-data"}])
def test_other_bodies_than_json_are_refused(guarded, headers):
    response = guarded.post("/rerank", content=json.dumps(BODY), headers=headers)
    assert response.status_code == 415


@pytest.mark.parametrize("is_compressed", [False, True])
def test_compressed_bodies_are_refused_in_words(guarded, is_compressed):
    content = gzip.compress(json.dumps(BODY).encode()) if is_compressed else json.dumps(BODY)
    response = guarded.post("/rerank", content=content, headers=JSON | {"content-encoding": "gzip"})
    assert response.status_code == 415
    assert "must not be compressed" in message(response)


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/health", 200), ("/ready", 200), ("/rerank", 405)])
def test_head_is_answered_as_get_without_the_body(guarded, path, status):
    """What a balancer or `wget --spider` asks; the connection is of use after it."""
    for _ in range(2):
        response = guarded.head(path)
        assert (response.status_code, response.content) == (status, b"")
        assert int(response.headers["content-length"]) == len(guarded.get(path).content)


def test_requests_are_counted_by_route(guarded):
    guarded.post("/rerank", json=BODY)
    guarded.get("/some/where?document=secret")
    text = guarded.get("/metrics").text
    assert 'querit_requests_total{route="/rerank",status="200"}' in text
    assert 'querit_requests_total{route="other",status="404"}' in text
    assert "some" not in text


def test_a_client_that_leaves_in_the_midst_of_its_body_is_counted_as_gone(small, guarded):
    host, port = small.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        connection.sendall(f'{head}Content-Length: 1000\r\n\r\n{{"query":'.encode())
    end = time.monotonic() + 10
    while 'querit_requests_total{route="/score",status="499"} 1.0' not in guarded.get("/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_body_that_does_not_come_is_given_up(small, monkeypatch):
    monkeypatch.setattr(middleware, "_BODY_SECONDS", 0.1)
    host, port = small.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        assert connection.recv(10_000).startswith(b"HTTP/1.1 408")


def test_a_fault_of_the_server_tells_nobody_a_document(served_model, caplog):
    settings, metrics = ServerSettings(), Metrics()
    app = create_app(Engine(served_model, settings, metrics), settings, metrics)

    @app.get("/fault")
    async def fault():
        raise ValueError("secret document")

    async def get():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/fault")

    with caplog.at_level(logging.DEBUG):
        response = asyncio.run(get())
    assert response.status_code == 500
    assert "secret" not in response.text + caplog.text.replace('raise ValueError("secret document")', "")
    assert "ValueError at /fault" in caplog.text
