"""Two processes on one machine: the same run as one process with their batches together."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_querit.files import write_jsonl

# Lists of different lengths, so that the mean of two processes' means would be another loss.
ROWS = [
    {
        "query": f"number {n}",
        "documents": [f"it is {'very ' * (n * k % 7)}{n + k}" for k in range(2 + n % 4)],
        "labels": [(k * 0.37 + n * 0.11) % 1 for k in range(2 + n % 4)],
    }
    for n in range(16)
]


# Fails if nothing was sharded, which accelerate decides without a word.
DRIVER = """
import sys
from modeling_querit.training.run import train
from modeling_querit.training.settings import parse
trainer = train(*parse(sys.argv[2:]))
assert trainer.is_fsdp_enabled
trainer.accelerator.end_training()
"""


@pytest.fixture(scope="module")
def sharding_site(tmp_path_factory):
    """A copy of accelerate that shards on CPUs too: what it does then is the same as on GPUs."""
    accelerate = pytest.importorskip("accelerate")
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(Path(accelerate.__file__).parent, site / "accelerate")
    path, gpus = site / "accelerate" / "state.py", "DistributedType.MULTI_NEURON,\n            ]:"
    text = path.read_text()
    assert text.count(gpus) == 1
    path.write_text(text.replace(gpus, "DistributedType.MULTI_CPU," + gpus))
    return site


def launch(processes, saved_folder, rows, output_dir, *more, site=None):
    querit = Path(sys.executable).with_name("querit")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if site is not None:
        querit = output_dir.with_name("driver.py")
        querit.write_text(DRIVER)
        environment["PYTHONPATH"] = os.pathsep.join([str(site), environment.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    settings = ["--model", saved_folder, "--train", rows, "--output_dir", output_dir, "--max_steps", 4]
    settings += ["--per_device_train_batch_size", 4 // processes, "--learning_rate", 1e-2, "--logging_steps", 1]
    settings += ["--losses", "pairwise_hinge", "listwise_kl", "--report_to", "none", "--use_cpu", "True"]
    settings += ["--save_strategy", "no", *more]
    command = [*(launcher if processes > 1 else []), *(["--no-python"] if processes > 1 and site is None else [])]
    command += [querit, "train", *settings]
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]


LAYERS = {"qwen3": "Qwen3DecoderLayer", "deepseek_v3": "DeepseekV3DecoderLayer"}


@pytest.fixture
def rows(tmp_path):
    pytest.importorskip("peft")
    write_jsonl(ROWS, tmp_path / "rows.jsonl")
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one(saved_folder, rows, tmp_path, accumulation):
    more = ["--gradient_accumulation_steps", accumulation]
    compare(launch(1, saved_folder, rows, tmp_path / "1", *more), launch(2, saved_folder, rows, tmp_path / "2", *more))
    compare_weights(tmp_path / "1", tmp_path / "2")


def test_two_processes_with_half_of_the_weights_each_train_as_one(
    architecture, saved_folder, rows, tmp_path, sharding_site
):
    """FSDP2, with repeated layers and packs, as in examples/train_*_fsdp.yaml."""
    compare_sharded(architecture, saved_folder, rows, tmp_path, sharding_site)
    assert not (tmp_path / "2" / "adapter").exists()


def test_two_processes_with_half_of_an_adapter_each_train_as_one(saved_folders, rows, tmp_path, sharding_site):
    compare_sharded("qwen3", saved_folders("qwen3"), rows, tmp_path, sharding_site, "--lora_rank", 2)
    assert (tmp_path / "2" / "adapter").exists()


def compare_sharded(architecture, folder, rows, tmp_path, site, *more):
    config = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": LAYERS[architecture]}
    config["cpu_ram_efficient_loading"] = False
    sharded = ["--gradient_checkpointing", "True", "--fsdp_config", json.dumps(config), "--fsdp"]
    one = launch(1, folder, rows, tmp_path / "1", *more)
    compare(one, launch(2, folder, rows, tmp_path / "2", *more, *sharded, site=site))
    compare_weights(tmp_path / "1", tmp_path / "2")
    first, second = (
        {path.name for path in (tmp_path / name / "model").iterdir() if path.suffix != ".jinja"} for name in "12"
    )
    assert first == second


def compare(one, two):
    assert len(one) == len(two) == 4
    for first, second in zip(one, two, strict=True):
        for name in ("loss", "loss_pairwise_hinge", "loss_listwise_kl", "score_spread", "grad_norm"):
            assert second[name] == pytest.approx(first[name], abs=2e-4, rel=1e-3), name


def compare_weights(one, two):
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
