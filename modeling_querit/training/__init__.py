"""Losses, ranking data and trainers; `querit train` is `run.py`."""

from .arguments import QueritTrainingArguments
from .dataset import RankingDataset
from .distillation import QueritDistillationTrainer
from .trainer import QueritTrainer

__all__ = ["QueritDistillationTrainer", "QueritTrainer", "QueritTrainingArguments", "RankingDataset"]
