"""Rows from collections: negatives to train on, candidate lists to validate on."""

import pytest

from modeling_querit.retrieval.collection import Collection
from modeling_querit.retrieval.sampling import Bands
from modeling_querit.training.data import RankingDataset
from modeling_querit.training.mining import mine_rows, validation_rows

ANIMALS = ["fox", "hen", "cow", "dog", "cat", "owl"]


@pytest.fixture
def collection():
    documents = {f"{animal}{n}": {"title": "", "text": f"{animal} story {n}"} for animal in ANIMALS for n in range(4)}
    queries = {animal: f"{animal} story" for animal in ANIMALS}
    return Collection("animals", documents, queries, {animal: {f"{animal}0": 2, f"{animal}1": 1} for animal in ANIMALS})


def test_a_row_has_the_best_document_and_negatives_without_a_relevant_grade(collection):
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
    is_hard = [set(texts_of(row)) == set(texts_of(hard_row)) for row, hard_row in zip(rows, hard, strict=True)]
    assert is_hard[3:] == [True] * 3
    assert not all(is_hard[:3])


def test_the_same_seed_draws_the_same(collection):
    assert mine_rows(collection, seed=3) == mine_rows(collection, seed=3)
    assert mine_rows(collection, seed=3) != mine_rows(collection, seed=4)


def test_queries_and_positives_are_limited(collection):
    assert len(mine_rows(collection, limit=2)) == 2
    assert mine_rows(collection, max_positive_chars=3) == []


def test_negatives_come_from_the_candidate_list_where_there_is_one(collection):
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
        # cat0 is relevant to "cat", so another document takes its place.
        negatives = texts_of(row)[1:]
        assert (negatives == ["cat story 0"]) == (row["source"] != "animals/cat")
        assert len(negatives) == 1


class FilterModel:
    """A teacher that scores documents numbered 2 as high as the positive."""

    def predict(self, pairs, **options):
        return [0.9 if text.endswith(("0", "2")) else 0.1 for _, text in pairs]


def test_negatives_that_the_filter_model_finds_relevant_are_dropped(collection):
    bands = Bands(2, 0, 0, 4, 4)

    def doubtful(rows):
        """Rows with the document that the filter model finds relevant."""
        return [row for row in rows if f"{row['source'].removeprefix('animals/')} story 2" in texts_of(row)]

    assert len(doubtful(mine_rows(collection, bands=bands))) == len(ANIMALS)
    filtered = mine_rows(collection, bands=bands, false_negative_filter=FilterModel())
    assert len(filtered) == len(ANIMALS)
    assert doubtful(filtered) == []
    # With a margin above every difference, the whole list is left out.
    for row in mine_rows(collection, bands=bands, false_negative_filter=FilterModel(), false_negative_margin=1.0):
        animal = row["source"].removeprefix("animals/")
        assert not any(text.startswith(animal) for text in texts_of(row)[1:])


def texts_of(row):
    return [document["text"] for document in row["documents"]]


def test_validation_rows_have_grades_as_labels(collection):
    rows = validation_rows(collection, depth=4)
    assert len(rows) == len(ANIMALS)
    for row in rows:
        by_text = dict(zip(texts_of(row), row["labels"], strict=True))
        animal = row["source"].removeprefix("animals/")
        assert by_text == {
            f"{animal} story 0": 2,
            f"{animal} story 1": 1,
            f"{animal} story 2": 0,
            f"{animal} story 3": 0,
        }
    assert len(validation_rows(collection, depth=4, limit=2)) == 2
