import math

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from modeling_querit.cache import EMBEDDINGS, SCORES, TEXTS, DiskCache, key_of

A, B, C = (key_of(name) for name in "abc")


# -- Keys


def test_keys_are_the_same_in_every_process():
    assert key_of("bm25", 1, ["a"], {"b": None}).hex() == "97804244bf5f7dc1b7fd22ede2fb4c77"
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of(("a", "b")) == key_of(["a", "b"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b"), ("ab",)),
        (("a", "b"), (["a", "b"],)),
        (("a", "b"), ("b", "a")),
        ((1,), ("1",)),
        ((1,), (1.0,)),
        ((1,), (True,)),
        ((None,), ("null",)),
        ((None,), ()),
        (("",), ()),
        (('a", "b',), ("a", "b")),
        (("\ud83d\ude00",), ("😀",)),
        (("é",), ("e\u0301",)),
        (("\ud800",), ("\ud801",)),
    ],
)
def test_different_values_have_different_keys(one, other):
    assert key_of(*one) != key_of(*other)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(VALUES, VALUES)
def test_any_values_have_a_key(one, other):
    assert len(key_of(one)) == 16
    # True is 1 in Python, and not in JSON.
    assert (key_of(one) == key_of(other)) == (repr(sorted_(one)) == repr(sorted_(other)))


def sorted_(value):
    if isinstance(value, dict):
        return {key: sorted_(value[key]) for key in sorted(value)}
    return [sorted_(item) for item in value] if isinstance(value, list) else value


# -- DiskCache


def test_added_values_can_be_read(tmp_path):
    cache = DiskCache(tmp_path / "new" / "folder", SCORES)
    assert dict(cache) == {}
    cache.add({A: 1.5, B: -2.0})
    cache.add({C: 1e-300})
    assert dict(cache) == {A: 1.5, B: -2.0, C: 1e-300}
    assert A in cache
    assert key_of("d") not in cache
    assert len(cache) == 3
    assert dict(DiskCache(tmp_path / "new" / "folder", SCORES)) == dict(cache)
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 2


def test_an_empty_batch_writes_nothing(tmp_path):
    DiskCache(tmp_path / "folder", SCORES).add({})
    assert not (tmp_path / "folder").exists()


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.binary(min_size=16, max_size=16), st.floats(), max_size=3), max_size=4))
def test_floats_come_back_to_the_bit(tmp_path_factory, batches):
    folder = tmp_path_factory.mktemp("cache")
    cache, expected = DiskCache(folder, SCORES), {}
    for batch in batches:
        batch = {key: value for key, value in batch.items() if key not in expected}
        cache.add(batch)
        expected |= batch
    for reader in (cache, DiskCache(folder, SCORES)):
        assert {key: float.hex(value) for key, value in reader.items()} == {
            key: float.hex(value) for key, value in expected.items()
        }


@pytest.mark.parametrize("text", ["", "a\x00b\n\r", "知らない", "👩‍👩‍👧", "كيف؟", "x" * 1_000_000])
def test_texts_come_back(tmp_path, text):
    DiskCache(tmp_path, TEXTS).add({A: text})
    assert DiskCache(tmp_path, TEXTS)[A] == text


@pytest.mark.slow
@given(st.lists(st.floats(width=32), max_size=9))
def test_embeddings_come_back_to_the_bit(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("cache")
    vector = np.array(values, np.float32)
    cache = DiskCache(folder, EMBEDDINGS)
    cache.add({A: vector, B: -vector})
    for reader in (cache, DiskCache(folder, EMBEDDINGS)):
        assert reader[A].dtype == np.float32
        assert reader[A].tobytes() == vector.tobytes()
        assert reader[B].tobytes() == (-vector).tobytes()


@pytest.mark.parametrize("value", [np.zeros(3), np.zeros((2, 3), np.float32)])
def test_other_arrays_than_float32_vectors_are_refused(tmp_path, value):
    with pytest.raises(TypeError, match="An embedding is a float32 vector"):
        DiskCache(tmp_path, EMBEDDINGS).add({A: value})
    assert list(tmp_path.iterdir()) == []


def test_several_processes_add_to_one_folder(tmp_path):
    one, other = DiskCache(tmp_path, SCORES), DiskCache(tmp_path, SCORES)
    one.add({A: 1.0})
    other.add({B: 2.0})
    assert B not in one
    one.refresh()
    other.refresh()
    assert dict(one) == dict(other) == {A: 1.0, B: 2.0}


def test_a_later_batch_replaces_a_value(tmp_path):
    cache = DiskCache(tmp_path, SCORES)
    cache.add({A: 1.0, B: 2.0})
    cache.add({A: 1.0, B: 3.0})
    assert dict(DiskCache(tmp_path, SCORES)) == dict(cache) == {A: 1.0, B: 3.0}


def test_a_batch_that_cannot_be_written_adds_nothing(tmp_path):
    cache = DiskCache(tmp_path, SCORES)
    cache.add({A: 1.0})
    for wrong in ({B: "text"}, {b"short": 1.0}):
        with pytest.raises((pyarrow.ArrowException, TypeError, ValueError)):
            cache.add({C: 1.0, **wrong})
        assert dict(cache) == dict(DiskCache(tmp_path, SCORES)) == {A: 1.0}


def test_other_and_incomplete_files_are_ignored(tmp_path):
    DiskCache(tmp_path, SCORES).add({A: 1.0})
    (tmp_path / "0123.parquet.part").write_bytes(b"PAR1")
    (tmp_path / "notes.txt").write_text("x")
    assert dict(DiskCache(tmp_path, SCORES)) == {A: 1.0}


KEYS = pyarrow.array([A], pyarrow.binary(16))


@pytest.mark.parametrize(
    "columns",
    [
        {"key": KEYS, "value": ["text"]},
        {"key": ["text"], "value": [1.0]},
        {"key": KEYS},
        {"value": [1.0]},
        {"other": [1.0]},
        {"key": KEYS, "value": [[1.0]]},
    ],
)
def test_a_table_with_other_columns_is_named(tmp_path, columns):
    parquet.write_table(pyarrow.table(columns), tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match=r"odd\.parquet is not a file of this cache .*Remove it"):
        DiskCache(tmp_path, SCORES)


def test_values_of_another_kind_are_refused(tmp_path):
    DiskCache(tmp_path, SCORES).add({A: 1.0})
    with pytest.raises(ValueError, match=r"\.parquet is not a file of this cache"):
        DiskCache(tmp_path, TEXTS)


@pytest.mark.parametrize("content", [b"", b"junk", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_not_parquet_is_named(tmp_path, content):
    (tmp_path / "odd.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.parquet is not a file of this cache"):
        DiskCache(tmp_path, SCORES)


def test_a_truncated_file_is_named(tmp_path):
    DiskCache(tmp_path, SCORES).add({key_of(n): math.pi for n in range(100)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=path.name):
        DiskCache(tmp_path, SCORES)


def test_names_of_folders_are_not_read_as_partitions(tmp_path):
    folder = tmp_path / "key=3" / "value=x"
    DiskCache(folder, SCORES).add({A: 1.0})
    assert dict(DiskCache(folder, SCORES)) == {A: 1.0}
