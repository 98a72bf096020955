"""Rerankers as lazily read tensors, in whatever layout they are stored: Querit's, the published one, LoRA adapters."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from transformers import PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import extract_commit_hash

from ..cards import NOTICE_FILE, InheritedMetadata, combine_inherited, read_inherited
from ..files import atomic_folder
from ..modeling_querit import QueritForSequenceRanking
from ..tokenization_querit import EARLIER_TEMPLATE_END, TEMPLATE_END, QueritTokenizer
from ..validation_querit import CONFIG_FILE, read_json_object
from .adapters import ADAPTER_CONFIG, apply_adapter, base_model_of
from .loading import check_head, check_local_path, is_reranker, load_for_training, unreachable
from .mini import ADAPTER, BASE_NAME, MINI_NAME, default_model_path
from .safetensors_io import LazyTensor, StoredTensor, open_weights, parse_dtype

# What loading needs from a repository: no pickles, logs or images.
_DOWNLOADED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*", "NOTICE*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Keys of old checkpoints that a reranker has no use for.
_IGNORED_KEY = re.compile(r"^lm_head\.|rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Checkpoint:
    """A reranker whose tensors are read on demand.

    Args:
        name: Name it was opened by.
        model: The model on the meta device (without weights), for its config and tokenizer.
        tensors: Key -> tensor, in Querit's layout.
        files: Files that the tensors and the config come from, for hashing.
        tokenizer: Tokenizer files, if they are as `save_pretrained` writes them; else empty.
        revision: Commit of the repository, if it comes from the Hub.
        inherited: Licence, languages, base models and notices that models made from it inherit.
    """

    name: str
    model: QueritForSequenceRanking
    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]
    tokenizer: tuple[Path, ...] = ()
    revision: str | None = None
    inherited: InheritedMetadata = field(default_factory=InheritedMetadata)

    def named_files(self) -> dict[str, Path]:
        """Map file names to files, with the folder's name in front where two are equal (adapters on adapters)."""
        counts = Counter(path.name for path in self.files)
        return {path.name if counts[path.name] == 1 else f"{path.parent.name}/{path.name}": path for path in self.files}

    @property
    def max_length(self) -> int:
        """Maximum length of a pair, in tokens."""
        for path in self.tokenizer:
            if path.name == "tokenizer_config.json":
                limit = json.loads(path.read_text(encoding="utf-8")).get("model_max_length")
                return limit if isinstance(limit, int) else self.model.processor.max_length
        return self.model.processor.max_length

    @property
    def chat_template(self) -> str:
        """Chat template, which formats the text of a pair; one of an earlier version as this version writes it."""
        for path in self.tokenizer:
            if path.name == "chat_template.jinja":
                return path.read_text(encoding="utf-8").replace(EARLIER_TEMPLATE_END, TEMPLATE_END)
        return self.model.processor.portable_tokenizer().chat_template

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer as other runtimes need it; files that are like that already are copied."""
        for path in self.tokenizer:
            shutil.copyfile(path, folder / path.name)
            if path.name == "chat_template.jinja":
                (folder / path.name).write_text(self.chat_template, encoding="utf-8")
        if not self.tokenizer:
            self.model.processor.save_pretrained(folder)


def open_checkpoint(name: str, temporary: Path) -> Checkpoint:
    """Open a reranker by its name; an adapter is opened on its base model, which its config names.

    Args:
        name: "mini", a folder, a LoRA adapter, or a repository, whose name may end in a branch, tag or commit
            (`me/reranker@v1.0`).
        temporary: Folder for rerankers made of plain decoders, which adapters may have as base models. It is created
            when needed, and must exist as long as the checkpoint is read.

    Raises:
        OSError: if there is no such model, or it has no safetensors files.
        ValueError: if the checkpoint is damaged, or lacks a weight.
    """
    folder = resolve_folder(name)
    if (folder / ADAPTER_CONFIG).exists():
        _check_no_cycle(folder)
        base = open_base(base_model_of(folder), temporary)
        files = (*base.files, folder / ADAPTER_CONFIG, *folder.glob("*.safetensors"))
        tensors = apply_adapter(folder, base.tensors)
        inherited = combine_inherited([read_inherited(folder), base.inherited])
        # The base was calibrated without the adapter.
        base.model.config.calibration = None
        return Checkpoint(name, base.model, tensors, files, base.tokenizer, _revision_of(folder), inherited)
    config = read_json_object(folder / CONFIG_FILE)
    # Loading to the meta device checks that every weight is there, in the shape that the config asks for.
    model = QueritForSequenceRanking.from_pretrained(folder, device_map="meta")
    _ = model.processor
    stored = open_weights(folder)
    tokenizer = _tokenizer_files(folder, config)
    paths = {tensor.path for tensor in stored.values()} | {folder / "config.json"}
    return Checkpoint(
        name, model, _rename_keys(stored), tuple(sorted(paths)), tokenizer, _revision_of(folder), read_inherited(folder)
    )


def open_base(name: str, temporary: Path) -> Checkpoint:
    """Open a model that others were trained from: a reranker, or a plain decoder, which gets a head at zero.

    Args:
        name: Name of the model.
        temporary: Folder for the reranker made of a plain decoder, as in `open_checkpoint`.
    """
    source = name if name == BASE_NAME else str(resolve_folder(name))
    if source != BASE_NAME and ((Path(source) / ADAPTER_CONFIG).exists() or is_reranker(source)):
        return open_checkpoint(name, temporary)
    folder = temporary / re.sub(r"\W+", "-", name)
    if not folder.exists():
        config = {} if source == BASE_NAME else PreTrainedConfig.get_config_dict(source)[0]
        dtype = parse_dtype(str(config.get("dtype") or config.get("torch_dtype") or "float32"))
        with atomic_folder(folder) as written:
            for path in (ADAPTER if source == BASE_NAME else Path(source)).iterdir():
                # A card that is there is not replaced by a stub, so that its metadata is inherited.
                if path.name.startswith(("README.md", "LICENSE", NOTICE_FILE)):
                    shutil.copyfile(path, written / path.name)
            load_for_training(source, dtype or torch.float32).save_pretrained(written)
    return open_checkpoint(str(folder), temporary)


def inherited_from(name: str) -> InheritedMetadata:
    """Read what a model trained from this one inherits; a repository is its base model.

    Raises:
        OSError: as in `resolve_folder`.
    """
    if name == BASE_NAME:
        return read_inherited(ADAPTER)
    inherited = read_inherited(resolve_folder(name))
    if name == MINI_NAME or Path(name).is_dir():
        return inherited
    base_model = {"base_model": name.partition("@")[0], "base_model_relation": "finetune"}
    return InheritedMetadata({**inherited.data, **base_model}, inherited.files)


def resolve_folder(name: str) -> Path:
    """Find the folder of a model: the mini's, the folder itself, or the download of a repository.

    Raises:
        OSError: if there is no such model, or the Hub cannot be reached.
    """
    if name == MINI_NAME:
        return default_model_path()
    check_local_path(name)
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / config).exists() for config in ("config.json", ADAPTER_CONFIG)):
            results = [result for result in ("model", "adapter") if (folder / result).is_dir()]
            hint = f": name {folder / results[0]}" if results else ""
            raise FileNotFoundError(f"{name} has neither config.json nor {ADAPTER_CONFIG}{hint}.")
        return folder
    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=list(_DOWNLOADED_FILES), ignore_patterns=["*/*"]
            )
        )
    except RevisionNotFoundError as error:
        raise OSError(f"{repository} has no revision {revision}: name a branch, a tag or a commit.") from error
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise unreachable(name, error) from error
    except HTTPError as error:
        raise ConnectionError(
            f"The download of {name} failed ({error}): run the same command again, and it resumes."
        ) from error


def has_untrained_head(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the two rows of `score.weight` are equal, so that all pairs get the same score."""
    return torch.equal(*tensors["score.weight"].read(slice(0, 2)).float())


def check_trained(checkpoint: Checkpoint) -> None:
    """Check that the head of a reranker was trained.

    Raises:
        ValueError: if it scores all pairs alike.
    """
    check_head(checkpoint.tensors["score.weight"].read(slice(0, 2)), checkpoint.name)


def _check_no_cycle(folder: Path) -> None:
    """Check that the base models of an adapter, which may be adapters too, do not lead back to one of them.

    Raises:
        ValueError: if they do.
    """
    visited, current = {folder.resolve()}, folder
    while Path(name := base_model_of(current)).is_dir() and (Path(name) / ADAPTER_CONFIG).exists():
        current = Path(name)
        if current.resolve() in visited:
            raise ValueError(
                f"{folder} is both an adapter and its base model: remove {ADAPTER_CONFIG} and its weights."
            )
        visited.add(current.resolve())


def _tokenizer_files(folder: Path, config: Mapping[str, Any]) -> tuple[Path, ...]:
    """Find the tokenizer files of a folder in Querit's layout; the tokenizers of other layouts have to be rewritten."""
    files = tuple(folder / name for name in _TOKENIZER_FILES)
    is_querit = config.get("model_type") == QueritForSequenceRanking.config_class.model_type
    if not is_querit or not all(path.is_file() for path in files):
        return ()
    # Earlier folders have a tokenizer of another class, which could not encode pairs.
    tokenizer_class = get_tokenizer_config(folder).get("tokenizer_class")
    return files if tokenizer_class == QueritTokenizer.__name__ else ()


def _revision_of(folder: Path) -> str | None:
    """Read the commit from the path of a folder in the Hub's cache."""
    return extract_commit_hash(str(folder / "config.json"), None)


def _rename_keys(stored: Mapping[str, StoredTensor]) -> dict[str, LazyTensor]:
    """Rename keys to those of `save_pretrained`: published heads are called `head`, some backbones have no prefix."""
    renamed: dict[str, LazyTensor] = {}
    for key, tensor in stored.items():
        if _IGNORED_KEY.search(key):
            continue
        key = re.sub(r"^head\.", "score.", key)
        key = key if key.startswith(("model.", "score.")) else f"model.{key}"
        if key in renamed:
            raise ValueError(f"{tensor.path} has {key} twice, under the keys of two layouts: remove one of them.")
        renamed[key] = tensor
    return renamed
