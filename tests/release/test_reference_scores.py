"""Reference scores: computed, written and read again."""

import json

import pytest

from modeling_querit import QueritForSequenceRanking
from modeling_querit.release.reference_scores import PAIRS, REFERENCE_FILE, compute_reference, read_reference


@pytest.fixture(scope="module")
def reference(saved_folders):
    return compute_reference(saved_folders("deepseek_v3"))


def test_reference_scores_are_those_of_the_model(saved_folders, reference):
    assert reference["dtype"] == "float32"
    assert reference["pairs"] == [list(pair) for pair in PAIRS]
    model = QueritForSequenceRanking.from_pretrained(saved_folders("deepseek_v3"))
    assert reference["scores"] == pytest.approx(model.predict(list(PAIRS)).tolist(), abs=1e-5)


def test_reference_scores_are_read_as_written(tmp_path, reference):
    (tmp_path / REFERENCE_FILE).write_text(json.dumps(reference))
    assert read_reference(tmp_path / REFERENCE_FILE) == reference


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"scores": [1.0]},
        {"pairs": [], "scores": []},
        {"pairs": [["a", "b"], ["a", "c"]], "scores": [0.5]},
        {"pairs": [["a", "b"]], "scores": ["high"]},
        {"pairs": ["ab"], "scores": [0.5]},
    ],
    ids=str,
)
def test_a_malformed_record_is_refused(tmp_path, record):
    (tmp_path / REFERENCE_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"reference_scores.json is not a record of pairs and their scores: delete it"):
        read_reference(tmp_path / REFERENCE_FILE)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / REFERENCE_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"reference_scores.json is not JSON .*: delete it"):
        read_reference(tmp_path / REFERENCE_FILE)
