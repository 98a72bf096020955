"""Training steps, ours against sentence-transformers' CrossEncoderTrainer: python -m benchmarks.training

All train the same folder on the same rows, with the same loss (RankNet), optimizer and batch. Contenders take turns,
each in its own process, as peak memory belongs to a process. Texts are random words of BEIR-like lengths, as the time
of a step does not depend on what is learned.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks import timing
from benchmarks.memory import Sampler, resident
from benchmarks.shapes import SHAPES, build_folder
from benchmarks.workloads import WORKLOADS, make_documents, words_of
from modeling_querit import QueritForSequenceRanking, QueritProcessor

OURS = "QueritTrainer"
PEERS = {
    "sentence_transformers": "CrossEncoderTrainer, the whole batch at once",
    "repeated_prefixes": "ours without prefix sharing",
    "padded": "ours without packing",
}
Row = dict[str, Any]


class Clock(TrainerCallback):
    """Records seconds and loss of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._start)

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Record the loss, which must be the same for all contenders."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def make_rows(processor: QueritProcessor, args: argparse.Namespace) -> list[Row]:
    """Draw queries, documents of the workload's lengths, and graded labels."""
    rng, words, workload = random.Random(args.seed), words_of(processor.tokenizer), WORKLOADS[args.workload]
    rows = []
    for _ in range(args.queries * args.steps):
        documents = list(make_documents(words, rng, args.documents, workload.median, workload.sigma))
        labels = [rng.random() for _ in documents]
        rows.append({"query": " ".join(rng.choices(words, k=12)), "documents": documents, "labels": labels})
    return rows


def train_ours(folder: Path, rows: list[Row], args: argparse.Namespace, clock: Clock, output: str) -> Any:
    """Make our trainer."""
    from modeling_querit.training.arguments import QueritTrainingArguments
    from modeling_querit.training.data import RankingDataset
    from modeling_querit.training.trainer import QueritTrainer

    model = QueritForSequenceRanking.from_pretrained(folder, dtype=torch.float32)
    arguments = QueritTrainingArguments(losses=["ranknet"], **_common(args, output))
    return QueritTrainer(model, arguments, train_dataset=RankingDataset(rows), callbacks=[clock])


def train_repeated_prefixes(*args: Any) -> Any:
    """Make our trainer without prefix sharing."""
    trainer = train_ours(*args)
    trainer.data_collator.share_prefix = False
    return trainer


def train_padded(*args: Any) -> Any:
    """Make our trainer without packing."""
    trainer = train_ours(*args)
    trainer.data_collator.packing = False
    return trainer


def train_sentence_transformers(
    folder: Path, rows: list[Row], args: argparse.Namespace, clock: Clock, output: str
) -> Any:
    """Make the trainer of sentence-transformers on the same folder."""
    from datasets import Dataset
    from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.cross_encoder.losses import RankNetLoss
    from torch.utils.data import SequentialSampler

    def in_order(dataset: Dataset, **settings: Any) -> DefaultBatchSampler:
        return DefaultBatchSampler(SequentialSampler(dataset), **settings)

    kwargs = {"dtype": torch.float32}
    encoder = CrossEncoder(str(folder), trust_remote_code=True, device=args.device.type, model_kwargs=kwargs)
    # Their logit is (z1 - z0) / 2, half the difference that our loss is computed on.
    loss = RankNetLoss(encoder, sigma=2.0, reduction_log="natural", mini_batch_size=0)
    table = Dataset.from_list(
        [{"query": row["query"], "docs": row["documents"], "labels": row["labels"]} for row in rows]
    )
    # Their trainer ignores `train_sampling_strategy` and shuffles.
    arguments = CrossEncoderTrainingArguments(batch_sampler=in_order, **_common(args, output))
    return CrossEncoderTrainer(encoder, arguments, train_dataset=table, loss=loss, callbacks=[clock])


CONTENDERS: dict[str, Callable[..., Any]] = {
    OURS: train_ours,
    "sentence_transformers": train_sentence_transformers,
    "repeated_prefixes": train_repeated_prefixes,
    "padded": train_padded,
}


def _common(args: argparse.Namespace, output: str) -> dict[str, Any]:
    return {
        "output_dir": output,
        "per_device_train_batch_size": args.queries,
        "max_steps": args.steps,
        "learning_rate": 1e-5,
        "bf16": args.dtype == "bfloat16",
        "gradient_checkpointing": args.gradient_checkpointing,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device.type == "cpu",
        "seed": args.seed,
    }


def run(name: str, folder: Path, rows: list[Row], args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Run a contender: seconds of its steps without the first, losses, and peak memory in MiB."""
    torch.set_num_threads(threads)
    is_cuda = args.device.type == "cuda"
    clock = Clock()
    with tempfile.TemporaryDirectory() as output, Sampler() as sampler:
        trainer = CONTENDERS[name](folder, rows, args, clock, output)
        gc.collect()
        loaded = resident()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**20 if is_cuda else sampler.peak
    return {"seconds": clock.seconds[1:], "losses": clock.losses, "mib_peak": peak, "mib_loaded": loaded}


def compare(folder: Path, rows: list[Row], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run the contenders in turn, in a fresh process each time; returns the runs of each."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in [OURS, *args.peers]}
    for _ in range(args.rounds):
        for name, its_runs in runs.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                its_runs.append(pool.submit(run, name, folder, rows, args, torch.get_num_threads()).result())
            median = sorted(its_runs[-1]["seconds"])[len(its_runs[-1]["seconds"]) // 2]
            print(f"  {name}: {median:.3g} s per step, peak {its_runs[-1]['mib_peak']:.0f} MiB")
    return runs


def make_row(shape: str, against: str, runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> timing.Row:
    """Compare with a peer: `ratio` of speeds, `memory_ratio` of peaks (below 1 if ours takes less)."""
    seconds = {name: [time_taken for run in runs[name] for time_taken in run["seconds"]] for name in (OURS, against)}
    peaks = {name: max(run["mib_peak"] for run in runs[name]) for name in (OURS, against)}
    difference = max(abs(a - b) for a, b in zip(runs[OURS][0]["losses"], runs[against][0]["losses"], strict=True))
    remarks = f"peaks {peaks[OURS]:.0f} and {peaks[against]:.0f} MiB; losses differ by at most {difference:.2g}"
    return timing.row(
        f"{shape}, {args.workload}, {args.queries} x {args.documents}",
        OURS,
        against,
        seconds,
        remarks=remarks,
        steps_per_second_ours=1 / timing.medians(seconds)[OURS],
        steps_per_second_against=1 / timing.medians(seconds)[against],
        mib_peak_ours=peaks[OURS],
        mib_peak_against=peaks[against],
        memory_ratio=peaks[OURS] / peaks[against],
        max_loss_difference=difference,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = timing.common_parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3_0_6b", help="shape of the model")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="beir", help="lengths of the documents")
    parser.add_argument("--queries", type=int, default=4, help="queries of a batch")
    parser.add_argument("--documents", type=int, default=8, help="documents per query")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run; the first is not timed")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="use gradient checkpointing")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        default=list(PEERS),
        help="; ".join(f"{name}: {text}" for name, text in PEERS.items()),
    )
    parser.set_defaults(dtype="float32")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or 2
    if args.steps < 2:
        parser.error("--steps is below 2, and the first step of a run is not timed")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the results."""
    args = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="querit-benchmark-") as temporary:
        folder = build_folder(args.shape, args.layers, torch.float32, Path(temporary), args.seed)
        rows = make_rows(QueritProcessor.from_pretrained(folder), args)
        runs = compare(folder, rows, args)
    table = [make_row(args.shape, name, runs, args) for name in args.peers]
    timing.print_rows(table, f"{args.shape}, {args.layers} layers, {args.dtype}, medians of steps")
    if args.json:
        timing.write_json(args.json, table, timing.machine(args.seed, args.device), settings=vars(args), runs=runs)


if __name__ == "__main__":
    main()
