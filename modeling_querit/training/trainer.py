"""`QueritTrainer`: transformers' Trainer on whole queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from .losses import LOSSES, ON_LOGIT, ON_SCORE


@dataclass
class QueritTrainingArguments(TrainingArguments):
    """`TrainingArguments`, plus the losses. A batch is counted in queries, each with all its documents.

    Args:
        losses: Names of the losses, added up: `pairwise_hinge` (the published one), `listwise_kl`, `pointwise_bce`.
    """

    losses: list[str] = field(
        default_factory=lambda: ["pairwise_hinge"],
        metadata={"help": f"Losses, added up: {', '.join(LOSSES)}."},
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
