import json
import math
import shutil

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from small_runs import make_trainer
from tiny_checkpoints import adapt

from modeling_querit import QueritForSequenceRanking
from modeling_querit.calibration_querit import logit_difference
from modeling_querit.checkpoints.convert import LAYOUTS, convert_to_querit
from modeling_querit.merging.merge import merge_checkpoints
from modeling_querit.merging.recipe import Recipe
from modeling_querit.training.calibrate import (
    JudgedScores,
    expected_calibration_error,
    fit,
    held_out_probabilities,
    measure,
    probabilities,
    write_calibration,
)


def judged(pairs=4000, slope=0.6, intercept=-1.0, seed=0):
    """Documents whose relevance is drawn with a known probability: the true calibration is known."""
    rng = np.random.default_rng(seed)
    scores = np.tanh(rng.normal(size=pairs) * 1.5).astype(np.float32).astype(float)
    truth = 1 / (1 + np.exp(-(slope * 2 * np.arctanh(scores) + intercept)))
    return JudgedScores(scores, rng.random(pairs) < truth, np.arange(pairs) // 20), truth


def test_platt_finds_the_true_calibration():
    pairs, truth = judged(40_000)
    calibration = fit(pairs, "platt")
    assert calibration["slope"] == pytest.approx(0.6, abs=0.05)
    assert calibration["intercept"] == pytest.approx(-1.0, abs=0.05)
    assert np.abs(probabilities(calibration, pairs.scores) - truth).max() < 0.02


def test_platt_is_that_of_scikit_learn():
    """Its CalibratedClassifierCV, around a classifier that passes the logits on."""
    pairs, _ = judged(500)
    logits = np.array([[logit_difference(score)] for score in pairs.scores])

    class Passing(ClassifierMixin, BaseEstimator):
        classes_ = np.array([False, True])
        n_features_in_ = 1

        def fit(self, X, y):
            return self

        def __sklearn_is_fitted__(self):
            return True

        def decision_function(self, X):
            return X[:, 0]

        def predict(self, X):
            return X[:, 0] > 0

    theirs = CalibratedClassifierCV(FrozenEstimator(Passing()), method="sigmoid").fit(logits, pairs.is_relevant)
    assert probabilities(fit(pairs, "platt"), pairs.scores) == pytest.approx(
        theirs.predict_proba(logits)[:, 1], abs=1e-3
    )


def test_isotonic_is_that_of_scikit_learn():
    pairs, _ = judged(500)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(pairs.scores, pairs.is_relevant)
    between = np.linspace(-1, 1, 301)
    assert probabilities(fit(pairs, "isotonic"), between) == pytest.approx(theirs.predict(between), abs=1e-6)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_calibration_lowers_the_error_on_held_out_queries(method):
    report = measure(judged()[0], method)
    (before, brier_before), (after, brier_after) = report.errors["before"], report.errors["after"]
    assert after < 0.03 < before
    assert brier_after < brier_before
    assert (report.queries, report.pairs) == (200, 4000)
    assert f"{after:.4f}" in report.lines()[-1]


def test_held_out_queries_are_not_seen():
    """Each query's documents are all relevant or none is, whatever their scores: what was seen would be known."""
    rng = np.random.default_rng(0)
    queries = np.repeat(np.arange(100), 2)
    scores = queries / 100 - 0.5 + rng.normal(size=200) * 1e-6
    pairs = JudgedScores(scores, rng.random(100)[queries] < 0.3, queries)
    seen = probabilities(fit(pairs, "isotonic"), scores)
    held_out = held_out_probabilities(pairs, "isotonic")
    brier_seen, brier_held_out = (np.square(values - pairs.is_relevant).mean() for values in (seen, held_out))
    assert brier_seen < brier_held_out


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_the_error_is_that_of_its_definition(pairs):
    values, is_relevant = np.array([value for value, _ in pairs]), np.array([label for _, label in pairs])
    expected = 0.0
    for number in range(15):
        mask = np.minimum((values * 15).astype(int), 14) == number
        if mask.any():
            gap = abs(values[mask].mean() - is_relevant[mask].mean())
            expected += mask.sum() / len(values) * gap
    assert expected_calibration_error(values, is_relevant) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "is_relevant", "message"),
    [
        ([0.1, 0.2], [True, True], "All 2 documents are relevant"),
        ([0.1, 0.2], [False, False], "All 2 documents are not relevant"),
        ([0.1, 0.5], [True, False], "do not score higher"),
        ([0.5, 0.5], [True, False], "do not score higher"),
    ],
)
@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_what_cannot_be_calibrated_is_refused(scores, is_relevant, message, method):
    with pytest.raises(ValueError, match=message):
        fit(JudgedScores(np.array(scores), np.array(is_relevant), np.arange(2)), method)


def test_one_query_is_not_enough():
    pairs = JudgedScores(np.array([0.1, 0.5]), np.array([False, True]), np.zeros(2))
    with pytest.raises(ValueError, match="only one query"):
        measure(pairs, "platt")


def test_scores_that_separate_the_classes_give_finite_numbers():
    pairs = JudgedScores(np.repeat([-1.0, 1.0], 10), np.repeat([False, True], 10), np.arange(20) % 10)
    calibration = fit(pairs, "platt")
    assert math.isfinite(calibration["slope"])
    assert probabilities(calibration, np.array([-1.0, 1.0])) == pytest.approx([1 / 12, 11 / 12], abs=1e-3)


# The command


@pytest.fixture(scope="module")
def judged_folder(tmp_path_factory, models):
    """A collection in which the documents that the model likes are relevant, but for a few."""
    folder = tmp_path_factory.mktemp("judged")
    rng = np.random.default_rng(0)
    words = ["novel", "judge", "book", "lee", "wrote", "nobody", "it", "who"]
    documents = {f"d{number}": " ".join(rng.choice(words, 5)) for number in range(40)}
    queries = {f"q{number}": f"who wrote {number}" for number in range(8)}
    (folder / "qrels").mkdir()
    lines = []
    for query, text in queries.items():
        scores = models("qwen3").predict([(text, document) for document in documents.values()])
        for document, score in zip(documents, scores.tolist(), strict=True):
            is_relevant = (score > scores.mean()) != (rng.random() < 0.15)
            lines.append(f"{query}\t{document}\t{int(is_relevant)}\n")
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    for name, texts in (("corpus", documents), ("queries", queries)):
        rows = (json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def model_folder(saved_folders, tmp_path):
    return shutil.copytree(saved_folders("qwen3"), tmp_path / "model")


@pytest.mark.parametrize("options", [(), ("--judged-only", "--method", "isotonic")])
def test_the_command_calibrates_a_folder(querit, judged_folder, model_folder, options):
    weights = (model_folder / "model.safetensors").read_bytes()
    code, out, err = querit("calibrate", model_folder, "--collection", f"{judged_folder}:dev", *options)
    assert (code, err) == (0, "")
    assert "8 queries, 320 pairs" in out
    assert out.splitlines()[-1] == f"Wrote {model_folder / 'config.json'}"
    before, after = (float(line.split()[-2]) for line in out.splitlines()[2:4])
    assert after < before
    assert (model_folder / "model.safetensors").read_bytes() == weights
    ranked = QueritForSequenceRanking.from_pretrained(model_folder).rank(
        tiny.QUERY, tiny.DOCUMENTS, as_probability=True
    )
    assert all(0 <= document.score <= 1 for document in ranked)


def test_rows_and_a_new_folder(querit, judged_folder, model_folder, tmp_path):
    rows = [
        {"query": f"who {number}", "documents": ["a novel", "x"], "labels": [number % 3 > 0, 0]} for number in range(12)
    ]
    model = QueritForSequenceRanking.from_pretrained(model_folder)
    if model.predict([("who 0", "a novel"), ("who 0", "x")]).diff() > 0:
        rows = [row | {"documents": row["documents"][::-1]} for row in rows]
    rows = [row | {"labels": [int(label) for label in row["labels"]]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (model_folder / "config.json").read_bytes()
    code, out, err = querit("calibrate", model_folder, "--rows", tmp_path / "rows.jsonl", "-o", tmp_path / "new")
    assert (code, err) == (0, "")
    assert "12 queries, 24 pairs, 33.3% relevant; method platt" in out
    assert (model_folder / "config.json").read_bytes() == before
    assert json.loads((tmp_path / "new" / "config.json").read_text())["calibration"]["method"] == "platt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to calibrate on"),
        (["--collection", "nowhere:dev"], "is missing"),
        (["--rows", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["--collection", "JUDGED:dev", "--relevant-from", "2"], "All 320 documents are not relevant"),
        (["--collection", "JUDGED:dev", "--method", "beta"], "Invalid value for '--method'"),
        (["--collection", "JUDGED:dev", "--output", "."], "exists: name a new folder"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    querit, judged_folder, model_folder, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    arguments = [argument.replace("JUDGED", str(judged_folder)) for argument in arguments]
    code, out, err = querit("calibrate", model_folder, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before


def test_a_model_that_is_no_folder_of_ours_needs_an_output(querit, judged_folder, models, tmp_path):
    model = models("qwen3")
    published = tiny.write_published(tmp_path / "published", model, tiny.published_tensors(model))
    for name in ("mini", published):
        code, _, err = querit("calibrate", name, "--collection", f"{judged_folder}:dev")
        assert code == 2
        assert "name a new one, --output FOLDER" in err


# What becomes of a calibration


@pytest.fixture
def calibrated(model_folder):
    write_calibration(model_folder, {"method": "platt", "slope": 1.0, "intercept": 0.5})
    return model_folder


def calibration_of(folder):
    return json.loads((folder / "config.json").read_text()).get("calibration")


def test_conversion_keeps_it_where_there_is_a_place_for_it(calibrated, tmp_path):
    for layout, convert in LAYOUTS.items():
        folder = convert(calibrated, tmp_path / layout)
        assert calibration_of(folder) == (calibration_of(calibrated) if layout == "querit" else None)
        assert ("## Calibration" in (folder / "README.md").read_text()) == (layout != "querit")


def test_a_merged_model_is_not_calibrated(calibrated, families, tmp_path, models, processor):
    other = tiny.make_model("qwen3", processor)
    other.score.weight.data += 0.1 * other.score.weight.data.flip(0)
    other.save_pretrained(tmp_path / "other")
    merged = merge_checkpoints(Recipe([str(calibrated), str(tmp_path / "other")], t=["0.5"]), tmp_path / "merged")
    assert calibration_of(merged) is None
    assert "querit calibrate" in (merged / "README.md").read_text()
    # Nothing to say where nothing was.
    plain = merge_checkpoints(Recipe([str(tmp_path / "other")] * 2, t=["0.5"]), tmp_path / "plain")
    assert "Calibration" not in (plain / "README.md").read_text()


def test_an_adapter_on_a_calibrated_base_is_not_calibrated(calibrated, tmp_path):
    pytest.importorskip("peft")
    adapt(tmp_path / "adapter", calibrated)
    assert calibration_of(convert_to_querit(tmp_path / "adapter", tmp_path / "whole")) is None


def test_a_trained_model_is_not_calibrated(calibrated, tmp_path):
    model = QueritForSequenceRanking.from_pretrained(calibrated)
    make_trainer(model, tmp_path / "out")
    assert model.config.calibration is None
