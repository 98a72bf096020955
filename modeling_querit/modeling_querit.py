"""Querit rerankers: a decoder of transformers under a two-logit head, which reads the final `[CLS]`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, logging

from .configuration_querit import QueritConfig
from .earlier_copies_querit import make_room_for_earlier_copies
from .loss_querit import pairwise_hinge_loss
from .mixed_precision_querit import fastest_dtypes, mixed_precision_modes
from .moe_querit import EXPERTS_IMPLEMENTATION
from .multi_process_querit import ProcessPool
from .offloading_querit import execution_device
from .packed_attention_querit import KeyValueStates
from .packed_forward_querit import is_causal, run_packed
from .packing_querit import Pack
from .pair_encoding_querit import CLS_TOKEN, Pair
from .processing_querit import TOKENIZER_FILES, QueritProcessor
from .prompt_learning_querit import without_prompts
from .ranking_querit import RankedDocument, rank_documents, rank_documents_in_thread, score_stream, start_pool
from .saving_querit import (
    check_loaded,
    finish_weights,
    missing_experts,
    name_few,
    spare_head,
    write_card_stub,
    write_folder_files,
)
from .validation_querit import CONFIG_FILE, check_model, one_line, read_headers

logger = logging.get_logger(__name__)

make_room_for_earlier_copies()

# Arguments of `from_pretrained` that say where files of a repository come from.
_HUB_KWARGS = ("subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")
# Published checkpoints name the head `head`.
_PUBLISHED_KEYS = {r"^head\.": "score."}


@dataclass
class QueritOutput(ModelOutput):
    """Output of a Querit model.

    Args:
        loss: Pairwise hinge loss, a float32 scalar; only with `labels` and `query_ids`.
        logits: Logits in float32: (batch, 2) = [z0, z1] from the ranking model, (batch, 1) = (z1 - z0) / 2 from the
            classifier.
        score: Relevance score p1 - p0 in [-1, 1], as published, float32, (batch, 1).
        hidden_states: Hidden states of the backbone's layers, if asked for.
        attentions: Attention weights of the backbone's layers, if asked for.
        carried: Prefix KV cache for the next pack; only after a pack with a `carry_over`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    score: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    carried: KeyValueStates | None = None


class QueritHead(nn.Linear):
    """`W h + b` in float32, whatever the dtype of the weights, of `h` or of an enclosing autocast."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, hidden) in any dtype -> logits, (batch, 2), float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float(), self.bias.float())


class QueritPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of Querit models."""

    config_class = QueritConfig
    base_model_prefix = "model"
    # The loss is a mean over pairs: without this the Trainer would not divide it by the accumulation steps.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _processor: QueritProcessor | None = None
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"rotary_emb\.inv_freq$"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the source of this file, but the experts are the backbone's.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Check the requested implementation as transformers does; the default is ours."""
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, QueritHead):
            # Zero, not random: final hidden states are large, so a random head saturates p1 - p0, where the hinge has
            # no gradient. With a zero head every score starts at 0, where the slope is largest.
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Load a Querit folder or repository, in our layout or as published; see `PreTrainedModel.from_pretrained`.

        Published layouts: config.json of the backbone (`qwen3`, `deepseek_v3`), head as `head.weight` and
        `head.bias`, backbone keys with or without `model.`, one key per expert.

        Raises:
            ValueError: if a weight is missing from the checkpoint or has another shape; the message names the keys.
        """
        with_loading_info = kwargs.pop("output_loading_info", False)
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        key_mapping = _PUBLISHED_KEYS | (kwargs.pop("key_mapping", None) or {})
        if pretrained_model_name_or_path is None:
            raise ValueError(
                "There is no name of a model to load: if this is the base of an adapter, name it in its "
                "adapter_config.json, as base_model_name_or_path."
            )
        config: Any = None
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        is_checked = folder.is_dir() and not any(kwargs.get(name) for name in ("variant", "gguf_file", "state_dict"))
        if is_checked:
            config = kwargs.get("config")
            if not isinstance(config, QueritConfig):
                config = cls.config_class.from_pretrained(folder)
            # Whoever allows other shapes wants a config that is not that of the weights.
            read_headers(folder) if may_mismatch else check_model(folder, config, cls)
        # Everything is read at once, from the same place: the folder may be another one when pairs are ranked.
        processor = cls._read_processor(folder, config) if folder.is_dir() else None
        # Pickles may run code when they are loaded.
        kwargs.setdefault("use_safetensors", True)
        if (quantization := kwargs.get("quantization_config")) is not None:
            kwargs["quantization_config"] = spare_head(quantization)
        try:
            # Mismatched sizes are accepted here, so that our own error can name the key in one sentence.
            loaded: Any = super().from_pretrained(
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
            # transformers names no key if it cannot merge the experts of a layer.
            if missing := missing_experts(pretrained_model_name_or_path):
                raise ValueError(f"{pretrained_model_name_or_path}: no weight for {name_few(missing)}.") from error
            raise
        except (ImportError, TypeError, KeyError, AttributeError) as error:
            # A config that is checked builds a model: what is left is its quantization.
            if not is_checked or _quantization_of(config) is None:
                raise
            raise ValueError(
                f"{folder / CONFIG_FILE}: weights with this quantization_config cannot be loaded ({one_line(error)})."
            ) from error
        model, info = loaded
        check_loaded(pretrained_model_name_or_path, info, may_mismatch)
        model._save_under_own_keys()
        if not folder.is_dir():
            # Of the commit of these weights, which may not be the newest any more.
            commit = {"revision": getattr(model.config, "_commit_hash", None) or kwargs.get("revision")}
            hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs} | commit
            processor = cls._read_processor(pretrained_model_name_or_path, model.config, **hub_kwargs)
        model._processor = processor
        return (model, info) if with_loading_info else model

    @staticmethod
    def _read_processor(
        name_or_path: str | os.PathLike[str], config: QueritConfig | None, **kwargs: Any
    ) -> QueritProcessor | None:
        """Read the tokenizer beside the weights, and check that it fits; None if there is none."""
        is_folder = Path(name_or_path).is_dir()
        if is_folder and not any(Path(name_or_path, name).is_file() for name in TOKENIZER_FILES):
            return None
        try:
            processor = QueritProcessor.from_pretrained(name_or_path, **kwargs)
        except (OSError, ValueError) as error:
            # A repository is not looked through for files that it may lack.
            if is_folder:
                raise
            logger.warning(f"The model is loaded without a tokenizer, and cannot rank: {error}")
            return None
        if config is not None:
            processor.check_fits(config.text_config.vocab_size, name_or_path)
        return processor

    def _save_under_own_keys(self) -> None:
        """Drop the renaming of published keys, which `save_pretrained` would otherwise undo (`score` -> `head`)."""
        conversions = getattr(self, "_weight_conversions", None)
        if conversions:
            self._weight_conversions = [
                conversion
                for conversion in conversions
                if not set(_PUBLISHED_KEYS).intersection(getattr(conversion, "_original_source_patterns", ()))
            ]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write one folder that transformers, sentence-transformers and mteb load; see `PreTrainedModel`.

        Besides weights and config it holds the tokenizer with its chat template, the code files, the files of
        sentence-transformers, and a model card stub if there is no README.md yet. `push_to_hub` uploads the same.
        """
        is_main_process = kwargs.get("is_main_process", True)
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            write_folder_files(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)
        if is_main_process:
            finish_weights(save_directory)

    def _upload_modified_files(  # type: ignore[override]
        self, working_dir: Any, repo_id: str, files_timestamps: Any, **kwargs: Any
    ) -> Any:
        # By now transformers has replaced our card by its blank template, unless the repository has a card. It uploads
        # only files changed after a timestamp that it took once ours were written; without timestamps it uploads all.
        write_card_stub(working_dir, repo_id, over_template=True)
        finish_weights(working_dir)
        return super()._upload_modified_files(working_dir, repo_id, {}, **kwargs)

    @property
    def processor(self) -> QueritProcessor:
        """The processor saved beside the weights, read with them; assign one to a model built from a config."""
        processor = self._processor
        if processor is None:
            raise ValueError(
                f"{self.name_or_path or 'The model'} has no tokenizer: it was built from a config, or none was found "
                "beside its weights when they were loaded; set model.processor = QueritProcessor(tokenizer)."
            )
        return processor

    @processor.setter
    def processor(self, processor: QueritProcessor) -> None:
        self._processor = processor


class QueritForSequenceRanking(QueritPreTrainedModel):
    """Scores the relevance of a document to a query: `p = softmax(W h + b)` at `[CLS]`, score `p1 - p0`.

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
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        query_ids: torch.Tensor | None = None,
        pack: Pack | None = None,
        carried: KeyValueStates | None = None,
        prune_last_layer: bool = True,
        mixed_precision: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QueritOutput | tuple[Any, ...]:
        """Score a batch of tokenized pairs, each ending in `[CLS]`; or a pack of them.

        Args:
            input_ids: Token ids, (batch, sequence).
            attention_mask: Mask of the tokens, (batch, sequence), 1 for tokens and 0 for padding on either side; or
                4-D as the attention functions of transformers take it: boolean (True = may attend) or additive,
                (batch, 1, sequence, sequence). Without one, every position is a token.
            position_ids: Positions, (batch, sequence). Counted from the first token by default, so padding moves no
                score.
            inputs_embeds: Embeddings in place of `input_ids`, (batch, sequence, hidden).
            labels: Relevance labels for the hinge loss, (batch,), hard or continuous; need `query_ids`.
            query_ids: Index of the query that each pair belongs to, (batch,).
            pack: Pairs in one sequence without padding, from `plan_packs`; the batch is then that of its pairs.
                `input_ids` and `position_ids`, (1, tokens), may be left out, and nothing else describes the inputs.
            carried: Prefix KV cache, the field `carried` of the output for the previous pack; required if
                `pack.carried_length` > 0.
            prune_last_layer: Whether the last layer skips the positions of a pack that are not scored.
            mixed_precision: Whether to compute in the dtypes that are fastest on this processor, and int8 weights by
                `Int8Arithmetic`; differs from the model's own dtype by rounding.
            return_dict: Whether to return a `QueritOutput`, as by default, or a tuple.
            **kwargs: Further arguments of the backbone (`output_hidden_states`, ...).

        Returns:
            [`QueritOutput`], or a tuple with `return_dict=False`.

        Raises:
            PackingError: if packs cannot express the backbone's attention.
            ValueError: if the arguments do not go together, or a row of `input_ids` does not end in `[CLS]`.
        """
        if labels is not None and query_ids is None:
            raise ValueError("labels need query_ids, (batch,): the loss compares the documents of one query.")
        run_backbone = partial(self._run_backbone, mixed_precision=mixed_precision)
        hidden_states = attentions = None
        if pack is not None:
            _check_only_pack(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
            last_states, carried = run_packed(
                self.model,
                run_backbone,
                pack,
                **_pack_inputs(pack, input_ids, position_ids, execution_device(self)),
                carried=carried,
                prune_last_layer=prune_last_layer,
            )
        else:
            inputs = input_ids if inputs_embeds is None else inputs_embeds
            if inputs is None:
                raise ValueError("There are no inputs: give input_ids, inputs_embeds or a pack.")
            attention_mask, is_token = prepare_mask(attention_mask, inputs.shape[0], self.dtype, is_causal(self.model))
            if input_ids is not None and self._processor is not None:
                check_last_tokens(input_ids, is_token, self._processor.cls_token_id)
            if position_ids is None and is_token is not None:
                position_ids = (is_token.cumsum(-1) - 1).clamp(min=0)
            outputs = run_backbone(
                self.model,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
            last_states = last_token(outputs[0], is_token)
            hidden_states, attentions = outputs.hidden_states, outputs.attentions
        logits = self.score(last_states)  # (batch, 2)
        # p1 - p0 as tanh: the same number, without the cancellation of two nearly equal probabilities.
        score = torch.tanh((logits[:, 1:] - logits[:, :1]) / 2)  # (batch, 1)
        loss = None
        if labels is not None and query_ids is not None:
            loss = pairwise_hinge_loss(score.squeeze(-1), labels, query_ids, self.config.margin_scale)
        output = QueritOutput(
            loss=loss,
            logits=self._public_logits(logits),
            score=score,
            hidden_states=hidden_states,
            attentions=attentions,
            carried=carried or None,
        )
        return output if return_dict in (None, True) else output.to_tuple()

    def _run_backbone(
        self,
        backbone: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        mixed_precision: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        kwargs.setdefault("use_cache", False)
        if not mixed_precision:
            return backbone(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        dtypes = fastest_dtypes(execution_device(self), self.dtype)
        if dtypes.hidden_states != self.dtype:
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.get_input_embeddings()(input_ids), None
            inputs_embeds = inputs_embeds.to(dtypes.hidden_states)
        with mixed_precision_modes(dtypes, self.dtype, getattr(self, "is_quantized", False)):
            return backbone(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _public_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    @without_prompts
    def rank(
        self,
        query: str,
        documents: Iterable[Any],
        instruction: str | None = None,
        top_k: int | None = None,
        *,
        as_probability: bool = False,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
        device: Sequence[str | torch.device] | None = None,
        pool: ProcessPool | None = None,
    ) -> list[RankedDocument]:
        """Rank documents by relevance, best first; equal scores keep the given order.

        Pairs are packed without padding, and the prefix that they share is computed once; on CPUs that are slow at
        bfloat16, a bfloat16 model computes in float32. With `top_k`, documents are read as they are scored, and only a
        few batches of them are held in memory.

        Args:
            query: The search query.
            documents: Any iterable of strings, of mappings with a "text" and perhaps a "title" and an "id" or "_id", of
                (id, text) tuples, or of documents of LangChain, LlamaIndex, Haystack or rerankers.
            instruction: The task in one sentence; by default the one that the model was trained with.
            top_k: Number of documents to return, at least 1; all by default.
            as_probability: Whether scores are given as probabilities of relevance, in [0, 1]; needs a model that
                `querit calibrate` has calibrated. The order is the same.
            max_length: Maximum number of tokens in a pair, `[CLS]` included; longer documents are cut at their end.
            batch_tokens: Maximum number of tokens in a forward pass, which bounds the memory. By default 2,048 for a
                dense model on a CPU and 8,192 otherwise. If memory runs out, it is halved.
            show_progress_bar: Whether to show a progress bar; by default only on a terminal and after two seconds.
            device: Devices of processes that share the work, `["cuda:0", "cuda:1"]` or `["cpu"] * 4`; they are started
                for this call, which takes seconds. By default this process computes, where the model is.
            pool: Processes that are running already, from `start_multi_process_pool`.

        Returns:
            `RankedDocument(index, score, document)` tuples; `index` counts the given documents from 0, `document` is
            the given object, and the attribute `id` is its id, None if it has none.

        Raises:
            TypeError: if the query is not a string, or a document has no text.
            ValueError: if `top_k` is below 1, a score is NaN or infinite, the model is not calibrated, or the pool is
                not that of this model as it is now.
            RuntimeError: if a process was killed, or cannot use its device.
        """
        return rank_documents(
            self,
            query,
            documents,
            instruction=instruction,
            top_k=top_k,
            as_probability=as_probability,
            max_length=max_length,
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
            device=device,
            pool=pool,
        )

    @without_prompts
    async def arank(
        self,
        query: str,
        documents: Iterable[Any],
        instruction: str | None = None,
        top_k: int | None = None,
        **kwargs: Any,
    ) -> list[RankedDocument]:
        """Rank as `rank` does, with its arguments, in a thread: the event loop goes on meanwhile.

        If the task is cancelled, the thread ends after the forward pass that it is at.

        Example:
            ```python
            >>> rankings = await asyncio.gather(*(model.arank(query, documents) for query in queries))
            ```
        """
        return await rank_documents_in_thread(self, query, documents, instruction=instruction, top_k=top_k, **kwargs)

    @without_prompts
    def start_multi_process_pool(self, devices: Sequence[str | torch.device]) -> ProcessPool:
        """Start processes that `rank`, `predict` and `predict_stream` share their work out to, by `pool=`.

        They hold the model as it is now: with another tokenizer or other weights, start a new pool. On CPUs they share
        one copy of the weights, and this process's threads. A script needs `if __name__ == "__main__":`, since they are
        started by spawn.

        Args:
            devices: Device of each process: `["cuda:0", "cuda:1"]`, or `["cpu"] * 4`.

        Returns:
            The pool; it is a context manager, or ends with `stop_multi_process_pool`.

        Raises:
            TypeError: if `devices` is not a list of devices.
            ValueError: if a device is none, or the model cannot be sent to other processes.
            RuntimeError: if a process does not start, or cannot use its device.

        Example:
            ```python
            >>> with model.start_multi_process_pool(["cuda:0", "cuda:1"]) as pool:
            ...     for batch in batches:
            ...         scores = model.predict(batch, pool=pool)
            ```
        """
        return start_pool(self, devices)

    @staticmethod
    def stop_multi_process_pool(pool: ProcessPool) -> None:
        """End the processes of a pool."""
        pool.close()

    @without_prompts
    def predict(
        self,
        pairs: Iterable[Pair],
        instruction: str | None = None,
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
        device: Sequence[str | torch.device] | None = None,
        pool: ProcessPool | None = None,
    ) -> torch.Tensor:
        """Score (query, document) pairs: float32 on the CPU, (pairs,), in [-1, 1]; arguments as in `rank`."""
        scored = score_stream(
            self,
            pairs,
            instruction=instruction,
            max_length=max_length,
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
            device=device,
            pool=pool,
        )
        return torch.tensor([score for _, score in scored], dtype=torch.float32)

    @without_prompts
    def predict_stream(
        self,
        pairs: Iterable[Pair],
        instruction: str | None = None,
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
        device: Sequence[str | torch.device] | None = None,
        pool: ProcessPool | None = None,
    ) -> Iterator[float]:
        """Score any number of pairs; scores are yielded in order while pairs are read, arguments as in `rank`.

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
            device=device,
            pool=pool,
        )
        return (score for _, score in scored)


class QueritForSequenceClassification(QueritForSequenceRanking):
    """The same weights with one logit, `(z1 - z0) / 2`, whose tanh is the score.

    For CrossEncoder of sentence-transformers, which takes template and tanh from the folder, and for whatever takes
    classifiers of transformers; `pipeline("text-classification")` takes the score itself.
    """

    def _public_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, 1:] - logits[:, :1]) / 2


def _quantization_of(config: QueritConfig) -> Any:
    return getattr(config, "quantization_config", None) or getattr(config.text_config, "quantization_config", None)


def _check_only_pack(**others: Any) -> None:
    names = [name for name, value in others.items() if value is not None and value is not False]
    if names:
        raise ValueError(f"A pack goes with nothing but input_ids and position_ids: leave out {names[0]}.")


def _pack_inputs(
    pack: Pack, input_ids: torch.Tensor | None, position_ids: torch.Tensor | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """`input_ids` and `position_ids` of a pack, (1, tokens) each: as given, or from the pack."""
    tensors = {name: ids for name, ids in (("input_ids", input_ids), ("position_ids", position_ids)) if ids is not None}
    for name, ids in tensors.items():
        if ids.shape != (1, len(pack)):
            raise ValueError(
                f"{name} has shape {tuple(ids.shape)}, but the pack has {len(pack)} tokens: give (1, tokens)."
            )
    return tensors if len(tensors) == 2 else pack.to_tensors(device) | tensors


def prepare_mask(
    attention_mask: torch.Tensor | None, batch_size: int, dtype: torch.dtype, is_causal: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Turn a caller's mask into the backbone's, and find out which positions are tokens.

    Args:
        attention_mask: (batch, sequence), or (batch or 1, 1, sequence, sequence), boolean or additive; None for all.
        batch_size: Number of rows in the batch.
        dtype: Data type of the model, in which additive masks are made.
        is_causal: Whether the backbone's tokens attend to no later ones.

    Returns:
        The mask for the backbone, and booleans that tell tokens from padding, (batch, sequence); None: all tokens.

    Raises:
        ValueError: if the mask has another shape, or is causal for a backbone that attends in both directions.
    """
    if attention_mask is None:
        return None, None
    if attention_mask.dim() == 2:
        return attention_mask, attention_mask.bool()
    if attention_mask.dim() != 4 or attention_mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give (batch, sequence) or "
            "(batch, 1, sequence, sequence)."
        )
    if not attention_mask.is_floating_point():
        attention_mask = attention_mask.bool()
    is_boolean = attention_mask.dtype == torch.bool
    # A blocked position is written as the dtype's minimum, as -inf, -1e9 or -1e4; what is above is a bias.
    may_attend = attention_mask if is_boolean else attention_mask > -1e3
    is_biased = not is_boolean and bool((attention_mask[may_attend] != 0).any())
    may_attend = may_attend.expand(batch_size, -1, -1, -1)
    is_token = _linked_positions(may_attend[:, 0])
    plain = is_token[:, :, None] & is_token[:, None, :]  # (batch, sequence, sequence)
    if is_causal:
        plain = plain & torch.ones_like(plain[0]).tril()
    # Plain attention over the tokens, as the reference wrapper writes it, is what a 2-D mask says: with that the
    # backbone builds its own masks (sliding windows too) and its fastest kernels stay available.
    if not is_biased and torch.equal(may_attend[:, 0] & is_token[:, :, None], plain):
        return is_token.long(), is_token
    if not is_causal and not may_attend.triu(1).any():
        raise ValueError(
            "attention_mask is causal, but the backbone attends in both directions: give a mask of the tokens, "
            "(batch, sequence)."
        )
    if is_boolean:
        blocked = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
        attention_mask = blocked.masked_fill(~attention_mask, torch.finfo(dtype).min)
    return attention_mask, is_token


def check_last_tokens(input_ids: torch.Tensor, is_token: torch.Tensor | None, cls_token_id: int) -> None:
    """Check that the last token of each text is `[CLS]`, where the model reads its score.

    Args:
        input_ids: Token ids, (batch, sequence).
        is_token: Booleans that tell tokens from padding, (batch, sequence); None: all are tokens.
        cls_token_id: Id of `[CLS]`.

    Raises:
        ValueError: if it is not.
    """
    # A check of values cannot be part of a graph.
    if torch.compiler.is_compiling() or input_ids.device.type == "meta" or not input_ids.numel():
        return
    last = last_token(input_ids, is_token)
    is_wrong = last != cls_token_id
    if is_token is not None:
        is_wrong = is_wrong & is_token.any(-1).to(is_wrong.device)
    if is_wrong.any():
        row = int(is_wrong.nonzero()[0])
        raise ValueError(
            f"Row {row} of input_ids ends in token {int(last[row])}, not in {CLS_TOKEN}, where the score is read: give "
            "model.processor(queries, documents), or tokenizer(queries, documents) by the model's own tokenizer, which "
            "AutoTokenizer loads with trust_remote_code=True."
        )


def _linked_positions(may_attend: torch.Tensor) -> torch.Tensor:
    """Find positions that attend to themselves and that attend, or are attended to by, another one; (batch, sequence).

    Padding sometimes attends to itself, lest its row of the softmax be empty, but has nothing to do with the others.
    """
    itself = may_attend.diagonal(dim1=-2, dim2=-1)
    others = may_attend & ~torch.eye(may_attend.shape[-1], dtype=torch.bool, device=may_attend.device)
    is_linked = itself & (others.any(-1) | others.any(-2))
    # A text of one token is linked to nothing.
    return torch.where(is_linked.any(-1, keepdim=True), is_linked, itself)


def last_token(hidden_states: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
    """Return the state at the last token of each text, whichever side the padding is on: (batch, hidden)."""
    if is_token is None:
        return hidden_states[:, -1]
    positions = torch.arange(is_token.shape[1], device=is_token.device)
    last = torch.where(is_token, positions, 0).argmax(-1).to(hidden_states.device)
    return hidden_states[torch.arange(last.shape[0], device=hidden_states.device), last]
