import json
import math

import numpy as np
import pytest

from modeling_querit.evaluation.evaluate import (
    BEST_ORDER,
    FIRST_STAGE,
    MRR,
    NDCG,
    RANDOM,
    by_score,
    evaluate,
    evaluate_scores,
    fused,
    score_candidates,
)
from modeling_querit.evaluation.metrics import mean, ndcg
from modeling_querit.retrieval.collection import Collection

DOCUMENTS = {
    "a": {"title": "", "text": "fox fox fox"},
    "b": {"title": "", "text": "fox hen"},
    "c": {"title": "", "text": "hen"},
    "d": {"title": "", "text": "cow"},
}
QUERIES = {"q1": "fox", "q2": "hen", "q3": "cow"}
QRELS = {"q2": {"b": 2, "c": 1}, "q1": {"b": 1, "a": 0}, "q3": {"d": 0, "a": -1}}


class ShortTextsFirst:
    """A reranker by the length of documents; it remembers what it was asked."""

    def __init__(self):
        self.pairs, self.options = [], []

    def predict(self, pairs, **options):
        self.pairs += pairs
        self.options.append(options)
        return np.array([-float(len(document)) for _, document in pairs])


def make_collection(**options):
    return Collection("animals", DOCUMENTS, QUERIES, QRELS, **options)


def test_by_score_keeps_the_order_of_equals():
    assert by_score("abcd", [0.5, 1.0, 0.5, 1.0]) == ["b", "d", "a", "c"]
    assert by_score([], []) == []


def test_every_system_is_measured_on_the_same_candidates():
    model = ShortTextsFirst()
    result = evaluate({"short": model}, make_collection(), depth=2, predict_options={"max_length": 9})
    assert result.systems == [RANDOM, FIRST_STAGE, "short", fused("short"), BEST_ORDER]
    assert result.pairs == len(model.pairs) == 4
    assert model.pairs[:2] == [("fox", "fox fox fox"), ("fox", "fox hen")]
    assert model.options == [{"max_length": 9}] * 2
    second_place = 1 / math.log2(3)
    swapped = (1 + 2 * second_place) / (2 + second_place)
    assert result.metrics[NDCG][FIRST_STAGE] == pytest.approx({"q1": second_place, "q2": swapped})
    assert result.metrics[NDCG]["short"] == pytest.approx({"q1": 1.0, "q2": swapped})
    assert result.metrics[NDCG][BEST_ORDER] == {"q1": 1.0, "q2": 1.0}
    assert result.metrics[NDCG][RANDOM]["q1"] == pytest.approx((1 + second_place) / 2)
    assert result.metrics[MRR]["short"] == {"q1": 1.0, "q2": 1.0}
    assert result.metrics[MRR][RANDOM] == pytest.approx({"q1": 0.75, "q2": 1.0})


def test_titles_are_read_with_the_text():
    documents = {"a": {"title": "Fox", "text": "red"}}
    model = ShortTextsFirst()
    evaluate({"short": model}, Collection("animals", documents, {"q1": "fox"}, {"q1": {"a": 1}}))
    assert model.pairs == [("fox", "Fox red")]


def test_fused_scores_are_scaled_and_added():
    candidates = {"q1": {"a": 30.0, "b": 29.0, "c": 10.0}}
    scores = {"model": {"q1": [0.1, 0.3, 0.2]}}
    collection = Collection("animals", DOCUMENTS, QUERIES, {"q1": {"b": 1}})
    result = evaluate_scores(scores, collection, candidates)
    # Scaled: 1 + 0, 0.95 + 1, 0 + 0.5.
    assert result.mean(fused("model")) == result.mean("model") == 1
    scores = {"model": {"q1": [0.29, 0.3, 0.2]}}
    assert evaluate_scores(scores, collection, candidates).mean(fused("model")) == 1
    scores = {"model": {"q1": [0.3, 0.3, 0.3]}}
    assert evaluate_scores(scores, collection, candidates).mean(fused("model")) == pytest.approx(1 / math.log2(3))


@pytest.mark.parametrize("missing", [None, math.nan, -math.inf])
def test_candidates_without_a_score_come_last(missing):
    candidates = {"q1": {"a": 3.0, "b": 2.0}}
    collection = Collection("animals", DOCUMENTS, QUERIES, {"q1": {"a": 1}})
    result = evaluate_scores({"model": {"q1": [missing, -0.9]}}, collection, candidates)
    assert result.mean("model") == pytest.approx(1 / math.log2(3))


def test_statistics_compare_queries_in_pairs():
    queries = {f"q{number}": "fox" for number in range(20)}
    collection = Collection("foxes", DOCUMENTS, queries, {query: {"b": 1} for query in queries})
    result = evaluate({"short": ShortTextsFirst()}, collection, depth=2)
    assert result.p_value("short") < 0.01
    assert result.p_value("short", BEST_ORDER) == 1
    assert result.interval("short") == (1.0, 1.0)
    summary = json.loads(json.dumps(result.summary()))
    assert (summary["collection"], summary["queries"], summary["pairs"]) == ("foxes", 20, 40)
    assert summary["systems"]["short"] == {
        "ndcg_at_10": 1.0,
        "ndcg_at_10_interval": [1.0, 1.0],
        "ndcg_at_10_p_value": result.p_value("short"),
        "mrr_at_10": 1.0,
        "mrr_at_10_interval": [1.0, 1.0],
        "mrr_at_10_p_value": result.p_value("short", metric=MRR),
    }


def test_candidates_can_be_used_again():
    class Unused:
        def search(self, queries, k):
            raise AssertionError

    candidates = {"q1": {"b": 2.0, "a": 1.0}}
    result = evaluate({"short": ShortTextsFirst()}, make_collection(), candidates=candidates, first_stage=Unused())
    assert result.candidates == candidates
    assert result.mean(FIRST_STAGE) == 1


@pytest.mark.parametrize("name", [RANDOM, FIRST_STAGE, BEST_ORDER])
def test_a_reranker_cannot_have_the_name_of_another_system(name):
    with pytest.raises(ValueError, match=f"{name!r}: that is the name of another system"):
        evaluate({name: ShortTextsFirst()}, make_collection())


def test_a_wrong_number_of_scores_is_refused():
    class Short(ShortTextsFirst):
        def predict(self, pairs, **options):
            return super().predict(pairs)[1:]

    with pytest.raises(ValueError, match="Short was given 4 pairs and returned 3 scores"):
        evaluate({"model": Short()}, make_collection())
    with pytest.raises(ValueError, match="model: query q1 has 2 candidates, but 0 scores"):
        evaluate_scores({"model": {}}, make_collection(), {"q1": {"a": 2.0, "b": 1.0}})


def test_a_query_without_candidates_counts_as_zero():
    result = evaluate({"short": ShortTextsFirst()}, make_collection(), candidates={"q1": {}, "q2": {"b": 1.0}})
    for system in result.systems:
        assert result.metrics[NDCG][system]["q1"] == 0


def test_rerankers_are_loaded_by_name(saved_folders):
    from modeling_querit import QueritForSequenceRanking

    folder = saved_folders("qwen3")
    model = QueritForSequenceRanking.from_pretrained(folder)
    options = {"show_progress_bar": False}
    result = evaluate({"object": model, "folder": folder}, make_collection(), predict_options=options)
    assert result.metrics[NDCG]["object"] == result.metrics[NDCG]["folder"]
    scores = score_candidates(str(folder), make_collection(), result.candidates, options)
    documents = [DOCUMENTS[document] for document in result.candidates["q1"]]
    expected = model.predict([("fox", document) for document in documents], **options)
    assert scores["q1"] == pytest.approx(expected.tolist(), abs=1e-6)
    rankings = {query: by_score(list(hits), scores[query]) for query, hits in result.candidates.items()}
    assert result.mean("folder") == mean(ndcg(QRELS, rankings))


def test_a_single_model_and_a_folder_are_enough(tmp_path):
    from modeling_querit import evaluate as public_evaluate

    folder = tmp_path / "animals"
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": name, **document} for name, document in DOCUMENTS.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"_id": name, "text": text} for name, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{query}\t{document}\t{grade}\n" for query, grades in QRELS.items() for document, grade in grades.items()]
    (folder / "qrels/test.tsv").write_text("".join(lines))
    result = public_evaluate(ShortTextsFirst(), str(folder), first_stage="bm25", depth=2)
    expected = evaluate({"model": ShortTextsFirst()}, make_collection(), depth=2)
    assert result.metrics == expected.metrics
    assert result.systems == expected.systems


def test_judgements_of_unknown_documents_are_reported(caplog):
    from transformers.utils import logging

    qrels = {"q1": {"b": 1, "gone": 1}}
    logging.enable_propagation()
    evaluate(ShortTextsFirst(), Collection("animals", DOCUMENTS, QUERIES, qrels))
    logging.disable_propagation()
    assert "animals: 1 relevant documents, such as 'gone'" in caplog.text


def test_nan_is_refused():
    class Broken(ShortTextsFirst):
        def predict(self, pairs, **options):
            return [float("nan") for _ in pairs]

    with pytest.raises(ValueError, match="animals: the score of query 'q1' and document 'a' is NaN"):
        evaluate(Broken(), make_collection())
