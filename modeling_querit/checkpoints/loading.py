"""Loading models by name: the mini, its backbone, folders and repositories."""

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
    name: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    int8: bool = False,
    device: str | torch.device | None = None,
) -> QueritForSequenceRanking:
    """Load a trained reranker.

    Args:
        name: "mini", or a folder or repository in Querit's or the published layout.
        dtype: Data type of the weights; "auto" is that of the checkpoint.
        int8: Whether linear layers (except experts and head) compute in int8, by torchao: weights are quantized by
            output channel, activations by token. For CPUs.
        device: Device to move the model to; by default it stays on the CPU.

    Raises:
        OSError: if there is no such model.
        ValueError: if the checkpoint lacks a weight.
        ModuleNotFoundError: if `int8` is set and torchao is not installed.
    """
    path = default_model_path() if name == MINI_NAME else name
    quantization_config = int8_config() if int8 else None
    try:
        model = QueritForSequenceRanking.from_pretrained(path, dtype=dtype, quantization_config=quantization_config)
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise OSError(f"{path} is not a folder, and not a repository that could be reached: {error}") from error
    return model if device is None else model.to(device)


def int8_config() -> TorchAoConfig:
    """Configure torchao's dynamic int8 quantization for transformers."""
    if not is_torchao_available():
        raise ModuleNotFoundError("int8 needs torchao: pip install 'modeling-querit[int8]'.")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


def load_for_training(name: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> QueritForSequenceRanking:
    """Load a reranker to train further, or a plain decoder with a new head at zero.

    Args:
        name: "mini", its backbone "gemma3-270m", or a folder or repository.
        dtype: Data type of the weights.
    """
    if name == BASE_NAME:
        return base_model(dtype)
    if name == MINI_NAME or is_reranker(name):
        return load_model(name, dtype)
    return from_backbone(name, dtype=dtype)


def is_reranker(name: str | os.PathLike[str]) -> bool:
    """Whether a folder or repository holds a reranker (in Querit's or the published layout), not a plain decoder."""
    config, _ = PreTrainedConfig.get_config_dict(name)
    # The config of a published checkpoint names a class that transformers does not have.
    unknown_classes = [cls for cls in config.get("architectures") or [] if not hasattr(transformers, cls)]
    return config.get("model_type") == QueritConfig.model_type or bool(unknown_classes)


def default_device() -> str:
    """Name the device that models run on: "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_local_path(name: str) -> None:
    """Check that a name which looks like a path is a folder; otherwise it would be taken for a repository.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if name.startswith(("/", "./", "../")) and not Path(name).is_dir():
        raise FileNotFoundError(f"There is no folder {name}.")
