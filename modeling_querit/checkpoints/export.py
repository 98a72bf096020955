"""Rerankers for servers that run none of our code: sequence classifiers of transformers, with one label."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ..configuration_querit import ACTIVATION
from ..folder_querit import SENTENCE_TRANSFORMERS_FILES
from .cards import exported_card
from .parents import Parent, check_trained, open_parent
from .streaming import HeldTensor, LazyTensor, copy_weights, dtype_named
from .writing import check_new, room_beside, whole_folder


def export_classifier(source: str | os.PathLike, destination: str | os.PathLike, dtype: str = "auto") -> Path:
    """Write a reranker as `Qwen3ForSequenceClassification`, or what its architecture has, with one label.

    Its logit is `(z1 - z0) / 2`, whose tanh is the score: `score.weight = (w1 - w0) / 2`, `score.bias = (b1 - b0) / 2`,
    both in float32, as vLLM computes them, whatever the other weights are in. vLLM reads the bias; transformers has no
    place for one, and gives logits that are smaller by it, all alike: the same order. The text of a pair is written by
    the chat template, with roles `query` and `document`.

    Args:
        source: "mini", a folder, a repository or a LoRA adapter.
        destination: A folder that does not exist yet, or is empty.
        dtype: Of the weights but the head: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".

    Raises:
        OSError: if there is something at the destination, it cannot be written, or there is no such source.
        ValueError: if transformers has no such classifier for the architecture, or the checkpoint is damaged or has
            an untrained head.

    Example:
        ```python
        >>> export_classifier("querit-4b", "querit-4b-seq-cls").name
        'querit-4b-seq-cls'
        ```
    """
    destination, wanted = check_new(destination), dtype_named(dtype)
    with whole_folder(destination) as folder:
        parent = open_parent(str(source), room_beside(folder))
        architecture = _classifier_of(parent)
        check_trained(parent)
        head = _one_logit(parent.tensors)
        copy_weights(folder, dict(parent.tensors) | head, wanted, kept=head)
        config = _config_of(parent, architecture, str(wanted or parent.tensors["score.weight"].dtype))
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, content in SENTENCE_TRANSFORMERS_FILES.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        bias = head["score.bias"].tensor.item()
        card = exported_card(destination.name, architecture, parent.name, bias)
        (folder / "README.md").write_text(card, encoding="utf-8")
        parent.model.processor.save_pretrained(folder)
    return destination


EXPORTS: dict[str, Callable[..., Path]] = {"seq-cls": export_classifier}


def _classifier_of(parent: Parent) -> str:
    """The name of transformers' classifier, if it reads the last token by a linear head called `score`."""
    model_type = parent.model.config.text_config.model_type
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if found is None or not issubclass(found, GenericForSequenceClassification):
        raise ValueError(
            f"transformers has no classifier by the last token for {model_type}, so {parent.name} has none."
        )
    return found.__name__


def _one_logit(tensors: Mapping[str, LazyTensor]) -> dict[str, HeldTensor]:
    folded = {}
    for key in ("score.weight", "score.bias"):
        both = tensors[key].read(slice(0, 2))
        folded[key] = HeldTensor(((both[1:].double() - both[:1].double()) / 2).float())
    return folded


def _config_of(parent: Parent, architecture: str, dtype: str) -> dict[str, Any]:
    processor = parent.model.processor
    # As it is written, with a padding token even if the model's own tokenizer has none.
    pad_token_id = processor.portable_tokenizer().pad_token_id
    if pad_token_id == processor.cls_token_id:
        # Any other will do: padding is on the left, and no text ends in it.
        pad_token_id = int(processor.cls_token_id == 0)
    # vLLM makes its classifier of the causal LM of that name, transformers goes by the model type: for Gemma 3's text
    # model, vLLM has a Gemma3ForCausalLM and no Gemma3TextForCausalLM.
    text_config = parent.model.config.text_config
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text_config.model_type, architecture)
    return text_config.to_dict() | {
        "architectures": [causal.replace("ForCausalLM", "ForSequenceClassification")],
        "dtype": dtype.removeprefix("torch."),
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        # By which transformers tells where a text ends.
        "pad_token_id": pad_token_id,
        "sentence_transformers": {"activation_fn": ACTIVATION},
    }
