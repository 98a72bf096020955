"""Conversion between layouts: Querit's, the published one, and a plain sequence classifier of transformers."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ..cards import InheritedMetadata, dropped_calibration, seq_cls_card, stub_card
from ..configuration_querit import ACTIVATION
from ..files import atomic_folder, check_destination, scratch_folder
from ..processing_querit import QueritProcessor
from ..saving_querit import SENTENCE_TRANSFORMERS_FILES, write_code_files
from ..validation_querit import CONFIG_FILE, read_json_object
from .backbone import check_decoder
from .checkpoint import Checkpoint, check_trained, open_checkpoint
from .loading import check_folder, is_reranker
from .safetensors_io import InMemoryTensor, LazyTensor, copy_weights, parse_dtype

StrPath = str | os.PathLike[str]


def convert_to_querit(source: StrPath, destination: StrPath, dtype: str = "auto") -> Path:
    """Write a checkpoint in Querit's layout, as `save_pretrained` does; an adapter is merged into its base model.

    Weights are streamed from file to file. The folder is written atomically: it appears complete, or not at all.

    Args:
        source: "mini", a folder in any layout, a repository or a LoRA adapter.
        destination: Folder that does not exist yet, or is empty.
        dtype: Data type of the written weights: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".

    Returns:
        The destination, as an absolute path.

    Raises:
        OSError: if the destination is not empty or cannot be written, or there is no such source.
        ValueError: if the checkpoint lacks a weight, or its tokenizer lacks `[CLS]`.

    Example:
        ```python
        >>> convert_to_querit("Querit/Querit-4B", "querit-4b").name
        'querit-4b'
        ```
    """
    return _convert(source, destination, dtype, _write_querit)


def convert_to_published(source: StrPath, destination: StrPath, dtype: str = "auto") -> Path:
    """Write a checkpoint in the layout of the first release, for code that was written for it.

    That is the flat config of the backbone, naming a class that transformers does not have (`MLQwen3Model`), the head
    as `head.weight` and `head.bias`, the tokenizer, and nothing else.

    Args:
        source: Checkpoint to convert, as in `convert_to_querit`.
        destination: New folder, as in `convert_to_querit`.
        dtype: Data type of the written weights, as in `convert_to_querit`.

    Raises:
        OSError, ValueError: as in `convert_to_querit`.
    """
    return _convert(source, destination, dtype, _write_published)


def convert_to_seq_cls(source: StrPath, destination: StrPath, dtype: str = "auto") -> Path:
    """Write a checkpoint as a one-label classifier of transformers, such as `Qwen3ForSequenceClassification`.

    Its logit is `(z1 - z0) / 2`, whose tanh is the score: `score.weight = (w1 - w0) / 2`, `score.bias = (b1 - b0) / 2`,
    both in float32, in which vLLM computes them whatever the other weights are in. vLLM adds the bias; transformers has
    no place for one, so its logits lack that constant and the order stays the same. The chat template formats the text
    of a pair, with the roles `query` and `document`.

    Args:
        source: Checkpoint to convert, as in `convert_to_querit`.
        destination: New folder, as in `convert_to_querit`.
        dtype: Data type of the weights other than the head, as in `convert_to_querit`.

    Raises:
        OSError: as in `convert_to_querit`.
        ValueError: if transformers has no such classifier for the architecture, the checkpoint is damaged, or its head
            is untrained.

    Example:
        ```python
        >>> convert_to_seq_cls("querit-4b", "querit-4b-seq-cls").name
        'querit-4b-seq-cls'
        ```
    """
    return _convert(source, destination, dtype, _write_seq_cls)


# Layout -> function that converts to it.
LAYOUTS: dict[str, Callable[..., Path]] = {
    "querit": convert_to_querit,
    "published": convert_to_published,
    "seq-cls": convert_to_seq_cls,
}


def _convert(
    source: StrPath,
    destination: StrPath,
    dtype: str,
    write: Callable[[Checkpoint, Path, torch.dtype | None], None],
) -> Path:
    destination, wanted_dtype = check_destination(destination), parse_dtype(dtype)
    with atomic_folder(destination) as folder:
        checkpoint = open_checkpoint(str(source), scratch_folder(folder))
        check_trained(checkpoint)
        write(checkpoint, folder, wanted_dtype)
        _check_written(folder)
    return destination


def _check_written(folder: Path) -> None:
    """Load what was written once, to the meta device: config, every weight and the tokenizer.

    Raises:
        OSError, ValueError: if it does not load.
    """
    if is_reranker(folder):
        check_folder(folder)
        return
    content = read_json_object(folder / CONFIG_FILE)
    check_decoder(folder, AutoModelForSequenceClassification.from_config)
    processor = QueritProcessor.from_pretrained(folder)
    processor.check_fits(content["vocab_size"], folder)


def _write_querit(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    copy_weights(folder, checkpoint.tensors, dtype)
    config = copy.deepcopy(checkpoint.model.config)
    config.dtype = config.text_config.dtype = dtype or checkpoint.tensors["score.weight"].dtype
    config.save_pretrained(folder)
    _write_inherited(checkpoint, folder)
    write_code_files(checkpoint.model, folder)
    checkpoint.write_tokenizer(folder)


def _write_inherited(checkpoint: Checkpoint, folder: Path, note: str = "") -> None:
    """Write a card with what the checkpoint passes on and a note, and its licence and notice files, if there is one."""
    if checkpoint.inherited != InheritedMetadata() or note:
        card = stub_card(folder.name, checkpoint.inherited) + note
        (folder / "README.md").write_text(card, encoding="utf-8")
        checkpoint.inherited.write(folder)


def _write_published(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    tensors = {
        f"head.{key.removeprefix('score.')}" if key.startswith("score.") else key: tensor
        for key, tensor in checkpoint.tensors.items()
    }
    copy_weights(folder, tensors, dtype)
    model = checkpoint.model
    config = model.config.text_config.to_dict() | {
        "architectures": [f"ML{type(model.model).__name__}"],
        "dtype": _dtype_name(dtype or checkpoint.tensors["score.weight"].dtype),
    }
    _write_config(config, folder)
    model.processor.generic_tokenizer().save_pretrained(folder)
    _write_inherited(checkpoint, folder, dropped_calibration([model.config]))


def _write_seq_cls(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    architecture = _classifier_of(checkpoint)
    head = _fold_head(checkpoint.tensors)
    copy_weights(folder, checkpoint.tensors | head, dtype, keep_dtype=head)
    _write_config(_seq_cls_config(checkpoint, architecture, dtype or checkpoint.tensors["score.weight"].dtype), folder)
    for name, content in SENTENCE_TRANSFORMERS_FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    bias = head["score.bias"].tensor.item()
    card = seq_cls_card(folder.name, architecture, checkpoint.name, bias, checkpoint.inherited)
    card += dropped_calibration([checkpoint.model.config])
    (folder / "README.md").write_text(card, encoding="utf-8")
    checkpoint.inherited.write(folder)
    _write_tokenizer_with_code(checkpoint.model.processor, folder)


def _write_tokenizer_with_code(processor: QueritProcessor, folder: Path) -> None:
    """Write a tokenizer that any runtime loads for single texts, and with `trust_remote_code` for pairs, too."""
    processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_json_object(path) | {"tokenizer_class": PreTrainedTokenizerFast.__name__}
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _classifier_of(checkpoint: Checkpoint) -> str:
    """Name the classifier of transformers that applies a linear head called `score` to the last token.

    Raises:
        ValueError: if there is none for the architecture.
    """
    model_type = checkpoint.model.config.text_config.model_type
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    classifier = getattr(transformers, name, None) if isinstance(name, str) else None
    if classifier is None or not issubclass(classifier, GenericForSequenceClassification):
        raise ValueError(
            f"{checkpoint.name} cannot be converted: transformers has no last-token classifier for {model_type}."
        )
    return classifier.__name__


def _fold_head(tensors: Mapping[str, LazyTensor]) -> dict[str, InMemoryTensor]:
    """Fold the head's two logits into one, `(z1 - z0) / 2`, in float32."""
    folded = {}
    for key in ("score.weight", "score.bias"):
        rows = tensors[key].read(slice(0, 2)).double()  # (2, hidden) or (2,)
        folded[key] = InMemoryTensor(((rows[1:] - rows[:1]) / 2).float())
    return folded


def _seq_cls_config(checkpoint: Checkpoint, architecture: str, dtype: torch.dtype) -> dict[str, Any]:
    processor = checkpoint.model.processor
    # The written tokenizer has a padding token even if the model's own has none.
    pad_token_id = processor.portable_tokenizer().pad_token_id
    if pad_token_id == processor.cls_token_id:
        # Any other id will do: padding is on the left, and no text ends in it.
        pad_token_id = int(processor.cls_token_id == 0)
    # vLLM derives its classifier from the causal LM of that name, transformers from the model type. For Gemma 3's text
    # model, vLLM has Gemma3ForCausalLM, but no Gemma3TextForCausalLM.
    text_config = checkpoint.model.config.text_config
    causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text_config.model_type, architecture)
    return text_config.to_dict() | {
        "architectures": [causal_lm.replace("ForCausalLM", "ForSequenceClassification")],
        "dtype": _dtype_name(dtype),
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        # transformers finds the last token of a text by it.
        "pad_token_id": pad_token_id,
        "sentence_transformers": {"activation_fn": ACTIVATION},
        # A classifier reads every text once: keys and values need not be kept, and torch.export cannot return them.
        "use_cache": False,
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_config(config: Mapping[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
