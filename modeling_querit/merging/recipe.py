"""Recipes of merges: which models are merged, how, and their record in `merge.json`."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoints.mini import MINI_NAME
from ..checkpoints.safetensors_io import parse_dtype
from ..environment import environment
from ..files import write_json
from ..settings_files import read_settings
from .methods import METHODS
from .schedule import Schedule

RECORD_FILE = "merge.json"
# Most parts of a local path that a public name holds.
_MAX_PUBLIC_PARTS = 3
# `querit train` names all its results like this.
_UNINFORMATIVE_NAMES = ("model", "adapter")


@dataclass(frozen=True)
class Recipe:
    """What to merge, and how.

    Args:
        models: Names of two or more models: "mini", folders, repositories, LoRA adapters.
        method: Merge method, a key of `METHODS`.
        t: Position between two models, from the first (0) to the second (1), as in `Schedule.from_t`; 0.5 by default.
        weights: Weights of any number of models, in place of `t`, as in `Schedule.from_weights`; equal by default.
        base: Model that the others were trained from, for task arithmetic.
        scale: Factor of the mean task vector, for task arithmetic.
        dtype: Data type of the merged weights: "auto" (that of the models), "float32", "bfloat16" or "float16".
        parents: Parents of an earlier merge, from its `merge.json`: base and models must have the same hashes.

    Raises:
        ValueError: if a field has a wrong value, or fields contradict each other.
    """

    models: Sequence[str]
    method: str = "slerp"
    t: Sequence[str] = ()
    weights: Sequence[str] = ()
    base: str | None = None
    scale: float = 1.0
    dtype: str = "auto"
    parents: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        for name in ("models", "t", "weights"):
            texts = getattr(self, name)
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str | os.PathLike) for text in texts):
                raise ValueError(f"{name} is {texts!r}: give a list of texts.")
        if not isinstance(self.base, str | os.PathLike | None):
            raise ValueError(f"base is {self.base!r}: give the name of a model.")
        if len(self.models) < 2:
            raise ValueError(f"A merge needs two models or more, not {len(self.models)}: name another one.")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: choose from {', '.join(METHODS)}.")
        if METHODS[self.method].uses_base and self.base is None:
            raise ValueError(f"{self.method} needs a base: name the model that the others were trained from.")
        if self.base is not None and not METHODS[self.method].uses_base:
            raise ValueError(f"{self.method} has no use for a base: leave it out, or choose task_arithmetic.")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}: give a finite number.")
        if self.scale != 1 and self.base is None:
            raise ValueError(f"scale is the factor of task vectors, which {self.method} does not have: leave it out.")
        if self.t and (self.weights or len(self.models) != 2):
            raise ValueError("t is a position between two models: for more than two, give weights instead.")
        parse_dtype(self.dtype)
        if self.parents and len(self.parents) != len(self.parent_names):
            raise ValueError(f"The record has {len(self.parents)} models, but {len(self.parent_names)} are given.")

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> Recipe:
        """Read a recipe from a `merge.json`, or from a JSON file with the fields of a recipe.

        The models of a `merge.json` must be the same ones again, by their hashes, wherever they are now.

        Args:
            path: JSON file.
            changes: Fields that replace those of the file.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is not a recipe.
        """
        try:
            record = read_settings(path)
            fields, parents = record.get("recipe", record) | changes, record.get("parents") or ()
            if parents and not changes.keys() & {"models", "base"}:
                fields = _pin_revisions(fields, parents)
            return cls(**fields | {"parents": parents})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a recipe ({error}): give JSON with the keys of merge.json.") from None

    def save(self, folder: Path, parents: Sequence[Mapping[str, Any]]) -> None:
        """Write `merge.json`: the recipe without local paths, the parents' hashes, and versions.

        Args:
            folder: Folder of the merged model.
            parents: Name, revision and hashes of each parent, the base first.
        """
        write_json({"recipe": self.public(), "parents": parents, **environment()}, folder / RECORD_FILE)

    def public(self) -> dict[str, Any]:
        """Return the fields as JSON values that may be published: local paths are shortened by `public_names`."""
        names = self.public_parent_names
        fields = asdict(self) | {"models": names[-len(self.models) :], "base": names[0] if self.base else None}
        del fields["parents"]
        return fields

    @property
    def parent_names(self) -> list[str]:
        """Return the names of all parents: the base, if there is one, and the models."""
        return [str(name) for name in (*((self.base,) if self.base else ()), *self.models)]

    @cached_property
    def public_parent_names(self) -> list[str]:
        """Return `parent_names` without local paths, as `public_names` shortens them."""
        return public_names(self.parent_names)

    def schedule(self, layers: int) -> Schedule:
        """Return the coefficients of the models in each tensor, for a model of this many layers."""
        if self.weights or len(self.models) > 2:
            return Schedule.from_weights(self.weights, len(self.models), layers)
        return Schedule.from_t(self.t, layers)


def public_names(names: Sequence[str]) -> list[str]:
    """Shorten the paths of folders to the last parts that distinguish them; names of repositories are kept.

    Folders that only a longer part of their path would distinguish are numbered, so that no public name tells where on
    a machine a folder lies.

    Args:
        names: Names of folders and repositories.

    Returns:
        The names in the same order; one of several parts begins with `./`, and has three of them at most.

    Example:
        ```python
        >>> public_names(["/data/law", "/data/runs/tax/model", "me/reranker"])
        ['law', './tax/model', 'me/reranker']
        ```
    """
    folders = {name: Path(name).resolve() for name in names if Path(name).is_dir()}
    ends = {folder: _distinguishing_end(folder, {*folders.values()} - {folder}) for folder in folders.values()}
    public = {folder: end for folder, end in ends.items() if end is not None}
    repositories = [name for name in names if name not in folders]
    for folder in ends:
        if folder not in public:
            public[folder] = _numbered_end(folder, {*public.values(), *repositories})
    return [public[folders[name]] if name in folders else name for name in names]


def _distinguishing_end(folder: Path, others: set[Path]) -> str | None:
    """Return the shortest end of a path that no other has; None if it would be too long to be published."""
    shortest = _shortest_length(folder)
    # Never the whole path, whose first part follows the root.
    longest = min(_MAX_PUBLIC_PARTS, len(folder.parts) - 2)
    for length in range(shortest, max(shortest, longest) + 1):
        if not any(other.parts[-length:] == folder.parts[-length:] for other in others):
            return _end(folder, length)
    return None


def _numbered_end(folder: Path, taken: set[str]) -> str:
    end = _end(folder, _shortest_length(folder))
    return next(name for name in (f"{end}-{number}" for number in itertools.count(1)) if name not in taken)


def _shortest_length(folder: Path) -> int:
    return 2 if folder.name in _UNINFORMATIVE_NAMES else 1


def _end(folder: Path, length: int) -> str:
    end = "/".join(part for part in folder.parts[-length:] if part != folder.anchor)
    return end if length == 1 and end not in ("", MINI_NAME) else f"./{end}"


def _pin_revisions(fields: Mapping[str, Any], parents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Replace the revisions of repositories by the commits that were merged."""
    names = [*([fields["base"]] if fields.get("base") else []), *fields["models"]]
    pinned = [
        f"{name.partition('@')[0]}@{parent['revision']}" if parent.get("revision") else name
        for name, parent in zip(names, parents, strict=True)
    ]
    count = len(fields["models"])
    return {**fields, "models": pinned[-count:], "base": pinned[0] if len(pinned) > count else None}
