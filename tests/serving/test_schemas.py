import pytest
from pydantic import ValidationError

from modeling_querit.serving.schemas import RerankRequest, ScoreRequest


def test_one_query_goes_with_every_document():
    request = ScoreRequest(text_1="q", text_2=["a", {"text": "b"}])
    assert request.pairs() == [("q", "a"), ("q", {"text": "b"})]


def test_queries_go_with_their_own_documents():
    assert ScoreRequest(queries=["p", "q"], documents=["a", "b"]).pairs() == [("p", "a"), ("q", "b")]
    assert ScoreRequest(text_1="q", text_2="a").pairs() == [("q", "a")]


@pytest.mark.parametrize(
    "fields",
    [
        {"text_1": ["p", "q"], "text_2": ["a", "b", "c"]},
        {"text_1": ["p", "q"], "text_2": "a"},
        {"text_1": [], "text_2": ["a"]},
        {"text_1": "q", "text_2": []},
        {"text_1": "q", "documents": ["a"]},
        {"text_1": "q", "text_2": "a", "queries": "q"},
        {"text_1": "q"},
        {"text_1": "q", "text_2": [3]},
    ],
)
def test_what_makes_no_pairs_is_refused(fields):
    with pytest.raises(ValidationError):
        ScoreRequest(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"documents": ["a"], "texts": ["a"]},
        {},
        {"documents": []},
        {"documents": "a"},
        {"documents": [{"title": "no text"}]},
        {"documents": [{"text": "a", "title": 3}]},
        {"documents": ["a"], "top_n": 0},
        {"documents": ["a"], "top_n": True},
        {"documents": ["a"], "top_n": 1.0},
        {"documents": ["a"], "raw_scores": True},
        {"documents": ["a"], "return_documents": "yes"},
        {"documents": ["a"], "top_k": 1},
        {"documents": ["a"], "truncate_prompt_tokens": -2},
    ],
)
def test_mistaken_fields_are_refused(fields):
    with pytest.raises(ValidationError):
        RerankRequest(query="q", **fields)


def test_documents_are_kept_as_they_are():
    document = {"text": "a", "id": 7, "meta": {"year": 1831}}
    assert RerankRequest(query="q", documents=[document]).documents == [document]
