"""Rerankers as tensors by name, whatever they are stored as: our layout, published ones, LoRA adapters."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import extract_commit_hash

from ..files import sha256
from ..modeling_querit import QueritForSequenceRanking
from .adapters import ADAPTER_CONFIG, adapted_tensors, base_of
from .loading import is_reranker, load_for_training
from .mini import BASE_NAME, MINI_NAME, default_model_path
from .streaming import LazyTensor, StoredTensor, dtype_named, open_weights
from .writing import write_whole

# What loading needs: no pickles, no logs, no images.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_UNUSED_KEY = re.compile(r"^lm_head\.|rotary_emb\.inv_freq$")
# What two configs of one architecture may differ in.
_FREE = {
    *PreTrainedConfig().to_dict().keys() - {"model_type", "is_encoder_decoder"},
    *("torch_dtype", "use_cache", "_attn_implementation", "output_router_logits", "pretraining_tp"),
    *("initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
}


@dataclass(frozen=True)
class Parent:
    """A reranker whose tensors are read as they are needed.

    Args:
        name: As it was given.
        model: The same with tensors of no content, for its config and tokenizer.
        tensors: By the keys of our layout.
        files: What it was read from, for its hashes.
        tokenizer: The files of its tokenizer, if they are as `save_pretrained` writes them.
        revision: Its commit, if it is from the Hub.
    """

    name: str
    model: QueritForSequenceRanking
    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]
    tokenizer: tuple[Path, ...] = ()
    revision: str | None = None

    def named_files(self) -> dict[str, Path]:
        """Its files by their names, with that of their folder where two have one name, as of adapters on adapters."""
        counts = Counter(path.name for path in self.files)
        return {path.name if counts[path.name] == 1 else f"{path.parent.name}/{path.name}": path for path in self.files}

    @property
    def max_length(self) -> int:
        """Tokens a pair may have."""
        for path in self.tokenizer:
            if path.name == "tokenizer_config.json":
                limit = json.loads(path.read_text(encoding="utf-8")).get("model_max_length")
                return limit if isinstance(limit, int) else self.model.processor.max_length
        return self.model.processor.max_length

    @property
    def template(self) -> str:
        """What writes the text of a pair: its chat template."""
        for path in self.tokenizer:
            if path.name == "chat_template.jinja":
                return path.read_text(encoding="utf-8")
        return self.model.processor.portable_tokenizer().chat_template

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer as other runtimes need it: a copy, where it is like that already."""
        for path in self.tokenizer:
            shutil.copyfile(path, folder / path.name)
        if not self.tokenizer:
            self.model.processor.save_pretrained(folder)


def open_parent(name: str, aside: Path) -> Parent:
    """A reranker by its name: "mini", a folder, a repository, or an adapter, whose base is looked up by its config.

    Args:
        name: The name; that of a repository may end in a branch, tag or commit, as in `me/reranker@v1.0`.
        aside: A folder for what has to be written down before it can be read: plain decoders that adapters are for.

    Raises:
        OSError: if there is no such model, or it has no safetensors files.
        ValueError: if the checkpoint is damaged, or lacks a weight.
    """
    folder = folder_of(name)
    if (folder / ADAPTER_CONFIG).exists():
        base = open_base(_base_below(folder), aside)
        files = (*base.files, *(path for path in (folder / ADAPTER_CONFIG, *folder.glob("*.safetensors"))))
        adapted = adapted_tensors(folder, base.tensors)
        return Parent(name, base.model, adapted, files, base.tokenizer, _revision_of(folder))
    stored = open_weights(folder)
    config = _config_of(folder)
    # Loading without content checks that every weight is there, and has the shape that the config asks for.
    model = QueritForSequenceRanking.from_pretrained(folder, device_map="meta")
    tokenizer = _tokenizer_files(folder, config)
    try:
        _ = tokenizer or model.processor
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no tokenizer that could be read: {error}") from error
    files = {tensor.path for tensor in stored.values()} | {folder / "config.json"}
    return Parent(name, model, _in_our_layout(stored), tuple(sorted(files)), tokenizer, _revision_of(folder))


def _base_below(folder: Path) -> str:
    """The name of an adapter's base, which may be an adapter, too.

    Raises:
        ValueError: if the bases go round in a circle.
    """
    passed, below, name = set(), folder, base_of(folder)
    while Path(name).is_dir() and (Path(name) / ADAPTER_CONFIG).exists():
        passed.add(below.resolve())
        below = Path(name)
        if below.resolve() in passed:
            raise ValueError(f"{folder} is both an adapter and its base: move {ADAPTER_CONFIG} and its weights away.")
        name = base_of(below)
    return base_of(folder)


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no object of names and values.")
    return config


def _tokenizer_files(folder: Path, config: Mapping[str, Any]) -> tuple[Path, ...]:
    """Those of a folder in our layout; none of others, whose tokenizers have to be changed."""
    files = tuple(folder / name for name in _TOKENIZER_FILES)
    is_ours = config.get("model_type") == QueritForSequenceRanking.config_class.model_type
    return files if is_ours and all(path.is_file() for path in files) else ()


def folder_of(name: str) -> Path:
    """Where a model is: that of the mini, a folder itself, a repository once it is downloaded.

    Raises:
        OSError: if there is no such model, or the Hub cannot be reached.
    """
    if name == MINI_NAME:
        return default_model_path()
    folder = Path(name)
    if folder.is_dir():
        known = [each for each in ("config.json", ADAPTER_CONFIG) if (folder / each).exists()]
        inside = [each for each in ("model", "adapter") if (folder / each).is_dir()]
        if not known:
            hint = f": name {folder / inside[0]}" if inside else ""
            raise FileNotFoundError(f"{name} holds no config.json and no {ADAPTER_CONFIG}{hint}.")
        return folder
    repository, _, revision = name.partition("@")
    patterns = {"allow_patterns": list(_FILES), "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(repository, revision=revision or None, **patterns))
    except RevisionNotFoundError as error:
        raise OSError(f"{repository} has no revision {revision}: name a branch, a tag or a commit.") from error
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise OSError(f"{name} is no folder, and no repository that could be reached: {error}") from error
    except HTTPError as error:
        raise ConnectionError(f"{name} did not arrive ({error}): give the same command again, it goes on.") from error


def _revision_of(folder: Path) -> str | None:
    """The commit, of a folder in the cache of the Hub."""
    return extract_commit_hash(str(folder / "config.json"), None)


def open_base(name: str, aside: Path) -> Parent:
    """The reranker that others were trained from; a plain decoder becomes one, with a head at zero."""
    source = name if name == BASE_NAME else str(folder_of(name))
    if source != BASE_NAME and ((Path(source) / ADAPTER_CONFIG).exists() or is_reranker(source)):
        return open_parent(name, aside)
    folder = aside / re.sub(r"\W+", "-", name)
    if not folder.exists():
        config = {} if source == BASE_NAME else PreTrainedConfig.get_config_dict(source)[0]
        dtype = dtype_named(str(config.get("dtype") or config.get("torch_dtype") or "float32"))
        write_whole(load_for_training(source, dtype), folder)
    return open_parent(str(folder), aside)


def _in_our_layout(stored: dict[str, StoredTensor]) -> dict[str, LazyTensor]:
    """Under the keys that `save_pretrained` writes: published heads are called `head`, backbones have no prefix."""
    renamed = {}
    for key, tensor in stored.items():
        if _UNUSED_KEY.search(key):
            continue
        key = re.sub(r"^head\.", "score.", key)
        key = key if key.startswith(("model.", "score.")) else f"model.{key}"
        if key in renamed:
            raise ValueError(f"{tensor.path} has {key} twice, under the names of two layouts: which is it?")
        renamed[key] = tensor
    return renamed


def check_alike(parents: Sequence[Parent]) -> None:
    """Raise a ValueError unless the parents are of one architecture, with one vocabulary."""
    first = parents[0]
    for other in parents[1:]:
        _check_configs(first, other)
        _check_vocabularies(first, other)
        _check_tensors(first, other)


def _check_configs(first: Parent, other: Parent) -> None:
    ours, theirs = (each.model.config.text_config.to_dict() for each in (first, other))
    for key in sorted((ours.keys() | theirs.keys()) - _FREE):
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{other.name} has {key} {theirs.get(key)!r}, {first.name} {ours.get(key)!r}: only models of one "
                "architecture can be merged."
            )


def _check_vocabularies(first: Parent, other: Parent) -> None:
    if first.template != other.template:
        raise ValueError(f"{other.name} writes pairs by another chat_template.jinja than {first.name}: which is it?")
    if first.tokenizer and other.tokenizer and sha256(first.tokenizer[0]) == sha256(other.tokenizer[0]):
        return
    tokenizers = [each.model.processor.tokenizer for each in (first, other)]
    ours, theirs = (each.get_vocab() for each in tokenizers)
    if differing := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        token = differing[0]
        raise ValueError(
            f"{other.name} has another vocabulary than {first.name}: {token!r} is {theirs.get(token)}, not "
            f"{ours.get(token)}, and {len(differing) - 1} more differ. Rows of embeddings would be mixed up."
        )
    ours, theirs = (_splitting(each) for each in tokenizers)
    if differing := [key for key in ours if ours[key] != theirs[key]]:
        raise ValueError(
            f"{other.name} has another {differing[0]} in its tokenizer than {first.name}: texts are split otherwise."
        )


def _splitting(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides into which tokens a text is split, besides the vocabulary."""
    found = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "normalizer": found["normalizer"],
        "pre_tokenizer": found["pre_tokenizer"],
        "merges": found["model"].get("merges"),
    }


def _check_tensors(first: Parent, other: Parent) -> None:
    for one, two in ((first, other), (other, first)):
        if missing := sorted(one.tensors.keys() - two.tensors.keys()):
            raise ValueError(f"{two.name} lacks {missing[0]} (and {len(missing) - 1} more), which {one.name} has.")
    for key, tensor in first.tensors.items():
        if other.tensors[key].shape != tensor.shape:
            raise ValueError(
                f"{key} has shape {other.tensors[key].shape} in {other.name}, but {tensor.shape} in {first.name}."
            )


def check_trained(parent: Parent) -> None:
    """Raise a ValueError if the head of a parent scores everything alike."""
    weight = parent.tensors["score.weight"].read(slice(0, 2)).float()
    if torch.equal(weight[0], weight[1]):
        raise ValueError(
            f"The head of {parent.name} was never trained: the rows of score.weight are equal, so all scores are."
        )
