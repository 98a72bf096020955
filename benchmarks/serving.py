"""Throughput and latency of servers: python -m benchmarks.serving [--model mini]

Ours, sentence-transformers' CrossEncoder behind FastAPI (one request at a time), and vLLM where QUERIT_VLLM names the
Python of an environment that has it. All get the same requests from 32 connections, in turns: all at once (burst), and
as a Poisson process at the rate at which ours worked off the burst.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import http_load, timing
from benchmarks.contest import BFLOAT16_TOLERANCE
from benchmarks.http_load import Arrival, Server
from benchmarks.workloads import make_documents, words_of
from modeling_querit import QueritProcessor, console, default_model_path
from modeling_querit.checkpoints.convert import LAYOUTS

OURS, PEER, VLLM = "querit serve", "CrossEncoder behind FastAPI", "vLLM"
QUERY_WORDS = 8


def make_bodies(
    processor: QueritProcessor, requests: int, largest: int, median: int, seed: int
) -> list[dict[str, Any]]:
    """Draw requests of 1 to `largest` documents, whose median length is `median` tokens; no pair comes twice."""
    rng, words = random.Random(seed), words_of(processor.tokenizer)
    return [
        {
            "query": " ".join(rng.choices(words, k=QUERY_WORDS)),
            "documents": list(make_documents(words, rng, rng.randint(1, largest), median, sigma=0.5)),
        }
        for _ in range(requests)
    ]


def start_servers(stack: ExitStack, model: str, folder: Path, vllm: str | None) -> dict[str, Server]:
    """Start every contender; all wait while one works."""
    port = http_load.free_port()
    # Repeated rounds must not find their scores in the cache.
    command = http_load.querit_serve(model, port, "--cache-mb", "0")
    servers = {OURS: stack.enter_context(http_load.running(command, port))}
    port = http_load.free_port()
    command = [sys.executable, "-m", "benchmarks.serving_peer", str(folder / "querit"), "--port", str(port)]
    LAYOUTS["querit"](model, folder / "querit", "auto")
    servers[PEER] = stack.enter_context(http_load.running(command, port))
    if vllm:
        seq_cls = folder / "seq-cls"
        LAYOUTS["seq-cls"](model, seq_cls, "auto")
        port = http_load.free_port()
        command = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(seq_cls), "--port", str(port)]
        command += ["--runner", "pooling", "--chat-template", str(seq_cls / "chat_template.jinja")]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
        servers[VLLM] = stack.enter_context(http_load.running(command, port, **environment))
    return servers


def check_scores(servers: dict[str, Server], bodies: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compare the scores of a few requests, which also warms up; exit if they differ by more than rounding."""
    scores = {}
    for name, server in servers.items():
        answers, _ = asyncio.run(http_load.send(server.address, http_load.bursts(bodies), 1))
        scores[name] = [score for answer in answers for score in http_load.scores_of(answer)]
    differences = {
        name: max(abs(a - b) for a, b in zip(scores[OURS], theirs, strict=True)) for name, theirs in scores.items()
    }
    for name, difference in differences.items():
        # Written so that NaN fails.
        if not difference <= BFLOAT16_TOLERANCE:
            sys.exit(f"Scores of {name} differ by {difference:.2g}: nothing was timed.")
    return differences


def measure(
    servers: dict[str, Server], arrivals: Sequence[Arrival], rounds: int, connections: int
) -> dict[str, dict[str, Any]]:
    """Send the same requests to each server in turn: seconds of each round, and percentiles of all latencies."""
    totals: dict[str, list[float]] = {name: [] for name in servers}
    latencies: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(rounds):
        for name, server in servers.items():
            answers, seconds = asyncio.run(http_load.send(server.address, arrivals, connections))
            failed = [answer for answer in answers if answer.status != 200]
            if failed:
                sys.exit(f"{name}: {len(failed)} requests were answered by {failed[0].status}.")
            totals[name].append(seconds)
            latencies[name] += [answer.seconds for answer in answers]
    return {name: {"seconds": totals[name], **http_load.percentiles(latencies[name])} for name in servers}


def rows_of(workload: str, results: dict[str, dict[str, Any]], bodies: Sequence[dict[str, Any]]) -> list[timing.Row]:
    """Compare ours with each other server."""
    seconds = {name: result["seconds"] for name, result in results.items()}
    middle = timing.medians(seconds)
    pairs = sum(len(body["documents"]) for body in bodies)
    rows = []
    for name in list(results)[1:]:
        ours, theirs = results[OURS], results[name]
        latencies = {
            f"{key}_{side}": result[key]
            for side, result in (("ours", ours), ("against", theirs))
            for key in ("p50", "p95", "p99")
        }
        latencies |= {f"{key}_ratio": theirs[key] / ours[key] for key in ("p50", "p95", "p99")}
        remarks = ", ".join(f"{key} {ours[key]:.2f} against {theirs[key]:.2f} s" for key in ("p50", "p95", "p99"))
        throughput = {"pairs_per_second_ours": pairs / middle[OURS], "pairs_per_second_against": pairs / middle[name]}
        rows.append(timing.row(workload, OURS, name, seconds, remarks=remarks, pairs=pairs, **throughput, **latencies))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="mini, or a folder or repository")
    parser.add_argument("--requests", type=int, default=64, help="requests of each round")
    parser.add_argument("--documents", type=int, default=40, help="maximum number of documents of a request")
    parser.add_argument("--tokens", type=int, default=40, help="median number of tokens of a document")
    parser.add_argument("--connections", type=int, default=32, help="connections of the clients")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each server")
    parser.add_argument("--load", type=float, default=1.0, help="Poisson: share of the rate of our burst")
    parser.add_argument("--seed", type=int, default=0, help="seed of texts and arrivals")
    parser.add_argument("--vllm", default=os.environ.get("QUERIT_VLLM"), help="Python of an environment with vLLM")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args(arguments)
    console.quiet_libraries()
    model = str(default_model_path()) if args.model == "mini" else args.model
    processor = QueritProcessor.from_pretrained(model)
    bodies = make_bodies(processor, args.requests, args.documents, args.tokens, args.seed)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = start_servers(stack, model, Path(folder), args.vllm)
        differences = check_scores(servers, make_bodies(processor, 4, args.documents, args.tokens, args.seed + 1))
        burst = measure(servers, http_load.bursts(bodies), args.rounds, args.connections)
        rate = args.load * len(bodies) / timing.medians({OURS: burst[OURS]["seconds"]})[OURS]
        arrivals = http_load.poisson(bodies, rate, args.seed)
        steady = measure(servers, arrivals, args.rounds, args.connections)
    rows = rows_of("burst", burst, bodies) + rows_of(f"Poisson, {rate:.2f} requests/s", steady, bodies)
    timing.print_rows(
        rows, f"{args.requests} requests of 1 to {args.documents} documents, {args.connections} connections"
    )
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "vllm", "model")}
        machine = timing.machine(args.seed, torch.device("cpu"))
        timing.write_json(args.json, rows, machine, settings=settings, max_score_differences=differences)


if __name__ == "__main__":
    main()
