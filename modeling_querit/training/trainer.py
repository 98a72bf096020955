"""`QueritTrainer`: transformers' Trainer on whole queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..modeling_querit import QueritForSequenceRanking
from .losses import LOSSES, ON_LOGIT, ON_SCORE


@dataclass
class QueritTrainingArguments(TrainingArguments):
    """`TrainingArguments`, plus the losses. A batch is counted in queries, each with all its documents.

    Args:
        losses: Names of the losses, added up: `pairwise_hinge` (the published one), `listwise_kl`, `pointwise_bce`.
        head_learning_rate: Of the head; the general one by default. The head sees large hidden states (Gemma 3:
            rms 4 over 640 values), and a step of Adam is as long for a small gradient as for a large one.
    """

    losses: list[str] = field(
        default_factory=lambda: ["pairwise_hinge"],
        metadata={"help": f"Losses, added up: {', '.join(LOSSES)}."},
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the head, which starts at zero; the general one by default."},
    )
    # The collator takes rows as they are; the Trainer would drop their columns as unknown to the model.
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.losses) - set(LOSSES))
        if unknown or not self.losses:
            raise ValueError(f"losses has {unknown or 'no entry'}: choose from {', '.join(LOSSES)}.")


class QueritTrainer(Trainer):
    """Trains a reranker on rows of (query, documents, labels); everything else is transformers' `Trainer`.

    Example:
        ```python
        >>> trainer = QueritTrainer(model, args, train_dataset=RankingDataset.from_jsonl("rows.jsonl"),
        ...                         data_collator=RankingCollator(model.processor))
        >>> trainer.train()
        ```
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Our losses are means over pairs or queries, so the Trainer has to divide them by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the head in groups of its own where it has its own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.head_learning_rate is not None:
            heads = {parameter for name, parameter in self.model.named_parameters() if _is_of_head(name)}
            for group in list(optimizer.param_groups):
                mine = [parameter for parameter in group["params"] if parameter in heads]
                if mine:
                    group["params"] = [parameter for parameter in group["params"] if parameter not in heads]
                    optimizer.add_param_group({**group, "params": mine, "lr": self.args.head_learning_rate})
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, QueritForSequenceRanking) and not self.is_fsdp_enabled:
            # The parent's load_state_dict(strict=False) passes over the experts of a mixture in silence: on disk
            # each has keys of its own, in the model they are one tensor. from_pretrained converts.
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
            model.load_state_dict(saved.state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, QueritForSequenceRanking) and not self.is_fsdp_enabled:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The sum of the chosen losses over one batch of whole queries."""
        inputs = dict(inputs)
        labels, query_ids = inputs.pop("labels"), inputs.pop("query_ids")
        outputs = model(**inputs)
        score, logit = outputs.score.squeeze(-1), outputs.logits[:, 1] - outputs.logits[:, 0]
        loss = sum(ON_SCORE[name](score, labels, query_ids) for name in self.args.losses if name in ON_SCORE)
        loss = loss + sum(ON_LOGIT[name](logit, labels, query_ids) for name in self.args.losses if name in ON_LOGIT)
        outputs.loss = loss
        return (loss, outputs) if return_outputs else loss


def _is_of_head(name: str) -> bool:
    """Whether a parameter is the ranking head's, under whatever wrapper (peft, FSDP, DDP)."""
    return "score" in name.split(".")
