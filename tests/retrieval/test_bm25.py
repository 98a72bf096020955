import math

import pytest

from modeling_querit.retrieval.bm25 import BM25, tokenize

DOCUMENTS = {
    "fox": {"title": "Foxes", "text": "The quick brown fox jumps over the lazy dog"},
    "sea": {"title": "", "text": "The sea is blue and deep"},
    "東京": {"title": "", "text": "東京都は日本の首都である"},
    "กรุงเทพ": {"title": "", "text": "กรุงเทพเป็นเมืองหลวงของประเทศไทย"},
}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The 2 cats, 東京都", ["the", "2", "cats", "東京", "京都"]),
        ("", []),
        ("!?", []),
        ("水", ["水"]),
        ("Straße", ["straße"]),
        ("ＡＢＣ", ["abc"]),
        ("кот и пёс", ["кот", "и", "пёс"]),
        # Vowel signs are parts of words.
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    ],
)
def test_texts_are_split_into_words_or_character_pairs(text, tokens):
    assert tokenize(text) == tokens


@pytest.mark.parametrize(
    ("query", "best"), [("brown FOX", "fox"), ("blue sea", "sea"), ("日本の首都", "東京"), ("เมืองหลวง", "กรุงเทพ")]
)
def test_documents_of_any_script_are_found(query, best):
    assert BM25(DOCUMENTS).search([query], k=4)[0][0][0] == best


def test_scores_follow_lucenes_formula():
    """With k1 = 1.5 and b = 0.75."""
    documents = {"a": {"text": "fox fox hen"}, "b": {"text": "hen"}, "c": {"text": "cow"}}
    average = 5 / 3
    idf = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    expected = idf * 2 / (2 + 1.5 * (1 - 0.75 + 0.75 * 3 / average))
    assert BM25(documents).search(["fox"], k=1)[0][0] == ("a", pytest.approx(expected, rel=1e-5))


def test_unknown_words_score_zero_and_k_is_capped():
    found = BM25(DOCUMENTS).search(["zebra", ""], k=100)
    assert [len(hits) for hits in found] == [4, 4]
    assert {score for hits in found for _, score in hits} == {0.0}


def test_an_index_needs_documents_but_no_queries():
    assert BM25(DOCUMENTS).search([], k=3) == []
    with pytest.raises(ValueError, match="no documents"):
        BM25({})


@pytest.mark.parametrize("query", ["the blue sea", "fox 日本の首都", "zebra", "", "fox fox zebra"])
def test_scores_equal_those_of_the_search(query):
    index = BM25(DOCUMENTS)
    (hits,) = index.search([query], k=4)
    assert index.scores(query, [document for document, _ in hits]) == pytest.approx([score for _, score in hits])
    # In the given order, with repetitions.
    scores = dict(hits)
    assert index.scores(query, ["sea", "fox", "sea"]) == pytest.approx([scores["sea"], scores["fox"], scores["sea"]])
    assert index.scores(query, []) == []


def test_documents_without_words_score_zero():
    index = BM25({"a": {"title": None, "text": ""}, "b": {"text": "!?"}})
    assert index.search(["fox"], k=1) == [[("a", 0.0)]]
    assert index.scores("fox", ["b"]) == [0.0]
