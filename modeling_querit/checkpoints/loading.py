"""Models by name: the ones this package knows, folders and repositories."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, TorchAoConfig
from transformers.utils import is_torchao_available

from ..configuration_querit import QueritConfig
from ..modeling_querit import QueritForSequenceRanking
from .backbone import from_backbone
from .mini import BASE_NAME, MINI_NAME, base_model, default_model_path


def load_model(
    name: str | os.PathLike, dtype: torch.dtype | str = "auto", int8: bool = False
) -> QueritForSequenceRanking:
    """A trained reranker: `"mini"`, the default model, or a folder or repository, in our layout or as published.

    Args:
        name: Of the model.
        dtype: Of its weights; by default that of the checkpoint.
        int8: Whether its linear layers (not the experts, not the head) compute in int8, by torchao: weights by output
            channel, activations by token. For CPUs.

    Raises:
        OSError: if there is no such model.
        ValueError: if the checkpoint lacks a weight.
        ModuleNotFoundError: if `int8` is asked for without torchao.
    """
    path = default_model_path() if name == MINI_NAME else name
    quantization_config = int8_config() if int8 else None
    try:
        return QueritForSequenceRanking.from_pretrained(path, dtype=dtype, quantization_config=quantization_config)
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise OSError(f"{path} is no folder, and no repository that could be reached: {error}") from error


def int8_config() -> TorchAoConfig:
    """transformers' configuration for dynamic int8 of torchao."""
    if not is_torchao_available():
        raise ModuleNotFoundError("int8 needs torchao: pip install 'modeling-querit[int8]'.")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


def load_for_training(name: str | os.PathLike, dtype: torch.dtype = torch.float32) -> QueritForSequenceRanking:
    """A reranker to go on training, or a plain decoder with a new head, at zero."""
    if name == BASE_NAME:
        return base_model(dtype)
    if name == MINI_NAME or is_reranker(name):
        return load_model(name, dtype)
    return from_backbone(name, dtype=dtype)


def is_reranker(name: str | os.PathLike) -> bool:
    """Whether a folder or repository holds a reranker, in our layout or as published, and no plain decoder."""
    config, _ = PreTrainedConfig.get_config_dict(name)
    # Published checkpoints name a class of their own, which transformers does not have.
    published = [each for each in config.get("architectures") or [] if not hasattr(transformers, each)]
    return config.get("model_type") == QueritConfig.model_type or bool(published)
