from modeling_querit.evaluation.evaluate import evaluate_scores
from modeling_querit.evaluation.report import difference_lines, table_rows, write_report
from modeling_querit.files import read_json
from modeling_querit.retrieval.collection import Collection

CANDIDATES = {"q1": {"a": 2.0, "b": 1.0}, "q2": {"a": 2.0, "c": 1.0}}


def evaluation(name):
    collection = Collection(name, {}, {}, {"q1": {"b": 1}, "q2": {"a": 1}})
    scores = {"good": {"q1": [0.1, 0.9], "q2": [0.9, 0.1]}, "bad": {"q1": [0.9, 0.1], "q2": [0.1, 0.9]}}
    return evaluate_scores(scores, collection, CANDIDATES)


def test_what_is_written_and_printed(tmp_path):
    results = write_report(
        [evaluation("x"), evaluation("y")], ["good", "bad"], {"depth": 2}, {"SciFact": {"good": 0.5}}, tmp_path
    )
    assert read_json(tmp_path / "results.json") == results
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert results["rows"][1]["collection"] == "y"
    assert results["rows"][0]["good"] == 100
    assert results["means"]["good"] == {"ndcg_at_10": 1, "mrr_at_10": 1}
    rows = table_rows(results)
    assert rows[0][0] == "x (2 queries)"
    assert rows[3] == ("  good", "100.00", "100.00-100.00", "1.0000", "100.00")
    assert rows[2][3] == ""
    assert rows[16][0] == "mean of 2 collections"
    assert difference_lines(results) == [
        "x: bad against good: -36.91 nDCG@10, p 0.5000",
        "y: bad against good: -36.91 nDCG@10, p 0.5000",
        "mteb's main score of SciFact: good 50.00",
    ]
