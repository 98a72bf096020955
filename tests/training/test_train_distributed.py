"""Two processes on one machine train as one process with their batches together does."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_querit.files import write_jsonl
from modeling_querit.training.train import main as train

psutil = pytest.importorskip("psutil")

# Lists of different lengths: the mean of two processes' means would be another loss.
ROWS = [
    {
        "query": f"number {n}",
        "documents": [f"it is {'very ' * (n * k % 7)}{n + k}" for k in range(2 + n % 4)],
        "labels": [(k * 0.37 + n * 0.11) % 1 for k in range(2 + n % 4)],
    }
    for n in range(16)
]


# Several runs in the same two processes, since starting them takes most of the time. It fails if nothing was sharded:
# accelerate decides that silently.
DRIVER = """
import json, sys
from pathlib import Path
from modeling_querit.training.train import disconnect, train
from modeling_querit.training.arguments import parse
for arguments in json.loads(sys.argv[1]):
    trainer = train(parse(arguments))
    assert trainer.is_fsdp_enabled == ("--fsdp" in arguments)
accelerator, is_sharded = trainer.accelerator, trainer.is_fsdp_enabled
del trainer
disconnect(accelerator)
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
# These threads would be joined while the interpreter ends. torch itself keeps those of sharded weights.
assert is_sharded or not [name for name in threads if "gloo" in name], threads
"""
LAYERS = {"qwen3": "Qwen3DecoderLayer", "deepseek_v3": "DeepseekV3DecoderLayer"}


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


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(ROWS, path)
    return path


def settings(batch_size, saved_folder, rows, output_dir, *more):
    flags = ["--model", saved_folder, "--train", rows, "--output_dir", output_dir, "--max_steps", 4]
    flags += ["--per_device_train_batch_size", batch_size, "--learning_rate", 1e-2, "--logging_steps", 1]
    flags += ["--losses", "pairwise_hinge", "listwise_kl", "--report_to", "none", "--use_cpu", "True"]
    return [str(part) for part in [*flags, "--save_strategy", "no", *more]]


def run_as_two(python, *command, **environment):
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | environment
    command = [str(part) for part in (*launcher, *command)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        # Each process then prints where it hangs.
        for hanging in [*psutil.Process(process.pid).children(recursive=True), process]:
            hanging.send_signal(signal.SIGABRT)
        _, errors = process.communicate()
    assert process.returncode == 0, errors[-9000:]


def compare_runs(python, runs, rows, folder, **environment):
    """Compare runs in one process and in two; `runs`: name -> folder of the model, flags of both, flags of the two."""
    (folder / "driver.py").write_text(DRIVER)
    together = [settings(2, model, rows, folder / name / "2", *both, *two) for name, (model, both, two) in runs.items()]
    run_as_two(python, python, folder / "driver.py", json.dumps(together), **environment)
    for name, (model, both, _) in runs.items():
        train(settings(4, model, rows, folder / name / "1", *both))
        compare(folder / name / "1", folder / name / "2")


@pytest.mark.slow
def test_two_processes_train_as_one(saved_folders, rows, forked_python, tmp_path):
    runs = {
        f"{architecture}, {accumulation}": (
            saved_folders(architecture),
            ["--gradient_accumulation_steps", accumulation],
            [],
        )
        for architecture in LAYERS
        for accumulation in (1, 2)
    }
    compare_runs(forked_python, runs, rows, tmp_path)


@pytest.mark.slow
def test_two_processes_with_half_of_the_weights_each_train_as_one(
    saved_folders, rows, forked_python, tmp_path, sharding_site
):
    """FSDP2 with gradient checkpointing and packs, as in examples/train_*_fsdp.yaml."""

    def fsdp(architecture):
        config = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": LAYERS[architecture]}
        config["cpu_ram_efficient_loading"] = False
        return ["--gradient_checkpointing", "True", "--fsdp_config", json.dumps(config), "--fsdp"]

    runs = {architecture: (saved_folders(architecture), [], fsdp(architecture)) for architecture in LAYERS}
    runs["adapter"] = (saved_folders("qwen3"), ["--lora_rank", 2], fsdp("qwen3"))
    site = os.pathsep.join([str(sharding_site), os.environ.get("PYTHONPATH", "")])
    compare_runs(forked_python, runs, rows, tmp_path, PYTHONPATH=site)
    for name in runs:
        one, two = (tmp_path / name / count for count in "12")
        assert {path.name for path in (one / "model").iterdir()} == {path.name for path in (two / "model").iterdir()}
        assert (one / "adapter").exists() == (two / "adapter").exists() == (name == "adapter")


@pytest.mark.slow
def test_the_command_in_two_processes(saved_folders, rows, forked_python, tmp_path):
    # The command as it is installed: two interpreters, which also differ in the seeds of their hashes.
    querit = Path(sys.executable).with_name("querit")
    run_as_two(forked_python, querit, "train", *settings(2, saved_folders("qwen3"), rows, tmp_path / "2"))
    train(settings(4, saved_folders("qwen3"), rows, tmp_path / "1"))
    compare(tmp_path / "1", tmp_path / "2")


def compare(one, two):
    """Compare the logs of each step, and the weights."""
    logs = [training_logs(folder) for folder in (one, two)]
    assert len(logs[0]) == len(logs[1]) == 4
    for first, second in zip(*logs, strict=True):
        for name in ("loss", "loss_pairwise_hinge", "loss_listwise_kl", "score_spread", "grad_norm"):
            assert second[name] == pytest.approx(first[name], abs=2e-4, rel=1e-3), name
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3, msg=name)


def training_logs(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]
