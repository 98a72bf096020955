"""`metrics/reranking`, the module for Hugging Face `evaluate`: loaded offline, from a copy that stands alone."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from modeling_querit.evaluation.measures import DEFAULT_MEASURES, measure

SOURCE = Path(__file__).parents[1] / "metrics/reranking"
QRELS = {"q": {"a": 2, "b": 1}, "r": {"c": 1}, "unanswerable": {"a": 0}}
RUN = {"q": {"a": 0.5, "b": 0.5, "x": 0.9}, "r": {"c": 0.1, "y": -0.3}, "unknown": {"a": 1.0}}


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    evaluate = pytest.importorskip("evaluate")
    folder = tmp_path_factory.mktemp("clone") / "reranking"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(evaluate.config, name, str(folder.parent / name))
        yield evaluate.load(str(folder), cache_dir=str(folder.parent / "data"))


def cases():
    spec = importlib.util.spec_from_file_location("metric_tests", SOURCE / "tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.test_cases


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["query_ids"][0])
def test_cases_of_the_module(metric, case):
    rows = {name: case[name] for name in ("predictions", "references", "query_ids")}
    assert metric.compute(**rows, measures=["ndcg_at_10", "mrr_at_10", "map"]) == pytest.approx(case["result"])


def test_qrels_and_run_have_the_values_of_the_package(metric):
    result = metric.compute(qrels=QRELS, run=RUN, per_query=True)
    assert result["per_query"] == measure(QRELS, RUN)
    assert result["queries"] == 2
    for name in DEFAULT_MEASURES:
        assert result[name] == pytest.approx(np.mean(list(result["per_query"][name].values())))


def test_trec_files_have_the_values_of_dicts(metric, tmp_path):
    lines = [f"{q} 0 {d} {grade}\n" for q, grades in QRELS.items() for d, grade in grades.items()]
    (tmp_path / "qrels").write_text("".join(lines))
    beir = "".join(line.replace(" 0 ", "\t").replace(" ", "\t") for line in lines)
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + beir)
    run = "".join(f"{q} Q0 {d} 1 {score} tag\n" for q, scores in RUN.items() for d, score in scores.items())
    (tmp_path / "run").write_text(run)
    expected = metric.compute(qrels=QRELS, run=RUN)
    for name in ("qrels", "test.tsv"):
        assert metric.compute(qrels=str(tmp_path / name), run=str(tmp_path / "run")) == expected
    (tmp_path / "run").write_text(run + "q Q0 a 9 0.1 tag\n")
    with pytest.raises(ValueError, match="run, line 7: query 'q' has document 'a' twice"):
        metric.compute(qrels=QRELS, run=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="qrels, line 1: not 'query Q0 document rank score tag'"):
        metric.compute(qrels=QRELS, run=str(tmp_path / "qrels"))
    (tmp_path / "qrels").write_text("q 0 a 1\nq 0 a 0.5\n")
    with pytest.raises(ValueError, match="line 2: not 'query 0 document grade'"):
        metric.compute(qrels=str(tmp_path / "qrels"), run=RUN)


def test_batches_have_the_values_of_all_rows(metric):
    rng = np.random.default_rng(0)
    rows = {"predictions": rng.normal(size=60), "references": rng.integers(0, 3, 60), "query_ids": [*range(6)] * 10}
    for start in range(0, 60, 7):
        metric.add_batch(**{name: values[start : start + 7] for name, values in rows.items()})
    assert metric.compute() == metric.compute(**rows)


@pytest.mark.slow
def test_bad_input_is_refused_by_name(metric):
    with pytest.raises(ValueError, match="have no ranking, such as 'r'"):
        metric.compute(qrels=QRELS, run={"q": RUN["q"]})
    with pytest.raises(ValueError, match="document 'a': the score is nan"):
        metric.compute(qrels=QRELS, run=RUN | {"q": {"a": float("nan")}})
    with pytest.raises(ValueError, match="Query 'q', pair 1: score nan"):
        metric.compute(predictions=[0.1, float("nan")], references=[1, 0], query_ids=["q", "q"])
    with pytest.raises(ValueError, match="'b' twice"):
        metric.compute(qrels=QRELS, run=RUN | {"q": ["b", "b"]})
    with pytest.raises(ValueError, match="No query has a label above 0"):
        metric.compute(predictions=[0.1], references=[0], query_ids=["q"])
    with pytest.raises(ValueError, match="Give rows"):
        metric.compute(qrels=QRELS)
