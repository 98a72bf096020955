"""Interleaved timings of one model and its peers, on the same texts and weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, timing
from benchmarks.peers import Peer
from benchmarks.shapes import SHAPES, size_of
from benchmarks.workloads import Task, needed_flops
from modeling_querit import QueritForSequenceRanking
from modeling_querit.ranking_querit import score_stream
from modeling_querit.scoring_querit import ALL, Optimizations

OURS = "rank"
INT8 = "rank, int8"
# Largest differences of scores by rounding. In bfloat16 a token may be routed to other experts.
FLOAT32_TOLERANCE = 1e-3
BFLOAT16_TOLERANCE = 0.05

Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Subject:
    """The model that is measured.

    Args:
        shape: Name of its shape, a key of `SHAPES`.
        folder: Folder of the saved model.
        model: The model, loaded from the folder.
    """

    shape: str
    folder: Path
    model: QueritForSequenceRanking

    @classmethod
    def load(cls, shape: str, folder: Path, dtype: torch.dtype, device: torch.device, **kwargs: Any) -> Subject:
        """Load a folder; `kwargs` go to `from_pretrained`."""
        model = QueritForSequenceRanking.from_pretrained(folder, dtype=dtype, **kwargs)
        return cls(shape, folder, model.to(device) if device.type != "cpu" else model)

    def name(self, task: Task) -> str:
        """Name of a row's workload."""
        return f"{self.shape}, {task.name}"

    def facts(self, task: Task) -> dict[str, Any]:
        """Describe model and texts, for a row."""
        return {
            "shape": self.shape,
            "layers": self.model.config.get_text_config().num_hidden_layers,
            "layers_of_whole_model": SHAPES[self.shape].text_config().num_hidden_layers,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "experts_ours": peers.experts_of(self.model),
            **task.statistics(),
        }


def rank(model: QueritForSequenceRanking, task: Task) -> list[float]:
    """Score documents, in their order, through the public interface."""
    ranking = model.rank(task.query, task.documents, show_progress_bar=False)
    return [ranked.score for ranked in sorted(ranking, key=lambda ranked: ranked.index)]


def ablations(model: QueritForSequenceRanking, task: Task) -> dict[str, Peer]:
    """Return our contender with each optimization disabled in turn."""
    experts, contenders = peers.experts_of(model), {}
    for field in fields(Optimizations):
        remaining = replace(ALL, **{field.name: False})

        def run(remaining: Optimizations = remaining) -> list[float]:
            scored = score_stream(model, task.pairs, optimizations=remaining, show_progress_bar=False)
            return [score for _, score in scored]

        contenders[f"without {field.name}"] = Peer(peers.with_experts(model, experts, run), len(task.pairs))
    if experts is not None:
        run_grouped = peers.with_experts(model, "grouped_mm", lambda: rank(model, task))
        contenders["without our experts"] = Peer(run_grouped, len(task.pairs), "experts: grouped_mm")
    return contenders


def compare(
    subject: Subject, task: Task, names: list[str], rounds: int, *, mteb_documents: int, with_ablations: bool
) -> list[timing.Row]:
    """Compare on a workload: each peer, each ablation, the bound."""
    model, pairs = subject.model, len(task.pairs)
    experts = peers.experts_of(model)
    contenders = {OURS: Peer(peers.with_experts(model, experts, lambda: rank(model, task)), pairs)}
    contenders |= peers.make_peers(names, subject.folder, model, task, mteb_documents)
    if with_ablations:
        contenders |= ablations(model, task)
    functions = {name: peer.run for name, peer in contenders.items()}
    seconds, differences = time_checked(functions, rounds, model, is_exact=model.dtype == torch.float32)
    for name, peer in contenders.items():
        seconds[name] = [time_taken * pairs / peer.pairs for time_taken in seconds[name]]
    if experts is not None:
        model.set_experts_implementation(experts)
    rows = []
    for name, peer in list(contenders.items())[1:]:
        more = {"pairs_timed_against": peer.pairs, "max_score_difference": differences[name]}
        rows.append(row(subject, task, OURS, name, seconds, peer.remarks, **more))
    return [*rows, bound(subject, task, seconds)]


def time_checked(
    functions: dict[str, Callable[[], list[float]]], rounds: int, model: QueritForSequenceRanking, *, is_exact: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Time each function; also return the largest difference of its scores from ours."""
    differences: dict[str, float] = {}

    def check(scores: Scores) -> None:
        differences.update(check_scores(scores, is_exact))

    functions = {name: timing.synchronized(function, model.device) for name, function in functions.items()}
    return timing.interleaved(functions, rounds, check), differences


def check_scores(scores: Scores, is_exact: bool) -> dict[str, float]:
    """Print the largest difference of each contender's scores from ours; exit if it is more than rounding."""
    ours = scores[OURS]
    spread = max(ours) - min(ours)
    differences = {}
    for name, theirs in scores.items():
        differences[name] = max(abs(a - b) for a, b in zip(ours, theirs, strict=False))
        if name != OURS:
            print(f"  scores of {name}: at most {differences[name]:.2g} from ours, which spread over {spread:.2g}")
        # Written so that NaN fails.
        if not differences[name] <= (FLOAT32_TOLERANCE if is_exact else max(spread, BFLOAT16_TOLERANCE)):
            sys.exit(f"The scores of {name} differ from ours: nothing was timed.")
    return differences


def row(
    subject: Subject,
    task: Task,
    ours: str,
    against: str,
    seconds: dict[str, list[float]],
    remarks: str = "",
    **more: Any,
) -> timing.Row:
    """Make a row of a comparison, with speeds in pairs and tokens."""
    median, pairs = timing.medians(seconds), len(task.pairs)
    speeds = f"{pairs / median[ours]:.3g} and {pairs / median[against]:.3g} pairs/s"
    more |= _speeds(median[ours], task, "ours") | _speeds(median[against], task, "against") | subject.facts(task)
    remarks = "; ".join(filter(None, [speeds, remarks]))
    return timing.row(subject.name(task), ours, against, seconds, remarks=remarks, **more)


def bound(subject: Subject, task: Task, seconds: dict[str, list[float]]) -> timing.Row:
    """Compare ours with the bound."""
    flops = needed_flops(subject.model.model.layers, subject.model.config.get_text_config(), task)
    speeds = _speeds(timing.medians(seconds)[OURS], task, "ours")
    remarks = f"{speeds['tokens_per_second_ours']:.4g} tokens/s"
    rates, more = timing.gemm_rates(subject.model.device), speeds | subject.facts(task)
    return timing.bound_row(subject.name(task), OURS, seconds, flops, rates, remarks=remarks, **more)


def _speeds(seconds: float, task: Task, whose: str) -> dict[str, float]:
    tokens = sum(map(len, task.input_ids))
    return {f"pairs_per_second_{whose}": len(task.pairs) / seconds, f"tokens_per_second_{whose}": tokens / seconds}


def vllm_row(subject: Subject, task: Task, served: dict[str, Any], seconds_ours: list[float]) -> timing.Row:
    """Compare with vLLM, which was timed in its own process, not in turn."""
    against = f"vLLM {served['version']}"
    ours = rank(subject.model, task)
    more = {"max_score_difference": max(abs(a - b) for a, b in zip(ours, served["scores"], strict=True))}
    remarks = f"timed apart, not in turn; scores at most {more['max_score_difference']:.2g} from ours"
    seconds = {OURS: seconds_ours, against: served["seconds"]}
    return row(subject, task, OURS, against, seconds, remarks, interleaved=False, **more)


def int8_rows(
    subject: Subject, dtype: torch.dtype, device: torch.device, tasks: Iterable[Task], rounds: int
) -> list[timing.Row]:
    """Compare the model with int8 linear layers (torchao) and without, both through `rank`."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    if not _has_room_for_another(subject.folder):
        print(f"{subject.folder.name}: not enough memory for a second model, so int8 is skipped.")
        return []
    quantization = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    int8 = Subject.load(subject.shape, subject.folder, dtype, device, quantization_config=quantization)
    rows = []
    for task in tasks:
        functions = {
            OURS: lambda task=task: rank(subject.model, task),
            INT8: lambda task=task: rank(int8.model, task),
        }
        seconds, differences = time_checked(functions, rounds, subject.model, is_exact=False)
        rows.append(row(subject, task, INT8, OURS, seconds, max_score_difference=differences[INT8]))
    return rows


def _has_room_for_another(folder: Path) -> bool:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return True
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    # Loading takes more memory than the weights.
    return free is None or free > 1.5 * size_of(folder)
