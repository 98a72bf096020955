"""`QueritTrainingArguments`: transformers' own, and what ranking adds to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .losses import LOSSES, choose_losses


@dataclass
class QueritTrainingArguments(TrainingArguments):
    """`TrainingArguments`, plus the losses and how texts become batches. A batch is counted in queries.

    Args:
        losses: Names of the losses, each `NAME`, `NAME:score` or `NAME:logit`: what it acts on.
        loss_weights: Factors of the losses in their sum; 1 each by default.
        margin_scale: Of `pairwise_hinge` (0.8 by default) and `margin_mse` (1): margin per unit of label difference.
        emphasis: Of `pairwise_hinge`: the share of a query's list, from the top, where margins are doubled.
        temperature: Of `listwise_kl`: the label difference that counts as a factor of e.
        head_learning_rate: Of the head; the general one by default. The head sees large hidden states (Gemma 3:
            rms 4 over 640 values), and a step of Adam is as long for a small gradient as for a large one.
        max_length: Tokens a pair may have in training.
        packing: Whether the pairs of a batch lie end to end, without padding and what those of a query begin with only
            once, where the backbone allows it; gradients are the same.
    """

    losses: list[str] = field(
        default_factory=lambda: ["pairwise_hinge"],
        metadata={"help": f"Losses, added up, each NAME, NAME:score or NAME:logit: {', '.join(LOSSES)}."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Factors of the losses in their sum; 1 each by default."}
    )
    margin_scale: float | None = field(
        default=None, metadata={"help": "Of pairwise_hinge (0.8) and margin_mse (1): margin per unit of label."}
    )
    emphasis: float | None = field(
        default=None,
        metadata={"help": "Of pairwise_hinge: share of a list, from the top, with doubled margins (published: 0.3)."},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Of listwise_kl (0.1): the label difference that counts as a factor of e."}
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the head, which starts at zero; the general one by default."},
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens a pair may have in training."})
    packing: bool = field(
        default=True,
        metadata={"help": "Lay pairs end to end, without padding, what those of a query begin with only once."},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two logs; how often the run's health is looked at, too."}
    )
    # What early stopping has counted belongs to a run that goes on.
    restore_callback_states_from_checkpoint: bool = True
    # The collator takes rows as they are; the Trainer would drop their columns as unknown to the model.
    remove_unused_columns: bool = False
    # A NaN is to be seen, not replaced by the mean of the losses before it.
    logging_nan_inf_filter: bool = False

    def __post_init__(self) -> None:
        # Processors without an accelerator have bfloat16 too, but the Trainer refuses it until it is told to use them.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        choose_losses(self.losses)
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(
                f"There are {len(self.loss_weights)} loss_weights for {len(self.losses)} losses: give one each."
            )
        if self.margin_scale is not None and not self.margin_scale > 0:
            raise ValueError(f"margin_scale is {self.margin_scale}: it has to be above 0.")
        if self.emphasis is not None and not 0 <= self.emphasis <= 1:
            raise ValueError(f"emphasis is {self.emphasis}: it is a share of the list, from 0 to 1.")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it has to be above 0.")
        if self.accelerator_config.dispatch_batches is None:
            # Each process reads its own queries of a stream: a batch cut up among them would lose its groups.
            self.accelerator_config.dispatch_batches = False
