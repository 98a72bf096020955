"""A server under many clients, some of them bad: python -m benchmarks.serving_soak [--model FOLDER]

1. Requests of 1 to 40 documents from 32 connections; 5 % of the clients are cut off, 5 % of the requests are bad. None
   may be lost or mixed up (each score is that of `predict`), none answered by 5xx, and memory must stay flat.
2. SIGTERM in the midst: every accepted request is answered, and the process ends with code 0.
3. SIGKILL in the midst and a restart: clients that try again get their answers.

Ends with exit code 1 if anything of this fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import http_load
from benchmarks.http_load import Answer, Server
from benchmarks.shapes import build_folder
from benchmarks.workloads import make_documents, words_of
from modeling_querit import QueritForSequenceRanking, console, files

QUERIES, LARGEST = 20, 40
TOLERANCE = 1e-5
# Growth of the resident memory from a fifth of the requests to the end, in MB, that is still flat.
FLAT_MB = 32
BAD_BODIES = (
    b"{",
    b"",
    b'{"query": "\\ud800", "documents": ["a"]}',
    b'{"query": "a", "documents": ["a"], "top_n": NaN}',
    b'{"query": "a", "documents": [3]}',
    b'{"query": "a"}',
    b'{"query": "a", "documents": ["' + b"x" * 3_000_000 + b'"]}',
)
JSON_HEADERS = {"content-type": "application/json"}


@dataclass
class Texts:
    """The texts that requests are drawn from, and the score of every pair."""

    queries: list[str]
    documents: list[str]
    scores: list[list[float]]

    @classmethod
    def make(cls, model: QueritForSequenceRanking, documents: int, seed: int) -> Texts:
        """Draw texts and score all pairs by `predict`."""
        rng, words = random.Random(seed), words_of(model.processor.tokenizer)
        queries = [" ".join(rng.choices(words, k=rng.randint(2, 12))) for _ in range(QUERIES)]
        texts = list(make_documents(words, rng, documents, median=40, sigma=0.6))
        scores = model.predict([(query, text) for query in queries for text in texts])
        return cls(queries, texts, scores.view(QUERIES, documents).tolist())


@dataclass
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    largest_difference: float = 0.0
    resident_mb: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Draw:
    """One request: the numbers of its query and documents."""

    query: int
    documents: list[int]

    @classmethod
    def make(cls, texts: Texts, rng: random.Random, count: int | None = None) -> Draw:
        """Draw a request of `count` documents, by default 1 to 40."""
        numbers = range(len(texts.documents))
        return cls(rng.randrange(QUERIES), rng.choices(numbers, k=count or rng.randint(1, LARGEST)))

    def body(self, texts: Texts) -> dict[str, Any]:
        """The request's body."""
        documents = [texts.documents[number] for number in self.documents]
        return {"query": texts.queries[self.query], "documents": documents, "return_documents": False}

    def difference(self, texts: Texts, answer: Answer) -> float:
        """Largest difference of the answer's scores from `predict`'s; infinite if one is missing."""
        expected = [texts.scores[self.query][number] for number in self.documents]
        scores = http_load.scores_of(answer)
        if len(scores) != len(expected):
            return float("inf")
        return max(abs(a - b) for a, b in zip(scores, expected, strict=True))


async def soak(server: Server, texts: Texts, requests: int, connections: int, seed: int) -> Tally:
    """Send the requests of the first part."""
    tally, rng = Tally(), random.Random(seed)
    plans = iter([(rng.random(), rng.choice(BAD_BODIES), Draw.make(texts, rng)) for _ in range(requests)])

    async def work(client: httpx.AsyncClient) -> None:
        for kind, bad_body, draw in plans:
            if kind < 0.05:
                await _cut_off(server, draw.body(texts), half=kind < 0.025)
                tally.outcomes["cut off"] += 1
            elif kind < 0.1:
                response = await client.post("/rerank", content=bad_body, headers=JSON_HEADERS)
                tally.outcomes[f"bad: {response.status_code // 100}xx"] += 1
            else:
                response = await client.post("/rerank", json=draw.body(texts))
                tally.outcomes[f"good: {response.status_code}"] += 1
                if response.status_code == 200:
                    difference = draw.difference(texts, Answer(200, 0.0, response.json()))
                    tally.largest_difference = max(tally.largest_difference, difference)
            if tally.outcomes.total() % max(1, requests // 20) == 0:
                tally.resident_mb.append(server.resident_mb())

    async with httpx.AsyncClient(base_url=server.address, timeout=600) as client:
        await asyncio.gather(*(work(client) for _ in range(connections)))
    return tally


async def _cut_off(server: Server, body: dict[str, Any], half: bool) -> None:
    """Send a request, or half of it, and close the connection without waiting for the answer."""
    host, port = server.address.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = (
        f"POST /rerank HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    )
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.encode() + b"\r\n" + (content[: len(content) // 2] if half else content))
    await writer.drain()
    writer.close()


async def terminate_in_the_midst(server: Server, texts: Texts, connections: int, seed: int) -> dict[str, Any]:
    """Send SIGTERM as soon as all requests have been accepted."""
    rng = random.Random(seed)
    draws = [Draw.make(texts, rng, LARGEST) for _ in range(connections)]
    async with httpx.AsyncClient(base_url=server.address, timeout=600) as client:
        tasks = [asyncio.ensure_future(client.post("/rerank", json=draw.body(texts))) for draw in draws]
        while await _accepted(client) < len(draws):
            pass
        open_requests = sum(not task.done() for task in tasks)
        server.process.send_signal(signal.SIGTERM)
        responses = await asyncio.gather(*tasks, return_exceptions=True)
    answered = [
        response.status_code == 200 and draw.difference(texts, Answer(200, 0.0, response.json())) <= TOLERANCE
        for draw, response in zip(draws, responses, strict=True)
        if isinstance(response, httpx.Response)
    ]
    code = await asyncio.to_thread(server.process.wait, 60)
    return {"requests": len(draws), "open": open_requests, "answered": sum(answered), "exit_code": code}


async def _accepted(client: httpx.AsyncClient) -> int:
    """Number of requests for a ranking that the server has accepted so far."""
    text = (await client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    answered = sum(
        sample.value
        for sample in samples
        if sample.name == "querit_requests_total" and sample.labels["route"] == "/rerank"
    )
    # The request for the metrics is open too.
    return int(answered + next(sample.value for sample in samples if sample.name == "querit_open_requests") - 1)


async def kill_in_the_midst(
    server: Server, command: Sequence[str], port: int, texts: Texts, connections: int, seed: int
) -> tuple[dict[str, Any], Server]:
    """Kill the server after a quarter of the answers and start it again, while clients try until they are answered."""
    rng = random.Random(seed)
    draws = [Draw.make(texts, rng) for _ in range(4 * connections)]
    waiting = iter(draws)
    answered, retries, worst = 0, 0, 0.0
    is_time = asyncio.Event()

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal answered, retries, worst
        for draw in waiting:
            while True:
                try:
                    response = await client.post("/rerank", json=draw.body(texts))
                    break
                except httpx.TransportError:
                    retries += 1
                    await asyncio.sleep(0.25)
            worst = max(worst, draw.difference(texts, Answer(response.status_code, 0.0, response.json())))
            answered += 1
            if answered >= len(draws) // 4:
                is_time.set()

    async with httpx.AsyncClient(base_url=server.address, timeout=600) as client:
        clients = asyncio.gather(*(work(client) for _ in range(connections)))
        await is_time.wait()
        server.process.kill()
        server.process.wait()
        restarted = await asyncio.to_thread(http_load.start, command, port)
        await clients
    result = {"requests": len(draws), "answered": answered, "retries": retries, "largest_difference": worst}
    return result, restarted


@contextmanager
def _folder(model: str | None) -> Iterator[Path]:
    """The model's folder: as named, or one with random weights."""
    if model is not None:
        yield Path(model)
        return
    with tempfile.TemporaryDirectory() as parent:
        yield build_folder("tiny_dense", None, torch.float32, Path(parent), seed=0)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the three parts."""
    texts = Texts.make(QueritForSequenceRanking.from_pretrained(folder), args.documents, args.seed)
    port = http_load.free_port()
    options = ("--cache-mb", str(args.cache_mb), "--max-body-mb", "2")
    command = http_load.querit_serve(str(folder), port, *options)
    server = http_load.start(command, port)
    try:
        tally = asyncio.run(soak(server, texts, args.requests, args.connections, args.seed))
        killed, server = asyncio.run(kill_in_the_midst(server, command, port, texts, args.connections, args.seed + 1))
        terminated = asyncio.run(terminate_in_the_midst(server, texts, args.connections, args.seed + 2))
    finally:
        with suppress(ProcessLookupError):
            server.process.kill()
        server.process.wait()
    return {
        "outcomes": dict(sorted(tally.outcomes.items())),
        "largest_difference": tally.largest_difference,
        "resident_mb": [round(megabytes, 1) for megabytes in tally.resident_mb],
        "sigterm": terminated,
        "sigkill": killed,
    }


def problems_of(results: dict[str, Any], requests: int) -> list[str]:
    """Name what must not have happened."""
    outcomes, resident = results["outcomes"], results["resident_mb"]
    early = resident[len(resident) // 5] if resident else 0.0
    checks = {
        "requests were lost": sum(outcomes.values()) != requests,
        "a request was answered by another status": not outcomes.keys() <= {"good: 200", "bad: 4xx", "cut off"},
        "scores differ from predict's": not results["largest_difference"] <= TOLERANCE,
        "memory grew": bool(resident) and resident[-1] - early > FLAT_MB,
        "SIGTERM lost requests": results["sigterm"]["answered"] != results["sigterm"]["requests"],
        "SIGTERM did not end the process in order": results["sigterm"]["exit_code"] != 0,
        "SIGKILL lost requests": results["sigkill"]["answered"] != results["sigkill"]["requests"],
        "scores after SIGKILL differ": not results["sigkill"]["largest_difference"] <= TOLERANCE,
    }
    return [name for name, is_wrong in checks.items() if is_wrong]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder in float32; by default a tiny one with random weights")
    parser.add_argument("--requests", type=int, default=5000, help="requests of the first part")
    parser.add_argument("--documents", type=int, default=200, help="different documents that requests are made of")
    parser.add_argument("--connections", type=int, default=32, help="connections of the clients")
    parser.add_argument("--cache-mb", type=int, default=0, help="size of the server's cache")
    parser.add_argument("--seed", type=int, default=0, help="seed of texts and requests")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args(arguments)
    console.quiet_libraries()
    with _folder(args.model) as folder:
        results = run(args, folder)
    print(json.dumps(results, indent=2))
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "model")}
        files.write_json({"settings": settings, **results}, args.json)
    if problems := problems_of(results, args.requests):
        sys.exit("; ".join(problems))


if __name__ == "__main__":
    main()
