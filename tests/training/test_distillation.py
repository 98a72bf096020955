"""Soft labels from teachers' scores."""

import copy
import json

import pytest
import torch
from small_runs import ROWS, make_trainer

from modeling_querit.training.distillation import DistillationCollator, QueritDistillationTrainer
from modeling_querit.training.teacher_labels import Calibration, Teachers

SCORED = [
    {"query": row["query"], "documents": row["documents"], "scores": {"a": [9, 1, 5], "b": [0.1, 0.9, None]}}
    for row in ROWS
]
TEACHERS = Teachers({"a": Calibration("none"), "b": Calibration("none")}, {"a": 3.0, "b": 1.0})


def test_labels_are_the_weighted_mean_of_calibrated_scores(processor):
    row = {"query": "q", "documents": ["x", "y"], "scores": {"a": [1.0, 0.0], "b": [0.2, None]}}
    labels = DistillationCollator(TEACHERS, processor)([row])["labels"]
    assert labels.tolist() == pytest.approx([0.8, 0.0])


def test_rows_with_relevance_judgements_keep_their_labels(processor):
    row = {"query": "q", "documents": ["x", "y"], "labels": [0, 1]}
    assert DistillationCollator(TEACHERS, processor)([row])["labels"].tolist() == [0, 1]


@pytest.mark.slow
def test_teachers_are_calibrated_by_the_training_rows(model, tmp_path):
    trainer = make_trainer(copy.deepcopy(model), tmp_path, SCORED, trainer=QueritDistillationTrainer)
    batch = trainer.data_collator(SCORED[:1])
    # a: 9, 1, 5 -> 1, 0, 0.5; b: 0.1, 0.9 -> 0, 1.
    assert batch["labels"].tolist() == pytest.approx([0.5, 0.5, 0.5])
    trainer.train()
    written = json.loads((tmp_path / "teachers.json").read_text())
    assert {name: entry["method"] for name, entry in written.items()} == {"a": "quantile", "b": "quantile"}
    assert Teachers.load(tmp_path / "teachers.json") == trainer.teachers


def test_documents_without_any_score_take_part_in_no_loss(model, tmp_path):
    trainer = make_trainer(copy.deepcopy(model), tmp_path, SCORED, trainer=QueritDistillationTrainer)
    row = {"query": "q", "documents": ["x", "y", "z"], "scores": {"a": [9, 1, None], "b": None}}
    batch = trainer.data_collator([row])
    assert batch["labels"].isnan().tolist() == [False, False, True]
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))


def test_rows_without_scores_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="Row 0 has no teacher scores"):
        make_trainer(model, tmp_path, ROWS, trainer=QueritDistillationTrainer)
