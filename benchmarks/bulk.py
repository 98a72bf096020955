"""`querit rerank --run` on many pairs: memory, kills and several processes, with a model that takes hardly any time."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Qwen3Config

from benchmarks import timing
from benchmarks.shapes import deepseek_tokenizer
from benchmarks.workloads import words_of
from modeling_querit import QueritConfig, QueritForSequenceRanking, QueritProcessor
from modeling_querit.files import sha256

DEPTH, WORDS_PER_DOCUMENT = 100, 3
# Seconds between two looks at a process.
INTERVAL = 0.1


def make_model(folder: Path, seed: int) -> None:
    """Write a model of one layer, as small as attention allows."""
    torch.manual_seed(seed)
    processor = QueritProcessor(deepseek_tokenizer())
    config = Qwen3Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    model = QueritForSequenceRanking(QueritConfig(text_config=config))
    torch.nn.init.normal_(model.score.weight, std=0.1)
    model.processor = processor
    model.save_pretrained(folder)


def make_collection(folder: Path, pairs: int, seed: int) -> None:
    """Write a collection, and a run of `pairs` lines, 100 for each query."""
    rng, words = random.Random(seed), words_of(deepseek_tokenizer())
    documents = max(pairs // 10, DEPTH)
    with (folder / "corpus.tsv").open("w") as file:
        for number in range(documents):
            file.write(f"d{number}\t{' '.join(rng.choices(words, k=WORDS_PER_DOCUMENT))}\n")
    with (folder / "queries.tsv").open("w") as queries, (folder / "run.trec").open("w") as run:
        for query in range(pairs // DEPTH):
            queries.write(f"q{query}\t{' '.join(rng.choices(words, k=WORDS_PER_DOCUMENT))}\n")
            for rank, document in enumerate(rng.sample(range(documents), DEPTH), start=1):
                run.write(f"q{query} Q0 d{document} {rank} {DEPTH - rank} first\n")


class Command:
    """`querit rerank --run` in a process of its own, or in several.

    Args:
        folder: Folder of the model and the collection.
        output: File that it writes.
        processes: Number of processes.
    """

    def __init__(self, folder: Path, output: Path, processes: int = 1):
        launch = ["-m", "modeling_querit"]
        if processes > 1:
            # torchrun would take --run for one of its own options.
            standalone = ["--standalone", f"--nproc_per_node={processes}", "-m", "--", "modeling_querit"]
            launch = ["-m", "torch.distributed.run", *standalone]
        options = {"run": folder / "run.trec", "collection": folder, "model": folder / "model", "output": output}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._parts = Path(f"{output}.parts")
        # A core for every process, however many there are.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, *launch, "rerank", *arguments]
        self._start, self._size = time.monotonic(), self._shard_bytes()
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def _shard_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._parts.glob("scores-*.jsonl"))

    def blocks(self) -> list[int]:
        """List the blocks that are scored."""
        lines = [line for path in self._parts.glob("scores-*.jsonl") for line in path.read_bytes().split(b"\n")[:-1]]
        return [json.loads(line)["block"] for line in lines]

    def kill_after(self, blocks: int) -> list[int]:
        """Kill the process once so many blocks are scored; return the blocks."""
        while self.process.poll() is None and len(self.blocks()) < blocks:
            time.sleep(INTERVAL / 10)
        if self.process.returncode is not None:
            raise RuntimeError("The work was done before it could be interrupted: give more pairs.")
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return self.blocks()

    def wait(self) -> dict[str, float]:
        """Wait for the end: seconds in all, seconds from the first score on, and memory in MiB.

        Raises:
            RuntimeError: if it fails.
        """
        tree, peak = psutil.Process(self.process.pid), 0.0
        first_score: float | None = None
        samples: list[float] = []
        while self.process.poll() is None:
            time.sleep(INTERVAL)
            memory = max(_resident(process) for process in [tree, *_children(tree)])
            peak = max(peak, memory)
            if first_score is None and self._shard_bytes() > self._size:
                first_score = time.monotonic()
            if first_score is not None:
                samples.append(memory)
        end = time.monotonic()
        if self.process.returncode:
            raise RuntimeError(f"querit rerank ended with code {self.process.returncode}.")
        quarter = max(len(samples) // 4, 1)
        return {
            "seconds": end - self._start,
            "seconds_from_first_score": end - (first_score or end),
            "mib_in_first_quarter": max(samples[:quarter], default=peak),
            "mib_peak": peak,
        }


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def run_with_kills(folder: Path, output: Path, kills: int, blocks: int) -> dict[str, Any]:
    """Rerank, killed at even distances; no block may be scored twice."""
    for kill in range(1, kills + 1):
        scored = Command(folder, output).kill_after(blocks * kill // (kills + 1))
        if len(set(scored)) != len(scored):
            raise RuntimeError("A block was scored twice.")
        if output.exists():
            raise RuntimeError("The output was there before the work was done.")
    return {"kills": kills, **Command(folder, output).wait()}


def measure(folder: Path, pairs: int, kills: int, processes: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Rerank with each number of processes, and with kills; all outputs must be equal, byte for byte."""
    make_model(folder / "model", seed)
    make_collection(folder, pairs, seed)
    rows: list[dict[str, Any]] = []
    hashes = set()
    # About 256 pairs a block, whole queries.
    blocks = pairs // (3 * DEPTH)
    for number in processes:
        output = folder / f"out-{number}.trec"
        rows.append({"processes": number, "pairs": pairs, **Command(folder, output, number).wait()})
        hashes.add(sha256(output))
    if kills:
        rows.append({"processes": 1, "pairs": pairs, **run_with_kills(folder, folder / "out.trec", kills, blocks)})
        hashes.add(sha256(folder / "out.trec"))
    if len(hashes) != 1:
        raise RuntimeError("The outputs differ.")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000, help="a multiple of 100")
    parser.add_argument("--kills", type=int, default=5, help="number of times that one more run is killed")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.pairs, args.kills, args.processes, args.seed)
    first = rows[0]["seconds_from_first_score"]
    for row in rows:
        if "kills" not in row:
            row["ratio"] = first / row["seconds_from_first_score"]
        print(*(f"{name}={round(value, 2):,}" for name, value in row.items()))
    print("all outputs are equal, byte for byte")
    if args.json:
        timing.write_json(args.json, rows, timing.machine(args.seed, torch.device("cpu")))


if __name__ == "__main__":
    main()
