"""Shared parts of the benchmarks: interleaved timings, rows of results, a record of the machine, profiles."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from modeling_querit import files

Row = dict[str, Any]

# Size of the square matrix products that the machine's best rate is measured by.
GEMM_SIZES = {"cpu": 2048, "cuda": 8192}
# Group -> parts of names of operators and kernels; an operator belongs to the first group that matches.
GROUPS = {
    "attention": ("attention", "flash", "fmha"),
    "matrix products": ("mm", "linear", "matmul", "dot", "gemm", "nvjet", "cutlass", "swiglu", "_outer"),
    "routing": (
        *("sort", "topk", "index", "gather", "scatter", "bincount", "cumsum", "nonzero", "one_hot", "where"),
        *("_count", "_place"),
    ),
    "copies": ("copy", "cat", "clone", "contiguous", "fill", "zero", "empty", "resize", "memcpy", "memset", "repeat"),
    "elementwise": (
        *("mul", "add", "sub", "div", "neg", "pow", "sqrt", "silu", "sigmoid", "tanh", "exp", "cos", "sin", "sum"),
        *("mean", "norm", "softmax", "elementwise", "reduce", "combine"),
    ),
}


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, list[float]]:
    """Time functions in turn: a warm-up of each, then A B C, A B C, ..., so that a slow minute slows all alike.

    Args:
        functions: Name -> function.
        rounds: Number of timed calls of each.
        check: Function called with the results of the warm-up, before anything is timed.

    Returns:
        Name -> seconds of each timed call.
    """
    results = {name: function() for name, function in functions.items()}
    if check is not None:
        check(results)
    del results
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median seconds by name."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def synchronized(function: Callable[[], Any], device: torch.device, calls: int = 1) -> Callable[[], Any]:
    """Make a function that calls `function` several times and waits for the GPU."""

    def run() -> Any:
        for _ in range(calls):
            result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    return run


def row(workload: str, ours: str, against: str, seconds: Mapping[str, Sequence[float]], **more: Any) -> Row:
    """Compare: `ratio` is the seconds of `against` over those of `ours`, above 1 if ours is faster."""
    middle = medians(seconds)
    return {
        "workload": workload,
        "ours": ours,
        "against": against,
        "ratio": middle[against] / middle[ours],
        "seconds_ours": middle[ours],
        "seconds_against": middle[against],
        "all_seconds_ours": list(seconds[ours]),
        "all_seconds_against": list(seconds[against]),
        **more,
    }


def bound_row(
    workload: str, ours: str, seconds: Mapping[str, Sequence[float]], flops: float, rates: dict[str, float], **more: Any
) -> Row:
    """Compare with the bound: the arithmetic alone, at the machine's best rate for large matrix products."""
    middle, best = medians(seconds)[ours], max(rates.values())
    return {
        "workload": workload,
        "ours": ours,
        "against": "bound of matrix products",
        "fraction_of_bound": flops / middle / best / 1e9,
        "seconds_ours": middle,
        "all_seconds_ours": list(seconds[ours]),
        "gflops_per_second_ours": flops / middle / 1e9,
        "gflops_per_second_best": best,
        "gflop_needed": flops / 1e9,
        **more,
    }


_best_rates: dict[str, float] = {}


def gemm_rates(device: torch.device, rounds: int = 3) -> dict[str, float]:
    """Measure the best GFLOP/s of a large matrix product by dtype, over this and all earlier calls."""
    size = GEMM_SIZES[device.type]
    functions = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            return torch.nn.functional.linear(a, b)

        functions[str(dtype).removeprefix("torch.")] = synchronized(product, device)
    seconds = interleaved(functions, rounds)
    for name, times in seconds.items():
        _best_rates[name] = max(_best_rates.get(name, 0.0), 2 * size**3 / min(times) / 1e9)
    return dict(_best_rates)


def profile_shares(function: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return shares of the time of one call by group of operations, largest first."""
    is_cuda = device.type == "cuda"
    function()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as profiled:
        synchronized(function, device)()
    times: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        # On a GPU the kernels count, not the operators that launch them.
        if (event.device_type == torch.autograd.DeviceType.CUDA) == is_cuda:
            times[_group(event.key)] += event.self_device_time_total if is_cuda else event.self_cpu_time_total
    total = sum(times.values()) or 1.0
    return {group: time_spent / total for group, time_spent in sorted(times.items(), key=lambda item: -item[1])}


def _group(name: str) -> str:
    lower = name.lower()
    return next((group for group, parts in GROUPS.items() if any(part in lower for part in parts)), "other")


def machine(seed: int, device: torch.device) -> dict[str, Any]:
    """Record of processor, libraries and seed."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capabilities": {
            "amx": bool(capabilities.get("amx_tile")),
            "avx512_bf16": bool(capabilities.get("avx512_bf16")),
        },
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "seed": seed,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def print_rows(rows: Sequence[Row], title: str) -> None:
    """Print rows as a table."""
    table = Table("workload", "ours", "against", "ratio", "s ours", "s against", "remarks", title=title)
    for row in rows:
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else f"{100 * row['fraction_of_bound']:.0f}% of bound"
        against = row.get("seconds_against")
        cells = [ratio, f"{row['seconds_ours']:.4g}", "" if against is None else f"{against:.4g}"]
        table.add_row(row["workload"], row["ours"], row["against"], *cells, row.get("remarks", ""))
    Console(width=160).print(table)


def print_shares(shares: Mapping[str, float], title: str) -> None:
    """Print shares of time as a table."""
    table = Table("operations", "share of time", title=title)
    for name, share in shares.items():
        table.add_row(name, f"{100 * share:.1f}%")
    Console(width=120).print(table)


def write_json(path: Path, rows: Sequence[Row], machine: dict[str, Any], **more: Any) -> None:
    """Write rows and the record of the machine, atomically."""
    files.write_json({"rows": rows, "machine": machine, **more}, path)


def common_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="data type of the weights")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--rounds", type=_positive, help="number of timed calls of each contender")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, texts and routing")
    parser.add_argument("--profile", action="store_true", help="print shares of time by operation too")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0: give a positive number")
    return value
