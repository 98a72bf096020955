import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.adaptation.filters import Query, QueryLimits, copied_share, filter_queries
from modeling_querit.retrieval.bm25 import BM25, tokenize

DOCUMENTS = {
    "fox": {"_id": "fox", "title": "Red fox", "text": "The red fox sleeps in the winter and hunts in small groups."},
    "hen": {"_id": "hen", "title": "", "text": "A hen lays eggs for people who live on a farm by the river."},
    "tokyo": {"_id": "tokyo", "title": "", "text": "東京都の人口はおよそ千四百万人です。"},
}


def query(text, document="fox", language="en", generator="writer", number=0):
    return Query(f"q{number}", text, document, "question", language, generator)


def reasons(*queries, first_stage=None, **limits):
    queries = [Query(f"q{n}", *list(vars(query).values())[1:]) for n, query in enumerate(queries)]
    results = list(filter_queries(queries, DOCUMENTS, QueryLimits(**limits), first_stage))
    assert [query for query, _ in results] == queries
    return [reason for _, reason in results]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        ("when does it sleep?", {}, None),
        ("", {}, "short"),
        ("?!", {}, "short"),
        ("fox", {}, "short"),
        ("fox", {"min_tokens": 1, "max_copied": 1}, None),
        ("東京", {"same_language": False}, "short"),
        ("東京都", {"same_language": False}, None),
        ("w " * 48, {"same_language": False}, None),
        ("w " * 49, {"same_language": False}, "long"),
        ("人口" * 30, {"same_language": False}, "long"),
        ("fox " * 250_000, {}, "long"),
        ("Wann schläft der Fuchs in seinem Bau unter der Erde?", {}, "language"),
        ("Wann schläft der Fuchs in seinem Bau unter der Erde?", {"same_language": False}, None),
        # Detection errs on a few words.
        ("Wann schläft der Fuchs?", {}, None),
        ("the red fox sleeps in the winter", {}, "copied"),
        ("the red fox sleeps in the winter", {"max_copied": 1}, None),
        ("the red fox sleeps in the winter", {"may_copy": ("writer",)}, None),
        ("the red fox sleeps in the winter", {"may_copy": ("another",)}, "copied"),
        ("does the red fox sleep in winter", {}, None),
        ("The red fox sleeps in the winter and hunts in small groups.", {"may_copy": ("writer",)}, "whole document"),
        ("Red fox", {"may_copy": ("writer",)}, None),
    ],
)
def test_queries_are_dropped_by_reason(text, limits, reason):
    assert reasons(query(text), **limits) == [reason]


def test_a_copied_share_at_the_limit_is_allowed():
    assert reasons(query("red fox sleeps in summer"), query("red fox sleeps in the snow")) == [None, "copied"]


def test_an_unknown_language_is_not_a_reason():
    text = "When does the fox sleep in its den under the earth?"
    assert reasons(query(text, language="und")) == [None]
    assert reasons(query(text, language="fr")) == ["language"]


def test_the_first_of_two_equal_queries_stays():
    assert reasons(
        query("When does it sleep?"),
        query("when  does it SLEEP", "hen"),
        query("When does it hunt?"),
    ) == [None, "duplicate", None]


def test_a_dropped_query_has_no_duplicates():
    text = "Wann schläft der Fuchs in seinem Bau unter der Erde?"
    assert reasons(query(text), query(text, language="de")) == ["language", None]


# -- Round trip


class FixedRanking:
    """A first stage that ranks the same documents for every query."""

    def __init__(self, *documents):
        self.documents, self.searches = documents, []

    def search(self, queries, k):
        self.searches.append((list(queries), k))
        return [[(document, 0.0) for document in self.documents[:k]] for _ in queries]


def test_the_first_stage_has_to_find_the_source():
    queries = [query("when does the fox sleep"), query("when does it lay eggs"), query("who lays eggs", "hen")]
    assert reasons(*queries, first_stage=BM25(DOCUMENTS), round_trip=1) == [None, "round-trip", None]


def test_the_round_trip_has_a_depth():
    queries = [query("when does it sleep"), query("who lays eggs", "hen")]
    assert reasons(*queries, first_stage=FixedRanking("fox", "hen"), round_trip=1) == [None, "round-trip"]
    assert reasons(*queries, first_stage=FixedRanking("fox", "hen"), round_trip=2) == [None, None]
    unused = FixedRanking()
    assert reasons(*queries, first_stage=unused, round_trip=0) == [None, None]
    assert reasons(*queries, first_stage=None, round_trip=1) == [None, None]
    assert not unused.searches


def test_only_queries_within_the_limits_are_searched():
    stage = FixedRanking("fox")
    dropped = reasons(query("fox"), query("when does it sleep"), query("when does it sleep"), first_stage=stage)
    assert dropped == ["short", None, "duplicate"]
    ((searched, k),) = stage.searches
    assert (set(searched), k) == ({"when does it sleep"}, 20)
    stage = FixedRanking("fox")
    assert reasons(query("fox"), first_stage=stage) == ["short"]
    assert not stage.searches


def test_a_failed_round_trip_has_no_duplicates():
    queries = [query("who lives on a farm", "fox"), query("who lives on a farm", "hen")]
    assert reasons(*queries, first_stage=FixedRanking("hen")) == ["round-trip", None]


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 600])
def test_many_queries_stay_in_order(count):
    stage = FixedRanking("fox")
    queries = [query(f"when does number {n}", "fox" if n % 3 else "hen") for n in range(count)]
    assert reasons(*queries, first_stage=stage) == [None if n % 3 else "round-trip" for n in range(count)]
    assert [text for texts, _ in stage.searches for text in texts] == [query.text for query in queries]


@pytest.mark.slow
def test_queries_are_filtered_as_they_come():
    def endless():
        number = 0
        while True:
            yield query(f"when does number {number}", number=number)
            number += 1

    assert next(filter_queries(endless(), DOCUMENTS, QueryLimits(), FixedRanking("fox")))[1] is None


# -- Any input


@given(st.lists(st.tuples(st.text(st.characters()), st.sampled_from(sorted(DOCUMENTS))), max_size=6))
def test_any_query_is_filtered(queries):
    state = random.getstate()
    dropped = reasons(*(query(*arguments) for arguments in queries), first_stage=BM25(DOCUMENTS), min_tokens=1)
    assert set(dropped) <= {None, "short", "long", "language", "copied", "whole document", "duplicate", "round-trip"}
    assert random.getstate() == state


WORD = st.sampled_from("abc")


@given(st.lists(WORD, max_size=8), st.lists(WORD, max_size=8), st.lists(WORD, max_size=8))
def test_copied_share_is_that_of_the_longest_common_piece(tokens, title, text):
    words = [*title, *text]
    pieces = [
        tokens[start:end]
        for start in range(len(tokens))
        for end in range(start + 1, len(tokens) + 1)
        if any(words[index : index + end - start] == tokens[start:end] for index in range(len(words)))
    ]
    expected = max(map(len, pieces), default=0) / max(1, len(tokens))
    assert copied_share(tokens, {"title": " ".join(title), "text": " ".join(text)}) == expected


def test_copied_share_ignores_case_and_punctuation():
    assert copied_share(tokenize("RED fox, eats"), DOCUMENTS["fox"]) == pytest.approx(2 / 3)
    assert copied_share(tokenize("東京都の人口"), DOCUMENTS["tokyo"]) == 1


def test_copied_share_of_a_large_document_is_fast():
    assert copied_share(["fox"] * 48, {"title": "", "text": "fox " * 4000}) == 1


@pytest.mark.parametrize(
    "limits",
    [{"min_tokens": 0}, {"min_tokens": 9, "max_tokens": 8}, {"max_copied": 0}, {"max_copied": 1.1}, {"min_tokens": -1}],
)
def test_invalid_limits_are_refused(limits):
    with pytest.raises(ValueError, match=r"min_tokens is|max_copied is"):
        QueryLimits(**limits)
