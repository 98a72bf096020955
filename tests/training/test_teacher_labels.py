import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.training.teacher_labels import METHODS, Calibration, Teachers

SCORES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["quantile", "sigmoid", "rank"])
@given(SCORES, SCORES)
def test_labels_are_in_the_unit_interval_and_keep_the_order(method, fitted, scores):
    labels = Calibration.fit(fitted, method).apply(scores)
    assert ((labels >= 0) & (labels <= 1)).all()
    order = np.argsort(scores, kind="stable")
    assert (np.diff(labels[order]) >= 0).all()


def test_quantile_is_linear_and_clips_outliers():
    scores = [*np.linspace(0, 10, 1001), 1e9]
    calibration = Calibration.fit(scores, "quantile")
    low, high = np.quantile(scores, [0.01, 0.99])
    assert calibration.apply([low, (low + high) / 2, high, 1e9, -5]) == pytest.approx([0, 0.5, 1, 1, 0])


def test_rank_spreads_labels_evenly():
    scores = np.exp(np.random.default_rng(0).normal(size=5000))
    labels = Calibration.fit(scores, "rank").apply(scores)
    assert np.histogram(labels, bins=10, range=(0, 1))[0] == pytest.approx([500] * 10, rel=0.05)


def test_sigmoid_is_the_logistic_function():
    assert Calibration.fit([0.0], "sigmoid").apply([0.0, 2.0, -800.0]) == pytest.approx(
        [0.5, 1 / (1 + math.exp(-2)), 0]
    )


def test_equal_scores_become_the_middle():
    assert Calibration.fit([3.0, 3.0], "quantile").apply([3.0, 9.0]).tolist() == [0.5, 0.5]
    assert Calibration.fit([3.0, 3.0], "rank").apply([3.0]).tolist() == [0.5]


def test_unknown_scores_stay_unknown():
    for method in METHODS:
        labels = Calibration.fit([0.0, 1.0], method).apply([math.nan, 1.0])
        assert math.isnan(labels[0])
        assert not math.isnan(labels[1])


@pytest.mark.parametrize(
    ("scores", "method", "message"),
    [([], "rank", "no finite"), ([math.nan], "rank", "no finite"), ([2.0], "none", "2"), ([0.0], "minmax", "choose")],
)
def test_scores_that_cannot_be_calibrated_are_refused(scores, method, message):
    with pytest.raises(ValueError, match=message):
        Calibration.fit(scores, method)


def test_a_label_is_the_weighted_mean_of_the_teachers_that_were_asked(tmp_path):
    rows = [{"a": [0.0, 10.0], "b": [0.2, 0.4]}]
    teachers = Teachers.fit(rows, weights={"a": 1, "b": 3}, methods={"a": "quantile", "b": "none"})
    assert teachers.labels({"a": [0.0, 10.0], "b": [0.2, 0.4]}) == pytest.approx([0.15, 0.55])
    assert teachers.labels({"a": [None, 10.0], "b": [0.2, None]}) == pytest.approx([0.2, 1.0])
    labels = teachers.labels({"a": [None, 10.0], "other": [1.0, 1.0]})
    assert math.isnan(labels[0])
    assert labels[1] == pytest.approx(1.0)
    teachers.save(tmp_path / "teachers.json")
    assert Teachers.load(tmp_path / "teachers.json") == teachers


@pytest.mark.parametrize("weights", [{"c": 1.0}, {"a": 0.0}, {"a": -1.0}, {"a": math.nan}])
def test_weights_have_to_be_of_teachers_and_above_zero(weights):
    with pytest.raises(ValueError, match="teacher"):
        Teachers.fit([{"a": [0.0, 1.0]}], weights)


def test_a_rare_score_still_counts():
    """The first and the last percentile are equal; only scores outside of them tell documents apart."""
    scores = [1.0] + [0.0] * 100
    assert Calibration.fit(scores).apply(scores).tolist() == scores
