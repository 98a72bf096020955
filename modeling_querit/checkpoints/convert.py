"""From a published checkpoint to the one folder that every runtime loads, and back."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

from ..folder_querit import write_code_files
from .parents import open_parent
from .streaming import copy_weights, dtype_named
from .writing import check_new, room_beside, whole_folder


def convert_checkpoint(source: str | os.PathLike, destination: str | os.PathLike, dtype: str = "auto") -> Path:
    """Write a checkpoint, in any layout that `from_pretrained` understands, or an adapter, as `save_pretrained` does.

    Weights go from file to file in parts. The folder is written aside and then renamed: it is whole, or not there.

    Args:
        source: "mini", a folder, a repository or a LoRA adapter.
        destination: A folder that does not exist yet, or is empty.
        dtype: Of the weights; "auto" keeps the checkpoint's.

    Raises:
        OSError: if there is something at the destination, it cannot be written, or there is no such source.
        ValueError: if the checkpoint lacks a weight, or its tokenizer `[CLS]`.

    Example:
        ```python
        >>> convert_checkpoint("Querit/Querit-4B", "querit-4b")
        PosixPath('querit-4b')
        ```
    """
    destination, wanted = check_new(destination), dtype_named(dtype)
    with whole_folder(destination) as folder:
        parent = open_parent(str(source), room_beside(folder))
        copy_weights(folder, parent.tensors, wanted)
        config = copy.deepcopy(parent.model.config)
        config.dtype = config.text_config.dtype = wanted or parent.tensors["score.weight"].dtype
        config.save_pretrained(folder)
        write_code_files(parent.model, folder)
        parent.write_tokenizer(folder)
    return destination


def publish_checkpoint(source: str | os.PathLike, destination: str | os.PathLike, dtype: str = "auto") -> Path:
    """Write a checkpoint as the first release was laid out: for code that was written for that.

    That is the backbone's flat config, which names a class that transformers does not have (`MLQwen3Model`), the head
    as `head.weight` and `head.bias`, the tokenizer, and nothing else. Weights go from file to file in parts.

    Args:
        source: As in `open_parent`.
        destination: A folder that does not exist yet, or is empty.
        dtype: Of the weights; "auto" keeps the checkpoint's.

    Raises:
        OSError, ValueError: as `convert_checkpoint`.
    """
    destination, wanted = check_new(destination), dtype_named(dtype)
    with whole_folder(destination) as folder:
        parent = open_parent(str(source), room_beside(folder))
        heads = {key: f"head.{key.removeprefix('score.')}" for key in parent.tensors if key.startswith("score.")}
        copy_weights(folder, {heads.get(key, key): tensor for key, tensor in parent.tensors.items()}, wanted)
        model = parent.model
        config = model.config.text_config.to_dict() | {
            "architectures": [f"ML{type(model.model).__name__}"],
            "dtype": str(wanted or parent.tensors["score.weight"].dtype).removeprefix("torch."),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        model.processor.tokenizer.save_pretrained(folder)
    return destination
