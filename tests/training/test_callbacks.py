"""Health of a run, and its plot."""

import copy
import math

import pytest
import torch
from small_runs import ROWS, make_args, make_trainer
from transformers import TrainerControl, TrainerState

from modeling_querit.training.callbacks import HealthCallback, HealthThresholds, PlotCallback, draw_run

HEALTHY = {"loss": 0.5, "grad_norm": 1.0, "score_spread": 0.3, "score_saturated": 0.0}


def feed(health, *logs, first_step=1000):
    """The number of logs after which the run was stopped; None if it was not."""
    state, control = TrainerState(), TrainerControl()
    for number, log in enumerate(logs, start=1):
        state.global_step = first_step + number
        state.log_history.append(log)
        health.on_log(None, state, control, logs=log)
        if control.should_training_stop:
            return number
    return None


def test_a_healthy_run_goes_on():
    health = HealthCallback()
    assert feed(health, *[HEALTHY] * 50, {"eval_loss": math.nan}) is None
    assert health.diagnosis is None


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stops_a_run_at_once(name, value):
    health = HealthCallback()
    assert feed(health, HEALTHY, HEALTHY | {name: value}, HEALTHY) == 2
    assert "not finite" in health.diagnosis


@pytest.mark.parametrize(
    ("symptom", "advice"),
    [({"score_saturated": 0.95}, "NAME:logit"), ({"score_spread": 1e-5}, "easier negatives")],
)
def test_a_collapsed_run_stops_when_patience_is_over(symptom, advice):
    health = HealthCallback(HealthThresholds(patience=3))
    assert feed(health, HEALTHY, *[HEALTHY | symptom] * 2, HEALTHY, *[HEALTHY | symptom] * 5) == 7
    assert advice in health.diagnosis
    assert "step 1007" in health.diagnosis


def test_scores_are_not_looked_at_during_warmup():
    dead = HEALTHY | {"score_spread": 0.0}
    assert feed(HealthCallback(HealthThresholds(patience=2, warmup_steps=200)), *[dead] * 50, first_step=0) is None


def test_an_explosion_is_measured_against_the_median():
    health = HealthCallback(HealthThresholds(patience=2))
    assert feed(health, *[HEALTHY] * 12, *[HEALTHY | {"grad_norm": 500.0}] * 3) == 14
    assert "max_grad_norm" in health.diagnosis


@pytest.mark.slow
def test_a_real_run_with_a_saturated_head_is_stopped(model, tmp_path):
    """The trap: with scores at -1 and 1 the hinge is dead, and its loss stays where it is."""
    student = copy.deepcopy(model)
    with torch.no_grad():
        student.score.weight.mul_(1000)
    health = HealthCallback(HealthThresholds(patience=2, warmup_steps=0))
    trainer = make_trainer(student, tmp_path, max_steps=10, logging_steps=1, callbacks=[health])
    trainer.train()
    assert trainer.state.global_step == 2
    assert "logit" in health.diagnosis
    assert trainer.state.log_history[0]["score_saturated"] > 0.9


@pytest.mark.slow
def test_a_real_run_with_a_dead_head_is_stopped(model, tmp_path):
    student = copy.deepcopy(model)
    torch.nn.init.zeros_(student.score.weight)
    health = HealthCallback(HealthThresholds(patience=2, warmup_steps=0))
    rows = [row | {"labels": [0, 0, 0]} for row in ROWS]
    trainer = make_trainer(student, tmp_path, rows, max_steps=10, logging_steps=1, callbacks=[health])
    trainer.train()
    assert trainer.state.global_step == 2
    assert "differ by" in health.diagnosis


@pytest.mark.slow
def test_a_real_run_with_nan_is_stopped(model, tmp_path):
    student = copy.deepcopy(model)
    with torch.no_grad():
        student.score.bias[0] = math.nan
    health = HealthCallback()
    trainer = make_trainer(student, tmp_path, max_steps=10, logging_steps=1, callbacks=[health])
    trainer.train()
    assert trainer.state.global_step == 1
    assert "not finite" in health.diagnosis


@pytest.mark.slow
def test_a_real_run_that_explodes_is_stopped(model, tmp_path):
    class Exploding(type(make_trainer(model, tmp_path))):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (1e6 if self.state.global_step > 12 else 1)

    health = HealthCallback(HealthThresholds(patience=2))
    trainer = make_trainer(
        copy.deepcopy(model), tmp_path, max_steps=30, logging_steps=1, callbacks=[health], max_grad_norm=0
    )
    trainer.__class__ = Exploding
    trainer.train()
    assert trainer.state.global_step < 20
    assert "gradient norm" in health.diagnosis


HISTORY = [
    {"step": 1, "loss": 1.0, "grad_norm": 2.0, "expert_load_max": 1.5, "expert_load_max/layer": 1.5},
    {"step": 2, "loss": 0.5, "eval_loss": 0.7, "eval_ndcg_at_10": 0.4, "eval_beir_ndcg_at_10": 0.4},
]


def png_size(png):
    return [int.from_bytes(png[start : start + 4], "big") for start in (16, 20)]


@pytest.mark.slow
def test_the_plot_has_a_panel_for_each_quantity(tmp_path):
    assert draw_run(HISTORY, tmp_path / "all.png")
    assert draw_run([{"step": 1, "loss": 1.0}], tmp_path / "loss.png")
    plots = [(tmp_path / name).read_bytes() for name in ("all.png", "loss.png")]
    assert all(png.startswith(b"\x89PNG") for png in plots)
    # Loss, nDCG, gradient norm and expert load, against loss alone.
    assert png_size(plots[0]) == [840, 4 * 312]
    assert png_size(plots[1]) == [840, 312]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "loss.png"]


@pytest.mark.slow
def test_a_run_is_drawn_again_when_something_is_new(tmp_path):
    args, path = make_args(tmp_path), tmp_path / "training.png"
    callback, state = PlotCallback(), TrainerState(log_history=HISTORY[:1], is_world_process_zero=True)
    callback.on_save(args, state, None)
    first = path.stat()
    state.log_history.append({"step": 1, "train_runtime": 1.0})
    callback.on_train_end(args, state, None)
    assert path.stat() == first
    state.log_history.append(HISTORY[1])
    callback.on_train_end(args, state, None)
    assert path.stat().st_ino != first.st_ino


def test_a_run_without_metrics_draws_nothing(tmp_path):
    assert not draw_run([{"step": 1, "epoch": 0.5}], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
