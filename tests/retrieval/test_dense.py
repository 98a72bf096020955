import pytest
import torch

from modeling_querit.retrieval.dense import DenseIndex

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
