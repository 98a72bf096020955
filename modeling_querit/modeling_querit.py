"""Querit rerankers: a causal decoder of transformers, read at the final `[CLS]`, under a two-logit head."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput, logging

from .attention_querit import CannotPack, Run
from .configuration_querit import QueritConfig
from .engine_querit import attends_plainly, contexts_of_checkpointing, exclusive, inputs_of, read_pack
from .folder_querit import write_card_stub, write_folder_files
from .loss_querit import pairwise_hinge_loss
from .masks_querit import last_token, prepare_mask
from .moe_querit import NAME as EXPERTS_IMPLEMENTATION
from .packing_querit import Pack
from .processing_querit import QueritProcessor
from .ranking_querit import Document, RankedDocument, rank_documents, score_pairs, score_stream

logger = logging.get_logger(__name__)

# Published checkpoints call the head `head`.
_PUBLISHED_KEYS = {r"^head\.": "score."}
_EXPERT_KEY = re.compile(r"(.*\.experts)\.(\d+)\.(\w+\.weight)")


@dataclass
class QueritOutput(ModelOutput):
    """What a Querit model returns.

    Args:
        loss: Pairwise hinge loss, a float32 scalar; only where `labels` and `query_ids` were given.
        logits: float32; (batch, 2) = [z0, z1] from the ranking model, (batch, 1) = (z1 - z0) / 2 from the classifier.
        score: The published relevance score p1 - p0 in [-1, 1], float32, (batch, 1).
        hidden_states, attentions: the backbone's, where asked for.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    score: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class QueritHead(nn.Linear):
    """`W h + b` in float32, whatever the dtype of the weights, of `h` or of an autocast around it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, hidden) in any dtype -> (batch, 2) logits, float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float(), self.bias.float())


class QueritPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of Querit models."""

    config_class = QueritConfig
    base_model_prefix = "model"
    # The loss is a mean over pairs: without this the Trainer would not divide it by the accumulation steps.
    accepts_loss_kwargs = False
    # Whether layers that a backward pass repeats do not know the pack they had.
    _repeats_blindly = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"rotary_emb\.inv_freq$"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the text of this file, but the experts are the backbone's.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The implementation that was asked for, checked by transformers; by default ours."""
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, QueritHead):
            # At zero, not at random: decoders' final states are large, and a random head saturates p1 - p0,
            # where the hinge has no gradient. A head at zero starts every score at 0 and learns at full slope.
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Load a Querit folder or repository, in our layout or as published; see `PreTrainedModel.from_pretrained`.

        Published layouts: config.json of the backbone (`qwen3`, `deepseek_v3`), head as `head.weight` and
        `head.bias`, backbone keys with or without `model.`, one key an expert.

        Raises:
            ValueError: if a weight is missing from the checkpoint or has another shape; the message names the keys.
        """
        with_loading_info = kwargs.pop("output_loading_info", False)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        key_mapping = _PUBLISHED_KEYS | (kwargs.pop("key_mapping", None) or {})
        if (quantization := kwargs.get("quantization_config")) is not None:
            kwargs["quantization_config"] = _sparing_the_head(quantization)
        try:
            # Sizes are let through here, so that our own error can name the key in one sentence.
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                key_mapping=key_mapping,
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: a weight file is damaged or cut short ({error})."
            ) from error
        except RuntimeError as error:
            # transformers names no key where it cannot put the experts of a layer together.
            if missing := _missing_experts(pretrained_model_name_or_path):
                raise ValueError(f"{pretrained_model_name_or_path}: no weight for {_few(missing)}.") from error
            raise
        _check_loaded(pretrained_model_name_or_path, info, may_mismatch)
        model._save_under_own_keys()
        model._hub_kwargs = {
            name: kwargs[name]
            for name in ("revision", "subfolder", "cache_dir", "token", "local_files_only")
            if kwargs.get(name) is not None
        }
        if commit := getattr(model.config, "_commit_hash", None):
            # The tokenizer is read later, and belongs to these weights.
            model._hub_kwargs["revision"] = commit
        return (model, info) if with_loading_info else model

    def _save_under_own_keys(self) -> None:
        """Forget the renaming of published keys, which `save_pretrained` would otherwise undo (`score` -> `head`)."""
        conversions = getattr(self, "_weight_conversions", None)
        if conversions:
            ours = set(_PUBLISHED_KEYS)
            self._weight_conversions = [
                each for each in conversions if not ours.intersection(getattr(each, "_original_source_patterns", ()))
            ]

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        # Layers that a backward pass repeats have to see the pack of their forward pass again.
        settings = getattr(gradient_checkpointing_func, "keywords", {})
        self._repeats_blindly = enable and (settings.get("use_reentrant", False) or "context_fn" in settings)
        if enable and not self._repeats_blindly:
            contexts = partial(contexts_of_checkpointing, self.model)
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False, context_fn=contexts)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write the one folder that transformers, sentence-transformers and mteb load; see `PreTrainedModel`.

        Beside weights and config: tokenizer with its chat template, the code files, what sentence-transformers
        reads, and a model card stub if there is no README.md yet. `push_to_hub` uploads the same.
        """
        if kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            write_folder_files(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, files_timestamps: Any, **kwargs: Any) -> Any:
        # transformers has put its blank template in the place of our card by now, unless the repository has a card;
        # and the time before which it leaves files out was taken after ours were written.
        write_card_stub(working_dir, repo_id, over_template=True)
        return super()._upload_modified_files(working_dir, repo_id, {}, **kwargs)

    @property
    def processor(self) -> QueritProcessor:
        """The processor saved beside the weights, loaded on first use; assign one to a model built from a config."""
        if getattr(self, "_processor", None) is None:
            if not self.name_or_path:
                raise ValueError(
                    "The model was not loaded from a folder, so it has no tokenizer: set "
                    "model.processor = QueritProcessor(tokenizer)."
                )
            self._processor = QueritProcessor.from_pretrained(self.name_or_path, **getattr(self, "_hub_kwargs", {}))
        return self._processor

    @processor.setter
    def processor(self, processor: QueritProcessor) -> None:
        self._processor = processor


class QueritForSequenceRanking(QueritPreTrainedModel):
    """Relevance of (instruction, query, document) texts: `p = softmax(W h + b)` at `[CLS]`, score `p1 - p0`.

    Source: arXiv 2606.19037, section 3; the public reference is mteb's `QueritWrapper`.

    Example:
        ```python
        >>> model = QueritForSequenceRanking.from_pretrained(modeling_querit.default_model_path())
        >>> model.rank("who wrote Faust", ["Goethe finished Faust in 1831.", "A fist is a closed hand."], top_k=1)
        [RankedDocument(index=0, score=0.65, document='Goethe finished Faust in 1831.')]
        ```
    """

    def __init__(self, config: QueritConfig):
        super().__init__(config)
        if config.text_config._experts_implementation is None:
            config.text_config._experts_implementation = config._experts_implementation
        self.model = AutoModel.from_config(config.text_config)
        self.score = QueritHead(config.text_config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.FloatTensor | None = None,
        query_ids: torch.LongTensor | None = None,
        pack: Pack | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QueritOutput | tuple:
        """Score a batch of tokenized pairs, each ending in `[CLS]`.

        Args:
            input_ids: (batch, sequence); or `inputs_embeds`, (batch, sequence, hidden).
            attention_mask: (batch, sequence), 1 for tokens and 0 for padding on either side; or 4-D as the
                transformers attention functions take it: boolean (True = may attend) or additive,
                (batch, 1, sequence, sequence). Without one, every position is a token.
            position_ids: (batch, sequence). Counted from the first token by default, so padding moves no score.
            labels: (batch,), hard or continuous, together with `query_ids`, (batch,), for the hinge loss.
            pack: How the pairs lie end to end in `input_ids` and `position_ids`, (1, tokens), without padding: from
                `plan_packs`, which knows both, so that they may be left out. The batch is then that of its pairs;
                nothing else can be given with it.
            **kwargs: handed to the backbone (`output_hidden_states`, ...).

        Returns:
            [`QueritOutput`], or a tuple with `return_dict=False`.
        """
        if labels is not None and query_ids is None:
            raise ValueError("labels need query_ids, (batch,): the loss compares the documents of one query.")
        hidden_states = attentions = None
        if pack is not None:
            others = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds} | kwargs
            last_states = self._read_pack(pack, input_ids, position_ids, others)
        else:
            outputs, is_token = self._decode(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
            last_states = last_token(outputs.last_hidden_state, is_token)
            hidden_states, attentions = outputs.hidden_states, outputs.attentions
        logits = self.score(last_states)
        # p1 - p0 as tanh: the same number, without the cancellation of two nearly equal probabilities.
        score = torch.tanh((logits[:, 1:] - logits[:, :1]) / 2)
        loss = None
        if labels is not None:
            loss = pairwise_hinge_loss(score.squeeze(-1), labels, query_ids, self.config.margin_scale)
        output = QueritOutput(
            loss=loss,
            logits=self._public_logits(logits),
            score=score,
            hidden_states=hidden_states,
            attentions=attentions,
        )
        return output if return_dict in (None, True) else output.to_tuple()

    def _decode(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        **kwargs: Any,
    ) -> tuple[Any, torch.Tensor | None]:
        """What the backbone returns, and which positions are tokens, (batch, sequence); None: all."""
        batch_size = len(input_ids if inputs_embeds is None else inputs_embeds)
        attention_mask, is_token = prepare_mask(attention_mask, batch_size, self.dtype)
        if position_ids is None and is_token is not None:
            position_ids = (is_token.cumsum(-1) - 1).clamp(min=0)
        kwargs.setdefault("use_cache", False)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return outputs, is_token

    def _read_pack(
        self,
        pack: Pack,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        others: dict[str, Any],
    ) -> torch.Tensor:
        given = [name for name, value in others.items() if value is not None and value is not False]
        if given or pack.carried:
            raise ValueError(f"A pack goes with nothing but input_ids, not with {(given or ['carried states'])[0]}.")
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        inputs = {name: ids for name, ids in inputs.items() if ids is not None}
        for name, ids in inputs.items():
            if ids.shape != (1, len(pack)):
                raise ValueError(
                    f"{name} has shape {tuple(ids.shape)}, but the pack has {len(pack)} tokens in one row."
                )
        if len(inputs) < 2:
            inputs = inputs_of(pack, self.device) | inputs
        if not attends_plainly(self.model):
            raise CannotPack("no plain attention")
        if self.training and self._repeats_blindly:
            raise ValueError("Packs need gradient checkpointing with use_reentrant=False.")
        config, layers = self.model.config, getattr(self.model, "layers", None)
        # A layer that is computed once more in the backward pass has to do then what it did before.
        is_repeated = self.training and layers and getattr(layers[-1], "gradient_checkpointing", False)
        with exclusive(self):
            run = Run(pack, {}, config._attn_implementation, None if is_repeated else config.num_hidden_layers - 1)
            return read_pack(self, run, **inputs)

    def _public_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def rank(
        self,
        query: str,
        documents: Iterable[Document],
        instruction: str | None = None,
        top_k: int | None = None,
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[RankedDocument]:
        """Documents in order of relevance, best first; equal scores keep the given order.

        Pairs go through the model end to end, without padding, what they begin with only once; in bfloat16 on a CPU
        that is slow at it, arithmetic is in float32. With `top_k`, documents are read as they are scored, and no more
        are held in memory than a few batches.

        Args:
            query: What is searched for.
            documents: Strings or `{"title": ..., "text": ...}`; any iterable.
            instruction: The task in one sentence; by default the one the model was trained with.
            top_k: How many to return, at least 1; all by default.
            max_length: Tokens a pair may have, `[CLS]` included; longer documents are cut at their end.
            batch_tokens: Tokens of one forward pass: what bounds the memory. By default 2,048 for a dense model on a
                CPU and 8,192 otherwise. Where memory runs out, it is halved.
            show_progress_bar: By default only on a terminal and where it takes more than two seconds.

        Returns:
            `RankedDocument(index, score, document)` tuples; `index` is the place in `documents`.

        Raises:
            TypeError: if the query or a document is not text.
            ValueError: if `top_k` is below 1, or a score is NaN or infinite.
        """
        return rank_documents(
            self,
            query,
            documents,
            instruction=instruction,
            top_k=top_k,
            max_length=max_length,
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
        )

    def predict(
        self,
        pairs: Iterable[tuple[str, Document]],
        instruction: str | None = None,
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> torch.Tensor:
        """Scores of (query, document) pairs, float32 on the CPU, (pairs,), in [-1, 1]; arguments as in `rank`."""
        return score_pairs(
            self,
            pairs,
            instruction=instruction,
            max_length=max_length,
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
        )

    def predict_stream(
        self,
        pairs: Iterable[tuple[str, Document]],
        instruction: str | None = None,
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Iterator[float]:
        """`predict` for any number of pairs: scores come out, in order, while pairs are read.

        Example:
            ```python
            >>> documents = (line.rstrip() for line in open("documents.txt"))
            >>> for score in model.predict_stream(("who wrote Faust", document) for document in documents):
            ...     print(score)
            ```
        """
        scored = score_stream(
            self,
            pairs,
            instruction=instruction,
            max_length=max_length,
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
        )
        return (score for _, score in scored)


class QueritForSequenceClassification(QueritForSequenceRanking):
    """The same weights with one logit, `(z1 - z0) / 2`, whose tanh is the score.

    For sentence-transformers' CrossEncoder, which takes template and tanh from the folder; a plain text-classification
    pipeline knows neither.
    """

    def _public_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, 1:] - logits[:, :1]) / 2


def _sparing_the_head(quantization_config: Any) -> Any:
    """The same, but for the head: its two rows take no time, and decide the score."""
    spared = getattr(quantization_config, "modules_to_not_convert", None) or []
    if hasattr(quantization_config, "modules_to_not_convert") and "score" not in spared:
        quantization_config = copy.copy(quantization_config)
        quantization_config.modules_to_not_convert = [*spared, "score"]
    return quantization_config


def _check_loaded(name: Any, info: dict[str, Any], may_mismatch: bool) -> None:
    """Raise unless every weight came from the checkpoint: a freshly initialised head would rank at random."""
    if info["mismatched_keys"] and not may_mismatch:
        key, *shapes = sorted(info["mismatched_keys"], key=str)[0]
        raise ValueError(
            f"{name}: {key} has shape {tuple(shapes[0])} in the checkpoint, but this model needs "
            f"{tuple(shapes[1])}; is config.json that of these weights, with a head of two labels?"
        )
    if info["missing_keys"]:
        missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        raise ValueError(
            f"{name}: no weight for {_few(missing)} in the checkpoint"
            + (f", while it holds {_few(unused)} that the model has no use for" if unused else "")
            + ". A reranker is not loaded with weights left at their initial value; to start training from a plain "
            "decoder use modeling_querit.from_backbone."
        )


def _missing_experts(name: str | os.PathLike) -> list[str]:
    """Keys of single experts that a local checkpoint lacks, while it has others of their layer."""
    keys: set[str] = set()
    for path in Path(name).glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            keys.update(tensors.keys())
    found = [match.groups() for match in map(_EXPERT_KEY.fullmatch, keys) if match]
    layers, experts = {layer for layer, _, _ in found}, {int(expert) for _, expert, _ in found}
    wanted = itertools.product(layers, range(max(experts, default=-1) + 1), {part for _, _, part in found})
    return sorted({f"{layer}.{expert}.{part}" for layer, expert, part in wanted} - keys)


def _few(keys: list[str], limit: int = 3) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
