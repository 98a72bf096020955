"""Which checkpoints can be merged: one architecture, one vocabulary, the same tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoints.checkpoint import Checkpoint
from ..files import sha256

# Settings that may differ between the configs of one architecture.
_IGNORED_SETTINGS = {
    *PreTrainedConfig().to_dict().keys() - {"model_type", "is_encoder_decoder"},
    *("torch_dtype", "use_cache", "_attn_implementation", "output_router_logits", "pretraining_tp"),
    *("initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
}


def check_compatible(checkpoints: Sequence[Checkpoint]) -> None:
    """Check that checkpoints can be merged, each against the first; data types may differ.

    Raises:
        ValueError: if their architectures, chat templates, vocabularies, tensors or shapes differ; the message names
            the two models, and the setting, token or tensor.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        _check_configs(first, other)
        _check_tokenizers(first, other)
        _check_tensors(first, other)


def _check_configs(first: Checkpoint, other: Checkpoint) -> None:
    first_config, other_config = (checkpoint.model.config.text_config.to_dict() for checkpoint in (first, other))
    for key in sorted((first_config.keys() | other_config.keys()) - _IGNORED_SETTINGS):
        if first_config.get(key) != other_config.get(key):
            raise ValueError(
                f"{other.name} has {key} {other_config.get(key)!r}, {first.name} has {first_config.get(key)!r}: only "
                "models of one architecture can be merged."
            )


def _check_tokenizers(first: Checkpoint, other: Checkpoint) -> None:
    if first.chat_template != other.chat_template:
        raise ValueError(
            f"{other.name} and {first.name} have different chat templates, so they expect different texts: make "
            "chat_template.jinja the same."
        )
    if first.tokenizer and other.tokenizer and sha256(first.tokenizer[0]) == sha256(other.tokenizer[0]):
        return
    tokenizers = [checkpoint.model.processor.tokenizer for checkpoint in (first, other)]
    first_vocab, other_vocab = (tokenizer.get_vocab() for tokenizer in tokenizers)
    tokens = first_vocab.keys() | other_vocab.keys()
    if differing := sorted(token for token in tokens if first_vocab.get(token) != other_vocab.get(token)):
        token = differing[0]
        raise ValueError(
            f"{other.name} has another vocabulary than {first.name}: the id of {token!r} is {other_vocab.get(token)}, "
            f"not {first_vocab.get(token)}, and {len(differing) - 1} more tokens differ. Merging would mix up the rows "
            "of their embeddings."
        )
    first_rules, other_rules = (_splitting_rules(tokenizer) for tokenizer in tokenizers)
    if parts := [part for part in first_rules if first_rules[part] != other_rules[part]]:
        raise ValueError(
            f"The tokenizer of {other.name} has another {parts[0]} than that of {first.name}: they split texts "
            "differently."
        )


def _splitting_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Collect what decides how a text is split into tokens, besides the vocabulary."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "normalizer": spec["normalizer"],
        "pre_tokenizer": spec["pre_tokenizer"],
        "merges": spec["model"].get("merges"),
    }


def _check_tensors(first: Checkpoint, other: Checkpoint) -> None:
    for complete, lacking in ((first, other), (other, first)):
        if missing_keys := sorted(complete.tensors.keys() - lacking.tensors.keys()):
            raise ValueError(
                f"{lacking.name} lacks {missing_keys[0]} (and {len(missing_keys) - 1} more), which {complete.name} has."
            )
    for key, tensor in first.tensors.items():
        if other.tensors[key].shape != tensor.shape:
            raise ValueError(
                f"{key} has shape {other.tensors[key].shape} in {other.name}, but {tensor.shape} in {first.name}."
            )
