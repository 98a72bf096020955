import pytest

from modeling_querit.retrieval.collection import Collection
from modeling_querit.training.data import RankingDataset
from modeling_querit.training.mining import mine_rows

ANIMALS = ["fox", "hen", "cow", "dog", "cat", "owl"]


@pytest.fixture
def collection():
    documents = {f"{animal}{n}": {"title": "", "text": f"{animal} story {n}"} for animal in ANIMALS for n in range(4)}
    queries = {animal: f"{animal} story" for animal in ANIMALS}
    return Collection("animals", documents, queries, {animal: {f"{animal}0": 2, f"{animal}1": 1} for animal in ANIMALS})


def test_a_row_has_the_best_document_and_negatives_that_nobody_judged_relevant(collection):
    rows = mine_rows(collection, negatives=3, hard=2, depth=6)
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
    for row in mine_rows(collection, negatives=2, hard=2, depth=4):
        animal = row["source"].removeprefix("animals/")
        assert {document["text"] for document in row["documents"][1:]} == {f"{animal} story 2", f"{animal} story 3"}


def test_easy_rows_come_first(collection):
    rows = mine_rows(collection, negatives=2, hard=2, depth=4, easy_first=0.5, seed=1)
    hard = mine_rows(collection, negatives=2, hard=2, depth=4, seed=1)
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
    for row in mine_rows(listed, negatives=1, hard=1):
        assert row["documents"][1]["text"] in ("owl story 3", "cow story 3")


@pytest.mark.parametrize("settings", [{"negatives": 0}, {"hard": -1}])
def test_settings_that_make_no_rows_are_refused(collection, settings):
    with pytest.raises(ValueError, match="negative"):
        mine_rows(collection, **settings)
