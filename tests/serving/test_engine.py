"""From pairs to scores, with a real model: the scores are those of `predict`."""

import asyncio

import pytest
import tiny

from modeling_querit.serving.engine import Engine
from modeling_querit.serving.errors import RequestError
from modeling_querit.serving.jobs import Options
from modeling_querit.serving.metrics import Metrics
from modeling_querit.serving.settings import ServerSettings

NO_OPTIONS = Options()


@pytest.fixture
def engines(served_model):
    started = []

    def make(**kwargs):
        engine = Engine(served_model, ServerSettings(**kwargs), Metrics())
        engine.start()
        started.append(engine)
        return engine

    yield make
    for engine in started:
        engine.close()


def score(engine, *requests, options=NO_OPTIONS, may_cut=True):
    async def together():
        return await asyncio.gather(*(engine.score(pairs, options, may_cut=may_cut) for pairs in requests))

    return [scored.scores for scored in asyncio.run(together())]


@pytest.mark.parametrize("batch_tokens", [None, 64])
def test_scores_are_those_of_predict(engines, served_model, batch_tokens):
    requests = [tiny.pairs(), tiny.pairs(query="another query"), tiny.pairs(tiny.DOCUMENTS[:1])]
    for scores, pairs in zip(score(engines(batch_tokens=batch_tokens), *requests), requests, strict=True):
        assert scores == pytest.approx(served_model.predict(pairs).tolist(), abs=1e-5)


def test_instruction_and_length_are_those_of_the_request(engines, served_model):
    pairs = tiny.pairs([tiny.LONG_DOCUMENT, *tiny.DOCUMENTS])
    options = Options(tiny.INSTRUCTION, 64)
    expected = served_model.predict(pairs, *options[:1], max_length=64).tolist()
    assert score(engines(), pairs, options=options) == [pytest.approx(expected, abs=1e-5)]


def test_a_request_cannot_ask_for_more_tokens_than_the_server_allows(engines, served_model):
    pairs = tiny.pairs([tiny.LONG_DOCUMENT])
    expected = served_model.predict(pairs, max_length=64).tolist()
    engine = engines(max_length=64)
    assert engine.max_length == 64
    assert score(engine, pairs, options=Options(max_length=200)) == [pytest.approx(expected, abs=1e-5)]
    assert engines(max_length=100_000).max_length == tiny.MAX_LENGTH


def test_repeated_pairs_come_from_the_cache(served_model):
    metrics = Metrics()
    engine = Engine(served_model, ServerSettings(), metrics)
    engine.start()
    first, second = score(engine, tiny.pairs()), score(engine, tiny.pairs())
    other = score(engine, tiny.pairs(), options=Options(tiny.INSTRUCTION))
    engine.close()
    assert first == second
    assert first != other
    assert f"querit_cached_pairs_total {len(tiny.DOCUMENTS)}.0" in metrics.text().decode()


def test_pairs_that_may_not_be_cut_are_refused(engines):
    with pytest.raises(RequestError, match=r"Document 1 is .* tokens too long for the limit of 256") as error:
        score(engines(), tiny.pairs(["x", tiny.LONG_DOCUMENT]), may_cut=False)
    assert error.value.status == 413


def test_an_instruction_that_leaves_no_room_is_refused(engines):
    with pytest.raises(RequestError, match="shorten the instruction") as error:
        score(engines(), tiny.pairs(), options=Options(tiny.LONG_DOCUMENT))
    assert error.value.status == 422


def test_a_full_queue_says_when_to_come_again(engines):
    engine = engines(max_queue=1, batch_tokens=64, cache_mb=0)
    requests = [tiny.pairs(["a novel " * 20] * 30, query=str(number)) for number in range(4)]
    with pytest.raises(RequestError, match="The queue is full: try again in 1 s") as error:
        score(engine, *requests)
    assert (error.value.status, error.value.headers) == (429, {"Retry-After": "1"})
