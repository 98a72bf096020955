"""Training: losses, rows and trainers for Python, and `querit train` (`train.py`)."""

from .arguments import QueritTrainingArguments
from .data import RankingDataset
from .distillation import QueritDistillationTrainer
from .trainer import QueritTrainer

__all__ = ["QueritDistillationTrainer", "QueritTrainer", "QueritTrainingArguments", "RankingDataset"]
