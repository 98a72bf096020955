"""`QueritTrainer`: transformers' Trainer on batches of whole queries, with exact losses and ranking metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from ..evaluation.metrics import ranking_metrics
from ..modeling_querit import QueritForSequenceRanking, QueritOutput
from ..packed_forward_querit import can_train_packed, is_causal
from .arguments import VALIDATION_METRICS, QueritTrainingArguments
from .callbacks import LogMetricsCallback
from .collator import RankingCollator
from .data import Row, row_length
from .losses import count_items, select_losses

# Absolute score beyond which the gradient of tanh is next to none: 1 - 0.99^2 = 0.02 of that at zero.
SATURATED_SCORE = 0.99


class QueritTrainer(Trainer):
    """Trains a reranker on rows of (query, documents, labels); everything else is transformers' `Trainer`.

    A batch holds whole queries. Each loss is a mean over its items (pairs, queries or documents) in an optimizer step,
    so gradients do not depend on how a step is divided into batches, accumulation steps and processes. Beside the loss,
    `score_spread` is logged, the standard deviation of a query's scores, averaged over queries, and `score_saturated`,
    the share of scores beyond 0.99.

    Args:
        model: A `QueritForSequenceRanking`, or a peft model of one.
        args: Training arguments.
        data_collator: Collator of rows; by default a `RankingCollator` for the model.
        compute_metrics: Metrics of a validation, by default nDCG@10 and MRR@10. With several `eval_dataset`s by name,
            their mean is reported as well, as `eval_ndcg_at_10` and `eval_mrr_at_10`.
        **kwargs: Keyword arguments of `Trainer`.

    Example:
        ```python
        >>> trainer = QueritTrainer(model, args, train_dataset=RankingDataset.from_jsonl("rows.jsonl"))
        >>> trainer.train()
        ```
    """

    args: QueritTrainingArguments
    model: torch.nn.Module

    def __init__(
        self,
        model: torch.nn.Module,
        args: QueritTrainingArguments,
        data_collator: Callable[[list[Row]], dict[str, Any]] | None = None,
        *,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = ranking_metrics,
        **kwargs: Any,
    ):
        data_collator = data_collator or self.make_collator(model, args)
        # What is trained scores otherwise than what was calibrated.
        _base_model(model).config.calibration = None
        super().__init__(model, args, data_collator, compute_metrics=compute_metrics, **kwargs)
        # compute_loss divides by the items of the whole step; the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.losses = select_losses(args.losses, **args.loss_settings())
        self.loss_weights = args.loss_weights or [1.0] * len(self.losses)
        # Sums since the last log: spreads, queries, saturated scores, scores, then each loss; (4 + losses,).
        self._log_sums: Tensor | None = None
        self._sums_start_step = 0
        # For each batch of a validation, the loss sums and items of its queries, (queries, 2, losses).
        self._validation_sums: list[Tensor] = []

    @staticmethod
    def make_collator(model: torch.nn.Module, args: QueritTrainingArguments) -> RankingCollator:
        """Make a collator for a model, which packs where the model can."""
        base = _base_model(model)
        packing = args.packing and can_train_packed(base)
        return RankingCollator(base.processor, args.max_length, packing=packing, share_prefix=is_causal(base.model))

    def _get_train_sampler(self, train_dataset: Dataset[Row] | None = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__"):
            batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            lengths = [row_length(row) for row in cast(Sequence[Row], dataset)]
            return LengthSampler(batch_size, lengths, lambda: self.args.seed + int(self.state.epoch or 0))
        return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the Trainer's optimizer; a head with its own learning rate gets its own parameter groups."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.head_learning_rate is not None:
            head = {parameter for name, parameter in self.model.named_parameters() if _is_in_head(name)}
            for group in list(optimizer.param_groups):
                head_parameters = [parameter for parameter in group["params"] if parameter in head]
                if head_parameters:
                    group["params"] = [parameter for parameter in group["params"] if parameter not in head]
                    head_group = {**group, "params": head_parameters, "lr": self.args.head_learning_rate}
                    optimizer.add_param_group(head_group)
        return optimizer

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        # A run that was killed after its last checkpoint, in mid-epoch, has no step left; the Trainer would do one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the weighted sum of the chosen losses over one batch of whole queries.

        Args:
            model: Model, in whatever wrapper.
            inputs: Batch of `RankingCollator`.
            return_outputs: Whether to return the model's output too.
            num_items_in_batch: Items of each loss in the whole step, (losses,); by default those of this batch.

        Returns:
            A scalar, float32; with `return_outputs`, also the model's output.
        """
        inputs = dict(inputs)
        labels, query_ids = inputs.pop("labels"), inputs.pop("query_ids")
        outputs = model(**inputs)
        values = _scores_and_logits(outputs)
        items = self._count(labels, query_ids) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        losses = self._loss_sums(values, labels, query_ids) / items.clamp(min=1)  # (losses,)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, while these losses are the processes' shares of a sum.
            losses = losses * self.accelerator.num_processes
        if model.training:
            self._add_to_log(values["score"].detach(), query_ids, losses.detach())
        loss = losses @ losses.new_tensor(self.loss_weights)
        outputs.loss = loss
        return (loss, outputs) if return_outputs else loss

    def _loss_sums(self, values: dict[str, Tensor], labels: Tensor, query_ids: Tensor) -> Tensor:
        """Sum each loss over its items, (losses,)."""
        losses = self.losses.values()
        return torch.stack([loss.function(values[loss.output], labels, query_ids, reduction="sum") for loss in losses])

    def _count(self, labels: Tensor, query_ids: Tensor) -> Tensor:
        """Count the items of each loss, (losses,)."""
        return torch.tensor(
            [count_items(loss, labels, query_ids) for loss in self.losses.values()], device=labels.device
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        # The Trainer would count labels; here each loss has a number of items of its own.
        if not batch_samples:
            return None
        items = torch.stack([self._count(batch["labels"], batch["query_ids"]) for batch in batch_samples]).sum(0)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            return self.accelerator.gather(items.to(device)[None]).sum(0)
        return items.to(device)

    def _add_to_log(self, scores: Tensor, query_ids: Tensor, losses: Tensor) -> None:
        spreads = [scores[query_ids == query_id].std(correction=0) for query_id in query_ids.unique()]
        saturated = (scores.abs() > SATURATED_SCORE).sum()
        values = [sum(spreads), len(spreads), saturated, len(scores), *losses]
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in values])
        if self._log_sums is None:
            self._log_sums, self._sums_start_step = torch.zeros_like(sums), self.state.global_step
        self._log_sums += sums

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; a log of training also has each of several losses, and metrics of scores and callbacks."""
        if "loss" in logs and self._log_sums is not None:
            sums, self._log_sums = self._log_sums, None
            if self.args.world_size > 1:
                sums = self.accelerator.gather(sums.float().to(self.args.device)[None]).sum(0)
            spread, queries, saturated, scores, *losses = sums.tolist()
            logs = logs | {"score_spread": spread / queries, "score_saturated": saturated / scores}
            if len(losses) > 1:
                steps = (self.state.global_step - self._sums_start_step) * self.args.world_size
                logs |= {f"loss_{name}": loss / steps for name, loss in zip(self.losses, losses, strict=True)}
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LogMetricsCallback):
                    logs |= callback.log_metrics()
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return loss, scores and labels of a batch; scores and labels are (queries, documents), padded with -100."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            query_sums = self._query_sums(_scores_and_logits(outputs), inputs["labels"], inputs["query_ids"])
            # Queries that were repeated to fill up the last batch are dropped here.
            self._validation_sums.append(self.gather_function(query_sums).cpu())
        if prediction_loss_only:
            return loss, None, None
        query_ids = inputs["query_ids"]
        return loss, _by_query(outputs.score.squeeze(-1), query_ids), _by_query(inputs["labels"], query_ids)

    def _query_sums(self, values: dict[str, Tensor], labels: Tensor, query_ids: Tensor) -> Tensor:
        """Return, per query, the sum of each loss and its number of items, (queries, 2, losses), float64."""
        query_sums = []
        for query_id in query_ids.unique():
            in_query = query_ids == query_id  # (pairs,)
            query_values = {name: value[in_query] for name, value in values.items()}
            sums = self._loss_sums(query_values, labels[in_query], query_ids[in_query])
            items = self._count(labels[in_query], query_ids[in_query])
            query_sums.append(torch.stack([sums.double(), items.double()]))
        return torch.stack(query_sums)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`, but the loss is a mean over the items of the whole dataset, whatever the batches are."""
        self._validation_sums = []
        output = super().evaluation_loop(*args, **kwargs)
        if self._validation_sums and output.metrics is not None:
            sums, items = torch.cat(self._validation_sums).sum(0)  # (losses,) each
            losses = sums / items.clamp(min=1)
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = float(losses @ losses.new_tensor(self.loss_weights))
        return output

    def evaluate(
        self, eval_dataset: Dataset[Row] | dict[str, Dataset[Row]] | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, float]:
        """As in `Trainer`; for several datasets by name, the means of their metrics too."""
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if isinstance(eval_dataset, dict) and eval_dataset:
            prefix = kwargs.get("metric_key_prefix", "eval")
            means = {}
            for name in VALIDATION_METRICS:
                keys = [f"{prefix}_{dataset_name}_{name}" for dataset_name in eval_dataset]
                values = [metrics[key] for key in keys if key in metrics]
                if values:
                    means[f"{prefix}_{name}"] = sum(values) / len(values)
            metrics |= means
            self.log(means)
            # The Trainer has reported each dataset by itself; early stopping goes by the mean.
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not Path(resume_from_checkpoint).is_dir():
            raise FileNotFoundError(f"No such checkpoint: {resume_from_checkpoint}. It was moved or removed.")
        model = self.model if model is None else model
        if isinstance(model, QueritForSequenceRanking) and not self.is_fsdp_enabled:
            # The Trainer's load_state_dict(strict=False) silently skips the experts of a mixture: on disk each has keys
            # of its own, in the model they are one tensor. from_pretrained converts.
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
            model.load_state_dict(saved.state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, QueritForSequenceRanking) and not self.is_fsdp_enabled:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()


class LengthSampler(LengthGroupedSampler):
    """transformers' sampler of batches of similar length, in an order that depends on a seed alone.

    A run that is resumed in its second epoch then sees the same batches as one that was not interrupted.

    Args:
        batch_size: Queries of an optimizer step.
        lengths: Lengths of the rows, in characters.
        seed: Function that gives the seed of an epoch, called at its start.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed())
        return super().__iter__()


def _base_model(model: torch.nn.Module) -> QueritForSequenceRanking:
    """Return the reranker within a peft model, or the reranker itself."""
    return cast(QueritForSequenceRanking, getattr(model, "get_base_model", lambda: model)())


def _scores_and_logits(outputs: QueritOutput) -> dict[str, Tensor]:
    """Return what losses are computed on, by `Loss.output`, (pairs,) each."""
    logits = outputs["logits"]  # (pairs, 2)
    return {"score": outputs["score"].squeeze(-1), "logit": logits[:, 1] - logits[:, 0]}


def _by_query(values: Tensor, query_ids: Tensor) -> Tensor:
    """Lay out the values of each query, (queries, documents), padded with -100 as the Trainer pads."""
    rows = [values[query_ids == query_id] for query_id in query_ids.unique()]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def _is_in_head(name: str) -> bool:
    """Whether a parameter belongs to the ranking head, in whatever wrapper (peft, FSDP, DDP)."""
    return "score" in name.split(".")
