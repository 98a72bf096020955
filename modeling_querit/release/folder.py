"""What a folder must hold, and must not, before it may leave this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .. import configuration_querit
from ..checkpoints.streaming import is_finite, open_weights, row_slices
from ..configuration_querit import AUTO_MAP, QueritConfig
from ..folder_querit import CARD_STUB, SENTENCE_TRANSFORMERS_FILES

# More than this the Hub does not take in one file.
LARGEST_FILE = 50 * 10**9
# The format's own limit.
_LARGEST_HEADER = 100_000_000
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
# All that a release has a use for: weights, settings, tokenizers, texts and pictures.
_KINDS = {".safetensors", ".json", ".jsonl", ".jinja", ".model", ".txt", ".md", ".bib", ".yaml", ".yml"}
_KINDS |= {".png", ".jpg", ".jpeg", ".svg", ".gif"}
_CODE = {path.name for path in Path(configuration_querit.__file__).parent.glob("*_querit.py")}
# Their entries are words of the training text, paths and keys among them.
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_(oauth_)?[A-Za-z0-9]{30,}"),
    "a token of an organization": re.compile(r"\bapi_org_[A-Za-z0-9]{30,}"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b|aws_secret_access_key\W+[\w/+]{40}", re.IGNORECASE),
    "a Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "a GitLab token": re.compile(r"\bglpat-[\w-]{20,}"),
    "a Slack token": re.compile(r"\bxox[abprs]-[\w-]{10,}"),
    "an npm token": re.compile(r"\bnpm_[A-Za-z0-9]{36}\b"),
    "a PyPI token": re.compile(r"\bpypi-[\w-]{50,}"),
    "a signed token": re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    "a password in an address": re.compile(r"\bhttps?://[^\s/:@]+:[^\s/:@{}$<>]+@"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_ROOTS = "home|root|Users|Volumes|mnt|media|tmp|var|opt|srv|work|data|scratch|workspaces?|gpfs|lustre|content|kaggle"
_ROOTS += "|fsx|nfs|storage|raid|private|app|datasets|models|dev/shm"
_LOCAL_PATH = re.compile(rf"(?<![\w/.])((file://)?/({_ROOTS})\d*/[\w.-]+|[A-Z]:[\\/]{{1,2}}\w+)")
# A value that is nothing but a path from the root of a disk, a share or a home directory.
_ABSOLUTE = re.compile(r"file:\S+|/[\w.@+-]+(/[\w.@+-]+)+/?|~[\w-]*[\\/]\S+|[A-Za-z]:[\\/][^\s\\/]+[\\/]\S+|\\\\\w\S+")


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
    elif (rows := (*tensors["score.weight"].shape, 0)[0]) != 2:
        yield f"score.weight has {rows} rows, not 2: this is an export or another model; give the folder it came from."
    elif torch.equal(*tensors["score.weight"].read(slice(0, 2))):
        yield "The head was never trained: the rows of score.weight are equal, so all scores are."
    read = {tensor.path for tensor in tensors.values()}
    for path in sorted(set(folder.glob("*.safetensors")) - read):
        yield f"{path.name} is not read by anybody who loads the folder: take it out."
    for key, tensor in tensors.items():
        if not all(is_finite(tensor.read(rows)) for rows in row_slices(tensor.shape)):
            yield f"{key} holds NaN or infinite numbers."


def _pickles(folder: Path) -> Iterator[str]:
    for name, path in files_of(folder).items():
        with path.open("rb") as file:
            start = file.read(4)
        if path.suffix.lower() in _PICKLED or start.startswith(_PICKLE_STARTS):
            yield f"{name} may run code when it is loaded: weights belong in safetensors, nothing else in the folder."


def _strangers(folder: Path) -> Iterator[str]:
    for name, path in files_of(folder).items():
        if path.suffix == ".py" and name not in _CODE:
            yield f"{name} is no code of a reranker's: take it out."
        elif path.suffix.lower() not in {*_KINDS, *_PICKLED, ".py"} and not name.startswith(("LICENSE", "NOTICE")):
            yield f"{name} is of a kind that a release has no use for: take it out."


def _secrets_and_paths(folder: Path) -> Iterator[str]:
    for name, path in files_of(folder).items():
        text = _header(path) if path.suffix == ".safetensors" else path.read_text(encoding="utf-8", errors="replace")
        yield from problems_of_text(name, text)
        if path.suffix == ".json" and path.name not in _VOCABULARIES:
            yield from _absolute_paths(name, path)


def _absolute_paths(name: str, path: Path) -> Iterator[str]:
    try:
        waiting = [json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, RecursionError) as error:
        yield f"{name} is no JSON: {error}."
        return
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and _ABSOLUTE.fullmatch(value) and not _LOCAL_PATH.search(value):
            yield f"{name} names a place on this machine: {value}."


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
    _strangers,
    _secrets_and_paths,
    _sizes,
)
STUB_SENTENCE = next(line for line in CARD_STUB.splitlines() if "Say here" in line)
