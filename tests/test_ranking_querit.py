import asyncio
import copy
import math
import re
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import tiny
import torch
from torch import nn
from transformers.utils import logging

from modeling_querit import QueritForSequenceClassification, RankedDocument, ranking_querit


@pytest.fixture
def broken(loaded):
    """Makes a model that gives a certain score to pairs of more than 50 tokens."""

    def make(value):
        def replace_scores(module, args, kwargs, output):
            segments = [segment for segment in kwargs["pack"].segments if segment.is_scored]
            lengths = torch.tensor([segment.prefix_length + segment.length for segment in segments])
            output.score = torch.where(lengths.unsqueeze(1) > 50, value, output.score)
            return output

        loaded.register_forward_hook(replace_scores, with_kwargs=True)
        return loaded

    return make


def in_order(scores):
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


# Results


def test_predict_gives_the_reference_scores(model, processor):
    scores = model.predict(tiny.pairs())
    assert scores.dtype == torch.float32
    assert scores.device.type == "cpu"
    assert scores.shape == (len(tiny.DOCUMENTS),)
    assert not scores.requires_grad
    encoded = processor.encode([tiny.QUERY] * len(tiny.DOCUMENTS), tiny.DOCUMENTS)
    expected = [tiny.reference_score(model, pair.input_ids) for pair in encoded]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_rank_sorts_by_score(model, scores):
    ranking = model.rank(tiny.QUERY, tiny.DOCUMENTS)
    assert [ranked.index for ranked in ranking] == in_order(scores)
    assert [ranked.score for ranked in ranking] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    for ranked in ranking:
        assert type(ranked) is RankedDocument
        assert type(ranked.index) is int
        assert type(ranked.score) is float
        # The document object itself, title included.
        assert ranked.document is tiny.DOCUMENTS[ranked.index]
        assert ranked == (ranked.index, ranked.score, ranked.document)


@pytest.mark.parametrize("top_k", [1, 3, 6, 100])
def test_top_k(model, scores, top_k):
    ranking = model.rank(tiny.QUERY, tiny.DOCUMENTS, top_k=top_k)
    assert [ranked.index for ranked in ranking] == in_order(scores)[:top_k]


def test_strings_and_dicts_are_the_same_documents(model):
    texts = ["a novel by lee", "the book"]
    scores = model.predict(tiny.pairs(texts)).tolist()
    assert model.predict(tiny.pairs([{"text": text} for text in texts])).tolist() == pytest.approx(scores, abs=1e-5)
    titled = model.predict(tiny.pairs([{"title": "a novel", "text": "by lee"}, {"title": "the", "text": "book"}]))
    assert titled.tolist() == pytest.approx(scores, abs=1e-5)


def test_any_iterable_of_documents(model, scores):
    ranking = model.rank(tiny.QUERY, iter(tiny.DOCUMENTS))
    assert [ranked.index for ranked in ranking] == in_order(scores)
    assert model.rank(tiny.QUERY, tuple(tiny.DOCUMENTS)) == ranking


def test_ties_keep_the_given_order(loaded):
    nn.init.zeros_(loaded.score.weight)
    nn.init.zeros_(loaded.score.bias)
    # Batches go by length, so this holds only if the order is put back.
    ranking = loaded.rank(tiny.QUERY, tiny.DOCUMENTS, batch_tokens=64)
    assert [ranked.index for ranked in ranking] == list(range(len(tiny.DOCUMENTS)))
    assert {ranked.score for ranked in ranking} == {0.0}
    assert [ranked.index for ranked in loaded.rank(tiny.QUERY, tiny.DOCUMENTS, top_k=2)] == [0, 1]


def test_no_documents(model):
    assert model.rank(tiny.QUERY, []) == []
    assert model.rank(tiny.QUERY, [], top_k=5) == []
    assert model.predict([]).shape == (0,)


def test_instruction_moves_the_scores(model, processor, scores):
    other = model.predict(tiny.pairs(), instruction="Find a novel.")
    ids = processor.encode([tiny.QUERY], tiny.DOCUMENTS[:1], "Find a novel.")[0].input_ids
    assert other[0].item() == pytest.approx(tiny.reference_score(model, ids), abs=1e-5)
    assert abs(other[0].item() - scores[0]) > 1e-4
    by_rank = {ranked.index: ranked.score for ranked in model.rank(tiny.QUERY, tiny.DOCUMENTS, "Find a novel.")}
    assert [by_rank[index] for index in range(len(other))] == pytest.approx(other.tolist(), abs=1e-5)


def test_max_length_cuts(model, processor):
    [score] = model.predict([(tiny.QUERY, tiny.LONG_DOCUMENT)], max_length=64).tolist()
    ids = processor.encode([tiny.QUERY], [tiny.LONG_DOCUMENT], max_length=64)[0].input_ids
    assert len(ids) == 64
    assert score == pytest.approx(tiny.reference_score(model, ids), abs=1e-5)
    [ranked] = model.rank(tiny.QUERY, [tiny.LONG_DOCUMENT], max_length=64)
    assert ranked.score == pytest.approx(score, abs=1e-5)


def test_the_classifier_ranks_alike(saved_folder, model, scores):
    classifier = QueritForSequenceClassification.from_pretrained(saved_folder)
    for batch_tokens in [100, 8192]:
        assert classifier.predict(tiny.pairs(), batch_tokens=batch_tokens).tolist() == pytest.approx(scores, abs=1e-5)
        stream = classifier.predict_stream(iter(tiny.pairs()), batch_tokens=batch_tokens)
        assert list(stream) == pytest.approx(scores, abs=1e-5)
    for top_k in [None, 2]:
        ranking, expected = (reranker.rank(tiny.QUERY, tiny.DOCUMENTS, top_k=top_k) for reranker in (classifier, model))
        assert [ranked.index for ranked in ranking] == [ranked.index for ranked in expected]
        assert [ranked.score for ranked in ranking] == pytest.approx([ranked.score for ranked in expected], abs=1e-5)


# What must not change a score


@pytest.mark.parametrize("batch_tokens", [1, 64, 130, 100_000])
def test_scores_do_not_depend_on_the_batches(model, scores, batch_tokens):
    assert model.predict(tiny.pairs(), batch_tokens=batch_tokens).tolist() == pytest.approx(scores, abs=1e-5)


def test_scores_do_not_depend_on_the_order(model, scores):
    assert model.predict(tiny.pairs()[::-1]).tolist()[::-1] == pytest.approx(scores, abs=1e-5)


def test_scores_do_not_depend_on_the_neighbours(model, scores):
    crowd = [(tiny.QUERY, tiny.LONG_DOCUMENT), *tiny.pairs(), ("nobody asked", "x")]
    assert model.predict(crowd).tolist()[1:-1] == pytest.approx(scores, abs=1e-5)
    assert [model.predict([pair]).item() for pair in tiny.pairs()] == pytest.approx(scores, abs=1e-5)


def test_a_batch_of_nothing_is_refused_at_once(model):
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        model.predict_stream(tiny.pairs(), batch_tokens=0)


@pytest.mark.parametrize("batch_tokens", [0, -5])
def test_an_empty_budget_is_an_error(model, batch_tokens):
    with pytest.raises(ValueError, match=f"batch_tokens is {batch_tokens}"):
        model.predict(tiny.pairs(), batch_tokens=batch_tokens)


@pytest.mark.parametrize("training", [True, False])
def test_an_interrupt_leaves_the_model_as_it_was(loaded, scores, training):
    loaded.train(training)
    calls = []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = loaded.model.layers[1].register_forward_pre_hook(interrupt)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in loaded.modules()]
    attention = loaded.model.config._attn_implementation
    with pytest.raises(KeyboardInterrupt):
        loaded.predict(tiny.pairs(), batch_tokens=64)
    assert {module.training for module in loaded.modules()} == {training}
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in loaded.modules()] == hooks
    assert loaded.model.config._attn_implementation == attention
    handle.remove()
    assert loaded.predict(tiny.pairs(), batch_tokens=64).tolist() == pytest.approx(scores, abs=1e-5)


# The state of the model


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(loaded, scores, training):
    loaded.train(training)
    seen = []
    for part in [loaded.model, loaded.score]:
        part.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    assert loaded.predict(tiny.pairs()).tolist() == pytest.approx(scores, abs=1e-5)
    assert set(seen) == {False}
    assert all(module.training is training for module in loaded.modules())


def test_training_mode_is_restored_module_by_module(loaded):
    """A frozen backbone stays in evaluation mode while the head trains."""
    loaded.train()
    loaded.model.eval()
    loaded.rank(tiny.QUERY, tiny.DOCUMENTS)
    assert loaded.training
    assert loaded.score.training
    assert not loaded.model.training


def test_training_mode_is_restored_after_an_error(broken):
    model = broken(math.nan)
    model.train()
    with pytest.raises(ValueError, match="NaN"):
        model.predict(tiny.pairs())
    assert model.training


def test_dropout_is_off(architecture, processor):
    model = tiny.make_model(architecture, processor, attention_dropout=0.5)
    model.train()
    assert torch.equal(model.predict(tiny.pairs()), model.predict(tiny.pairs()))


def test_no_gradients_are_kept(loaded):
    scores = loaded.predict(tiny.pairs())
    assert scores.grad_fn is None
    # An ordinary tensor, which may take part in training.
    (scores * torch.ones(len(scores), requires_grad=True)).sum().backward()


# In an event loop


def test_arank_is_rank_while_the_event_loop_goes_on(models):
    model = models("deepseek_v3")
    started, released = threading.Event(), threading.Event()

    def documents():
        yield from tiny.DOCUMENTS[:2]
        started.set()
        assert released.wait(10)
        yield from tiny.DOCUMENTS[2:]

    async def main():
        task = asyncio.ensure_future(model.arank(tiny.QUERY, documents(), tiny.INSTRUCTION, 3, max_length=64))
        while not started.is_set():
            await asyncio.sleep(0.001)
        assert not task.done()
        released.set()
        return await task

    assert asyncio.run(main()) == model.rank(tiny.QUERY, tiny.DOCUMENTS, tiny.INSTRUCTION, 3, max_length=64)
    with pytest.raises(TypeError, match="query is NoneType"):
        asyncio.run(model.arank(None, tiny.DOCUMENTS))


def test_a_cancelled_arank_stops_after_its_forward_pass(loaded):
    expected, passes, started, released = loaded.predict(tiny.pairs()), [], threading.Event(), threading.Event()

    def wait(*_):
        passes.append(threading.current_thread())
        started.set()
        assert released.wait(10)

    hook = loaded.register_forward_pre_hook(wait)

    async def main():
        task = asyncio.ensure_future(loaded.arank(tiny.QUERY, tiny.DOCUMENTS * 50, batch_tokens=64))
        while not started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        released.set()

    # The end of the loop waits for its threads.
    asyncio.run(main())
    assert len(passes) == 1
    assert passes[0] is not threading.main_thread()
    hook.remove()
    assert loaded.predict(tiny.pairs()).tolist() == expected.tolist()


# Errors


@pytest.mark.parametrize("documents", ["a bare string", {"text": "one document"}])
def test_one_document_instead_of_a_list_is_an_error(model, documents):
    with pytest.raises(TypeError, match="list of documents"):
        model.rank(tiny.QUERY, documents)


@pytest.mark.parametrize("documents", [["x", None], [7], [b"bytes"], [{"title": "only"}], [["x"]], b"bytes"])
def test_documents_that_are_not_text_are_an_error(model, documents):
    with pytest.raises(TypeError, match="document"):
        model.rank(tiny.QUERY, documents)


@pytest.mark.parametrize("query", [None, 7, b"bytes", ["who"]])
def test_a_query_that_is_not_text_is_an_error(model, query):
    with pytest.raises(TypeError, match="query"):
        model.rank(query, tiny.DOCUMENTS)


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_an_error(model, top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}"):
        model.rank(tiny.QUERY, tiny.DOCUMENTS, top_k=top_k)


@pytest.mark.parametrize(("value", "name"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_nan_and_infinite_scores_are_an_error(broken, value, name):
    model = broken(value)
    with pytest.raises(ValueError, match=rf"score of document 4 is {name} \(2 of 6"):
        model.rank(tiny.QUERY, tiny.DOCUMENTS)
    with pytest.raises(ValueError, match=name):
        model.predict(tiny.pairs())


def test_damaged_weights_are_an_error(loaded):
    with torch.no_grad():
        loaded.model.norm.weight[3] = math.nan
    with pytest.raises(ValueError, match="document 0 is NaN"):
        loaded.rank(tiny.QUERY, tiny.DOCUMENTS)


def test_a_model_without_a_tokenizer_says_so(architecture):
    with pytest.raises(ValueError, match=r"model\.processor = QueritProcessor"):
        tiny.make_model(architecture).rank(tiny.QUERY, tiny.DOCUMENTS)


# Progress bar and warnings


def test_progress_bar(models, capsys):
    model = models("qwen3")
    was_enabled = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        model.predict(tiny.pairs(), show_progress_bar=True)
        shown = capsys.readouterr().err
        assert "Scoring" in shown
        assert f"{len(tiny.DOCUMENTS)}/{len(tiny.DOCUMENTS)}" in shown
        model.rank(tiny.QUERY, tiny.DOCUMENTS, show_progress_bar=True)
        assert "Scoring" in capsys.readouterr().err
        for quiet in [False, None]:
            # By default a quick call is quiet, and so is one without a terminal.
            model.rank(tiny.QUERY, tiny.DOCUMENTS, show_progress_bar=quiet)
            assert "Scoring" not in capsys.readouterr().err
        logging.disable_progress_bar()
        model.predict(tiny.pairs(), show_progress_bar=True)
        assert "Scoring" not in capsys.readouterr().err
    finally:
        (logging.enable_progress_bar if was_enabled else logging.disable_progress_bar)()


@pytest.mark.parametrize("is_list", [True, False])
def test_the_progress_bar_knows_the_total_of_a_list(models, monkeypatch, is_list):
    bars = []

    class Bar:
        def __init__(self, total, **kwargs):
            self.total, self.done, self.is_closed = total, 0, False
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.is_closed = True

        def update(self, count):
            self.done += count

    monkeypatch.setattr(ranking_querit.logging, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model, wrap = models("qwen3"), list if is_list else iter
    model.predict(wrap(tiny.pairs()))
    model.rank(tiny.QUERY, wrap(tiny.DOCUMENTS), top_k=2, batch_tokens=64)
    list(model.predict_stream(wrap(tiny.pairs())))
    count = len(tiny.DOCUMENTS)
    assert [bar.total for bar in bars] == [count if is_list else None] * 3
    assert [bar.done for bar in bars] == [count] * 3
    assert all(bar.is_closed for bar in bars)


def test_a_warning_says_that_pairs_were_cut(models, monkeypatch):
    model, messages = models("qwen3"), []
    monkeypatch.setattr(ranking_querit, "logger", SimpleNamespace(warning_once=messages.append))
    model.predict(tiny.pairs())
    assert messages == []
    model.predict([*tiny.pairs(), (tiny.QUERY, tiny.LONG_DOCUMENT), ("who " * 300, "x")])
    [message] = messages
    assert "longer than max_length" in message


@pytest.mark.parametrize("pairs", [[None], ["ab"], [("a", "b"), ("a",)], ("ab", "cd"), [{"query": "a", "text": "b"}]])
def test_an_error_names_what_is_not_a_pair(model, pairs):
    with pytest.raises(TypeError, match=r"Pair [01] is .*: give \(query, document\) tuples"):
        model.predict(pairs)


def test_a_list_of_instructions_is_refused(model):
    with pytest.raises(TypeError, match="give one string"):
        model.predict(tiny.pairs(), ["one"] * len(tiny.pairs()))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"max_length": 64.0}, TypeError, "max_length is float 64.0"),
        ({"max_length": 0}, ValueError, "max_length is 0"),
        ({"max_length": True}, TypeError, "max_length is bool True"),
        ({"batch_tokens": True}, TypeError, "batch_tokens is bool True"),
        ({"batch_tokens": "x"}, TypeError, "batch_tokens is str 'x'"),
        ({"batch_tokens": math.nan}, TypeError, "batch_tokens is float nan"),
        ({"top_k": "x"}, TypeError, "top_k is str 'x'"),
        ({"top_k": 1.0}, TypeError, "top_k is float 1.0"),
        ({"top_k": torch.tensor(1.5)}, TypeError, "top_k is Tensor"),
        ({"instruction": ["a"]}, TypeError, "instruction is list"),
        ({"show_progress_bar": "no"}, TypeError, "show_progress_bar is str 'no'"),
        ({"query": None}, TypeError, "query is NoneType None"),
        ({"documents": 5}, TypeError, "documents is int 5"),
        ({"documents": b"a text"}, TypeError, "documents is bytes"),
        ({"documents": pandas.DataFrame({"text": ["a"]})}, TypeError, "documents is a table (DataFrame)"),
    ],
)
def test_arguments_of_other_types_are_named_before_anything_is_read(models, arguments, error, words):
    def documents():
        pytest.fail("read")
        yield

    with pytest.raises(error, match=re.escape(words)) as caught:
        models("qwen3").rank(**{"query": tiny.QUERY, "documents": documents()} | arguments)
    assert "\n" not in str(caught.value)
    if not arguments.keys() & {"top_k", "query", "documents"}:
        with pytest.raises(error, match=re.escape(words)):
            models("qwen3").predict(documents(), **arguments)


def test_integers_of_other_libraries_are_integers(models):
    expected = models("qwen3").rank(tiny.QUERY, tiny.DOCUMENTS, top_k=2, max_length=64)
    given = models("qwen3").rank(tiny.QUERY, tiny.DOCUMENTS, top_k=np.int64(2), max_length=torch.tensor(64))
    assert given == expected


@pytest.mark.parametrize("as_dict", [True, False])
def test_one_bad_score_among_thousands_is_named(models, as_dict):
    model = copy.deepcopy(models("qwen3"))
    with torch.no_grad():
        model.model.embed_tokens.weight[model.processor.tokenizer.convert_tokens_to_ids("Z")] = math.nan
    documents = ["x"] * 3000
    documents[2900] = "Z"
    if as_dict:
        documents = [{"_id": f"doc-{index}", "text": text} for index, text in enumerate(documents)]
    with pytest.raises(
        ValueError, match=r"document 2900 \(id str 'doc-2900'\) is NaN" if as_dict else "document 2900 is NaN"
    ):
        model.rank(tiny.QUERY, documents)
