import math

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from modeling_querit.adaptation.shards import Shards, key_of

FLOATS, TEXTS = pyarrow.float64(), pyarrow.string()
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
def test_other_values_another_key(one, other):
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
    return [sorted_(each) for each in value] if isinstance(value, list) else value


# -- Shards


def test_what_was_added_is_there(tmp_path):
    shards = Shards(tmp_path / "new" / "folder", FLOATS)
    assert dict(shards) == {}
    shards.add({A: 1.5, B: -2.0})
    shards.add({C: 1e-300})
    assert dict(shards) == {A: 1.5, B: -2.0, C: 1e-300}
    assert A in shards
    assert key_of("d") not in shards
    assert len(shards) == 3
    assert dict(Shards(tmp_path / "new" / "folder", FLOATS)) == dict(shards)
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 2


def test_nothing_is_no_batch(tmp_path):
    Shards(tmp_path / "folder", FLOATS).add({})
    assert not (tmp_path / "folder").exists()


@given(st.lists(st.dictionaries(st.binary(min_size=16, max_size=16), st.floats(), max_size=3), max_size=4))
def test_floats_come_back_to_the_bit(tmp_path_factory, batches):
    folder = tmp_path_factory.mktemp("shards")
    shards, expected = Shards(folder, FLOATS), {}
    for batch in batches:
        batch = {key: value for key, value in batch.items() if key not in expected}
        shards.add(batch)
        expected |= batch
    for found in (shards, Shards(folder, FLOATS)):
        assert {key: float.hex(value) for key, value in found.items()} == {
            key: float.hex(value) for key, value in expected.items()
        }


@pytest.mark.parametrize("text", ["", "a\x00b\n\r", "知らない", "👩‍👩‍👧", "كيف؟", "x" * 1_000_000])
def test_texts_come_back(tmp_path, text):
    Shards(tmp_path, TEXTS).add({A: text})
    assert Shards(tmp_path, TEXTS)[A] == text


def test_several_add_to_one_folder(tmp_path):
    one, other = Shards(tmp_path, FLOATS), Shards(tmp_path, FLOATS)
    one.add({A: 1.0})
    other.add({B: 2.0})
    assert B not in one
    one.refresh()
    other.refresh()
    assert dict(one) == dict(other) == {A: 1.0, B: 2.0}


def test_a_value_of_one_batch_more(tmp_path):
    shards = Shards(tmp_path, FLOATS)
    shards.add({A: 1.0, B: 2.0})
    shards.add({A: 1.0, B: 3.0})
    assert dict(Shards(tmp_path, FLOATS)) == dict(shards) == {A: 1.0, B: 3.0}


def test_a_batch_that_could_not_be_written_is_not_there(tmp_path):
    shards = Shards(tmp_path, FLOATS)
    shards.add({A: 1.0})
    for wrong in ({B: "text"}, {b"short": 1.0}):
        with pytest.raises((pyarrow.ArrowException, TypeError, ValueError)):
            shards.add({C: 1.0, **wrong})
        assert dict(shards) == dict(Shards(tmp_path, FLOATS)) == {A: 1.0}


def test_a_file_that_was_never_finished_is_no_shard(tmp_path):
    Shards(tmp_path, FLOATS).add({A: 1.0})
    (tmp_path / "0123.parquet.part").write_bytes(b"PAR1")
    (tmp_path / "notes.txt").write_text("x")
    assert dict(Shards(tmp_path, FLOATS)) == {A: 1.0}


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
def test_a_table_that_is_no_shard_is_named(tmp_path, columns):
    parquet.write_table(pyarrow.table(columns), tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match=r"odd\.parquet is no shard of this run .*remove it"):
        Shards(tmp_path, FLOATS)


def test_scores_are_no_texts(tmp_path):
    Shards(tmp_path, FLOATS).add({A: 1.0})
    with pytest.raises(ValueError, match=r"\.parquet is no shard"):
        Shards(tmp_path, TEXTS)


@pytest.mark.parametrize("content", [b"", b"junk", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_no_parquet_is_named(tmp_path, content):
    (tmp_path / "odd.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.parquet is no shard"):
        Shards(tmp_path, FLOATS)


def test_a_shard_that_is_cut_off_is_named(tmp_path):
    Shards(tmp_path, FLOATS).add({key_of(n): math.pi for n in range(100)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=path.name):
        Shards(tmp_path, FLOATS)


def test_names_of_folders_do_not_matter(tmp_path):
    folder = tmp_path / "key=3" / "value=x"
    Shards(folder, FLOATS).add({A: 1.0})
    assert dict(Shards(folder, FLOATS)) == {A: 1.0}
