"""Runs that are killed, and go on: the end is the same as if nothing had happened."""

import json
import multiprocessing
import os
import random
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_querit.files import write_jsonl
from modeling_querit.training import run as training_run
from modeling_querit.training.record import newest_checkpoint

STEPS = 8
ROWS = [
    {"query": f"number {n}", "documents": [f"this is {n}", f"this is {n + 1}", "x"], "labels": [1, 0.3, 0]}
    for n in range(12)
]


class Killer(TrainerCallback):
    """Kills its own process as nothing else does: no handler, no flush."""

    def __init__(self, step, event):
        self.step, self.event = step, event

    def on_event(self, event, state):
        if event == self.event and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        self.on_event("step", state)

    def on_save(self, args, state, control, **kwargs):
        self.on_event("saved", state)


def train(arguments, step, event):
    """One process of a run, killed at a step: after it, or before, in the middle of, or after saving it."""
    torch.set_num_threads(1)
    callbacks = training_run._callbacks

    def with_killer(*args):
        return [*callbacks(*args), Killer(step, event)]

    training_run._callbacks = with_killer
    if event == "saving":
        save_rng = training_run.QueritTrainer._save_optimizer_and_scheduler

        def save_half(self, folder):
            save_rng(self, folder)
            Killer(step, "saving").on_event("saving", self.state)

        training_run.QueritTrainer._save_optimizer_and_scheduler = save_half
    training_run.main(arguments)


def launch(arguments, step=None, event=None):
    """The exit code of a run in a process of its own, forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_querit.training.run"])
    process = context.Process(target=train, args=(arguments, step, event))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture
def arguments(saved_folder, tmp_path):
    write_jsonl(ROWS, tmp_path / "rows.jsonl")

    def make(name, *more):
        settings = {
            "model": saved_folder,
            "train": tmp_path / "rows.jsonl",
            "output_dir": tmp_path / name,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "save_steps": 2,
            "save_total_limit": 2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return [str(each) for pair in settings.items() for each in (f"--{pair[0]}", pair[1])] + list(more)

    return make


def tensors(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(("seed", "lora"), [(0, []), (1, []), (2, ["--lora_rank", "2"])])
def test_killed_at_random_and_resumed_gives_the_same_weights(arguments, tmp_path, seed, lora):
    assert launch(arguments("whole", *lora)) == 0
    rng = random.Random(seed)
    for step in sorted(rng.sample(range(1, STEPS), 2)):
        event = rng.choice(["step", "saving", "saved"])
        # Only even steps are saved.
        step += step % 2 if event != "step" else 0
        assert launch(arguments("killed", "--resume", "True", *lora), step, event) in (-signal.SIGKILL, 0)
    assert launch(arguments("killed", "--resume", "True", *lora)) == 0
    whole, killed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name


def test_killed_after_the_last_checkpoint_trains_no_step_more(arguments, tmp_path):
    # In the middle of an epoch, with a rate that does not end at zero.
    more = ["--max_steps", "4", "--lr_scheduler_type", "constant"]
    assert launch(arguments("run", *more)) == 0
    state, before = tmp_path / "run" / "trainer_state.json", tensors(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert launch(arguments("run", *more, "--resume", "True")) == 0
    assert json.loads(state.read_text())["global_step"] == 4
    assert all(torch.equal(tensor, tensors(tmp_path / "run")[name]) for name, tensor in before.items())


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(arguments, tmp_path):
    assert launch(arguments("run"), 4, "saving") == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint-4").exists()
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-2"
    broken = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    assert newest_checkpoint(tmp_path / "run") is None


def test_a_run_is_not_overwritten_by_another(arguments, tmp_path):
    assert launch(arguments("run"), 3, "step") == -signal.SIGKILL
    with pytest.raises(ValueError, match="go on with --resume"):
        training_run.main(arguments("run"))
    with pytest.raises(ValueError, match=r"was begun with learning_rate 0\.01, not 0\.5"):
        training_run.main(arguments("run", "--resume", "True", "--learning_rate", "0.5"))
    write_jsonl(ROWS[1:], tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl has changed"):
        training_run.main(arguments("run", "--resume", "True"))
