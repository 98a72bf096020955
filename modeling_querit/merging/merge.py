"""Merging rerankers into one: stage 3 of the paper, SLERP of checkpoints adapted to different tasks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..cards import combine_inherited, dropped_calibration, merged_card
from ..checkpoints.checkpoint import Checkpoint, check_trained, has_untrained_head, open_base, open_checkpoint
from ..checkpoints.safetensors_io import (
    TensorSpec,
    cast,
    is_routing_bias,
    open_weights,
    parse_dtype,
    parse_shard_size,
    row_slices,
    write_weights,
)
from ..files import atomic_folder, check_destination, scratch_folder, sha256
from ..saving_querit import write_code_files
from ..threads import threads
from .compatibility import check_compatible
from .methods import METHODS, gram_matrix, weighted_sum
from .recipe import Recipe


def merge_checkpoints(
    recipe: Recipe, destination: str | Path, *, max_shard_size: int | str = "5GB", show_progress_bar: bool | None = None
) -> Path:
    """Merge rerankers into one folder that every runtime loads, with a record (`merge.json`) and a model card.

    Weights are streamed in chunks, so memory does not grow with the models; the arithmetic is in float32. The folder is
    written atomically: it appears complete, or not at all.

    Args:
        recipe: Models, method and coefficients.
        destination: Folder that does not exist yet, or is empty.
        max_shard_size: Maximum size of a weight file in bytes, or a text such as "5GB".
        show_progress_bar: Whether to show progress; by default only on a terminal.

    Returns:
        The destination, as an absolute path.

    Raises:
        OSError: if the destination is not empty or cannot be written, or a model is not found.
        ValueError: if models differ in architecture, vocabulary, tensors or shapes, hold NaN, or have an untrained
            head; the message names the tensor.

    Example:
        ```python
        >>> merge_checkpoints(Recipe(["law", "medicine"], t=["0.4"]), "merged").name
        'merged'
        ```
    """
    destination = check_destination(destination)
    parse_shard_size(max_shard_size)
    with atomic_folder(destination) as folder:
        merger = open_merger(recipe, scratch_folder(folder))
        merger.write(folder, recipe, max_shard_size, show_progress_bar)
    return destination


def open_merger(recipe: Recipe, temporary: Path) -> Merger:
    """Open and check the models of a recipe, to merge them any number of times.

    Args:
        recipe: Names of the models and the base.
        temporary: Folder for rerankers made of plain decoders, as in `open_checkpoint`.
    """
    try:
        models = [open_checkpoint(str(name), temporary) for name in recipe.models]
        base = open_base(recipe.base, temporary) if recipe.base else None
    except OSError as error:
        if not recipe.parents:
            raise
        raise OSError(f"{error} merge.json does not store full paths: pass the model paths too.") from error
    merger = Merger(models, base)
    check_compatible(merger.parents)
    for model in models:
        check_trained(model)
    return merger


@dataclass
class Merger:
    """Models to be merged; Gram matrices and hashes are cached for the next merge.

    Args:
        models: Models to merge.
        base: Model that they were trained from, for task arithmetic.
    """

    models: list[Checkpoint]
    base: Checkpoint | None = None
    _grams: dict[str, torch.Tensor] = field(init=False, default_factory=dict)
    _hashes: dict[Path, str] = field(init=False, default_factory=dict)

    @property
    def parents(self) -> list[Checkpoint]:
        """Return the base, if there is one, and the models: the order of Gram matrices and factors."""
        return [*([self.base] if self.base else []), *self.models]

    def write(
        self,
        folder: Path,
        recipe: Recipe,
        max_shard_size: int | str = "5GB",
        show_progress_bar: bool | None = None,
    ) -> None:
        """Write the merged model.

        Args:
            folder: Empty folder to write to; its name becomes that of the model in the card.
            recipe: Recipe with these models and this base.
            max_shard_size: Maximum size of a weight file in bytes, or a text such as "5GB".
            show_progress_bar: Whether to show progress; by default only on a terminal.
        """
        if recipe.parents:
            # Fails before anything is computed if the models are not those of the record.
            self._provenance(recipe)
        dtype = self._write_weights(folder, recipe, max_shard_size, show_progress_bar)
        recipe.save(folder, self._provenance(recipe))
        inherited = combine_inherited([parent.inherited for parent in self.parents])
        card = merged_card(folder.name, recipe.public(), inherited)
        card += dropped_calibration([parent.model.config for parent in self.parents])
        (folder / "README.md").write_text(card, encoding="utf-8")
        inherited.write(folder)
        first = self.models[0].model
        config = copy.deepcopy(first.config)
        # The merged model scores otherwise.
        config.calibration = None
        config.dtype = config.text_config.dtype = dtype
        config.save_pretrained(folder)
        write_code_files(first, folder)
        # Use the smallest max_length among the models.
        min(self.models, key=lambda model: model.max_length).write_tokenizer(folder)

    def _write_weights(
        self, folder: Path, recipe: Recipe, max_shard_size: int | str, show_progress_bar: bool | None
    ) -> torch.dtype:
        """Write the merged weights; return the data type of the head."""
        tensors = self.models[0].tensors
        schedule = recipe.schedule(self.models[0].model.config.text_config.num_hidden_layers)
        coefficients = {key: schedule.coefficients(key) for key in tensors}
        specs = {key: TensorSpec(self._dtype_of(key, recipe), tensor.shape) for key, tensor in tensors.items()}
        hide = None if show_progress_bar is None else not show_progress_bar
        total = sum(spec.nbytes for spec in specs.values())
        with (
            threads(1) as background,
            tqdm(total=total, unit="B", unit_scale=True, desc="Merging", disable=hide, leave=False) as bar,
        ):
            # Hashing takes about as long as merging, so it runs beside the writing.
            hashing = [background.submit(self._hash, path) for parent in self.parents for path in parent.files]
            chunks_of = partial(self._merged_chunks, recipe=recipe, coefficients=coefficients, specs=specs)
            write_weights(folder, specs, chunks_of, max_shard_size, advance=bar.update)
            for job in hashing:
                job.result()
        if has_untrained_head(open_weights(folder)):
            raise ValueError(
                "The heads cancel out: the rows of the merged score.weight are equal, and so all scores are. Set "
                "another t, or other weights, for the group score."
            )
        return specs["score.weight"].dtype

    def _dtype_of(self, key: str, recipe: Recipe) -> torch.dtype:
        for parent in self.parents:
            dtype = parent.tensors[key].dtype
            if not dtype.is_floating_point or dtype.itemsize == 1:
                raise ValueError(f"{key} of {parent.name} is stored as {dtype}: quantized weights cannot be merged.")
        wanted_dtype = parse_dtype(recipe.dtype)
        if wanted_dtype is None or is_routing_bias(key):
            return functools.reduce(torch.promote_types, (model.tensors[key].dtype for model in self.models))
        return wanted_dtype

    def _merged_chunks(
        self, key: str, recipe: Recipe, coefficients: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]
    ) -> Iterator[torch.Tensor]:
        slices = list(row_slices(specs[key].shape))
        # A tensor of one chunk is read once; a longer one twice, the second time from the page cache.
        chunk = self._read(key, slices[0]) if len(slices) == 1 else None
        gram, dtype = self._gram(key, chunk), specs[key].dtype
        factors = METHODS[recipe.method].factors(gram, coefficients[key], recipe.scale)  # (parents,)
        # No element exceeds the norm of the whole tensor.
        if not (factors @ gram @ factors).clamp(min=0).sqrt() < torch.finfo(torch.bfloat16).max:
            raise ValueError(f"{key} would overflow in {dtype}: use smaller weights, or a smaller scale.")
        for rows in slices:
            yield cast(weighted_sum(chunk or self._read(key, rows), factors), dtype, key)

    def _gram(self, key: str, chunk: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Return the dot products of the parents' tensors, (parents, parents), float64; computed once."""
        if key not in self._grams:
            slices = row_slices(self.parents[0].tensors[key].shape)
            gram = torch.zeros(len(self.parents), len(self.parents), dtype=torch.float64)
            for tensors in [chunk] if chunk else (self._read(key, rows) for rows in slices):
                gram += gram_matrix(tensors)
            self._check_finite(key, gram)
            self._grams[key] = gram
        return self._grams[key]

    def _read(self, key: str, rows: slice) -> list[torch.Tensor]:
        return [parent.tensors[key].read(rows).to(torch.float32) for parent in self.parents]

    def _check_finite(self, key: str, gram: torch.Tensor) -> None:
        for parent, squared_norm in zip(self.parents, gram.diagonal().tolist(), strict=True):
            if not squared_norm < float("inf"):
                raise ValueError(f"{key} of {parent.name} holds NaN or infinite values.")

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = sha256(path)
        return self._hashes[path]

    def _provenance(self, recipe: Recipe) -> list[dict[str, Any]]:
        """List name, revision and hashes of each parent.

        Raises:
            ValueError: if the recipe has a record with other hashes.
        """
        names = recipe.public_parent_names
        recorded = recipe.parents or [{}] * len(names)
        provenance: list[dict[str, Any]] = []
        for name, parent, record in zip(names, self.parents, recorded, strict=True):
            hashes = {file_name: self._hash(path) for file_name, path in parent.named_files().items()}
            # Hashes alone: the names of files may include those of their folders, which may be others now.
            if "sha256" in record and sorted(hashes.values()) != sorted(record["sha256"].values()):
                raise ValueError(
                    f"{name} is not the model in the record: its hashes differ. To merge other models in the same way, "
                    "give a file with the record's recipe alone."
                )
            revision = {"revision": parent.revision} if parent.revision else {}
            provenance.append({"name": name, **revision, "sha256": hashes})
        return provenance
