import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.retrieval.collection import Collection
from modeling_querit.training.dataset import RankingDataset
from modeling_querit.training.mining import Bands, judged_rows, mine_rows

ANIMALS = ["fox", "hen", "cow", "dog", "cat", "owl"]


@pytest.fixture
def collection():
    documents = {f"{animal}{n}": {"title": "", "text": f"{animal} story {n}"} for animal in ANIMALS for n in range(4)}
    queries = {animal: f"{animal} story" for animal in ANIMALS}
    return Collection("animals", documents, queries, {animal: {f"{animal}0": 2, f"{animal}1": 1} for animal in ANIMALS})


def test_a_row_has_the_best_document_and_negatives_that_nobody_judged_relevant(collection):
    rows = mine_rows(collection, bands=Bands(2, 0, 1, 6, 6))
    assert len(rows) == len(ANIMALS)
    RankingDataset(rows)
    for row in rows:
        animal = row["source"].removeprefix("animals/")
        texts = [document["text"] for document in row["documents"]]
        assert row["labels"] == [1, 0, 0, 0]
        assert texts[0] == f"{animal} story 0"
        assert len(set(texts)) == 4
        assert f"{animal} story 1" not in texts


def test_hard_negatives_come_from_the_top_of_bm25(collection):
    for row in mine_rows(collection, bands=Bands(2, 0, 0, 4, 4)):
        animal = row["source"].removeprefix("animals/")
        assert {document["text"] for document in row["documents"][1:]} == {f"{animal} story 2", f"{animal} story 3"}


def test_easy_rows_come_first(collection):
    rows = mine_rows(collection, bands=Bands(2, 0, 0, 4, 4), easy_first=0.5, seed=1)
    hard = mine_rows(collection, bands=Bands(2, 0, 0, 4, 4), seed=1)
    assert [row["source"] for row in rows] == [row["source"] for row in hard]
    is_hard = [
        {each["text"] for each in a["documents"]} == {each["text"] for each in b["documents"]}
        for a, b in zip(rows, hard, strict=True)
    ]
    assert is_hard[3:] == [True] * 3
    assert not all(is_hard[:3])


def test_the_same_seed_draws_the_same(collection):
    assert mine_rows(collection, seed=3) == mine_rows(collection, seed=3)
    assert mine_rows(collection, seed=3) != mine_rows(collection, seed=4)


def test_limits(collection):
    assert len(mine_rows(collection, limit=2)) == 2
    assert mine_rows(collection, max_chars=3) == []


def test_listed_candidates_are_the_pool(collection):
    candidates = {animal: [f"{animal}0", "owl3" if animal != "owl" else "cow3"] for animal in ANIMALS}
    listed = Collection("listed", collection.documents, collection.queries, collection.qrels, candidates)
    for row in mine_rows(listed, bands=Bands(1, 0, 0)):
        assert row["documents"][1]["text"] in ("owl story 3", "cow story 3")


class Alphabetical:
    """A first stage that finds documents by their names."""

    def __init__(self, documents):
        self.documents = sorted(documents)

    def search(self, queries, k):
        return [[(document, 0.0) for document in self.documents[:k]] for _ in queries]


def test_any_retriever_finds_negatives(collection):
    retriever = Alphabetical(collection.documents)
    for row in mine_rows(collection, bands=Bands(1, 0, 0, 1, 1), retriever=retriever):
        # cat0 is relevant to "cat": what the list lacks, other documents make up for.
        negatives = [each["text"] for each in row["documents"][1:]]
        assert (negatives == ["cat story 0"]) == (row["source"] != "animals/cat")
        assert len(negatives) == 1


class Guard:
    """A teacher that knows all documents numbered 2 to be as good as the positive."""

    def predict(self, pairs):
        return [0.9 if text.endswith(("0", "2")) else 0.1 for _, text in pairs]


def test_what_the_teacher_thinks_relevant_is_no_negative(collection):
    bands = Bands(2, 0, 0, 4, 4)

    def doubtful(rows):
        """Rows with the document that the teacher thinks relevant."""
        return [row for row in rows if f"{row['source'].removeprefix('animals/')} story 2" in texts_of(row)]

    assert len(doubtful(mine_rows(collection, bands=bands))) == len(ANIMALS)
    guarded = mine_rows(collection, bands=bands, guard=Guard())
    assert len(guarded) == len(ANIMALS)
    assert doubtful(guarded) == []
    # With a margin above every difference, the whole list is left out.
    for row in mine_rows(collection, bands=bands, guard=Guard(), guard_margin=1.0):
        animal = row["source"].removeprefix("animals/")
        assert not any(text.startswith(animal) for text in texts_of(row)[1:])


def texts_of(row):
    return [document["text"] for document in row["documents"]]


def test_rows_to_validate_on_have_all_judgements(collection):
    rows = judged_rows(collection, depth=4)
    assert len(rows) == len(ANIMALS)
    for row in rows:
        by_text = dict(zip((each["text"] for each in row["documents"]), row["labels"], strict=True))
        animal = row["source"].removeprefix("animals/")
        assert by_text == {
            f"{animal} story 0": 2,
            f"{animal} story 1": 1,
            f"{animal} story 2": 0,
            f"{animal} story 3": 0,
        }
    assert len(judged_rows(collection, depth=4, limit=2)) == 2


@given(
    st.tuples(*[st.integers(0, 4)] * 3).filter(any),
    st.integers(1, 8),
    st.integers(0, 8),
    st.integers(0, 30),
    st.integers(0, 10),
    st.integers(0, 99),
)
def test_bands(counts, top_depth, more_depth, ranked, others, seed):
    bands = Bands(*counts, top_depth, top_depth + more_depth)
    places, rest = list(range(ranked)), [100 + n for n in range(others)]
    drawn = bands.draw(places, rest, random.Random(seed))
    assert len(set(drawn)) == len(drawn) <= bands.size
    assert set(drawn) <= {*places, *rest}
    if ranked >= bands.depth + bands.size and more_depth >= bands.middle and top_depth >= bands.top:
        of_top = [each for each in drawn if each < top_depth]
        of_middle = [each for each in drawn if top_depth <= each < bands.depth]
        assert [len(of_top), len(of_middle), len(drawn)] == [bands.top, bands.middle, bands.size]


@pytest.mark.parametrize(
    "settings", [{"top": 0, "random": 0}, {"top": -1}, {"top_depth": 0}, {"top_depth": 9, "depth": 3}]
)
def test_bands_that_draw_nothing_are_refused(settings):
    with pytest.raises(ValueError, match=r"draws no document|top_depth"):
        Bands(**settings)
