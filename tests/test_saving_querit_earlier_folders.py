"""Folders saved by earlier versions, and several copies of the code in one process."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
from transformers import AutoModel

from modeling_querit import QueritForSequenceRanking

SAVED_FOLDERS = Path(__file__).with_name("fixtures") / "saved_folders"
# Loads the folders in turn, and scores with all of them twice, by the code in the folders.
FRESH_PROCESS = """
import json, sys
sys.modules["modeling_querit"] = None
folders, rows = json.loads(sys.stdin.read())
from transformers import AutoModel
models = [AutoModel.from_pretrained(folder, trust_remote_code=True) for folder in folders]
assert len({type(model) for model in models}) == len(folders)
scores = []
for _ in range(2):
    for model in models:
        scores.append([
            model.predict([(row["query"], document) for document in row["documents"]], row["instruction"]).tolist()
            for row in rows
        ])
print(json.dumps(scores))
"""


def score_in_fresh_process(python, folders, rows, home):
    done = subprocess.run(
        [python, "-c", FRESH_PROCESS],
        input=json.dumps([[str(folder) for folder in folders], rows]),
        cwd=home,
        # Not even on the path.
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def recorded_rows(architecture):
    return json.loads((SAVED_FOLDERS / f"{architecture}_scores.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("load", [QueritForSequenceRanking.from_pretrained, AutoModel.from_pretrained])
def test_an_earlier_folder_loads_and_scores_as_recorded(architecture, load):
    model = load(SAVED_FOLDERS / architecture)
    assert type(model) is QueritForSequenceRanking
    rows = recorded_rows(architecture)
    assert len(rows) > 3
    for row in rows:
        scores = model.predict([(row["query"], document) for document in row["documents"]], row["instruction"])
        assert scores.tolist() == pytest.approx(row["scores"], abs=1e-6)


@pytest.mark.slow
def test_an_earlier_folder_scores_as_recorded_by_its_own_code(architecture, forked_python, tmp_path):
    """As its users load it, who never installed the package."""
    rows = recorded_rows(architecture)
    for scores in score_in_fresh_process(forked_python, [SAVED_FOLDERS / architecture], rows, tmp_path):
        for row, row_scores in zip(rows, scores, strict=True):
            assert row_scores == pytest.approx(row["scores"], abs=1e-6)


@pytest.mark.slow
def test_an_earlier_folder_that_is_saved_again_has_the_code_of_today(architecture, forked_python, tmp_path):
    model = QueritForSequenceRanking.from_pretrained(SAVED_FOLDERS / architecture)
    model.save_pretrained(tmp_path / "again")
    rows = recorded_rows(architecture)
    [scores, _] = score_in_fresh_process(forked_python, [tmp_path / "again"], rows, tmp_path)
    for row, row_scores in zip(rows, scores, strict=True):
        assert row_scores == pytest.approx(row["scores"], abs=1e-6)


@pytest.mark.slow
def test_several_copies_of_the_code_work_beside_each_other(model, saved_folder, architecture, forked_python, tmp_path):
    """Each copy teaches transformers' attention function the same keyword; one of them is from an earlier version."""
    folders = [tmp_path / "first", tmp_path / "second", SAVED_FOLDERS / architecture]
    for folder in folders[:2]:
        shutil.copytree(saved_folder, folder)
    rows = [{"query": tiny.QUERY, "documents": tiny.STRINGS, "instruction": None}]
    expected = model.predict(tiny.pairs(tiny.STRINGS)).tolist()
    earlier = QueritForSequenceRanking.from_pretrained(folders[2]).predict(tiny.pairs(tiny.STRINGS)).tolist()
    for [scores], wanted in zip(
        score_in_fresh_process(forked_python, folders, rows, tmp_path), [expected, expected, earlier] * 2, strict=True
    ):
        assert scores == pytest.approx(wanted, abs=1e-5)
