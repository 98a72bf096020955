"""Forward passes of a bounded size, and too little memory."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit import ranking_querit, scoring_querit
from modeling_querit.ranking_querit import score_stream
from modeling_querit.scoring_querit import Optimizations, default_batch_tokens, plan_batches


@pytest.fixture
def packs(loaded):
    """The packs that go through the model."""
    packs = []
    loaded.register_forward_pre_hook(lambda module, args, kwargs: packs.append(kwargs["pack"]), with_kwargs=True)
    return packs


@pytest.fixture
def sizes(loaded):
    """(rows, width) of every forward pass through the backbone."""
    sizes = []
    loaded.model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return sizes


def test_forward_passes_keep_to_batch_tokens(loaded, sizes, packs):
    loaded.predict([*tiny.pairs(), (tiny.QUERY, tiny.LONG_DOCUMENT)], batch_tokens=150)
    assert sizes == [(1, len(pack)) for pack in packs]
    assert sizes[0] == (1, tiny.MAX_LENGTH)
    assert all(width <= 150 for _, width in sizes[1:])
    assert sum(len(pack.pairs) for pack in packs) == len(tiny.DOCUMENTS) + 1
    assert max(len(pack.pairs) for pack in packs) > 1


def test_padded_forward_passes_keep_to_batch_tokens(loaded, sizes):
    pairs = [*tiny.pairs(), (tiny.QUERY, tiny.LONG_DOCUMENT)]
    assert len(list(score_stream(loaded, pairs, batch_tokens=150, optimizations=Optimizations(packing=False)))) == 7
    assert sizes[0] == (1, tiny.MAX_LENGTH)
    assert all(rows * width <= 150 for rows, width in sizes[1:])
    assert sum(rows for rows, _ in sizes) == len(tiny.DOCUMENTS) + 1
    assert max(rows for rows, _ in sizes) > 1


@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 500))
def test_plan_batches(lengths, batch_tokens):
    batches = list(plan_batches(lengths, batch_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_tokens
    longest = [max(lengths[index] for index in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    # No batch could have taken the next text as well.
    for batch, (first, *_) in pairwise(batches):
        assert (len(batch) + 1) * max(lengths[batch[0]], lengths[first]) > batch_tokens


def test_many_batches_are_planned():
    # Planning that looked at all lengths for each batch would not end.
    assert sum(1 for _ in plan_batches([1] * 100_000, 1)) == 100_000


def test_weights_that_float32_states_cannot_be_computed_with_are_computed_in_their_dtype(loaded, scores):
    asked = []

    def refuse(module, args, kwargs):
        asked.append(kwargs["mixed_precision"])
        if kwargs["mixed_precision"]:
            raise RuntimeError("expected scalar type Float but found BFloat16")

    loaded.register_forward_pre_hook(refuse, with_kwargs=True)
    for _ in range(2):
        assert loaded.predict(tiny.pairs()).tolist() == pytest.approx(scores, abs=1e-5)
    # It is tried once, and not again.
    assert asked == [True, False, False]


def test_default_batch_tokens(models):
    assert default_batch_tokens(models("qwen3")) == 2048
    assert default_batch_tokens(models("deepseek_v3")) == 8192


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
        monkeypatch.setattr(scoring_querit, "logger", logger)
        return model, sizes, warnings

    yield limit
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=["CUDA", "CPU", "MPS", "Python"])
@pytest.mark.parametrize("packing", [True, False])
def test_out_of_memory_halves_the_batches(models, limit_memory, monkeypatch, error, packing):
    monkeypatch.setattr(ranking_querit, "_PASSES_PER_WINDOW", 2)
    monkeypatch.setattr(ranking_querit, "_TOKENIZED_TOGETHER", 16)
    pairs = [(query, document) for document in tiny.STREAM for query in [tiny.QUERY, "a novel"]]
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
    expected = model.predict(tiny.pairs(tiny.STREAM)).tolist()
    packs = []

    def fail_once(module, args, kwargs):
        packs.append(kwargs["pack"])
        if len(packs) == 3:
            raise MEMORY_ERRORS[0]

    handle = model.register_forward_pre_hook(fail_once, with_kwargs=True)
    try:
        scores = model.predict(tiny.pairs(tiny.STREAM), batch_tokens=150).tolist()
    finally:
        handle.remove()
    assert scores == pytest.approx(expected, abs=1e-5)
    assert packs[2].carried_length > 0
    assert packs[3].carried_length == 0
    assert sum(len(pack.pairs) for pack in packs) == len(tiny.STREAM) + len(packs[2].pairs)


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
