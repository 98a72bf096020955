"""Several rerankers as one: stage 3 of the method, SLERP of checkpoints adapted to different tasks."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..environment import environment
from ..files import sha256, write_json
from ..folder_querit import write_code_files
from ..threads import threads
from .cards import merged_card
from .naming import public_names
from .parents import Parent, check_alike, check_trained, open_base, open_parent
from .schedule import Schedule
from .spherical import METHODS, add_up, gram_of
from .streaming import (
    Spec,
    checked_size,
    dtype_named,
    is_routing_bias,
    narrowed,
    open_weights,
    row_slices,
    write_weights,
)
from .writing import check_new, room_beside, whole_folder

RECORD_FILE = "merge.json"


@dataclass(frozen=True)
class Recipe:
    """What is merged, and how.

    Args:
        models: Two or more: "mini", folders, repositories, LoRA adapters.
        method: "slerp" (the spherical mean), "linear" or "task_arithmetic".
        t: For two models: the way from the first (0) to the second (1), as in `Schedule.of_t`; 0.5 by default.
        weights: For any number of models, instead of `t`, as in `Schedule.of_weights`; equal by default.
        base: For "task_arithmetic": what the models were trained from.
        scale: For "task_arithmetic": of the sum of task vectors.
        dtype: Of the result: "auto" (that of the models), "float32", "bfloat16" or "float16".
        parents: Of a `merge.json`: with the hashes that the base and the models must have.

    Raises:
        ValueError: if these do not go together.
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
            raise ValueError(
                f"There is nothing to merge {', '.join(self.models) or 'it'} with: name two models or more."
            )
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: choose from {', '.join(METHODS)}.")
        if (self.method == "task_arithmetic") != (self.base is not None):
            raise ValueError("base goes with task_arithmetic, and task_arithmetic with the base the models come from.")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}: give a number.")
        if self.scale != 1 and self.base is None:
            raise ValueError("scale is that of task vectors: it goes with task_arithmetic.")
        if self.t and (self.weights or len(self.models) != 2):
            raise ValueError("t is the way from one model to another: for more than two, give weights instead.")
        dtype_named(self.dtype)
        if self.parents and len(self.parents) != len(self.names):
            raise ValueError(f"The record is of {len(self.parents)} models, and these are {len(self.names)}.")

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> Recipe:
        """From a `merge.json`, or from JSON with the same keys; what is given in `changes` takes precedence.

        Models that a `merge.json` was made of have to be the same ones again, by their hashes, wherever they are now.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is no recipe.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            recipe, parents = found.get("recipe", found) | changes, found.get("parents") or ()
            if parents and not changes.keys() & {"models", "base"}:
                recipe = _at_revisions(recipe, parents)
            return cls(**recipe | {"parents": parents})
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no recipe ({error}): give JSON with the keys of merge.json.") from None

    def published(self) -> dict[str, Any]:
        """For a record that may leave this machine: no more of the paths of folders than tells them apart."""
        names = public_names(self.names)
        found = asdict(self) | {"models": names[-len(self.models) :], "base": names[0] if self.base else None}
        del found["parents"]
        return found

    @property
    def names(self) -> list[str]:
        """Of the base, if there is one, and of the models."""
        return [str(each) for each in (*((self.base,) if self.base else ()), *self.models)]

    def schedule(self, layers: int) -> Schedule:
        """The weights of the models, by tensor."""
        if self.weights or len(self.models) > 2:
            return Schedule.of_weights(self.weights, len(self.models), layers)
        return Schedule.of_t(self.t, layers)


def merge_checkpoints(
    recipe: Recipe, destination: str | Path, *, max_shard_size: int | str = "5GB", show_progress_bar: bool | None = None
) -> Path:
    """Merge rerankers into one folder that loads everywhere, with `merge.json` and a card.

    Weights are read and written in parts: memory does not grow with the models. The arithmetic is in float32. The
    folder is written aside and then renamed: it is whole, or not there.

    Args:
        recipe: What is merged, and how.
        destination: A folder that does not exist yet, or is empty.
        max_shard_size: Bytes of one weight file.
        show_progress_bar: By default only on a terminal.

    Raises:
        OSError: if there is something at the destination, it cannot be written, or a model is not found.
        ValueError: if models differ in architecture, vocabulary, tensors or shapes, hold NaN, or have an untrained
            head; the message names the tensor.

    Example:
        ```python
        >>> merge_checkpoints(Recipe(["law", "medicine"], t=["0.4"]), "merged").name
        'merged'
        ```
    """
    destination = check_new(destination)
    checked_size(max_shard_size)
    with whole_folder(destination) as folder:
        merger = open_models(recipe, room_beside(folder))
        merger.write(folder, recipe, destination.name, max_shard_size, show_progress_bar)
    return destination


def open_models(recipe: Recipe, aside: Path) -> Merger:
    """The models of a recipe, checked, ready to be merged any number of times.

    Args:
        recipe: What is merged.
        aside: A folder for what has to be written down before it can be read; there need not be one yet.
    """
    try:
        models = [open_parent(str(name), aside) for name in recipe.models]
        # The base first: that is where task arithmetic looks for it.
        parents = [*([open_base(recipe.base, aside)] if recipe.base else []), *models]
    except OSError as error:
        if not recipe.parents:
            raise
        raise OSError(f"{error} A record has no more of paths than their ends: name the models as well.") from error
    check_alike(parents)
    for model in models:
        check_trained(model)
    return Merger(parents, models)


@dataclass
class Merger:
    """Models to be merged; what is computed of their tensors is kept for the next merge.

    Args:
        parents: The base, if there is one, and the models.
        models: The models alone.
    """

    parents: list[Parent]
    models: list[Parent]
    _grams: dict[str, torch.Tensor] = field(init=False, default_factory=dict)
    _hashes: dict[Path, str] = field(init=False, default_factory=dict)

    def write(
        self,
        folder: Path,
        recipe: Recipe,
        name: str,
        max_shard_size: int | str = "5GB",
        show_progress_bar: bool | None = None,
    ) -> None:
        """Write the models, merged, to a folder.

        Args:
            folder: Where; it exists, and is empty.
            recipe: With these models and base.
            name: Of the merged model, in its card.
            max_shard_size: Bytes of one weight file.
            show_progress_bar: By default only on a terminal.
        """
        if recipe.parents:
            # Other models than those of the record: known before anything is computed.
            self._provenance(recipe)
        first = self.models[0]
        config = copy.deepcopy(first.model.config)
        schedule = recipe.schedule(config.text_config.num_hidden_layers)
        weights = {key: schedule.weights(key) for key in first.tensors}
        specs = {key: Spec(self._dtype_of(key, recipe), tensor.shape) for key, tensor in first.tensors.items()}
        hidden = None if show_progress_bar is None else not show_progress_bar
        size = sum(spec.nbytes for spec in specs.values())
        with (
            threads(1) as beside,
            tqdm(total=size, unit="B", unit_scale=True, desc="Merging", disable=hidden, leave=False) as bar,
        ):
            # Hashing takes about as long as merging.
            hashing = [beside.submit(self._hash, path) for parent in self.parents for path in parent.files]
            chunks_of = partial(self._merged_chunks, recipe=recipe, weights=weights, specs=specs)
            write_weights(folder, specs, chunks_of, max_shard_size, advance=bar.update)
            for job in hashing:
                job.result()
        _check_head(folder)
        parents = self._provenance(recipe)
        record = {"recipe": recipe.published(), "parents": parents, **environment()}
        write_json(record, folder / RECORD_FILE)
        (folder / "README.md").write_text(merged_card(name, record["recipe"]), encoding="utf-8")
        config.dtype = config.text_config.dtype = specs["score.weight"].dtype
        config.save_pretrained(folder)
        write_code_files(first.model, folder)
        # No longer pairs than all models are made for.
        min(self.models, key=lambda model: model.max_length).write_tokenizer(folder)

    def _dtype_of(self, key: str, recipe: Recipe) -> torch.dtype:
        stored = {model.tensors[key].dtype for model in self.models}
        for parent in self.parents:
            dtype = parent.tensors[key].dtype
            if not dtype.is_floating_point or dtype.itemsize == 1:
                raise ValueError(f"{key} of {parent.name} is stored as {dtype}: quantized weights cannot be merged.")
        if recipe.dtype == "auto" or is_routing_bias(key):
            return functools.reduce(torch.promote_types, stored)
        return dtype_named(recipe.dtype)

    def _merged_chunks(
        self, key: str, recipe: Recipe, weights: dict[str, torch.Tensor], specs: dict[str, Spec]
    ) -> Iterator[torch.Tensor]:
        slices = list(row_slices(specs[key].shape))
        # What fits in one part is read once, what is longer twice: the second time from the system's cache.
        held = self._read(key, slices[0]) if len(slices) == 1 else None
        gram, dtype = self._gram(key, held), specs[key].dtype
        factors = _factors(gram, weights[key], recipe)
        # No entry is longer than the whole tensor.
        if not (factors @ gram @ factors).clamp(min=0).sqrt() < torch.finfo(torch.bfloat16).max:
            raise ValueError(f"{key} would have numbers that {dtype} cannot hold: take smaller weights, or scale.")
        for rows in slices:
            yield narrowed(add_up(held or self._read(key, rows), factors), dtype, key)

    def _gram(self, key: str, held: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Dot products of the parents' tensors, (parents, parents), float64; computed once."""
        if key not in self._grams:
            slices = row_slices(self.parents[0].tensors[key].shape)
            gram = sum(map(gram_of, [held] if held else (self._read(key, rows) for rows in slices)))
            self._check_finite(key, gram)
            self._grams[key] = gram
        return self._grams[key]

    def _read(self, key: str, rows: slice) -> list[torch.Tensor]:
        return [parent.tensors[key].read(rows).to(torch.float32) for parent in self.parents]

    def _check_finite(self, key: str, gram: torch.Tensor) -> None:
        for parent, square in zip(self.parents, gram.diagonal().tolist(), strict=True):
            if not square < float("inf"):
                raise ValueError(f"{key} of {parent.name} holds NaN or infinite numbers.")

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = sha256(path)
        return self._hashes[path]

    def _provenance(self, recipe: Recipe) -> list[dict[str, Any]]:
        names = public_names(recipe.names)
        hashes = [{name: self._hash(path) for name, path in each.named_files().items()} for each in self.parents]
        for name, found, known in zip(names, hashes, recipe.parents or [{}] * len(names), strict=True):
            # Names of files tell their folders apart, which may be others now.
            if "sha256" in known and sorted(found.values()) != sorted(known["sha256"].values()):
                raise ValueError(
                    f"{name} is not the model that the record was made of: its hashes are others. To merge other "
                    "models in the same way, give a file with the record's recipe alone."
                )
        revisions = [parent.revision for parent in self.parents]
        return [
            {"name": name, **({"revision": revision} if revision else {}), "sha256": found}
            for name, revision, found in zip(names, revisions, hashes, strict=True)
        ]


def _check_head(folder: Path) -> None:
    if torch.equal(*open_weights(folder)["score.weight"].read(slice(0, 2))):
        raise ValueError(
            "The heads cancel out: the rows of the merged score.weight are equal, so all scores are. Take another t, "
            "or weights, for the group score."
        )


def _at_revisions(recipe: Mapping[str, Any], parents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A recipe whose repositories are asked for by the commits that were merged."""
    names = [*([recipe["base"]] if recipe.get("base") else []), *recipe["models"]]
    names = [
        f"{name.partition('@')[0]}@{parent['revision']}" if parent.get("revision") else name
        for name, parent in zip(names, parents, strict=True)
    ]
    count = len(recipe["models"])
    return {**recipe, "models": names[-count:], "base": names[0] if len(names) > count else None}


def _factors(gram: torch.Tensor, weights: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """What the parents are added up with, (parents,); the base, if there is one, comes first."""
    if recipe.base is None:
        return METHODS[recipe.method](gram, weights)
    return METHODS[recipe.method](gram, torch.cat([weights.new_zeros(1), weights]), recipe.scale)
