import json
import random
from collections import Counter

import pytest
from small_adaptations import make_documents

from modeling_querit.adaptation.extractive import ExtractiveGenerator
from modeling_querit.adaptation.prompts import STYLES, QueryRequest
from modeling_querit.adaptation.queries import make_requests, write_queries
from modeling_querit.cache import TEXTS, DiskCache

EVEN = dict.fromkeys(STYLES, 1.0)
DOCUMENTS = [document | {"language": "de" if n % 2 else "en"} for n, document in enumerate(make_documents(24))]


# -- Requests


def test_a_document_has_requests_of_different_styles():
    requests = make_requests(DOCUMENTS, EVEN, 3)
    assert [request.document for request in requests] == [document for document in DOCUMENTS for _ in range(3)]
    for start in range(0, len(requests), 3):
        assert len({request.style for request in requests[start : start + 3]}) == 3
    assert all(request.language == request.document["language"] for request in requests)
    assert {request.style for request in requests} == set(STYLES)


def test_styles_are_drawn_by_weight():
    documents = [{"_id": str(n), "title": "", "text": "x", "language": "en"} for n in range(2000)]
    found = Counter(request.style for request in make_requests(documents, {"title": 6, "claim": 3, "question": 1}, 1))
    assert found["title"] == pytest.approx(1200, abs=80)
    assert found["claim"] == pytest.approx(600, abs=80)
    assert found["question"] == pytest.approx(200, abs=60)


def test_only_the_ratio_of_weights_matters():
    documents = [{"_id": str(n), "title": "", "text": "x", "language": "en"} for n in range(500)]
    found = Counter(request.style for request in make_requests(documents, {"title": 1e-5, "claim": 1e-5}, 1))
    assert found["title"] == pytest.approx(250, abs=60)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_have_to_be_above_0(weight):
    with pytest.raises(ValueError, match="claim"):
        make_requests(DOCUMENTS, {"title": 1, "claim": weight}, 1)


def test_languages_are_drawn_evenly():
    documents = [{"_id": str(n), "title": "", "text": "x", "language": "en"} for n in range(900)]
    requests = make_requests(documents, EVEN, 1, ["fi", "ar", "de"])
    found = Counter(request.language for request in requests)
    assert set(found) == {"fi", "ar", "de"}
    assert min(found.values()) > 250
    assert make_requests(documents, EVEN, 1, ["de", "fi", "ar"]) == requests


def test_four_examples_are_shown():
    examples = [f"query {n}" for n in range(10)]
    requests = make_requests(DOCUMENTS, EVEN, 1, examples=examples)
    assert all(len(set(request.examples)) == 4 for request in requests)
    assert {example for request in requests for example in request.examples} == set(examples)
    requests = make_requests(DOCUMENTS, EVEN, 1, examples=["a", "b"])
    assert all(sorted(request.examples) == ["a", "b"] for request in requests)
    assert all(request.examples == () for request in make_requests(DOCUMENTS, EVEN, 1))


def test_draws_depend_on_seed_and_id_alone():
    examples = [f"query {n}" for n in range(10)]
    options = {"per_document": 2, "languages": ["de", "fi"], "examples": examples}
    state = random.getstate()
    requests = make_requests(DOCUMENTS, EVEN, **options)
    assert random.getstate() == state
    assert make_requests(DOCUMENTS[5:6], EVEN, **options) == requests[10:12]
    other = make_requests([DOCUMENTS[5] | {"text": "another"}], EVEN, **options)
    assert [(request.style, request.language, request.examples) for request in other] == [
        (request.style, request.language, request.examples) for request in requests[10:12]
    ]
    assert make_requests(DOCUMENTS, EVEN, **options, seed=1) != requests


def test_draws_do_not_depend_on_the_order_of_styles():
    weights = {"question": 3.0, "keywords": 1.0, "claim": 1.0, "title": 2.0}
    turned = dict(reversed(weights.items()))
    assert make_requests(DOCUMENTS, weights, 2) == make_requests(DOCUMENTS, turned, 2)


@pytest.mark.parametrize("count", [0, -1, 5])
def test_there_are_no_more_queries_than_styles(count):
    with pytest.raises(ValueError, match=f"per_document is {count}, with 4 styles"):
        make_requests(DOCUMENTS, EVEN, count)


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style 'haiku' is unknown: choose from question"):
        make_requests(DOCUMENTS, {"haiku": 1.0}, 1)


# -- Writing


class Writer:
    """A generator with a fixed answer to request request, which logs its requests."""

    def __init__(self, name="writer", answer=lambda request: f"{request.style} of {request.document['_id']}", size=3):
        self.identity, self.batch_size, self.answer = [name], size, answer
        self.requests = []

    def generate(self, requests):
        assert 0 < len(requests) <= self.batch_size
        self.requests.append(list(requests))
        return [self.answer(request) for request in requests]


REQUESTS = make_requests(DOCUMENTS, EVEN, 2)


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path, TEXTS)


def write(generators, cache, requests=REQUESTS, fallback=None):
    dropped, advanced = Counter(), []
    queries = list(write_queries(requests, generators, cache, dropped, fallback, advanced.append))
    assert sum(advanced) == len(requests)
    return queries, +dropped


def test_every_request_gets_a_query(cache):
    queries, dropped = write({"writer": Writer()}, cache)
    for query, request in zip(queries, REQUESTS, strict=True):
        assert query.text == f"{request.style} of {request.document['_id']}"
        assert query.document == request.document["_id"]
        assert (query.style, query.language, query.generator) == (request.style, request.language, "writer")
    assert len({query.id for query in queries}) == len(queries)
    assert not dropped


def test_cached_queries_are_not_written_again(cache, tmp_path):
    queries, _ = write({"writer": Writer()}, cache)
    second = Writer()
    assert write({"writer": second}, DiskCache(tmp_path, TEXTS))[0] == queries
    assert second.requests == []


def test_a_killed_run_is_resumed(cache, tmp_path):
    expected, _ = write({"writer": Writer()}, DiskCache(tmp_path / "whole", TEXTS))

    def until_it_ends(request):
        if len(writer.requests) > 4:
            raise KeyboardInterrupt
        return Writer().answer(request)

    writer = Writer(answer=until_it_ends)
    with pytest.raises(KeyboardInterrupt):
        write({"writer": writer}, cache)
    second = Writer()
    assert write({"writer": second}, DiskCache(tmp_path, TEXTS))[0] == expected
    assert [request for batch in second.requests for request in batch] == REQUESTS[12:]


@pytest.mark.parametrize(
    "change",
    [
        lambda request: QueryRequest(request.document | {"text": "x"}, request.style, request.language),
        lambda request: QueryRequest(request.document | {"title": "x"}, request.style, request.language),
        lambda request: QueryRequest(request.document, request.style, "fi"),
        lambda request: QueryRequest(request.document, request.style, request.language, ("x",)),
    ],
)
def test_a_changed_request_is_written_again(cache, change):
    write({"writer": Writer()}, cache)
    second = Writer()
    write({"writer": second}, cache, [*REQUESTS[1:], change(REQUESTS[0])])
    assert second.requests == [[change(REQUESTS[0])]]


def test_another_identity_writes_again(cache):
    write({"writer": Writer("a")}, cache)
    second = Writer("b")
    write({"writer": second}, cache)
    assert sum(map(len, second.requests)) == len(REQUESTS)
    # The name of the generator is not part of its identity.
    second = Writer("b")
    assert {query.generator for query in write({"other": second}, cache)[0]} == {"other"}
    assert second.requests == []


def test_a_server_with_cached_queries_is_marked_as_working(cache):
    class Remote(Writer):
        def __init__(self):
            super().__init__()
            self.endpoint, self.is_working = self, False

        def mark_as_working(self):
            self.is_working = True

    before, after = Remote(), Remote()
    write({"server": before}, cache)
    write({"server": after}, cache)
    assert not before.is_working
    assert after.is_working


def test_a_repeated_request_is_written_once(cache):
    writer = Writer()
    queries, _ = write({"writer": writer}, cache, [REQUESTS[0], REQUESTS[0], REQUESTS[1], REQUESTS[0]])
    assert len(queries) == 4
    assert writer.requests == [[REQUESTS[0], REQUESTS[1]]]


def test_requests_are_dealt_out_in_turn(cache):
    first, second = Writer("a"), Writer("b")
    queries, _ = write({"first": first, "second": second}, cache)
    assert [request for batch in first.requests for request in batch] == REQUESTS[::2]
    assert [request for batch in second.requests for request in batch] == REQUESTS[1::2]
    assert len(queries) == len(REQUESTS)


@pytest.mark.parametrize("nothing", [None, ""])
def test_unanswered_requests_go_to_the_fallback(cache, nothing):
    def answer(request):
        return nothing if request.style == "claim" else "a red fox"

    claims = sum(request.style == "claim" for request in REQUESTS)
    queries, dropped = write({"writer": Writer(answer=answer)}, cache)
    assert len(queries) == len(REQUESTS) - claims
    assert dropped == {"not written": claims}
    fallback = ("other", Writer("other"))
    queries, dropped = write({"writer": Writer(answer=answer)}, cache, fallback=fallback)
    assert len(queries) == len(REQUESTS)
    assert {query.style for query in queries if query.generator == "other"} == {"claim"}
    assert not dropped
    fallback = ("third", Writer("third", answer=lambda request: nothing))
    assert write({"writer": Writer(answer=answer)}, cache, fallback=fallback)[1] == {"not written": claims}


def test_a_missing_answer_is_requested_again_in_the_next_run(cache):
    write({"writer": Writer(answer=lambda request: None)}, cache)
    second = Writer()
    assert len(write({"writer": second}, cache)[0]) == len(REQUESTS)


def test_no_requests_give_no_queries(cache):
    assert write({"writer": Writer()}, cache, []) == ([], {})


WILD = ["知らない人が書いた本を読みました。", "كيف أزيل حزمة؟", "a\x00b c", "x" * 1_000_000, "...", "การลบแพ็กเกจ"]


@pytest.mark.slow
def test_any_text_can_be_requested_cached_and_written(cache, tmp_path):
    documents = [{"_id": f"{n}/ '\"\t", "title": "", "text": text, "language": "und"} for n, text in enumerate(WILD)]
    requests = make_requests(documents, EVEN, 4, examples=WILD)
    queries, dropped = write({"writer": Writer(answer=lambda request: request.document["text"])}, cache, requests)
    assert [query.text for query in queries] == [request.document["text"] for request in requests]
    second = Writer()
    assert write({"writer": second}, DiskCache(tmp_path, TEXTS), requests) == (queries, dropped)
    assert second.requests == []
    extracted, dropped = write({"extractive": ExtractiveGenerator(documents)}, cache, requests)
    assert len(extracted) + dropped["not written"] == len(requests)
    assert json.dumps([vars(query) for query in extracted])


def test_queries_have_different_ids(cache):
    document = DOCUMENTS[0]
    requests = [QueryRequest(document, style, "en") for style in STYLES]
    queries, _ = write(
        {"a": Writer("a", lambda request: "same"), "b": Writer("b", lambda request: "same")}, cache, requests
    )
    queries_again, _ = write({"a": Writer("a", lambda request: "same")}, cache, requests[:1])
    assert len({query.id for query in queries}) == 4
    assert queries_again[0].id == queries[0].id
