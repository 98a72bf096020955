"""Servers as processes of their own, and clients that load them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ROOT = Path(__file__).parents[1]
_START_SECONDS = 600
_REQUEST_SECONDS = 600.0


class Arrival(NamedTuple):
    """One request: when it arrives, in seconds from the start, and its body."""

    at: float
    body: dict[str, Any]


class Answer(NamedTuple):
    """Status, seconds from a request's arrival to its answer, and the answer."""

    status: int
    seconds: float
    content: Any


@dataclass
class Server:
    """A running server.

    Args:
        process: Its process.
        address: Its URL.
    """

    process: subprocess.Popen[bytes]
    address: str

    def resident_mb(self) -> float:
        """Resident memory in MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("The process has no resident memory.")


def free_port() -> int:
    """Find a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def querit_serve(model: str, port: int, *options: str) -> list[str]:
    """Return the command of our server."""
    command = [sys.executable, "-m", "modeling_querit", "serve", model, "--port", str(port)]
    return [*command, *options, "--max-queue", "1000000"]


def start(command: Sequence[str], port: int, **environment: str) -> Server:
    """Start a server, and wait until it is healthy."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT, env=variables)
    server = Server(process, f"http://127.0.0.1:{port}")
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}.")
        try:
            if httpx.get(f"{server.address}/health", timeout=5).status_code == 200:
                return server
        except httpx.TransportError:
            time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"{' '.join(command)} was not ready after {_START_SECONDS} s.")


@contextmanager
def running(command: Sequence[str], port: int, **environment: str) -> Iterator[Server]:
    """Run a server while the block runs."""
    server = start(command, port, **environment)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(30)
        except subprocess.TimeoutExpired:
            server.process.kill()


def poisson(bodies: Sequence[dict[str, Any]], rate: float, seed: int) -> list[Arrival]:
    """Let requests arrive independently of one another, `rate` of them a second on average."""
    rng, at = random.Random(seed), 0.0
    arrivals = []
    for body in bodies:
        at += rng.expovariate(rate)
        arrivals.append(Arrival(at, body))
    return arrivals


def bursts(bodies: Sequence[dict[str, Any]]) -> list[Arrival]:
    """Let all requests arrive at once."""
    return [Arrival(0.0, body) for body in bodies]


async def send(address: str, arrivals: Sequence[Arrival], connections: int) -> tuple[list[Answer], float]:
    """Send requests as they arrive, as soon as one of the connections is free.

    Returns:
        The answers in the order of the arrivals, with their seconds since the arrival; the seconds until the last.
    """
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    free = asyncio.Semaphore(connections)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=_REQUEST_SECONDS) as client:
        start = time.perf_counter()

        async def one(arrival: Arrival) -> Answer:
            await asyncio.sleep(arrival.at - (time.perf_counter() - start))
            async with free:
                response = await client.post("/rerank", json=arrival.body)
            return Answer(response.status_code, time.perf_counter() - start - arrival.at, response.json())

        answers = await asyncio.gather(*map(one, arrivals))
        return list(answers), time.perf_counter() - start


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the 50th, 95th and 99th percentile of latencies."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def scores_of(answer: Answer) -> list[float]:
    """Return the scores of an answer in the order of the request's documents."""
    if answer.status != 200:
        raise RuntimeError(f"A request was answered by {answer.status}: {json.dumps(answer.content)[:300]}")
    results = sorted(answer.content["results"], key=lambda result: result["index"])
    return [result["relevance_score"] for result in results]
