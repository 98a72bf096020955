"""Two processes on one machine: the same run as one process with their batches together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_querit.training.data import write_rows

# Lists of different lengths, so that the mean of two processes' means would be another loss.
ROWS = [
    {
        "query": f"number {n}",
        "documents": [f"it is {'very ' * (n * k % 7)}{n + k}" for k in range(2 + n % 4)],
        "labels": [(k * 0.37 + n * 0.11) % 1 for k in range(2 + n % 4)],
    }
    for n in range(16)
]


def launch(processes, saved_folder, rows, output_dir, *more):
    querit = Path(sys.executable).with_name("querit")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    settings = ["--model", saved_folder, "--train", rows, "--output_dir", output_dir, "--max_steps", 4]
    settings += ["--per_device_train_batch_size", 4 // processes, "--learning_rate", 1e-2, "--logging_steps", 1]
    settings += ["--losses", "pairwise_hinge", "listwise_kl", "--report_to", "none", "--use_cpu", "True"]
    settings += ["--save_strategy", "no", *more]
    command = [*(launcher if processes > 1 else []), *(["--no-python"] if processes > 1 else []), querit, "train"]
    result = subprocess.run(
        list(map(str, command + settings)), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one(saved_folder, tmp_path, accumulation):
    pytest.importorskip("peft")
    write_rows(ROWS, tmp_path / "rows.jsonl")
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        more = ["--gradient_accumulation_steps", accumulation]
        found[processes] = launch(processes, saved_folder, tmp_path / "rows.jsonl", folder, *more)
    for one, two in zip(found[1], found[2], strict=True):
        for name in ("loss", "loss_pairwise_hinge", "loss_listwise_kl", "score_spread", "grad_norm"):
            assert two[name] == pytest.approx(one[name], abs=2e-4, rel=1e-3), name
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("1", "2"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
