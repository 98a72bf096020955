"""Copies of the code in one process, of this version and of an earlier one: whichever came last, all rank right."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from modeling_querit import QueritForSequenceRanking

SAVED_FOLDERS = Path(__file__).with_name("fixtures") / "saved_folders"
# Loads models one after another and ranks with all of them after each; then in four threads at once, and in children
# that are forked meanwhile and afterwards. A folder is loaded by its own code until the package is imported.
PROCESS = """
import json, os, signal, sys, threading
folders, rows = json.loads(sys.stdin.read())
from transformers import AutoModel
models = []

def score():
    return [
        [score for row in rows for score in
         model.predict([(row["query"], document) for document in row["documents"]], row["instruction"]).tolist()]
        for model in models
    ]

def score_in_child():
    reader, writer = os.pipe()
    if os.fork() == 0:
        signal.alarm(120)
        os.write(writer, json.dumps(score()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        return lines.read()

results = []
for folder in folders:
    if folder.endswith("package"):
        from modeling_querit import QueritForSequenceRanking
        models.append(QueritForSequenceRanking.from_pretrained(folder))
    else:
        models.append(AutoModel.from_pretrained(folder, trust_remote_code=True))
    results += score()
assert len({type(model) for model in models}) == len(models)
threads = [threading.Thread(target=lambda: [results.extend(score()) for _ in range(2)]) for _ in range(4)]
for thread in threads:
    thread.start()
children = [score_in_child() for _ in range(2)]
for thread in threads:
    thread.join()
for child in [*children, score_in_child()]:
    results += json.loads(child)
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_copies_of_any_version_work_beside_each_other(forked_python, tmp_path):
    rows = json.loads((SAVED_FOLDERS / "qwen3_scores.json").read_text(encoding="utf-8"))[:2]
    folders = [tmp_path / name for name in ("old", "new", "second_old", "second_new", "package")]
    for folder in folders:
        if "old" in folder.name:
            shutil.copytree(SAVED_FOLDERS / "qwen3", folder)
        else:
            QueritForSequenceRanking.from_pretrained(SAVED_FOLDERS / "qwen3").save_pretrained(folder)
    # The code of two folders is one copy if it is the same.
    with (folders[3] / "modeling_querit.py").open("a", encoding="utf-8") as file:
        file.write("\n# Another release.\n")
    done = subprocess.run(
        [forked_python, "-c", PROCESS],
        input=json.dumps([[str(folder) for folder in folders], rows]),
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 1 + 2 + 3 + 4 + 5 + 5 * (8 + 3)
    expected = [score for row in rows for score in row["scores"]]
    assert all(scores == pytest.approx(expected, abs=1e-6) for scores in results)
