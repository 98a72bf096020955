"""What every benchmark shares: interleaved timings, rows of figures, the machine they belong to, where time goes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
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

Row = dict[str, Any]

# Rows and columns of the products that the machine's best rate is measured by.
GEMM_SIZES = {"cpu": 2048, "cuda": 8192}
# Parts of names of operators and kernels; the first group that has one of them gets the time.
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
    """Seconds of each call: once each to warm up, then A B C, A B C, ..., so that a slow minute slows all alike.

    Args:
        functions: What is timed, by name.
        rounds: Timed calls of each.
        check: Called with what the warm-up returned, before anything is timed.
    """
    warm = {name: function() for name, function in functions.items()}
    if check is not None:
        check(warm)
    del warm
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each list of seconds."""
    return {name: statistics.median(each) for name, each in seconds.items()}


def synchronized(function: Callable[[], Any], device: torch.device, calls: int = 1) -> Callable[[], Any]:
    """`function`, called so many times, and done only when the GPU is."""

    def run() -> Any:
        for _ in range(calls):
            result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    return run


def row(workload: str, ours: str, against: str, seconds: Mapping[str, Sequence[float]], **more: Any) -> Row:
    """One comparison: `ratio` is seconds of `against` over seconds of `ours`, above 1 where ours is faster."""
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
    """Ours against arithmetic that runs at the machine's best rate for large matrix products, and nothing else."""
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
    """The best GFLOP/s of a large matrix product, by dtype: of this call and all before, since others may be busy."""
    size = GEMM_SIZES[device.type]
    functions = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            return torch.nn.functional.linear(a, b)

        functions[str(dtype).removeprefix("torch.")] = synchronized(product, device)
    seconds = interleaved(functions, rounds)
    for name, each in seconds.items():
        _best_rates[name] = max(_best_rates.get(name, 0.0), 2 * size**3 / min(each) / 1e9)
    return dict(_best_rates)


def profile_shares(function: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Where one call spends its time: shares by kind of operation, the largest first."""
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
    return {name: each / total for name, each in sorted(times.items(), key=lambda item: -item[1])}


def _group(name: str) -> str:
    plain = name.lower()
    return next((group for group, parts in GROUPS.items() if any(part in plain for part in parts)), "other")


def machine(seed: int, device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
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
    """The rows as a table."""
    table = Table("workload", "ours", "against", "ratio", "s ours", "s against", "remarks", title=title)
    for each in rows:
        figure = f"{each['ratio']:.2f}x" if "ratio" in each else f"{100 * each['fraction_of_bound']:.0f}% of bound"
        against = each.get("seconds_against")
        cells = [figure, f"{each['seconds_ours']:.4g}", "" if against is None else f"{against:.4g}"]
        table.add_row(each["workload"], each["ours"], each["against"], *cells, each.get("remarks", ""))
    Console(width=160).print(table)


def print_shares(shares: Mapping[str, float], title: str) -> None:
    """Shares of time as a table."""
    table = Table("operations", "share of time", title=title)
    for name, share in shares.items():
        table.add_row(name, f"{100 * share:.1f}%")
    Console(width=120).print(table)


def write_json(path: Path, rows: Sequence[Row], machine: dict[str, Any], **more: Any) -> None:
    """Write the figures to a file that appears only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rows": rows, "machine": machine, **more}, indent=2, default=str) + "\n"
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as aside:
        whole = Path(aside) / path.name
        whole.write_text(text, encoding="utf-8")
        whole.replace(path)


def common_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--rounds", type=_positive, help="timed calls of each contender, in turn")
    parser.add_argument("--seed", type=int, default=0, help="of weights, texts and routing")
    parser.add_argument("--profile", action="store_true", help="print where the time goes as well")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value
