"""Models by name: the ones this package knows, folders and repositories."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig

from ..configuration_querit import QueritConfig
from ..modeling_querit import QueritForSequenceRanking
from .backbone import from_backbone
from .mini import BASE_NAME, MINI_NAME, base_model, default_model_path


def load_model(name: str | os.PathLike, dtype: torch.dtype | str = "auto") -> QueritForSequenceRanking:
    """A trained reranker: `"mini"`, the default model, or a folder or repository, in our layout or as published.

    Raises:
        OSError: if there is no such model.
        ValueError: if the checkpoint lacks a weight.
    """
    path = default_model_path() if name == MINI_NAME else name
    try:
        return QueritForSequenceRanking.from_pretrained(path, dtype=dtype)
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise OSError(f"{path} is no folder, and no repository that could be reached: {error}") from error


def load_for_training(name: str | os.PathLike, dtype: torch.dtype = torch.float32) -> QueritForSequenceRanking:
    """A reranker to go on training, or a plain decoder with a new head, at zero."""
    if name == BASE_NAME:
        return base_model(dtype)
    if name == MINI_NAME or _is_reranker(name):
        return load_model(name, dtype)
    return from_backbone(name, dtype=dtype)


def _is_reranker(name: str | os.PathLike) -> bool:
    config, _ = PreTrainedConfig.get_config_dict(name)
    # Published checkpoints name a class of their own, which transformers does not have.
    published = [each for each in config.get("architectures") or [] if not hasattr(transformers, each)]
    return config.get("model_type") == QueritConfig.model_type or bool(published)
