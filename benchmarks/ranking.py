"""Ranking the documents of a query, ours against other software: python -m benchmarks.ranking

Full-size models with random weights are timed from texts to scores, through public interfaces. Contenders share one
copy of the weights and take turns; their scores are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import contest, memory, peers, timing
from benchmarks.contest import Subject
from benchmarks.shapes import SHAPES, build_folder, size_of
from benchmarks.workloads import WORKLOADS, make_task
from modeling_querit import QueritProcessor


def measure(args: argparse.Namespace, shape: str, parent: Path) -> tuple[list[timing.Row], dict[str, Any]]:
    """Measure one model; return rows, and other measurements."""
    dtype = getattr(torch, args.dtype)
    folder = build_folder(shape, args.layers, dtype, parent, args.seed)
    print(f"{folder.name}: {size_of(folder) / 1e9:.2f} GB")
    more: dict[str, Any] = {}
    # Measurements in their own processes come first, as memory may not suffice for both.
    if args.memory:
        more["memory"] = measure_memory(args, shape, parent)
    processor = QueritProcessor.from_pretrained(folder)
    tasks = [make_task(name, processor, args.documents, args.seed) for name in args.workload]
    served = [peers.vllm(args.vllm, folder, task, args.dtype, args.rounds) for task in tasks] if args.vllm else []
    subject = Subject.load(shape, folder, dtype, args.device)
    rows: list[timing.Row] = []
    for index, task in enumerate(tasks):
        print(f"{subject.name(task)}: {task.statistics()}")
        options = {"mteb_documents": args.mteb_documents, "with_ablations": args.ablation}
        task_rows = contest.compare(subject, task, args.peers, args.rounds, **options)
        if served:
            task_rows.append(contest.vllm_row(subject, task, served[index], task_rows[-1]["all_seconds_ours"]))
        if args.profile:
            shares = timing.profile_shares(lambda task=task: contest.rank(subject.model, task), args.device)
            timing.print_shares(shares, subject.name(task))
            more.setdefault("profile", {})[task.name] = shares
        timing.print_rows(task_rows, f"{subject.name(task)}, {args.dtype}, medians of {args.rounds}")
        rows += task_rows
    if args.int8:
        int8_rows = contest.int8_rows(subject, dtype, args.device, tasks, args.rounds)
        timing.print_rows(int8_rows, f"{shape}, int8 against {args.dtype}")
        rows += int8_rows
    return rows, more


def measure_memory(args: argparse.Namespace, shape: str, parent: Path) -> dict[str, Any]:
    """Measure peaks of memory while documents stream through a model of the same width with fewer layers."""
    dtype = getattr(torch, args.dtype)
    folder = build_folder(shape, args.memory_layers, dtype, parent, args.seed)
    measured = memory.measure_apart(folder, dtype, args.memory_documents, args.seed)
    for peak in measured["mib_beyond_weights"]:
        print(f"  {peak['documents']:,} documents: at most {peak['peak']:.0f} MiB beyond the weights")
    return measured


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = timing.common_parser(__doc__.splitlines()[0])
    shapes = [name for name in SHAPES if not name.startswith("tiny")]
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=shapes[:2], help="models")
    workloads = [name for name in WORKLOADS if name != "tiny"]
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=workloads, help="texts to rank")
    parser.add_argument("--layers", type=int, help="layers of each model; by default all")
    parser.add_argument("--documents", type=int, help="documents per query; by default those of the workload")
    help_of_peers = "; ".join(f"{name}: {text}" for name, text in peers.PEERS.items())
    parser.add_argument("--peers", nargs="*", choices=list(peers.PEERS), default=list(peers.PEERS), help=help_of_peers)
    parser.add_argument("--mteb-documents", type=int, default=1, help="documents that mteb's wrapper is timed on")
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vLLM")
    parser.add_argument("--folder", type=Path, help="folder to keep the models in; by default they are removed")
    parser.add_argument("--ablation", action="store_true", help="time ours with each optimization disabled")
    parser.add_argument("--int8", action="store_true", help="time ours with int8 linear layers (needs torchao)")
    parser.add_argument("--memory", action="store_true", help="measure memory while documents stream")
    parser.add_argument("--memory-documents", type=int, nargs="+", default=[1000, 10_000], help="numbers of documents")
    parser.add_argument("--memory-layers", type=int, default=2, help="layers of the model whose memory is measured")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or 3
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write the results."""
    args = parse(arguments)
    torch.manual_seed(args.seed)
    rows: list[timing.Row] = []
    more: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="querit-benchmark-") as temporary:
        for shape in args.shape:
            model_rows, more[shape] = measure(args, shape, args.folder or Path(temporary))
            rows += model_rows
            gc.collect()
            if args.json:
                # After each model, as a run takes long.
                machine = timing.machine(args.seed, args.device)
                timing.write_json(args.json, rows, machine, settings=vars(args), more=more)


if __name__ == "__main__":
    main()
