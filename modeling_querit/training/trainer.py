"""`QueritTrainer`: transformers' Trainer on whole queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from ..engine_querit import can_pack
from ..evaluation.metrics import ranking_metrics
from ..modeling_querit import QueritForSequenceRanking
from .arguments import QueritTrainingArguments
from .collator import RankingCollator
from .dataset import length_of
from .losses import choose_losses, count_items

# Beyond it a score has next to no gradient: 1 - 0.99^2 = 0.02 of that at zero.
SATURATED = 0.99


class QueritTrainer(Trainer):
    """Trains a reranker on rows of (query, documents, labels); everything else is transformers' `Trainer`.

    A batch is whole queries. The loss is a mean over all pairs (queries, documents) of an optimizer step, so gradients
    are the same however a step is divided into batches, accumulation steps and processes. Beside the loss are logged
    `score_spread`, the mean over queries of the standard deviation of their scores, and `score_saturated`, the share of
    scores beyond 0.99.

    Args:
        model: A `QueritForSequenceRanking`, or a peft model of one.
        args: `QueritTrainingArguments`.
        data_collator: A `RankingCollator` by default, made for the model.
        compute_metrics: By default nDCG@10 and MRR@10. With several `eval_dataset`s by name, their mean is reported as
            well, as `eval_ndcg_at_10` and `eval_mrr_at_10`.
        **kwargs: Those of `Trainer`.

    Example:
        ```python
        >>> trainer = QueritTrainer(model, args, train_dataset=RankingDataset.from_jsonl("rows.jsonl"))
        >>> trainer.train()
        ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: QueritTrainingArguments,
        data_collator: Any = None,
        *positional: Any,
        compute_metrics: Any = ranking_metrics,
        **kwargs: Any,
    ):
        data_collator = data_collator or self.make_collator(model, args)
        super().__init__(model, args, data_collator, *positional, compute_metrics=compute_metrics, **kwargs)
        # Our losses are divided by the items of the whole step, which the Trainer then must not do again.
        self.model_accepts_loss_kwargs = True
        settings = {name: getattr(args, name) for name in ("margin_scale", "emphasis", "temperature")}
        self.losses = choose_losses(args.losses, **settings)
        self.loss_weights = args.loss_weights or [1.0] * len(self.losses)
        # Sums since the last log: spreads, queries, saturated scores, scores, then each loss.
        self._sums: Tensor | None = None
        # Of the collection that is validated: what its queries add to each loss.
        self._validated: list[Tensor] = []
        self._summed_from = 0

    @staticmethod
    def make_collator(model: torch.nn.Module, args: QueritTrainingArguments) -> RankingCollator:
        """The collator for a model: packed where it can be."""
        base = _unwrapped(model)
        # FSDP's own way of repeating layers in the backward pass does not tell them what pack they had.
        repeats_blindly = (args.fsdp_config or {}).get("activation_checkpointing") or (
            args.gradient_checkpointing_kwargs or {}
        ).get("use_reentrant")
        packing = args.packing and not repeats_blindly and can_pack(base)
        return RankingCollator(base.processor, args.max_length, packing=packing)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "__len__"):
            batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            lengths = [length_of(row) for row in dataset]
            return LengthSampler(batch_size, lengths, lambda: self.args.seed + int(self.state.epoch or 0))
        return super()._get_train_sampler(train_dataset)

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

    def _run_epoch(self, **kwargs: Any) -> None:
        # The Trainer would train a step more of a run that was killed after its last checkpoint, in mid-epoch.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The weighted sum of the chosen losses over one batch of whole queries.

        Args:
            model: The model, as it is wrapped.
            inputs: A batch of `RankingCollator`.
            return_outputs: Whether to return the model's output too.
            num_items_in_batch: (losses,), the items of each loss in the whole step; by default those of this batch.
        """
        inputs = dict(inputs)
        labels, query_ids = inputs.pop("labels"), inputs.pop("query_ids")
        outputs = model(**inputs)
        values = _values_of(outputs)
        items = self._count(labels, query_ids) if num_items_in_batch is None else num_items_in_batch
        losses = torch.stack(
            [
                loss.function(values[loss.output], labels, query_ids, reduction="sum") / count
                for loss, count in zip(self.losses.values(), items.clamp(min=1), strict=True)
            ]
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, while these are shares of a sum.
            losses = losses * self.accelerator.num_processes
        if model.training:
            self._watch(values["score"].detach(), query_ids, losses.detach())
        loss = losses @ losses.new_tensor(self.loss_weights)
        outputs.loss = loss
        return (loss, outputs) if return_outputs else loss

    def _count(self, labels: Tensor, query_ids: Tensor) -> Tensor:
        return torch.tensor(
            [count_items(loss, labels, query_ids) for loss in self.losses.values()], device=labels.device
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        # The Trainer counts labels; our losses are means over pairs, queries or documents, each its own number.
        if not batch_samples:
            return None
        items = torch.stack([self._count(batch["labels"], batch["query_ids"]) for batch in batch_samples]).sum(0)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            return self.accelerator.gather(items.to(device)[None]).sum(0)
        return items.to(device)

    def _watch(self, scores: Tensor, query_ids: Tensor, losses: Tensor) -> None:
        spreads = [scores[query_ids == query_id].std(correction=0) for query_id in query_ids.unique()]
        sums = [sum(spreads), len(spreads), (scores.abs() > SATURATED).sum(), len(scores), *losses]
        sums = torch.stack([torch.as_tensor(each, dtype=torch.float64, device="cpu") for each in sums])
        if self._sums is None:
            self._sums, self._summed_from = torch.zeros_like(sums), self.state.global_step
        self._sums += sums

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """What the Trainer logs, and of training how the scores spread and, of several losses, each."""
        if "loss" in logs and self._sums is not None:
            sums, self._sums = self._sums, None
            if self.args.world_size > 1:
                sums = self.accelerator.gather(sums.float().to(self.args.device)[None]).sum(0)
            spread, queries, saturated, scores, *losses = sums.tolist()
            logs = logs | {"score_spread": spread / queries, "score_saturated": saturated / scores}
            if len(losses) > 1:
                steps = (self.state.global_step - self._summed_from) * self.args.world_size
                logs |= {f"loss_{name}": loss / steps for name, loss in zip(self.losses, losses, strict=True)}
            for callback in self.callback_handler.callbacks:
                # Here, not in their on_log: those that write logs somewhere were added before them.
                logs |= callback.figures() if hasattr(callback, "figures") else {}
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, scores and labels of a batch; the latter two (queries, documents), filled up with -100."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            shares = self._shares(_values_of(outputs), inputs["labels"], inputs["query_ids"])
            self._validated.append(self.gather_function(shares).cpu())
        if prediction_loss_only:
            return loss, None, None
        of_query = inputs["query_ids"]
        return loss, _by_query(outputs.score.squeeze(-1), of_query), _by_query(inputs["labels"], of_query)

    def _shares(self, values: dict[str, Tensor], labels: Tensor, query_ids: Tensor) -> Tensor:
        """(queries, 2, losses), float64: of each query, the sum of each loss, and its items."""
        shares = []
        for query_id in query_ids.unique():
            mine = query_ids == query_id
            of_query = labels[mine], query_ids[mine]
            sums = [
                loss.function(values[loss.output][mine], *of_query, reduction="sum") for loss in self.losses.values()
            ]
            shares.append(torch.stack([torch.stack(sums).double(), self._count(*of_query).double()]))
        return torch.stack(shares)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`; the loss is a mean over the collection's items, whatever the batches are."""
        self._validated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._validated:
            sums, items = torch.cat(self._validated).sum(0)
            losses = sums / items.clamp(min=1)
            output.metrics[f"{metric_key_prefix}_loss"] = float(losses @ losses.new_tensor(self.loss_weights))
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; of several collections, their mean too."""
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if isinstance(eval_dataset, dict) and eval_dataset:
            prefix = kwargs.get("metric_key_prefix", "eval")
            means = {}
            for name in ("loss", "ndcg_at_10", "mrr_at_10"):
                values = [metrics[key] for each in eval_dataset if (key := f"{prefix}_{each}_{name}") in metrics]
                if values:
                    means[f"{prefix}_{name}"] = sum(values) / len(values)
            metrics |= means
            self.log(means)
            # Single collections have been announced; what a run is judged by is their mean.
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not Path(resume_from_checkpoint).is_dir():
            raise FileNotFoundError(f"There is no checkpoint {resume_from_checkpoint}: it was moved or removed.")
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


class LengthSampler(LengthGroupedSampler):
    """transformers' sampler that puts queries of similar length together, in an order that follows from a seed alone.

    So a run that was resumed in its second epoch meets the same batches as one that was not.

    Args:
        batch_size: Queries of an optimizer step.
        lengths: Of the rows.
        seed: Asked for at the start of each epoch.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed())
        return super().__iter__()


def _unwrapped(model: torch.nn.Module) -> QueritForSequenceRanking:
    """The reranker within a peft model; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _values_of(outputs: Any) -> dict[str, Tensor]:
    """(pairs,) each: what losses act on."""
    return {"score": outputs.score.squeeze(-1), "logit": outputs.logits[:, 1] - outputs.logits[:, 0]}


def _by_query(values: Tensor, query_ids: Tensor) -> Tensor:
    """(queries, documents): the values of each query in a row, filled up with -100 as the Trainer does."""
    rows = [values[query_ids == query_id] for query_id in query_ids.unique()]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def _is_of_head(name: str) -> bool:
    """Whether a parameter is the ranking head's, under whatever wrapper (peft, FSDP, DDP)."""
    return "score" in name.split(".")
