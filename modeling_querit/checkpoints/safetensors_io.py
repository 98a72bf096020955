"""Streaming input and output of safetensors files: weights are read and written in chunks, never all in memory."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory

from ..threads import threads
from ..validation_querit import DTYPES, INDEX_FILE, read_header, read_headers

WEIGHTS_PATTERN = "model{suffix}.safetensors"
# Weights of an adapter, as peft names them.
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Elements of one chunk of a tensor: 4 MB in float32, which fits in the cache of a processor.
CHUNK_ELEMENTS = 1024 * 1024
# Bytes after which written data is flushed to disk.
_FLUSH_BYTES = 32 * 1024**2
# Writing gains nothing from more threads than this.
_MAX_THREADS = 8

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZE = re.compile(r"0*[1-9]\d*[KMGT]B", re.IGNORECASE)


def parse_dtype(name: str) -> torch.dtype | None:
    """Parse the data type of weights: "float32", "bfloat16" or "float16"; None for "auto", the checkpoint's own.

    Raises:
        ValueError: if the name is none of these.
    """
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {name!r}: choose auto, float32, bfloat16 or float16.")
    return None if name == "auto" else getattr(torch, name)


def parse_shard_size(size: int | str) -> int | str:
    """Check the maximum size of a weight file: a number of bytes, or a text such as "5GB" (huggingface_hub's format).

    Returns:
        The size as huggingface_hub takes it: a text of digits becomes an int.

    Raises:
        ValueError: if it is neither, or not positive.
    """
    if isinstance(size, str) and size.isdigit():
        size = int(size)
    if size < 1 if isinstance(size, int) else not _SIZE.fullmatch(size):
        raise ValueError(f"max_shard_size is {size!r}: give a number of bytes, or a size such as 5GB.")
    return size


class LazyTensor(Protocol):
    """A tensor that is read by rows: slices of its first dimension."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    def read(self, rows: slice) -> torch.Tensor:
        """Read these rows into a new tensor, which the caller may overwrite."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Args:
        path: File that holds the tensor.
        offset: Position of its first byte in the file.
        dtype: Data type of the tensor.
        shape: Shape of the tensor.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, rows: slice) -> torch.Tensor:
        """Read these rows. Not memory-mapped: mapped pages would stay resident and count as memory."""
        shape = (rows.stop - rows.start, *self.shape[1:]) if self.shape else ()
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        buffer = torch.empty(math.prod(shape) * self.dtype.itemsize, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + (rows.start or 0) * row_bytes)
            _fill(file, buffer.numpy().data)
        return buffer.view(self.dtype).view(shape)


def _fill(file: FileIO, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise ValueError(f"{file.name} is truncated.")
        buffer = buffer[count:]


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Open the tensors of a model's or an adapter's safetensors files; only the headers are read.

    Returns:
        Key -> tensor.

    Raises:
        FileNotFoundError: if there are no safetensors files, or a file in the index is missing.
        ValueError: if a file is damaged; the message names it.
    """
    adapter = folder / ADAPTER_WEIGHTS
    headers = dict(read_header(adapter)) if adapter.is_file() else read_headers(folder)
    return {key: StoredTensor(*header) for key, header in headers.items()}


@dataclass(frozen=True)
class InMemoryTensor:
    """A tensor in memory with the interface of a `LazyTensor`.

    Args:
        tensor: Tensor to read from.
    """

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the tensor."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.tensor.shape)

    def read(self, rows: slice) -> torch.Tensor:
        """Copy these rows."""
        return (self.tensor[rows] if self.shape else self.tensor).clone()


def row_slices(shape: Sequence[int], chunk: int | None = None) -> Iterator[slice]:
    """Split the first dimension into slices of about `chunk` elements each, at least one row.

    Args:
        shape: Shape of the tensor.
        chunk: Elements of a slice; `CHUNK_ELEMENTS` by default.

    Example:
        ```python
        >>> list(row_slices((5, 4), chunk=10))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
        ```
    """
    if not shape:
        yield slice(0, 1)
        return
    count = max(1, (chunk or CHUNK_ELEMENTS) // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], count):
        yield slice(start, min(start + count, shape[0]))


@dataclass(frozen=True)
class TensorSpec:
    """Data type and shape of a tensor to write."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


# Computes a tensor, by its key, in consecutive chunks.
Chunks = Callable[[str], Iterable[torch.Tensor]]


def write_weights(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    chunks_of: Chunks,
    max_shard_size: int | str = "5GB",
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write tensors to safetensors files, named and sharded as `save_pretrained` does.

    Several tensors are computed and written at once, in threads.

    Args:
        folder: Folder to write to.
        specs: Key -> data type and shape, in the order of the shards.
        chunks_of: Function from a key to the elements of its tensor: consecutive chunks of any length, in the tensor's
            data type.
        max_shard_size: Maximum size of a file in bytes, or a text such as "5GB".
        advance: Progress callback, called with the number of bytes just written.

    Raises:
        ValueError: if chunks do not add up to the tensor's shape, or have another data type.
    """
    split = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=WEIGHTS_PATTERN,
        max_shard_size=parse_shard_size(max_shard_size),
    )
    for name, keys in split.filename_to_tensors.items():
        # The widest data types first: narrow ones before them could leave them misaligned.
        ordered = sorted(keys, key=lambda key: -specs[key].dtype.itemsize)
        _write_file(folder / name, {key: specs[key] for key in ordered}, chunks_of, advance)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_weights(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    keep_dtype: Collection[str] = (),
) -> None:
    """Write tensors as `write_weights` does, unchanged or in another data type.

    Args:
        folder: Folder to write to.
        tensors: Key -> tensor to copy.
        dtype: Data type of the written weights, except routing biases, which transformers keeps in float32; by default
            that of each tensor.
        max_shard_size: Maximum size of a file in bytes, or a text such as "5GB".
        keep_dtype: Keys of further tensors whose data type stays as it is.

    Raises:
        ValueError: if a tensor holds NaN or infinite values, or values that `dtype` cannot represent; the message
            names it.
    """

    def spec_of(key: str, tensor: LazyTensor) -> TensorSpec:
        keeps_dtype = key in keep_dtype or is_routing_bias(key)
        return TensorSpec(tensor.dtype if dtype is None or keeps_dtype else dtype, tensor.shape)

    specs = {key: spec_of(key, tensor) for key, tensor in tensors.items()}

    def chunks_of(key: str) -> Iterator[torch.Tensor]:
        for rows in row_slices(specs[key].shape):
            chunk = tensors[key].read(rows)
            if not all_finite(chunk):
                raise ValueError(f"{key} holds NaN or infinite values: use an earlier checkpoint.")
            yield cast(chunk, specs[key].dtype, key)

    write_weights(folder, specs, chunks_of, max_shard_size)


def all_finite(chunk: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite values: one reduction, since a sum in float64 keeps both."""
    return not chunk.dtype.is_floating_point or bool(chunk.float().sum(dtype=torch.float64).isfinite())


def cast(chunk: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    """Convert a chunk to another data type.

    Args:
        chunk: Chunk of a tensor.
        dtype: Data type of the result.
        key: Key of the tensor, for the error message.

    Raises:
        ValueError: if float16 would overflow.
    """
    converted = chunk.to(dtype)
    if dtype == torch.float16 != chunk.dtype and not converted.isfinite().all():
        raise ValueError(f"{key} overflows in float16: choose bfloat16 or float32.")
    return converted


def is_routing_bias(key: str) -> bool:
    """Whether a key is that of DeepSeek-V3's expert routing bias, which stays in float32 in any checkpoint."""
    return key.endswith("e_score_correction_bias")


def _write_file(
    path: Path, specs: Mapping[str, TensorSpec], chunks_of: Chunks, advance: Callable[[int], object]
) -> None:
    header = _header(specs)
    starts = accumulate((spec.nbytes for spec in specs.values()), initial=len(header))
    offsets = dict(zip(specs, starts, strict=False))
    with path.open("wb") as file, _workers() as pool:
        file.write(header)
        file.flush()
        # The largest first, so that no thread is left alone with it at the end.
        largest_first = sorted(specs, key=lambda key: -specs[key].nbytes)
        jobs = {
            pool.submit(_write_tensor, path, offsets[key], key, specs[key], chunks_of): key for key in largest_first
        }
        unflushed = 0
        for job in as_completed(jobs):
            job.result()
            nbytes = specs[jobs[job]].nbytes
            advance(nbytes)
            unflushed += nbytes
            if unflushed >= _FLUSH_BYTES:
                # While other threads compute, rather than all at the end.
                os.fsync(file.fileno())
                unflushed = 0
        os.fsync(file.fileno())


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Open a pool with torch's number of threads, each of them single-threaded: chunks are too small to be divided."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threads(min(count, _MAX_THREADS)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


def _write_tensor(path: Path, offset: int, key: str, spec: TensorSpec, chunks_of: Chunks) -> None:
    written = 0
    with path.open("r+b") as file:
        file.seek(offset)
        for chunk in chunks_of(key):
            written += chunk.nbytes
            # Surplus bytes would overwrite the next tensor.
            if written <= spec.nbytes:
                file.write(_as_bytes(chunk, spec, key))
    if written != spec.nbytes:
        raise ValueError(f"{key} has {written} bytes, not the {spec.nbytes} of its shape {spec.shape}.")


def _as_bytes(chunk: torch.Tensor, spec: TensorSpec, key: str) -> memoryview:
    if chunk.dtype != spec.dtype:
        raise ValueError(f"{key} is to be written in {spec.dtype}, not in {chunk.dtype}.")
    return chunk.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, spec in specs.items():
        end = offset + spec.nbytes
        entries[key] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    # The format wants tensors to begin at a multiple of eight bytes.
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
