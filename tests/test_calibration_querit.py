import math

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit import QueritConfig, QueritForSequenceRanking
from modeling_querit.calibration_querit import probability_function

PLATT = {"method": "platt", "slope": 0.7, "intercept": -1.5}
ISOTONIC = {"method": "isotonic", "scores": [-0.5, 0.0, 0.25], "probabilities": [0.1, 0.1, 0.9]}


@given(st.floats(-1, 1, width=32))
def test_platt_is_the_logistic_function_of_the_logit_difference(score):
    logits = math.log((1 + score) / (1 - score)) if abs(score) < 1 else math.copysign(18, score)
    expected = 1 / (1 + math.exp(-(0.7 * logits - 1.5)))
    assert probability_function(PLATT)(score) == pytest.approx(expected, rel=1e-6 if abs(score) < 1 else 1)


@given(st.floats(-1, 1, width=32))
def test_isotonic_is_linear_between_its_points(score):
    expected = np.interp(score, ISOTONIC["scores"], ISOTONIC["probabilities"])
    assert probability_function(ISOTONIC)(score) == pytest.approx(expected, abs=1e-12)


def test_slope_one_is_the_models_own_p1():
    assert probability_function({"method": "platt", "slope": 1.0, "intercept": 0.0})(-0.5) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("platt", "calibration is 'platt', not an object"),
        ({"method": "beta"}, "method 'beta'"),
        ({"method": []}, "method"),
        ({"method": "platt", "slope": 1.0}, "slope above 0 and an intercept"),
        ({"method": "platt", "slope": -1.0, "intercept": 0.0}, "slope above 0"),
        ({"method": "platt", "slope": True, "intercept": 0.0}, "slope above 0"),
        ({"method": "isotonic", "scores": [0.0], "probabilities": []}, "same length"),
        ({"method": "isotonic", "scores": [], "probabilities": []}, "same length"),
        ({"method": "isotonic", "scores": [0.0, "a"], "probabilities": [0, 1]}, "numbers"),
        ({"method": "isotonic", "scores": [0.0, 0.1], "probabilities": [0, 2]}, r"in \[0, 1\]"),
        ({"method": "isotonic", "scores": [0.1, 0.1], "probabilities": [0, 1]}, "rise"),
        ({"method": "isotonic", "scores": [0.0, 0.1], "probabilities": [1, 0]}, "fall"),
    ],
)
def test_broken_calibrations_are_refused(calibration, message):
    with pytest.raises(ValueError, match=message):
        QueritConfig(calibration=calibration)


@pytest.mark.parametrize("calibration", [PLATT, ISOTONIC])
def test_rank_gives_probabilities_that_survive_a_save(models, processor, tmp_path, calibration):
    model = tiny.make_model("qwen3", processor)
    scored = model.rank(tiny.QUERY, tiny.DOCUMENTS)
    expected = [probability_function(calibration)(document.score) for document in scored]
    model.config.calibration = calibration
    model.save_pretrained(tmp_path)
    loaded = QueritForSequenceRanking.from_pretrained(tmp_path)
    ranked = loaded.rank(tiny.QUERY, tiny.DOCUMENTS, as_probability=True)
    assert [document.score for document in ranked] == pytest.approx(expected, abs=1e-6)
    assert [document.index for document in ranked] == [document.index for document in scored]
    assert loaded.rank(tiny.QUERY, tiny.DOCUMENTS, top_k=2, as_probability=True) == ranked[:2]
    # Scores are as before unless they are asked for as probabilities.
    assert loaded.predict(tiny.pairs()).tolist() == models("qwen3").predict(tiny.pairs()).tolist()


def test_a_model_without_calibration_says_how_to_get_one(models):
    with pytest.raises(ValueError, match=r"not calibrated.*querit calibrate"):
        models("qwen3").rank(tiny.QUERY, tiny.DOCUMENTS, as_probability=True)
