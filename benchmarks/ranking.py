"""Ranking the documents of a query, ours against whoever can load the folder: python -m benchmarks.ranking

Whole models of full size with random weights, through public interfaces, from texts to scores. Contenders share one
copy of the weights in memory and take turns; that their scores agree is checked before anything is timed.
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
    """Rows of one model, and what else was measured."""
    dtype = getattr(torch, args.dtype)
    folder = build_folder(shape, args.layers, dtype, parent, args.seed)
    print(f"{folder.name}: {size_of(folder) / 1e9:.2f} GB")
    more: dict[str, Any] = {}
    # What runs in processes of its own comes first: there may not be memory for both.
    if args.memory:
        more["memory"] = measure_memory(args, shape, parent)
    processor = QueritProcessor.from_pretrained(folder)
    tasks = [make_task(name, processor, args.documents, args.seed) for name in args.workload]
    served = [peers.vllm(args.vllm, folder, task, args.dtype, args.rounds) for task in tasks] if args.vllm else []
    subject = Subject.load(shape, folder, dtype, args.device)
    rows: list[timing.Row] = []
    for place, task in enumerate(tasks):
        print(f"{subject.name(task)}: {task.statistics()}")
        options = {"mteb_documents": args.mteb_documents, "with_ablations": args.ablation}
        found = contest.compare(subject, task, args.peers, args.rounds, **options)
        if served:
            found.append(contest.vllm_row(subject, task, served[place], found[-1]["all_seconds_ours"]))
        if args.profile:
            shares = timing.profile_shares(lambda task=task: contest.rank(subject.model, task), args.device)
            timing.print_shares(shares, subject.name(task))
            more.setdefault("profile", {})[task.name] = shares
        timing.print_rows(found, f"{subject.name(task)}, {args.dtype}, medians of {args.rounds}")
        rows += found
    if args.int8:
        found = contest.int8_rows(subject, dtype, args.device, tasks, args.rounds)
        timing.print_rows(found, f"{shape}, 8 bits against {args.dtype}")
        rows += found
    return rows, more


def measure_memory(args: argparse.Namespace, shape: str, parent: Path) -> dict[str, Any]:
    """Peaks of memory while documents stream through a model of the same width with few layers."""
    dtype = getattr(torch, args.dtype)
    folder = build_folder(shape, args.memory_layers, dtype, parent, args.seed)
    found = memory.measure_apart(folder, dtype, args.memory_documents, args.seed)
    for each in found["mib_beyond_weights"]:
        print(f"  {each['documents']:,} documents: at most {each['peak']:.0f} MiB beyond the weights")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = timing.common_parser(__doc__.splitlines()[0])
    shapes = [name for name in SHAPES if not name.startswith("tiny")]
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=shapes[:2], help="models")
    workloads = [name for name in WORKLOADS if name != "tiny"]
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=workloads, help="texts")
    parser.add_argument("--layers", type=int, help="of each model, for a quick look; by default all")
    parser.add_argument("--documents", type=int, help="of a query; by default what the workload says")
    help_of_peers = "; ".join(f"{name}: {text}" for name, text in peers.PEERS.items())
    parser.add_argument("--peers", nargs="*", choices=list(peers.PEERS), default=list(peers.PEERS), help=help_of_peers)
    parser.add_argument("--mteb-documents", type=int, default=1, help="on which mteb's wrapper is timed, and scaled")
    parser.add_argument("--vllm", type=Path, help="the python of an environment that has vLLM")
    parser.add_argument("--folder", type=Path, help="where models are kept; by default they are made and removed")
    parser.add_argument("--ablation", action="store_true", help="ours with each saving off in turn")
    parser.add_argument("--int8", action="store_true", help="ours with linear layers in 8 bits (needs torchao)")
    parser.add_argument("--memory", action="store_true", help="memory beyond the weights while documents stream")
    parser.add_argument("--memory-documents", type=int, nargs="+", default=[1000, 10_000], help="when to look at it")
    parser.add_argument("--memory-layers", type=int, default=2, help="of the model whose memory is looked at")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or 3
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write the figures."""
    args = parse(arguments)
    torch.manual_seed(args.seed)
    rows: list[timing.Row] = []
    more: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="querit-benchmark-") as temporary:
        for shape in args.shape:
            found, more[shape] = measure(args, shape, args.folder or Path(temporary))
            rows += found
            gc.collect()
            if args.json:
                # After each model: a run takes long.
                machine = timing.machine(args.seed, args.device)
                timing.write_json(args.json, rows, machine, settings=vars(args), more=more)


if __name__ == "__main__":
    main()
