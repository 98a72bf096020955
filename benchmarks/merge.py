"""Merging two checkpoints by SLERP, ours against mergekit: python -m benchmarks.merge

The same tensors, each contender as its own command in a process of its own, from the first import to the last file, in
turn; what they wrote is compared. Ours hashes the parents and writes the whole folder meanwhile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.shapes import SHAPES, build_folder, size_of
from modeling_querit.checkpoints.streaming import open_weights, row_slices

OURS, PEER = "querit merge", "mergekit-yaml"
T = 0.3
# Seconds between two looks at a process's memory.
_INTERVAL = 0.005


def plain_folder(folder: Path, destination: Path) -> Path:
    """The same weights as a plain decoder, which mergekit knows; without the head, which it does not."""
    destination.mkdir()
    config = json.loads((folder / "config.json").read_text())
    plain = config["text_config"] | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    (destination / "config.json").write_text(json.dumps(plain))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (destination / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in [*folder.glob("*.safetensors"), *folder.glob("tokenizer*")]:
        (destination / path.name).symlink_to(path)
    return destination


def our_command(pair: Sequence[Path], output: Path, args: argparse.Namespace) -> list[str]:
    """`querit merge`."""
    return [sys.executable, "-m", "modeling_querit", "merge", *map(str, pair), "--t", str(T), "-o", str(output)]


def their_command(pair: Sequence[Path], output: Path, args: argparse.Namespace) -> list[str]:
    """`mergekit-yaml`."""
    recipe = {
        "merge_method": "slerp",
        "base_model": str(pair[0]),
        "models": [{"model": str(each)} for each in pair],
        "parameters": {"t": T},
        "dtype": "bfloat16",
    }
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(recipe))
    return [str(args.mergekit), "-m", "mergekit.scripts.run_yaml", str(path), str(output), "--quiet"]


def measured(command: list[str]) -> dict[str, float]:
    """Seconds of a command, and the peaks of its memory in MiB: resident, and that of its own (not mapped files)."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    peaks = {"VmHWM": 0.0, "RssAnon": 0.0}
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) / 1024)
        time.sleep(_INTERVAL)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{process.stdout.read().decode()}")
    return {"seconds": seconds, "mib_resident": peaks["VmHWM"], "mib_own": peaks["RssAnon"]}


def largest_difference(ours: Path, theirs: Path) -> float:
    """Between the same entries of two merges, relative to the largest entry of their tensor."""
    left, right = open_weights(ours), open_weights(theirs)
    worst = 0.0
    for key, tensor in left.items():
        if key.startswith("score."):
            continue
        for rows in row_slices(tensor.shape):
            one, two = tensor.read(rows).float(), right[key].read(rows).float()
            worst = max(worst, float((one - two).abs().max() / two.abs().max()))
    return worst


def compare(pairs: dict[str, list[Path]], aside: Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Each contender in turn; what the first round wrote is compared."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pairs}
    commands, outputs = {OURS: our_command, PEER: their_command}, {}
    for turn in range(-args.warm_ups, args.rounds):
        for name, pair in pairs.items():
            output = outputs[name] = aside / f"{name.replace(' ', '-')}-{turn}"
            one = measured(commands[name](pair, output, args))
            remark = " (warm-up)" if turn < 0 else ""
            print(f"  {name}: {one['seconds']:.1f} s, {one['mib_resident']:.0f} MiB{remark}")
            if turn >= 0:
                found[name].append(one)
        if turn == -args.warm_ups:
            difference = largest_difference(outputs[OURS], outputs[PEER])
            print(f"  entries are at most {difference:.2g} of their tensor's largest apart (bfloat16: 0.0039)")
            if difference > 2**-7:
                sys.exit("That is more than rounding explains: nothing is timed.")
    return found


def make_row(workload: str, found: dict[str, list[dict[str, float]]]) -> timing.Row:
    """Ours against mergekit: `ratio` of speed, `memory_ratio` of peaks (below 1 where ours takes less)."""
    seconds = {name: [each["seconds"] for each in runs] for name, runs in found.items()}
    peak = {name: max(each["mib_resident"] for each in runs) for name, runs in found.items()}
    own = {name: max(each["mib_own"] for each in runs) for name, runs in found.items()}
    remarks = (
        f"peaks {peak[OURS]:.0f} and {peak[PEER]:.0f} MiB resident; without mapped files {own[OURS]:.0f} and "
        f"{own[PEER]:.0f}"
    )
    return timing.row(
        workload,
        OURS,
        PEER,
        seconds,
        remarks=remarks,
        mib_peak_ours=peak[OURS],
        mib_peak_against=peak[PEER],
        mib_own_ours=own[OURS],
        mib_own_against=own[PEER],
        memory_ratio=peak[OURS] / peak[PEER],
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = timing.common_parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3_0_6b", help="of the models, random weights")
    parser.add_argument("--layers", type=int, default=22, help="of the models: 22 make 1 GB each in bfloat16")
    parser.add_argument(
        "--warm-ups", type=int, default=1, help="untimed first: files are read from the disk, and modules compiled"
    )
    parser.add_argument("--mergekit", default=sys.executable, help="the python that has mergekit 0.1.5")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or 3
    if args.warm_ups < 0:
        parser.error(f"--warm-ups is {args.warm_ups}, below 0")
    if args.mergekit == sys.executable and importlib.util.find_spec("mergekit") is None:
        parser.error("mergekit is not installed here: pip install mergekit==0.1.5, or name another --mergekit PYTHON")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the figures."""
    args = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="querit-benchmark-") as temporary:
        aside = Path(temporary)
        seeds = (args.seed, args.seed + 1)
        ours = [build_folder(args.shape, args.layers, torch.bfloat16, aside, seed) for seed in seeds]
        theirs = [plain_folder(folder, aside / f"plain-{place}") for place, folder in enumerate(ours)]
        workload = f"{args.shape}, {args.layers} layers, two of {size_of(ours[0]) / 1e9:.2f} GB"
        print(workload)
        found: dict[str, Any] = compare({OURS: ours, PEER: theirs}, aside, args)
    table = [make_row(workload, found)]
    timing.print_rows(table, "merging by SLERP, whole processes")
    if args.json:
        timing.write_json(args.json, table, timing.machine(args.seed, args.device), settings=vars(args), runs=found)


if __name__ == "__main__":
    main()
