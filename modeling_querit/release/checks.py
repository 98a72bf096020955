"""Checks of a folder before its release: complete, loadable, free of pickles, secrets and local paths."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import configuration_querit
from ..checkpoints.checkpoint import has_untrained_head
from ..checkpoints.safetensors_io import all_finite, open_weights, row_slices
from ..configuration_querit import AUTO_MAP, QueritConfig
from ..saving_querit import SENTENCE_TRANSFORMERS_FILES

# Maximum size of a file on the Hub, in bytes.
MAX_FILE_BYTES = 50 * 10**9
# Maximum size of a header in the safetensors format, in bytes.
_MAX_HEADER_BYTES = 100_000_000
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}
_PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
# Files of a release: weights, settings, tokenizers, texts and images.
_SUFFIXES = {".safetensors", ".json", ".jsonl", ".jinja", ".model", ".txt", ".md", ".bib", ".yaml", ".yml"}
_SUFFIXES |= {".png", ".jpg", ".jpeg", ".svg", ".gif"}
_CODE_FILES = {path.name for path in Path(configuration_querit.__file__).parent.glob("*_querit.py")}
# Their entries come from training texts, and may look like paths.
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
_ROOT_FOLDERS = "home|root|Users|Volumes|mnt|media|tmp|var|opt|srv|work|data|scratch|workspaces?|gpfs|lustre|content"
_ROOT_FOLDERS += "|kaggle|fsx|nfs|storage|raid|private|app|datasets|models|dev/shm"
_LOCAL_PATH = re.compile(rf"(?<![\w/.])((file://)?/({_ROOT_FOLDERS})\d*/[\w.-]+|[A-Z]:[\\/]{{1,2}}\w+)")
# A value that is an absolute path: from the root of a disk, a network share or a home directory.
_ABSOLUTE_PATH = re.compile(
    r"file:\S+|/[\w.@+-]+(/[\w.@+-]+)+/?|~[\w-]*[\\/]\S+|[A-Za-z]:[\\/][^\s\\/]+[\\/]\S+|\\\\\w\S+"
)


def visible_files(folder: Path) -> dict[str, Path]:
    """Map the relative paths of a folder's files to the files, without hidden ones."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.split("/"))}


def find_problems(folder: Path) -> list[str]:
    """List what is wrong with a folder, one sentence each; an empty list if it is fit for release.

    Args:
        folder: Reranker, as `save_pretrained` writes it.

    Example:
        ```python
        >>> find_problems(Path("runs/mine/model"))
        ['optimizer.pt may run code when it is loaded: take it out, and keep weights in safetensors.']
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
        yield "config.json is not a JSON object: write the folder with save_pretrained, or querit convert."
        return
    if config.get("model_type") != QueritConfig.model_type:
        yield f"config.json has model_type {config.get('model_type')!r}, not {QueritConfig.model_type!r}: convert it."
        return
    for name, entry in AUTO_MAP.items():
        actual = auto_map.get(name) if isinstance(auto_map := config.get("auto_map"), dict) else None
        if actual != entry:
            yield f"config.json has {actual!r} as auto_map of {name}, not {entry!r}."
        elif not (folder / f"{entry.split('.')[0]}.py").is_file():
            yield f"{entry.split('.')[0]}.py is missing, although auto_map names it."


def _weights(folder: Path) -> Iterator[str]:
    try:
        tensors = open_weights(folder)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if missing := {"score.weight", "score.bias"} - tensors.keys():
        yield f"{min(missing)} is missing: the model has no head."
    elif (rows := (*tensors["score.weight"].shape, 0)[0]) != 2:
        yield f"score.weight has {rows} rows, not 2: this is a sequence classifier or another model: give a reranker."
    elif has_untrained_head(tensors):
        yield "The head was never trained: the rows of score.weight are equal, and so all scores are."
    loaded_files = {tensor.path for tensor in tensors.values()}
    for path in sorted(set(folder.glob("*.safetensors")) - loaded_files):
        yield f"{path.name} is not loaded by any runtime: take it out."
    for key, tensor in tensors.items():
        if not all(all_finite(tensor.read(rows)) for rows in row_slices(tensor.shape)):
            yield f"{key} holds NaN or infinite values."


def _pickles(folder: Path) -> Iterator[str]:
    for name, path in visible_files(folder).items():
        with path.open("rb") as file:
            start = file.read(4)
        if path.suffix.lower() in _PICKLE_SUFFIXES or start.startswith(_PICKLE_MAGIC):
            yield f"{name} may run code when it is loaded: take it out, and keep weights in safetensors."


def _unexpected_files(folder: Path) -> Iterator[str]:
    for name, path in visible_files(folder).items():
        if path.suffix == ".py" and name not in _CODE_FILES:
            yield f"{name} is not code of a reranker: take it out."
        elif path.suffix.lower() not in {*_SUFFIXES, *_PICKLE_SUFFIXES, ".py"} and not name.startswith(
            ("LICENSE", "NOTICE")
        ):
            yield f"{name} does not belong in a release: take it out."


def _secrets_and_paths(folder: Path) -> Iterator[str]:
    for name, path in visible_files(folder).items():
        text = _header(path) if path.suffix == ".safetensors" else path.read_text(encoding="utf-8", errors="replace")
        yield from find_text_problems(name, text)
        if path.suffix == ".json" and path.name not in _VOCABULARIES:
            yield from _absolute_paths(name, path)


def _absolute_paths(name: str, path: Path) -> Iterator[str]:
    try:
        values = [json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, RecursionError) as error:
        yield f"{name} is not JSON: {error}."
        return
    while values:
        value = values.pop()
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and _ABSOLUTE_PATH.fullmatch(value) and not _LOCAL_PATH.search(value):
            yield f"{name} contains a path on this machine: {value}."


def find_text_problems(name: str, text: str) -> Iterator[str]:
    """Find secrets and local paths in a file, one sentence each.

    Args:
        name: Name of the file.
        text: Content of the file.
    """
    for kind, pattern in _SECRETS.items():
        if pattern.search(text):
            yield f"{name} contains what looks like {kind}."
    if name.split("/")[-1] not in _VOCABULARIES and (match := _LOCAL_PATH.search(text)):
        yield f"{name} contains a path on this machine: {match[0]}."


def _header(path: Path) -> str:
    """Read the header of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, _MAX_HEADER_BYTES)).decode(errors="replace")


def _sizes(folder: Path) -> Iterator[str]:
    for name, path in visible_files(folder).items():
        if path.stat().st_size > MAX_FILE_BYTES:
            yield f"{name} has {path.stat().st_size / 10**9:.0f} GB: save it in shards, the Hub accepts 50 GB a file."


CHECKS: tuple[Callable[[Path], Iterator[str]], ...] = (
    _missing_files,
    _config,
    _weights,
    _pickles,
    _unexpected_files,
    _secrets_and_paths,
    _sizes,
)
