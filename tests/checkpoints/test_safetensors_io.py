"""Streamed reading and writing, against the safetensors library."""

import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoints import bits, whole

from modeling_querit import QueritForSequenceRanking
from modeling_querit.checkpoints import safetensors_io
from modeling_querit.checkpoints.safetensors_io import (
    INDEX_FILE,
    InMemoryTensor,
    TensorSpec,
    copy_weights,
    is_routing_bias,
    open_weights,
    parse_dtype,
    row_slices,
    write_weights,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
SHAPES = [(), (0,), (1,), (1, 1, 1), (7,), (3, 5), (5, 0), (0, 5), (2, 3, 5)]
CHUNKS = st.integers(1, 30)


def make(dtype, shape, seed=0):
    """A tensor of random bits, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(high, (math.prod(shape) * dtype.itemsize,), generator=generator).to(torch.uint8)
    return raw.view(dtype).reshape(shape)


def specs_of(tensors):
    return {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def write(folder, tensors, chunk=None, **options):
    """Write tensors by `write_weights`, in chunks of about `chunk` elements."""

    def chunks_of(key):
        for rows in row_slices(tensors[key].shape, chunk):
            yield tensors[key][rows] if tensors[key].shape else tensors[key]

    write_weights(folder, specs_of(tensors), chunks_of, **options)
    return folder


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (tensor.dtype, tensor.shape), key
        assert bits(actual[key]) == bits(tensor), key


@pytest.fixture
def reads(monkeypatch):
    """Sizes of all reads from files opened by `Path.open`, in bytes."""
    sizes = []
    open_path = Path.open

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, size=-1):
            data = self.file.read(size)
            sizes.append(len(data))
            return data

        def readinto(self, buffer):
            count = self.file.readinto(buffer)
            sizes.append(len(buffer))
            return count

    def counting_open(path, mode="r", *args, **kwargs):
        file = open_path(path, mode, *args, **kwargs)
        return Counting(file) if mode == "rb" else file

    monkeypatch.setattr(Path, "open", counting_open)
    return sizes


# Writing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_data_type_and_shape_is_read_by_safetensors(dtype, tmp_path):
    tensors = {str(shape): make(dtype, shape, seed) for seed, shape in enumerate(SHAPES)}
    write(tmp_path, tensors, chunk=4)
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)
    assert_same({key: whole(tensor) for key, tensor in open_weights(tmp_path).items()}, tensors)


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES)), min_size=1, max_size=8),
    CHUNKS,
    st.sampled_from([1, 40, 200, "5GB"]),
)
def test_random_tensors_are_read_by_safetensors(tmp_path_factory, kinds, chunk, max_shard_size):
    folder = tmp_path_factory.mktemp("written")
    tensors = {f"{index}.weight": make(*kind, seed=index) for index, kind in enumerate(kinds)}
    write(folder, tensors, chunk, max_shard_size=max_shard_size)
    assert_same(tiny.read_tensors(folder), tensors)
    assert_same({key: whole(tensor) for key, tensor in open_weights(folder).items()}, tensors)
    # Readers that map the file need aligned tensors.
    for tensor in open_weights(folder).values():
        assert tensor.offset % tensor.dtype.itemsize == 0


def test_keys_may_have_any_characters(tmp_path):
    tensors = {'a"b\\c': make(torch.int8, (3,)), "ключ.重み": make(torch.float32, (2, 2)), " ": make(torch.bool, (1,))}
    write(tmp_path, tensors)
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)
    assert_same({key: whole(tensor) for key, tensor in open_weights(tmp_path).items()}, tensors)


def test_shards_respect_the_maximum_size_and_are_indexed(tmp_path):
    tensors = {f"{index}.weight": make(torch.float32, (rows, 8)) for index, rows in enumerate([4, 4, 1, 100, 4, 9, 2])}
    write(tmp_path, tensors, max_shard_size=300)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{index + 1:05}-of-{len(names):05}.safetensors" for index in range(len(names))]
    assert len(names) > 2
    for name in names:
        shard = load_file(tmp_path / name)
        assert shard.keys() == {key for key, file_name in index["weight_map"].items() if file_name == name}
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 300


def test_one_file_has_no_index(tmp_path):
    write(tmp_path, {"a": make(torch.float32, (3,))})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("counts", [[], [2], [2, 1], [2, 3], [4, 1]])
def test_a_wrong_number_of_elements_names_the_tensor(counts, tmp_path):
    specs = {"a.weight": TensorSpec(torch.float32, (4,))}
    with pytest.raises(ValueError, match=r"a\.weight has \d+ bytes, not the 16 of its shape \(4,\)"):
        write_weights(tmp_path, specs, lambda key: [torch.zeros(count) for count in counts])


def test_a_wrong_data_type_names_the_tensor(tmp_path):
    specs = {"a.weight": TensorSpec(torch.float32, (4,))}
    with pytest.raises(ValueError, match=r"a\.weight is to be written in torch\.float32, not in torch\.float16"):
        write_weights(tmp_path, specs, lambda key: [torch.zeros(4, dtype=torch.float16)])


def test_chunks_may_have_any_strides(tmp_path):
    tensor = make(torch.float32, (6, 4))
    specs = {"a": TensorSpec(torch.float32, (6, 4))}
    write_weights(tmp_path, specs, lambda key: [tensor.T.contiguous().T[:2], tensor[2:3, :], tensor[3:]])
    assert bits(load_file(tmp_path / "model.safetensors")["a"]) == bits(tensor)


@pytest.mark.parametrize("size", ["many", "-5GB", "0GB", "", "5 GB", 0, -1])
def test_an_invalid_shard_size_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=rf"max_shard_size is {size!r}: give a number of bytes"):
        write(tmp_path, {"a": make(torch.float32, (3,))}, max_shard_size=size)


@pytest.mark.parametrize("size", [9, "9", "10000", "5GB", "5gb"])
def test_shard_sizes_are_numbers_or_texts(tmp_path, size):
    write(tmp_path, {"a": make(torch.float32, (3,))}, max_shard_size=size)
    assert load_file(tmp_path / "model.safetensors")["a"].shape == (3,)


# Copying


def copy_of(folder, destination, **options):
    shutil.copytree(folder, destination, ignore=shutil.ignore_patterns("*.safetensors"))
    copy_weights(destination, open_weights(folder), **options)
    return destination


@pytest.mark.slow
@pytest.mark.parametrize("max_shard_size", ["5GB", 20_000])
def test_copies_are_loaded_by_transformers(model, saved_folder, tmp_path, max_shard_size):
    copy = copy_of(saved_folder, tmp_path / "copy", max_shard_size=max_shard_size)
    assert (len(list(copy.glob("*.safetensors"))) > 1) == (max_shard_size == 20_000)
    assert_same(tiny.read_tensors(copy), tiny.read_tensors(saved_folder))
    assert_same(QueritForSequenceRanking.from_pretrained(copy).state_dict(), model.state_dict())


def test_an_error_in_a_thread_is_raised(tmp_path):
    """Afterwards torch has as many threads as before."""
    specs = {key: TensorSpec(torch.float32, (4,)) for key in "abcdefgh"}
    count = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="b has 12 bytes, not the 16"):
            write_weights(tmp_path, specs, lambda key: [torch.zeros(3 if key == "b" else 4)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(count)


def test_progress_is_reported_in_bytes(tmp_path):
    written = []
    specs = {
        "a": TensorSpec(torch.float32, (4,)),
        "b": TensorSpec(torch.bfloat16, (8, 5)),
        "c": TensorSpec(torch.float32, (0,)),
    }
    tensors = {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in specs.items()}
    write_weights(tmp_path, specs, lambda key: [tensors[key]], 20, written.append)
    assert sorted(written) == [0, 16, 80]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_copies_have_another_data_type(saved_folder, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 50)
    expected = {
        key: tensor if key.endswith("e_score_correction_bias") else tensor.to(dtype)
        for key, tensor in tiny.read_tensors(saved_folder).items()
    }
    copy_weights(tmp_path, open_weights(saved_folder), dtype)
    assert_same(tiny.read_tensors(tmp_path), expected)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_infinity_are_not_copied(tmp_path, dtype, wrong):
    tensor = torch.ones(3, 5)
    tensor[2, 4] = wrong
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinite"):
        copy_weights(tmp_path, {"model.norm.weight": InMemoryTensor(tensor.to(dtype))})


def test_routing_biases_are_recognised_by_their_keys(saved_folder, architecture):
    actual = [key for key in tiny.read_tensors(saved_folder) if is_routing_bias(key)]
    expected = {"qwen3": [], "deepseek_v3": ["model.layers.1.mlp.gate.e_score_correction_bias"]}
    assert actual == expected[architecture]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_copies_are_read_in_chunks(tmp_path, monkeypatch, reads, chunk):
    tensors = {"a": torch.randn(300, 16), "b": torch.randn(5000).half(), "c": make(torch.int8, (2, 30))}
    write(tmp_path, tensors)
    stored = open_weights(tmp_path)
    reads.clear()
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", chunk)
    (tmp_path / "copy").mkdir()
    copy_weights(tmp_path / "copy", stored)
    assert sum(reads) == sum(tensor.nbytes for tensor in tensors.values())
    # A whole row of the first tensor is 64 bytes.
    assert max(reads) <= max(4 * chunk, 64)
    assert_same(tiny.read_tensors(tmp_path / "copy"), tensors)


def test_opening_reads_only_headers(tmp_path, reads):
    write(tmp_path, {"a": make(torch.float32, (100_000,))})
    open_weights(tmp_path)
    assert 0 < sum(reads) < 1000


# Reading


@given(st.sampled_from(DTYPES), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_rows_are_those_of_safetensors(tmp_path_factory, dtype, shape, data):
    folder = tmp_path_factory.mktemp("stored")
    tensors = {name: make(dtype, shape, seed) for seed, name in enumerate("abc")}
    save_file(tensors, folder / "model.safetensors")
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    for key, tensor in open_weights(folder).items():
        actual = tensor.read(slice(start, stop))
        assert (actual.dtype, actual.shape) == (dtype, tensors[key][start:stop].shape)
        assert bits(actual) == bits(tensors[key][start:stop])


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_in_memory_are_read_like_stored_ones(shape, tmp_path):
    tensor = make(torch.float32, shape)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    stored, in_memory = open_weights(tmp_path)["a"], InMemoryTensor(tensor)
    assert (in_memory.dtype, in_memory.shape) == (stored.dtype, stored.shape)
    for rows in row_slices(shape, 2):
        assert bits(in_memory.read(rows)) == bits(stored.read(rows))


def test_overwriting_what_was_read_changes_nothing(tmp_path):
    tensor = make(torch.float32, (4, 2))
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    in_memory, stored = InMemoryTensor(tensor.clone()), open_weights(tmp_path)["a"]
    for lazy_tensor in (in_memory, stored):
        lazy_tensor.read(slice(1, 3)).zero_()
        assert bits(whole(lazy_tensor)) == bits(tensor)


@given(st.lists(st.integers(0, 7), max_size=4), CHUNKS)
def test_slices_cover_every_row_once(shape, chunk):
    slices = list(row_slices(shape, chunk))
    if not shape:
        assert slices == [slice(0, 1)]
        return
    assert [row for rows in slices for row in range(shape[0])[rows]] == list(range(shape[0]))
    entries = math.prod(shape[1:])
    assert all(rows.stop - rows.start == 1 or (rows.stop - rows.start) * entries <= chunk for rows in slices)
    # No more slices than necessary.
    if entries and shape[0]:
        assert len(slices) == math.ceil(shape[0] / max(1, chunk // entries))


def test_slices_have_the_default_size(monkeypatch):
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 10)
    assert list(row_slices((5, 4))) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    monkeypatch.undo()
    assert list(row_slices((5, 4))) == [slice(0, 5)]


# Damaged folders


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "shards").mkdir()
    tensors = {f"{index}.weight": make(torch.float32, (4, 8), index) for index in range(4)}
    return write(tmp_path / "shards", tensors, max_shard_size=300)


def test_a_missing_shard_is_named(shards):
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_weights(shards)


@pytest.mark.parametrize("left", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_named(shards, left):
    path = shards / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is damaged or truncated"):
        open_weights(shards)


def test_a_file_truncated_after_opening_is_named(tmp_path):
    write(tmp_path, {"a": make(torch.float32, (100,))})
    stored = open_weights(tmp_path)["a"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        whole(stored)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ""}}', "ü"]
)
def test_a_damaged_index_is_named(shards, content):
    (shards / INDEX_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors\.index\.json|shards"):
        open_weights(shards)


def test_an_unsupported_data_type_is_named(tmp_path):
    header = json.dumps({"a.weight": {"dtype": "U16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=r"model\.safetensors: a\.weight has the unsupported dtype U16"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "deep/../../outside.safetensors", "{}/outside.safetensors"])
def test_an_index_does_not_lead_out_of_the_folder(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    weight_map = {"a": name.replace("{}", str(tmp_path))}
    (inside / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({"a": torch.zeros(2)}, inside / "outside.safetensors")
    with pytest.raises(ValueError, match=r"a is in .*, which is not a safetensors file beside it"):
        open_weights(inside)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="has no safetensors files: weights in other formats are not read"):
        open_weights(tmp_path)


def test_the_files_are_those_that_transformers_loads(saved_folder, tmp_path):
    """Even beside an index of older shards, and weights in another layout."""
    folder = tmp_path / "folder"
    shutil.copytree(saved_folder, folder)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"score.bias": "old.safetensors"}}))
    save_file({"score.bias": torch.full((2,), 9.0)}, folder / "old.safetensors")
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    loaded = QueritForSequenceRanking.from_pretrained(folder)
    stored = open_weights(folder)
    assert bits(whole(stored["score.bias"])) == bits(loaded.score.bias.detach())
    assert stored.keys() == tiny.read_tensors(saved_folder).keys()


# Data types


@pytest.mark.parametrize(("name", "dtype"), [("auto", None), ("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_data_types_are_parsed(name, dtype):
    assert parse_dtype(name) is dtype


@pytest.mark.parametrize("name", ["fp16", "int8", "", "Float32", "nn", None])
def test_an_unknown_data_type_is_refused(name):
    with pytest.raises(ValueError, match="choose auto, float32, bfloat16 or float16"):
        parse_dtype(name)
