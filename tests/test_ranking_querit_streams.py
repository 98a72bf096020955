"""Endless input."""

import pytest
import tiny
from torch import nn

from modeling_querit import ranking_querit


@pytest.fixture
def small_windows(monkeypatch):
    """Small windows; returns how many pairs may be read ahead of the scores."""
    monkeypatch.setattr(ranking_querit, "_TOKENIZED_TOGETHER", 16)
    monkeypatch.setattr(ranking_querit, "_PASSES_PER_WINDOW", 2)
    # A pair has more than 16 tokens, so that with 512 a batch two readings fill a window of two batches.
    return 2 * 512 // 16 + 16


@pytest.fixture(scope="module")
def stream_scores(models):
    return models("qwen3").predict(tiny.pairs(tiny.STREAM)).tolist()


class Documents:
    """5,000 documents; counts how many were read and how many are still in memory."""

    class Document(dict):
        def __init__(self, owner, index):
            super().__init__(text=tiny.STREAM[index * 7 % len(tiny.STREAM)])
            self.owner = owner
            owner.held += 1

        def __del__(self):
            self.owner.held -= 1

    def __init__(self, count=5000):
        self.count, self.read, self.held, self.most = count, 0, 0, 0

    def __iter__(self):
        for index in range(self.count):
            self.read += 1
            document = self.Document(self, index)
            self.most = max(self.most, self.held)
            yield document

    def expected(self, scores):
        return [scores[index * 7 % len(tiny.STREAM)] for index in range(self.count)]


@pytest.mark.slow
def test_predict_stream_reads_as_it_scores(models, stream_scores, small_windows):
    documents, scores, ahead = Documents(), [], 0
    for score in models("qwen3").predict_stream(((tiny.QUERY, document) for document in documents), batch_tokens=512):
        scores.append(score)
        ahead = max(ahead, documents.read - len(scores))
    assert type(scores[0]) is float
    assert documents.read == 5000
    assert ahead <= small_windows
    assert documents.most <= 2 * small_windows
    assert scores == pytest.approx(documents.expected(stream_scores), abs=1e-5)


@pytest.mark.slow
def test_top_k_of_a_stream(models, stream_scores, small_windows):
    documents = Documents()
    ranking = models("qwen3").rank(tiny.QUERY, documents, top_k=30, batch_tokens=512)
    assert documents.read == 5000
    assert documents.most <= 2 * small_windows + 30
    expected = sorted(documents.expected(stream_scores), reverse=True)[:30]
    assert [ranked.score for ranked in ranking] == pytest.approx(expected, abs=1e-5)
    assert all(ranked.document["text"] == tiny.STREAM[ranked.index * 7 % len(tiny.STREAM)] for ranked in ranking)


def test_nothing_is_read_before_the_first_score_is_asked_for(models, stream_scores, small_windows):
    documents = Documents()
    stream = models("qwen3").predict_stream(((tiny.QUERY, document) for document in documents), batch_tokens=512)
    assert documents.read == 0
    assert next(stream) == pytest.approx(stream_scores[0], abs=1e-5)
    assert 0 < documents.read <= small_windows
    # A caller that has seen enough leaves a model that can be used.
    stream.close()
    assert models("qwen3").predict(tiny.pairs(tiny.STREAM[:2])).tolist() == pytest.approx(stream_scores[:2], abs=1e-5)


@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_ties_in_a_stream_keep_the_given_order(loaded, small_windows, top_k):
    nn.init.zeros_(loaded.score.weight)
    nn.init.zeros_(loaded.score.bias)
    ranking = loaded.rank(tiny.QUERY, iter(tiny.STREAM), top_k=top_k, batch_tokens=512)
    assert [ranked.index for ranked in ranking] == list(range(top_k))
    assert [ranked.document for ranked in ranking] == tiny.STREAM[:top_k]


def test_an_error_in_the_input_comes_through(models, small_windows):
    def documents():
        yield from tiny.STREAM[:40]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        models("qwen3").rank(tiny.QUERY, documents(), top_k=2)


def test_predict_takes_any_iterable_of_pairs(model, scores):
    assert model.predict(pair for pair in tiny.pairs()).tolist() == pytest.approx(scores, abs=1e-5)
    assert list(model.predict_stream(iter(tiny.pairs()))) == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [60, 200, 100_000])
def test_many_queries_at_once(model, batch_tokens):
    queries = [tiny.QUERY, "a novel", "nobody asked", "", "x " * 30]
    alone = {query: model.predict(tiny.pairs(query=query)).tolist() for query in queries}
    pairs = [(query, document) for document in tiny.DOCUMENTS for query in queries] + [("only once", "x")]
    scores = model.predict(pairs, batch_tokens=batch_tokens).tolist()
    for index, query in enumerate(queries):
        assert scores[index :: len(queries)][: len(tiny.DOCUMENTS)] == pytest.approx(alone[query], abs=1e-5)
    assert scores[-1] == pytest.approx(model.predict(pairs[-1:]).item(), abs=1e-5)
