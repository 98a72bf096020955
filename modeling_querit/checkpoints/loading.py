"""Loading models by name: the mini, its backbone, folders and repositories."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import PreTrainedConfig, TorchAoConfig
from transformers.utils import is_torchao_available

from ..configuration_querit import QueritConfig
from ..modeling_querit import QueritForSequenceRanking
from ..validation_querit import CONFIG_FILE, check_config, read_json_object
from .backbone import check_decoder, from_backbone
from .mini import BASE_NAME, MINI_NAME, base_model, check_mini_package, default_model_path


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    int8: bool = False,
    device: str | torch.device | None = None,
    *,
    may_be_untrained: bool = False,
) -> QueritForSequenceRanking:
    """Load a trained reranker.

    Args:
        name: "mini", or a folder or repository in Querit's or the published layout.
        dtype: Data type of the weights; "auto" is that of the checkpoint.
        int8: Whether linear layers (except experts and head) compute in int8, by torchao: weights are quantized by
            output channel, activations by token. For CPUs.
        device: Device to move the model to; by default it stays on the CPU.
        may_be_untrained: Whether the head may score all pairs alike, as that of a model to train.

    Raises:
        OSError: if there is no such model.
        ValueError: if the checkpoint lacks a weight, its tokenizer is broken, or its head is untrained.
        ModuleNotFoundError: if `int8` is set and torchao is not installed.
    """
    check_local_path(str(name))
    path = default_model_path() if name == MINI_NAME else name
    quantization_config = int8_config() if int8 else None
    try:
        model = QueritForSequenceRanking.from_pretrained(path, dtype=dtype, quantization_config=quantization_config)
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise unreachable(str(path), error) from error
    _ = model.processor
    if not may_be_untrained:
        check_head(model.score.weight, str(name))
    return model if device is None else model.to(device)


def check_head(weight: torch.Tensor, name: str) -> None:
    """Check that a head was trained.

    Args:
        weight: Weight of the head, (2, hidden).
        name: Name of the model, for the error message.

    Raises:
        ValueError: if its rows are equal, so that it scores all pairs alike.
    """
    if torch.equal(*weight.float()):
        raise ValueError(
            f"The head of {name} was never trained: the rows of score.weight are equal, and so all scores are."
        )


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
        return load_model(name, dtype, may_be_untrained=True)
    return from_backbone(name, dtype=dtype)


def is_reranker(name: str | os.PathLike[str]) -> bool:
    """Whether a folder or repository holds a reranker (in Querit's or the published layout), not a plain decoder."""
    config = _read_config(name)
    # The config of a published checkpoint names a class that transformers does not have.
    unknown_classes = [cls for cls in config.get("architectures") or [] if not hasattr(transformers, cls)]
    return config.get("model_type") == QueritConfig.model_type or bool(unknown_classes)


def _read_config(name: str | os.PathLike[str]) -> dict[str, Any]:
    place = Path(name) / CONFIG_FILE
    config = read_json_object(place) if Path(name).is_dir() else PreTrainedConfig.get_config_dict(name)[0]
    check_config(config, place)
    return config


def check_for_training(name: str | os.PathLike[str]) -> None:
    """Check a model's folder before anything is read or written for its training; other names pass.

    Raises:
        OSError, ValueError: as in `load_for_training`.
    """
    if not Path(name).is_dir():
        return
    if not is_reranker(name):
        check_decoder(name)
        return
    check_folder(Path(name))


def check_folder(folder: Path) -> None:
    """Check the config, weights and tokenizer of a reranker's folder without loading it.

    Raises:
        OSError, ValueError: if the folder does not load.
    """
    _ = QueritForSequenceRanking.from_pretrained(folder, device_map="meta").processor


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


def unreachable(name: str, error: Exception) -> OSError:
    """The error for a model that is neither a folder nor a repository that could be read, with the reason in a line."""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return OSError(f"{name} is not a folder, and not a repository that could be reached: {reason}")


def check_available(name: str) -> None:
    """Check that a model can be had, without loading it: that its folder, package or repository is there.

    Raises:
        FileNotFoundError: if there is no such folder or repository.
        ModuleNotFoundError: if the package of the mini or its backbone is not installed.
        OSError: if the Hub cannot be reached, and the repository is not in its cache.
    """
    if name in (MINI_NAME, BASE_NAME):
        check_mini_package()
        return
    check_local_path(name)
    if Path(name).is_dir():
        return
    try:
        hf_hub_download(name, "config.json")
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        # Some models of sentence-transformers have their config elsewhere.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return
        raise unreachable(name, error) from error
