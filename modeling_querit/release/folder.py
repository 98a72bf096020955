"""What a folder must hold, and must not, before it may leave this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..checkpoints.streaming import is_finite, open_weights, row_slices
from ..configuration_querit import AUTO_MAP, QueritConfig
from ..folder_querit import CARD_STUB, SENTENCE_TRANSFORMERS_FILES

# More than this the Hub does not take in one file.
LARGEST_FILE = 50 * 10**9
# The format's own limit.
_LARGEST_HEADER = 100_000_000
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
# Their entries are words of the training text, paths and keys among them.
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a token of an organization": re.compile(r"\bapi_org_[A-Za-z0-9]{30,}"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "a GitLab token": re.compile(r"\bglpat-[\w-]{20,}"),
    "a Slack token": re.compile(r"\bxox[abprs]-[\w-]{10,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_ROOTS = "home|root|Users|Volumes|mnt|media|tmp|var|opt|srv|work|data|scratch|workspaces?|gpfs|lustre|content|kaggle"
_ROOTS += "|fsx|nfs|storage|raid|private|app|datasets|models|dev/shm"
_LOCAL_PATH = re.compile(rf"(?<![\w/.])((file://)?/({_ROOTS})\d*/[\w.-]+|[A-Z]:[\\/]{{1,2}}\w+)")


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder by their paths in it; none that are hidden."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if not any(part.startswith(".") for part in name.split("/"))}


def problems_of(folder: Path) -> list[str]:
    """What is wrong with a folder, a sentence each; nothing, if it is fit to be loaded by anybody.

    Args:
        folder: A reranker, as `save_pretrained` wrote it.

    Example:
        ```python
        >>> problems_of(Path("runs/mine/model"))
        ['README.md is the stub: say what the model was trained on, and under which licence it comes.']
        ```
    """
    return [problem for check in CHECKS for problem in check(folder)]


def _missing_files(folder: Path) -> Iterator[str]:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "README.md", *SENTENCE_TRANSFORMERS_FILES):
        if not (folder / name).is_file():
            yield f"{name} is missing: write the folder with save_pretrained, or querit convert."


def _config(folder: Path) -> Iterator[str]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"config.json cannot be read: {error}."
        return
    if not isinstance(config, dict):
        yield "config.json is no object of names and values: write the folder with save_pretrained, or querit convert."
        return
    if config.get("model_type") != QueritConfig.model_type:
        yield f"config.json has model_type {config.get('model_type')!r}, not {QueritConfig.model_type!r}: convert it."
        return
    for name, entry in AUTO_MAP.items():
        found = auto_map.get(name) if isinstance(auto_map := config.get("auto_map"), dict) else None
        if found != entry:
            yield f"config.json has {found!r} as auto_map of {name}, not {entry!r}."
        elif not (folder / f"{entry.split('.')[0]}.py").is_file():
            yield f"{entry.split('.')[0]}.py is missing, though auto_map names it."


def _weights(folder: Path) -> Iterator[str]:
    try:
        tensors = open_weights(folder)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if missing := {"score.weight", "score.bias"} - tensors.keys():
        yield f"{min(missing)} is missing: the model has no head."
    elif (rows := tensors["score.weight"].shape[0]) != 2:
        yield f"score.weight has {rows} rows, not 2: this is an export or another model; give the folder it came from."
    elif torch.equal(*tensors["score.weight"].read(slice(0, 2))):
        yield "The head was never trained: the rows of score.weight are equal, so all scores are."
    for key, tensor in tensors.items():
        if not all(is_finite(tensor.read(rows)) for rows in row_slices(tensor.shape)):
            yield f"{key} holds NaN or infinite numbers."


def _pickles(folder: Path) -> Iterator[str]:
    for name, path in files_of(folder).items():
        with path.open("rb") as file:
            start = file.read(4)
        if path.suffix.lower() in _PICKLED or start.startswith(_PICKLE_STARTS):
            yield f"{name} may run code when it is loaded: weights belong in safetensors, nothing else in the folder."


def _secrets_and_paths(folder: Path) -> Iterator[str]:
    for name, path in files_of(folder).items():
        text = _header(path) if path.suffix == ".safetensors" else path.read_text(encoding="utf-8", errors="replace")
        yield from problems_of_text(name, text)


def problems_of_text(name: str, text: str) -> Iterator[str]:
    """Secrets in a file, and places on this machine, a sentence each.

    Args:
        name: Of the file.
        text: Its content.
    """
    for what, pattern in _SECRETS.items():
        if pattern.search(text):
            yield f"{name} holds what looks like {what}."
    if name.split("/")[-1] not in _VOCABULARIES and (found := _LOCAL_PATH.search(text)):
        yield f"{name} names a place on this machine: {found[0]}."


def _header(path: Path) -> str:
    """What a file of weights says about itself."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, _LARGEST_HEADER)).decode(errors="replace")


def _sizes(folder: Path) -> Iterator[str]:
    for name, path in files_of(folder).items():
        if path.stat().st_size > LARGEST_FILE:
            yield f"{name} has {path.stat().st_size / 10**9:.0f} GB: save it in shards, the Hub takes 50 GB a file."


CHECKS: tuple[Callable[[Path], Iterator[str]], ...] = (
    _missing_files,
    _config,
    _weights,
    _pickles,
    _secrets_and_paths,
    _sizes,
)
STUB_SENTENCE = next(line for line in CARD_STUB.splitlines() if "Say here" in line)
