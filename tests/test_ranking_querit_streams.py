"""Endless input, and too little memory."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from modeling_querit import ranking_querit
from modeling_querit.ranking_querit import Optimizations, score_stream

# Streams


STREAM = [f"{word} {number}" for word in ["book", "novel", "judge", "x"] for number in range(25)]


@pytest.fixture
def small_windows(monkeypatch):
    """Small windows; returns how many pairs may be read ahead of the scores."""
    monkeypatch.setattr(ranking_querit, "_TOKENIZED_TOGETHER", 16)
    monkeypatch.setattr(ranking_querit, "_PASSES_PER_WINDOW", 2)
    # A pair has more than 16 tokens, so that with 512 a batch two readings fill a window of two batches.
    return 2 * 512 // 16 + 16


@pytest.fixture(scope="module")
def stream_scores(models):
    return models("qwen3").predict(tiny.pairs(STREAM)).tolist()


class Documents:
    """5,000 documents; counts how many were read and how many are still in memory."""

    class Document(dict):
        def __init__(self, owner, index):
            super().__init__(text=STREAM[index * 7 % len(STREAM)])
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
        return [scores[index * 7 % len(STREAM)] for index in range(self.count)]


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
    assert all(ranked.document["text"] == STREAM[ranked.index * 7 % len(STREAM)] for ranked in ranking)


def test_nothing_is_read_before_the_first_score_is_asked_for(models, stream_scores, small_windows):
    documents = Documents()
    stream = models("qwen3").predict_stream(((tiny.QUERY, document) for document in documents), batch_tokens=512)
    assert documents.read == 0
    assert next(stream) == pytest.approx(stream_scores[0], abs=1e-5)
    assert 0 < documents.read <= small_windows
    # A caller that has seen enough leaves a model that can be used.
    stream.close()
    assert models("qwen3").predict(tiny.pairs(STREAM[:2])).tolist() == pytest.approx(stream_scores[:2], abs=1e-5)


@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_ties_in_a_stream_keep_the_given_order(loaded, small_windows, top_k):
    nn.init.zeros_(loaded.score.weight)
    nn.init.zeros_(loaded.score.bias)
    ranking = loaded.rank(tiny.QUERY, iter(STREAM), top_k=top_k, batch_tokens=512)
    assert [ranked.index for ranked in ranking] == list(range(top_k))
    assert [ranked.document for ranked in ranking] == STREAM[:top_k]


def test_an_error_in_the_input_comes_through(models, small_windows):
    def documents():
        yield from STREAM[:40]
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


# Out of memory


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)."),
    MemoryError(),
]


@pytest.fixture
def limit_memory(models, monkeypatch):
    """Makes forward passes of too many tokens fail; returns a model, the sizes that were tried, and the warnings."""
    handles = []

    def limit(tokens, error):
        model, sizes, warnings = models("qwen3"), [], []

        def check_size(module, args, kwargs):
            sizes.append(len(kwargs["pack"]) if "pack" in kwargs else kwargs["input_ids"].numel())
            if sizes[-1] > tokens:
                raise error

        handles.append(model.register_forward_pre_hook(check_size, with_kwargs=True))
        logger = SimpleNamespace(warning=warnings.append, warning_once=lambda message: None)
        monkeypatch.setattr(ranking_querit, "logger", logger)
        return model, sizes, warnings

    yield limit
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=["CUDA", "CPU", "MPS", "Python"])
@pytest.mark.parametrize("packing", [True, False])
def test_out_of_memory_halves_the_batches(models, limit_memory, small_windows, error, packing):
    pairs = [(query, document) for document in STREAM for query in [tiny.QUERY, "a novel"]]
    expected = models("qwen3").predict(pairs).tolist()
    model, sizes, warnings = limit_memory(200, error)
    scored = score_stream(model, pairs, batch_tokens=1000, optimizations=Optimizations(packing=packing))
    assert [score for _, score in scored] == pytest.approx(expected, abs=1e-5)
    failed = [index for index, tokens in enumerate(sizes) if tokens > 200]
    assert 1 <= len(failed) <= 5
    assert len(warnings) == len(failed)
    assert all("Out of memory" in warning for warning in warnings)
    # Only the first window tries what does not fit: from then on, batches are small.
    assert failed == list(range(len(failed)))
    assert len(sizes) > 10


def test_out_of_memory_in_the_middle(models):
    """Scores that are known are kept, prefixes are computed anew."""
    model = models("qwen3")
    expected = model.predict(tiny.pairs(STREAM)).tolist()
    packs = []

    def fail_once(module, args, kwargs):
        packs.append(kwargs["pack"])
        if len(packs) == 3:
            raise MEMORY_ERRORS[0]

    handle = model.register_forward_pre_hook(fail_once, with_kwargs=True)
    try:
        scores = model.predict(tiny.pairs(STREAM), batch_tokens=150).tolist()
    finally:
        handle.remove()
    assert scores == pytest.approx(expected, abs=1e-5)
    assert packs[2].carried_length > 0
    assert packs[3].carried_length == 0
    assert sum(len(pack.pairs) for pack in packs) == len(STREAM) + len(packs[2].pairs)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "pairs", [[(tiny.QUERY, tiny.LONG_DOCUMENT)], [*tiny.pairs(), (tiny.QUERY, tiny.LONG_DOCUMENT)]]
)
def test_a_pair_that_does_not_fit_at_all(limit_memory, packing, pairs):
    model, _, _ = limit_memory(200, MEMORY_ERRORS[0])
    with pytest.raises(RuntimeError, match=f"A pair of {tiny.MAX_LENGTH} tokens does not fit.*max_length") as caught:
        list(score_stream(model, pairs, optimizations=Optimizations(packing=packing)))
    assert caught.value.__cause__ is MEMORY_ERRORS[0]


@pytest.mark.parametrize("packing", [True, False])
def test_other_errors_are_raised_as_they_are(limit_memory, packing):
    error = RuntimeError("a shape is wrong")
    model, sizes, warnings = limit_memory(0, error)
    with pytest.raises(RuntimeError) as caught:
        list(score_stream(model, tiny.pairs(), optimizations=Optimizations(packing=packing)))
    assert caught.value is error
    assert len(sizes) == 1
    assert warnings == []
