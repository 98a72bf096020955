import json
import random
from collections import Counter

import pyarrow
import pytest
from small_adaptations import make_documents

from modeling_querit.adaptation.extractive import ExtractiveGenerator
from modeling_querit.adaptation.prompts import STYLES, Request
from modeling_querit.adaptation.queries import requests_for, write_queries
from modeling_querit.adaptation.shards import Shards

EVEN = dict.fromkeys(STYLES, 1.0)
DOCUMENTS = [each | {"language": "de" if n % 2 else "en"} for n, each in enumerate(make_documents(24))]


# -- Requests


def test_each_document_is_asked_for_different_styles():
    requests = requests_for(DOCUMENTS, EVEN, 3)
    assert [each.document for each in requests] == [each for each in DOCUMENTS for _ in range(3)]
    for start in range(0, len(requests), 3):
        assert len({each.style for each in requests[start : start + 3]}) == 3
    assert all(each.language == each.document["language"] for each in requests)
    assert {each.style for each in requests} == set(STYLES)


def test_styles_are_drawn_by_weight():
    documents = [{"_id": str(n), "title": "", "text": "x", "language": "en"} for n in range(2000)]
    found = Counter(each.style for each in requests_for(documents, {"title": 6, "claim": 3, "question": 1}, 1))
    assert found["title"] == pytest.approx(1200, abs=80)
    assert found["claim"] == pytest.approx(600, abs=80)
    assert found["question"] == pytest.approx(200, abs=60)


def test_small_weights_are_weights_too():
    documents = [{"_id": str(n), "title": "", "text": "x", "language": "en"} for n in range(500)]
    found = Counter(each.style for each in requests_for(documents, {"title": 1e-5, "claim": 1e-5}, 1))
    assert found["title"] == pytest.approx(250, abs=60)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_that_mean_nothing(weight):
    with pytest.raises(ValueError, match="claim"):
        requests_for(DOCUMENTS, {"title": 1, "claim": weight}, 1)


def test_languages_are_drawn_evenly():
    documents = [{"_id": str(n), "title": "", "text": "x", "language": "en"} for n in range(900)]
    requests = requests_for(documents, EVEN, 1, ["fi", "ar", "de"])
    found = Counter(each.language for each in requests)
    assert set(found) == {"fi", "ar", "de"}
    assert min(found.values()) > 250
    assert requests_for(documents, EVEN, 1, ["de", "fi", "ar"]) == requests


def test_examples():
    examples = [f"query {n}" for n in range(10)]
    requests = requests_for(DOCUMENTS, EVEN, 1, examples=examples)
    assert all(len(set(each.examples)) == 4 for each in requests)
    assert {example for each in requests for example in each.examples} == set(examples)
    assert all(sorted(each.examples) == ["a", "b"] for each in requests_for(DOCUMENTS, EVEN, 1, examples=["a", "b"]))
    assert all(each.examples == () for each in requests_for(DOCUMENTS, EVEN, 1))


def test_draws_depend_on_the_id_and_nothing_else():
    examples = [f"query {n}" for n in range(10)]
    options = {"per_document": 2, "languages": ["de", "fi"], "examples": examples}
    state = random.getstate()
    requests = requests_for(DOCUMENTS, EVEN, **options)
    assert random.getstate() == state
    assert requests_for(DOCUMENTS[5:6], EVEN, **options) == requests[10:12]
    other = requests_for([DOCUMENTS[5] | {"text": "another"}], EVEN, **options)
    assert [(each.style, each.language, each.examples) for each in other] == [
        (each.style, each.language, each.examples) for each in requests[10:12]
    ]
    assert requests_for(DOCUMENTS, EVEN, **options, seed=1) != requests


def test_draws_do_not_depend_on_the_order_of_styles():
    weights = {"question": 3.0, "keywords": 1.0, "claim": 1.0, "title": 2.0}
    turned = dict(reversed(weights.items()))
    assert requests_for(DOCUMENTS, weights, 2) == requests_for(DOCUMENTS, turned, 2)


@pytest.mark.parametrize("count", [0, -1, 5])
def test_more_than_there_are_styles(count):
    with pytest.raises(ValueError, match=f"per_document is {count}, with 4 styles"):
        requests_for(DOCUMENTS, EVEN, count)


def test_an_unknown_style():
    with pytest.raises(ValueError, match="style 'haiku' is unknown: choose from question"):
        requests_for(DOCUMENTS, {"haiku": 1.0}, 1)


# -- Writing


class Writer:
    """Writes the same for the same request, or what it is told to; knows what it was asked."""

    def __init__(self, name="writer", answer=lambda request: f"{request.style} of {request.document['_id']}", size=3):
        self.identity, self.batch_size, self.answer = [name], size, answer
        self.asked = []

    def generate(self, requests):
        assert 0 < len(requests) <= self.batch_size
        self.asked.append(list(requests))
        return [self.answer(request) for request in requests]


REQUESTS = requests_for(DOCUMENTS, EVEN, 2)


@pytest.fixture
def kept(tmp_path):
    return Shards(tmp_path, pyarrow.string())


def write(generators, kept, requests=REQUESTS, fallback=None):
    dropped, advanced = Counter(), []
    queries = list(write_queries(requests, generators, kept, dropped, fallback, advanced.append))
    assert sum(advanced) == len(requests)
    return queries, +dropped


def test_a_query_for_each_request(kept):
    queries, dropped = write({"writer": Writer()}, kept)
    for query, request in zip(queries, REQUESTS, strict=True):
        assert query.text == f"{request.style} of {request.document['_id']}"
        assert query.document == request.document["_id"]
        assert (query.style, query.language, query.generator) == (request.style, request.language, "writer")
    assert len({query.id for query in queries}) == len(queries)
    assert not dropped


def test_what_was_written_is_not_written_again(kept, tmp_path):
    queries, _ = write({"writer": Writer()}, kept)
    again = Writer()
    assert write({"writer": again}, Shards(tmp_path, pyarrow.string()))[0] == queries
    assert again.asked == []


def test_a_killed_run_goes_on(kept, tmp_path):
    expected, _ = write({"writer": Writer()}, Shards(tmp_path / "whole", pyarrow.string()))

    def until_it_ends(request):
        if len(writer.asked) > 4:
            raise KeyboardInterrupt
        return Writer().answer(request)

    writer = Writer(answer=until_it_ends)
    with pytest.raises(KeyboardInterrupt):
        write({"writer": writer}, kept)
    again = Writer()
    assert write({"writer": again}, Shards(tmp_path, pyarrow.string()))[0] == expected
    assert [each for batch in again.asked for each in batch] == REQUESTS[12:]


@pytest.mark.parametrize(
    "change",
    [
        lambda request: Request(request.document | {"text": "x"}, request.style, request.language),
        lambda request: Request(request.document | {"title": "x"}, request.style, request.language),
        lambda request: Request(request.document, request.style, "fi"),
        lambda request: Request(request.document, request.style, request.language, ("x",)),
    ],
)
def test_a_changed_request_is_written_anew(kept, change):
    write({"writer": Writer()}, kept)
    again = Writer()
    write({"writer": again}, kept, [*REQUESTS[1:], change(REQUESTS[0])])
    assert again.asked == [[change(REQUESTS[0])]]


def test_another_writer_writes_anew(kept):
    write({"writer": Writer("a")}, kept)
    again = Writer("b")
    write({"writer": again}, kept)
    assert sum(map(len, again.asked)) == len(REQUESTS)
    # The name is no more than a name.
    again = Writer("b")
    assert {each.generator for each in write({"other": again}, kept)[0]} == {"other"}
    assert again.asked == []


def test_a_server_that_wrote_before_is_known_to_answer(kept):
    class Remote(Writer):
        def __init__(self):
            super().__init__()
            self.endpoint, self.known = self, False

        def known_to_answer(self):
            self.known = True

    first, second = Remote(), Remote()
    write({"server": first}, kept)
    write({"server": second}, kept)
    assert not first.known
    assert second.known


def test_a_request_that_is_given_twice_is_written_once(kept):
    writer = Writer()
    queries, _ = write({"writer": writer}, kept, [REQUESTS[0], REQUESTS[0], REQUESTS[1], REQUESTS[0]])
    assert len(queries) == 4
    assert writer.asked == [[REQUESTS[0], REQUESTS[1]]]


def test_requests_are_shared_out_by_place(kept):
    first, second = Writer("a"), Writer("b")
    queries, _ = write({"first": first, "second": second}, kept)
    assert [each for batch in first.asked for each in batch] == REQUESTS[::2]
    assert [each for batch in second.asked for each in batch] == REQUESTS[1::2]
    assert len(queries) == len(REQUESTS)


@pytest.mark.parametrize("nothing", [None, ""])
def test_requests_without_an_answer(kept, nothing):
    def answer(request):
        return nothing if request.style == "claim" else "a red fox"

    claims = sum(each.style == "claim" for each in REQUESTS)
    queries, dropped = write({"writer": Writer(answer=answer)}, kept)
    assert len(queries) == len(REQUESTS) - claims
    assert dropped == {"not written": claims}
    fallback = ("other", Writer("other"))
    queries, dropped = write({"writer": Writer(answer=answer)}, kept, fallback=fallback)
    assert len(queries) == len(REQUESTS)
    assert {each.style for each in queries if each.generator == "other"} == {"claim"}
    assert not dropped
    fallback = ("third", Writer("third", answer=lambda request: nothing))
    assert write({"writer": Writer(answer=answer)}, kept, fallback=fallback)[1] == {"not written": claims}


def test_no_answer_is_asked_for_again_in_the_next_run(kept):
    write({"writer": Writer(answer=lambda request: None)}, kept)
    again = Writer()
    assert len(write({"writer": again}, kept)[0]) == len(REQUESTS)


def test_no_requests(kept):
    assert write({"writer": Writer()}, kept, []) == ([], {})


WILD = ["知らない人が書いた本を読みました。", "كيف أزيل حزمة؟", "a\x00b c", "x" * 1_000_000, "...", "การลบแพ็กเกจ"]


def test_wild_texts(kept, tmp_path):
    documents = [{"_id": f"{n}/ '\"\t", "title": "", "text": text, "language": "und"} for n, text in enumerate(WILD)]
    requests = requests_for(documents, EVEN, 4, examples=WILD)
    queries, dropped = write({"writer": Writer(answer=lambda request: request.document["text"])}, kept, requests)
    assert [each.text for each in queries] == [each.document["text"] for each in requests]
    again = Writer()
    assert write({"writer": again}, Shards(tmp_path, pyarrow.string()), requests) == (queries, dropped)
    assert again.asked == []
    taken, dropped = write({"extractive": ExtractiveGenerator(documents)}, kept, requests)
    assert len(taken) + dropped["not written"] == len(requests)
    assert json.dumps([vars(each) for each in taken])


def test_ids_of_queries_tell_them_apart(kept):
    document = DOCUMENTS[0]
    requests = [Request(document, style, "en") for style in STYLES]
    queries, _ = write(
        {"a": Writer("a", lambda request: "same"), "b": Writer("b", lambda request: "same")}, kept, requests
    )
    again, _ = write({"a": Writer("a", lambda request: "same")}, kept, requests[:1])
    assert len({each.id for each in queries}) == 4
    assert again[0].id == queries[0].id
