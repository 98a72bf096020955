"""Mutated folders through every command: one line, exit code 2, nothing written, bounded memory and time.

QUERIT_MUTATIONS=2000 python -m pytest tests/test_validation_querit_hostile.py  # a long run, about an hour
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from hostile_folders import mutations
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modeling_querit.checkpoints.convert import convert_to_published
from modeling_querit.cli import main

MUTATIONS = int(os.environ.get("QUERIT_MUTATIONS", "20"))
MAX_SECONDS = 20
MAX_BYTES = 2 * 1024**3


@pytest.fixture(scope="module")
def bases(saved_folders, tmp_path_factory):
    """Folders of both architectures and layouts, with weights in two files."""
    folders = []
    for architecture in ("qwen3", "deepseek_v3"):
        place = tmp_path_factory.mktemp("bases")
        shutil.copytree(saved_folders(architecture), place / "querit")
        convert_to_published(saved_folders(architecture), place / "published")
        for folder in (place / "querit", place / "published"):
            tensors = load_file(folder / "model.safetensors")
            (folder / "model.safetensors").unlink()
            weight_map = {}
            for number, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
                name = f"model-0000{number}-of-00002.safetensors"
                save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(keys, name)
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "documents.txt").write_text("a novel by lee\nthe judge wrote it\n")
    row = {"query": "who wrote it", "documents": ["lee wrote it", "nobody"], "labels": [1, 0]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def commands(folder, other, inputs, output):
    return {
        "rerank": ["rerank", "--query", "who wrote it", inputs / "documents.txt", "--model", folder, "--device", "cpu"],
        "convert": ["convert", folder, output / "new"],
        "merge": ["merge", folder, other, "--output", output / "new"],
        "train": [
            *("train", "--model", folder, "--train", inputs / "rows.jsonl", "--output_dir", output / "new"),
            *("--max_steps", 1, "--use_cpu", True, "--report_to", "none"),
        ],
        "release": ["release", folder, "--repo-id", "me/model", "--dry-run"],
    }


def run(capfd, argv):
    """The exit code of a command, the lines it wrote to standard error, and its seconds."""
    capfd.readouterr()
    start = time.perf_counter()
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in argv])
    return stop.value.code or 0, capfd.readouterr().err.splitlines(), time.perf_counter() - start


def memory(field):
    """A field of `/proc/self/status` in bytes: VmRSS, the resident memory, or VmHWM, its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def start_peak():
    """Let the peak count from now, and return the memory held now: other tests in this process have peaks too."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def check_mutation(bases, inputs, tmp_path, capfd, data):
    base = data.draw(st.sampled_from(bases))
    name, content = data.draw(mutations(base))
    folder, output = tmp_path / "hostile", tmp_path / "output"
    for left in (folder, output):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(base, folder)
    (folder / name).write_bytes(content)
    is_refused = {}
    for command, argv in commands(folder, base, inputs, output).items():
        held = start_peak()
        code, lines, seconds = run(capfd, argv)
        assert seconds < MAX_SECONDS, command
        assert memory("VmHWM") - held < MAX_BYTES, command
        is_refused[command] = code == 2
        if code == 2:
            assert len(lines) == 1, (command, lines)
            assert lines[0].startswith("querit: "), (command, lines)
            assert len(lines[0]) < 300, (command, lines)
            assert not (output / "new").exists(), command
            assert not output.exists() or not any(output.iterdir()), command
        else:
            # A release lists what is missing for its publication.
            assert code == (1 if command == "release" else 0), (command, lines)
        shutil.rmtree(output, ignore_errors=True)
    # One rule: what one command refuses, no other takes (a merge also compares the two models).
    assert len({refused for command, refused in is_refused.items() if command != "merge"}) == 1, is_refused


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=MUTATIONS)
@given(data=st.data())
def test_mutated_folders_are_refused_in_one_line(bases, inputs, tmp_path, capfd, data):
    check_mutation(bases, inputs, tmp_path, capfd, data)
