"""Merging two checkpoints by SLERP, ours against mergekit: python -m benchmarks.merge

Both merge the same tensors, each by its own command in its own process, in turn, timed from the first import to the
last file; the outputs are compared. Ours also hashes the parents and writes a complete folder.
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
from modeling_querit.checkpoints.safetensors_io import open_weights, row_slices

OURS, PEER = "querit merge", "mergekit-yaml"
T = 0.3
# Seconds between two samples of a process's memory.
_INTERVAL = 0.005


def plain_folder(folder: Path, destination: Path) -> Path:
    """Link the weights as a plain decoder without the head, which mergekit does not know; returns the new folder."""
    destination.mkdir()
    config = json.loads((folder / "config.json").read_text())
    decoder_config = config["text_config"] | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    (destination / "config.json").write_text(json.dumps(decoder_config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (destination / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in [*folder.glob("*.safetensors"), *folder.glob("tokenizer*")]:
        (destination / path.name).symlink_to(path)
    return destination


def our_command(pair: Sequence[Path], output: Path, args: argparse.Namespace) -> list[str]:
    """Return the command of `querit merge`."""
    return [sys.executable, "-m", "modeling_querit", "merge", *map(str, pair), "--t", str(T), "-o", str(output)]


def their_command(pair: Sequence[Path], output: Path, args: argparse.Namespace) -> list[str]:
    """Return the command of `mergekit-yaml`, with its recipe written beside the output."""
    recipe = {
        "merge_method": "slerp",
        "base_model": str(pair[0]),
        "models": [{"model": str(folder)} for folder in pair],
        "parameters": {"t": T},
        "dtype": "bfloat16",
    }
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(recipe))
    return [str(args.mergekit), "-m", "mergekit.scripts.run_yaml", str(path), str(output), "--quiet"]


def measure(command: list[str]) -> dict[str, float]:
    """Run a command: its seconds, and peaks of its memory in MiB, resident and anonymous (without mapped files)."""
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
    """Return the largest difference between entries of two merges, relative to the largest entry of their tensor."""
    left, right = open_weights(ours), open_weights(theirs)
    largest = 0.0
    for key, tensor in left.items():
        if key.startswith("score."):
            continue
        for rows in row_slices(tensor.shape):
            left_rows, right_rows = tensor.read(rows).float(), right[key].read(rows).float()
            largest = max(largest, float((left_rows - right_rows).abs().max() / right_rows.abs().max()))
    return largest


def compare(pairs: dict[str, list[Path]], parent: Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Run the contenders in turn and compare the outputs of the first round; returns the runs of each."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in pairs}
    commands, outputs = {OURS: our_command, PEER: their_command}, {}
    for turn in range(-args.warm_ups, args.rounds):
        for name, pair in pairs.items():
            output = outputs[name] = parent / f"{name.replace(' ', '-')}-{turn}"
            run = measure(commands[name](pair, output, args))
            remark = " (warm-up)" if turn < 0 else ""
            print(f"  {name}: {run['seconds']:.1f} s, {run['mib_resident']:.0f} MiB{remark}")
            if turn >= 0:
                runs[name].append(run)
        if turn == -args.warm_ups:
            difference = largest_difference(outputs[OURS], outputs[PEER])
            print(f"  entries differ by at most {difference:.2g} of the largest of their tensor (bfloat16: 0.0039)")
            if difference > 2**-7:
                sys.exit("That is more than rounding explains: nothing is timed.")
    return runs


def make_row(workload: str, runs: dict[str, list[dict[str, float]]]) -> timing.Row:
    """Compare with mergekit: `ratio` of speeds, `memory_ratio` of peaks (below 1 if ours takes less)."""
    seconds = {name: [run["seconds"] for run in its_runs] for name, its_runs in runs.items()}
    peak = {name: max(run["mib_resident"] for run in its_runs) for name, its_runs in runs.items()}
    own = {name: max(run["mib_own"] for run in its_runs) for name, its_runs in runs.items()}
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
    """Parse the command line."""
    parser = timing.common_parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3_0_6b", help="shape of the models")
    parser.add_argument("--layers", type=int, default=22, help="layers of the models: 22 are 1 GB in bfloat16")
    parser.add_argument(
        "--warm-ups", type=int, default=1, help="untimed rounds first, to read files and compile modules"
    )
    parser.add_argument("--mergekit", default=sys.executable, help="Python of an environment with mergekit 0.1.5")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or 3
    if args.warm_ups < 0:
        parser.error(f"--warm-ups is {args.warm_ups}, below 0")
    if args.mergekit == sys.executable and importlib.util.find_spec("mergekit") is None:
        parser.error("mergekit is not installed: pip install mergekit==0.1.5, or name another Python by --mergekit")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the results."""
    args = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="querit-benchmark-") as temporary:
        parent = Path(temporary)
        seeds = (args.seed, args.seed + 1)
        ours = [build_folder(args.shape, args.layers, torch.bfloat16, parent, seed) for seed in seeds]
        theirs = [plain_folder(folder, parent / f"plain-{number}") for number, folder in enumerate(ours)]
        workload = f"{args.shape}, {args.layers} layers, two of {size_of(ours[0]) / 1e9:.2f} GB"
        print(workload)
        runs: dict[str, Any] = compare({OURS: ours, PEER: theirs}, parent, args)
    table = [make_row(workload, runs)]
    timing.print_rows(table, "merging by SLERP, whole processes")
    if args.json:
        timing.write_json(args.json, table, timing.machine(args.seed, args.device), settings=vars(args), runs=runs)


if __name__ == "__main__":
    main()
