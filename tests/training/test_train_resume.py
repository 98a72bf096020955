"""Runs that are killed and resumed: the result is the same as if nothing had happened.

On the architecture that also has experts: what is saved and restored of a run is the same for both.
"""

import json
import os
import random
import shutil
import signal

import pytest
import torch
from forked_calls import exit_code_of
from safetensors.torch import load_file
from small_runs import as_flags, make_settings
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from modeling_querit.files import write_jsonl
from modeling_querit.training.arguments import parse
from modeling_querit.training.record import newest_checkpoint
from modeling_querit.training.train import train

STEPS = 8
ROWS = [
    {"query": f"number {n}", "documents": [f"this is {n}", f"this is {n + 1}", "x"], "labels": [1, 0.3, 0]}
    for n in range(12)
]


class Killer(TrainerCallback, ExportableState):
    """Kills its own process at a step: no handler runs, no buffer is flushed.

    The step and the event are of the class, since the Trainer restores callbacks from their state when it resumes.
    """

    step, event = None, None
    last_step = 0

    def kill_at(self, event):
        if event == self.event and self.last_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        self.last_step = state.global_step
        self.kill_at("step")

    def state(self):
        # The Trainer asks for it in the middle of a checkpoint, before it writes trainer_state.json.
        self.kill_at("saving")
        return {"args": {}, "attributes": {}}

    def on_save(self, args, state, control, **kwargs):
        self.kill_at("saved")


def run(flags, step, event):
    """One process of a run, killed after a step, in the middle of its checkpoint, or after the checkpoint."""
    torch.set_num_threads(1)
    Killer.step, Killer.event = step, event
    train(parse(flags), callbacks=[Killer()])


def launch(flags, step=None, event=None):
    """The exit code of a run in a process of its own."""
    return exit_code_of(run, flags, step, event)


@pytest.fixture
def flags(saved_folders, tmp_path):
    write_jsonl(ROWS, tmp_path / "rows.jsonl")
    settings = {
        "model": saved_folders("deepseek_v3"),
        "train": tmp_path / "rows.jsonl",
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
    }
    return lambda name, **more: as_flags(tmp_path / name, **settings | more)


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "lora"), [(0, {}), (2, {"lora_rank": 2})])
def test_killed_at_random_and_resumed_gives_the_same_weights(flags, tmp_path, seed, lora):
    assert launch(flags("whole", **lora)) == 0
    rng = random.Random(seed)
    for step in sorted(rng.sample(range(1, STEPS), 2)):
        event = rng.choice(["step", "saving", "saved"])
        # Only even steps are saved.
        step += step % 2 if event != "step" else 0
        # 0: a run that was resumed after that step has nothing left to be killed at.
        assert launch(flags("killed", resume=True, **lora), step, event) in (-signal.SIGKILL, 0)
    assert launch(flags("killed", resume=True, **lora)) == 0
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


@pytest.mark.slow
def test_killed_after_the_last_checkpoint_trains_no_further_step(flags, tmp_path):
    # In the middle of an epoch, with a learning rate that does not end at zero.
    settings = {"max_steps": 4, "lr_scheduler_type": "constant"}
    assert launch(flags("run", **settings)) == 0
    state, before = tmp_path / "run" / "trainer_state.json", weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert launch(flags("run", resume=True, **settings)) == 0
    assert json.loads(state.read_text())["global_step"] == 4
    assert_equal(before, weights(tmp_path / "run"))


@pytest.mark.slow
def test_a_checkpoint_that_was_killed_half_written_is_passed_over(flags, tmp_path):
    assert launch(flags("run"), 4, "saving") == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint-4").exists()
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-2"


@pytest.mark.slow
def test_a_named_checkpoint_is_resumed(flags, tmp_path):
    settings = {"lr_scheduler_type": "constant"}
    train(parse(flags("whole", max_steps=4, **settings)))
    train(parse(flags("parts", max_steps=2, **settings)))
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    train(parse(flags("parts", max_steps=4, resume_from_checkpoint=checkpoint, **settings)))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
def test_a_stream_is_resumed_in_a_later_pass(saved_folders, tmp_path):
    """Six rows are read again and again: step 8 of two queries each is in the third pass."""
    pytest.importorskip("datasets")
    write_jsonl(ROWS[:6], tmp_path / "rows.jsonl")
    settings = {"model": str(saved_folders("deepseek_v3")), "train": [str(tmp_path / "rows.jsonl")], "streaming": True}
    settings |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    settings |= {"save_strategy": "steps", "save_steps": 8}
    train(make_settings(tmp_path / "whole", max_steps=11, **settings))
    train(make_settings(tmp_path / "parts", max_steps=8, **settings))
    train(make_settings(tmp_path / "parts", max_steps=11, resume=True, **settings))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
