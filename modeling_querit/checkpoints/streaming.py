"""Weights read and written in parts, so that no checkpoint needs to fit in memory: the safetensors format."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from ..threads import threads

WEIGHTS_PATTERN = "model{suffix}.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Elements held at a time, of each checkpoint: 4 MB in float32, which caches hold.
CHUNK = 1024 * 1024
# Bytes after which what was written is sent to the disk.
_FLUSHED = 32 * 1024**2
# Tensors are computed in so many threads at most: disks have no use for more.
_MOST_THREADS = 8

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_SIZE = re.compile(r"0*[1-9]\d*[KMGT]B", re.IGNORECASE)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_named(name: str) -> torch.dtype | None:
    """The dtype of weights: "float32", "bfloat16" or "float16"; None for "auto", that of the checkpoint.

    Raises:
        ValueError: for any other name.
    """
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {name!r}: choose auto, float32, bfloat16 or float16.")
    return None if name == "auto" else getattr(torch, name)


def checked_size(size: int | str) -> int | str:
    """The bytes of a file, or a text such as "5GB", as huggingface_hub reads it.

    Raises:
        ValueError: if it is neither, or nothing fits in.
    """
    if isinstance(size, str) and size.isdigit():
        size = int(size)
    if size < 1 if isinstance(size, int) else not _SIZE.fullmatch(size):
        raise ValueError(f"max_shard_size is {size!r}: give bytes, or a size such as 5GB.")
    return size


class LazyTensor(Protocol):
    """A tensor that is read row by row: `dtype`, `shape`, and `read`."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, rows: slice) -> torch.Tensor:
        """These entries of the first dimension, a tensor of one's own."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Args:
        path: The file.
        offset: Where its bytes begin.
        dtype: Of its entries.
        shape: Its shape.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, rows: slice) -> torch.Tensor:
        """These entries of the first dimension. Read, not mapped: mapped pages would stay, and count, as memory."""
        shape = (rows.stop - rows.start, *self.shape[1:]) if self.shape else ()
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        buffer = torch.empty(math.prod(shape) * self.dtype.itemsize, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + (rows.start or 0) * row_bytes)
            _fill(file, memoryview(buffer.numpy()))
        return buffer.view(self.dtype).view(shape)


def _fill(file: BinaryIO, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise ValueError(f"{file.name} is cut short.")
        buffer = buffer[count:]


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's safetensors files, by their keys.

    Raises:
        FileNotFoundError: if there are no safetensors files, or one that the index names is missing.
        ValueError: if a file is damaged; it is named.
    """
    whole, index = folder / WEIGHTS_PATTERN.format(suffix=""), folder / INDEX_FILE
    if whole.exists():
        # As transformers does, even where there is an index too.
        paths = [whole]
    elif index.exists():
        paths = [folder / name for name in _shards_of(index)]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no safetensors files: weights in other formats are not read.")
    return {key: tensor for path in paths for key, tensor in _open_file(path)}


def _shards_of(index: Path) -> list[str]:
    try:
        names = {Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}).") from None
    if not all(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{index} is damaged, or names files that are not safetensors.")
    return sorted(names)


def _open_file(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, though the index names it.")
    try:
        # Checks the header, and that the file is as long as it says.
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}).") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for key, spec in header.items():
        if spec["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {key} has dtype {spec['dtype']}, which is not read.")
        start = 8 + length + spec["data_offsets"][0]
        yield key, StoredTensor(path, start, _DTYPES[spec["dtype"]], tuple(spec["shape"]))


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that is in memory already, among others that are not.

    Args:
        tensor: It.
    """

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of its entries."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    def read(self, rows: slice) -> torch.Tensor:
        """These entries of the first dimension."""
        return (self.tensor[rows] if self.shape else self.tensor).clone()


def row_slices(shape: Sequence[int], chunk: int | None = None) -> Iterator[slice]:
    """Slices of the first dimension of about `chunk` entries each (`CHUNK` by default), a whole row at least."""
    if not shape:
        yield slice(0, 1)
        return
    count = max(1, (chunk or CHUNK) // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], count):
        yield slice(start, min(start + count, shape[0]))


@dataclass(frozen=True)
class Spec:
    """What a tensor that is to be written will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its entries."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path,
    specs: Mapping[str, Spec],
    chunks_of: Callable[[str], Iterable[torch.Tensor]],
    max_shard_size: int | str = "5GB",
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write tensors in safetensors files, with an index where there is more than one, as `save_pretrained` names them.

    Several tensors are computed and written at a time, in threads.

    Args:
        folder: Where.
        specs: Dtype and shape of each tensor, by key, in the order of the files.
        chunks_of: The entries of a tensor, in order, in parts of any length, in its dtype.
        max_shard_size: Bytes of one file, or a string such as "5GB".
        advance: Told how many bytes have been written.
    """
    split = split_state_dict_into_shards_factory(
        specs,
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=WEIGHTS_PATTERN,
        max_shard_size=checked_size(max_shard_size),
    )
    for name, keys in split.filename_to_tensors.items():
        # The widest entries first, or narrow ones before them might leave them at odd addresses.
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
    kept: Collection[str] = (),
) -> None:
    """Write tensors as `write_weights` does, as they are or in another dtype.

    Args:
        folder: Where.
        tensors: By their keys.
        dtype: Of all but routing biases, which transformers keeps in float32; by default that of each tensor.
        max_shard_size: Bytes of one file.
        kept: Keys of more tensors that keep their dtype.

    Raises:
        ValueError: if a tensor holds NaN or infinite numbers, or ones that the dtype cannot hold; it is named.
    """
    specs = {
        key: Spec(tensor.dtype if dtype is None or key in kept or is_routing_bias(key) else dtype, tensor.shape)
        for key, tensor in tensors.items()
    }

    def chunks_of(key: str) -> Iterator[torch.Tensor]:
        for rows in row_slices(specs[key].shape):
            chunk = tensors[key].read(rows)
            if not is_finite(chunk):
                raise ValueError(f"{key} holds NaN or infinite numbers: take a checkpoint from before that.")
            yield narrowed(chunk, specs[key].dtype, key)

    write_weights(folder, specs, chunks_of, max_shard_size)


def is_finite(chunk: torch.Tensor) -> bool:
    """Whether all of some weights are numbers, and finite: then so is their sum, else never."""
    return not chunk.dtype.is_floating_point or bool(chunk.float().sum(dtype=torch.float64).isfinite())


def narrowed(chunk: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    """Numbers in another dtype.

    Raises:
        ValueError: if float16 cannot hold one of them.
    """
    found = chunk.to(dtype)
    if dtype == torch.float16 != chunk.dtype and not found.isfinite().all():
        raise ValueError(f"{key} has numbers that float16 cannot hold: take bfloat16 or float32.")
    return found


def is_routing_bias(key: str) -> bool:
    """Whether a tensor is what DeepSeek-V3 adds to the scores of experts: float32, whatever the weights are in."""
    return key.endswith("e_score_correction_bias")


def _write_file(
    path: Path,
    specs: Mapping[str, Spec],
    chunks_of: Callable[[str], Iterable[torch.Tensor]],
    advance: Callable[[int], object],
) -> None:
    header = _header(specs)
    starts = accumulate((spec.nbytes for spec in specs.values()), initial=len(header))
    places = dict(zip(specs, starts, strict=False))
    with path.open("wb") as file, _workers() as pool:
        file.write(header)
        file.flush()
        # The longest first, so that in the end no thread is left alone with it.
        order = sorted(specs, key=lambda key: -specs[key].nbytes)
        jobs = {pool.submit(_write_tensor, path, places[key], key, specs[key], chunks_of): key for key in order}
        dirty = 0
        for job in as_completed(jobs):
            job.result()
            advance(specs[jobs[job]].nbytes)
            dirty += specs[jobs[job]].nbytes
            if dirty >= _FLUSHED:
                # While others compute, instead of all at the end.
                os.fsync(file.fileno())
                dirty = 0
        os.fsync(file.fileno())


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has for one operation, each with one: parts are too short to be divided."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threads(min(count, _MOST_THREADS)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


def _write_tensor(
    path: Path, place: int, key: str, spec: Spec, chunks_of: Callable[[str], Iterable[torch.Tensor]]
) -> None:
    written = 0
    with path.open("r+b") as file:
        file.seek(place)
        for chunk in chunks_of(key):
            written += chunk.nbytes
            # What is too much would overwrite the next tensor.
            if written <= spec.nbytes:
                file.write(_bytes(chunk, spec, key))
    if written != spec.nbytes:
        raise ValueError(f"{key} has {written} bytes, not the {spec.nbytes} of its shape {spec.shape}.")


def _bytes(chunk: torch.Tensor, spec: Spec, key: str) -> memoryview:
    if chunk.dtype != spec.dtype:
        raise ValueError(f"{key} is to be written in {spec.dtype}, not in {chunk.dtype}.")
    return memoryview(chunk.contiguous().reshape(-1).view(torch.uint8).numpy())


def _header(specs: Mapping[str, Spec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, spec in specs.items():
        end = offset + spec.nbytes
        entries[key] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    # Padded, so that tensors begin at a multiple of eight bytes, as the format wants it.
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
