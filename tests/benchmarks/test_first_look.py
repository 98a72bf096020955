import json

import pytest
from small_adaptations import write_collection

from benchmarks import first_look

COLUMNS = ["random", "BM25", "BM25 + mini", "score fusion (sum)", "oracle order"]


def test_a_reranker_is_measured_on_each_collection(saved_folders, tmp_path, capsys):
    names = ["targets/scifact", "targets/cranfield", "targets/cacm", "targets/liveqa_med"]
    for name in [*names, "multilingual/xquad-en", "multilingual/xquad-de"]:
        write_collection(tmp_path / name)
    path = tmp_path / "first_look.json"
    options = ["--model", str(saved_folders("qwen3")), "--data", str(tmp_path), "--queries", "2", "--depth", "3"]
    first_look.main([*options, "--max-length", "40", "--json", str(path)])
    written = json.loads(path.read_text())
    assert [row["collection"] for row in written["rows"]] == [
        "scifact",
        "cranfield",
        "cacm",
        "liveqa_med",
        "xquad de->en",
    ]
    for row in written["rows"]:
        assert (row["queries"], row["pairs"]) == (2, 6)
        assert all(0 <= row[column] <= row["oracle order"] <= 1 for column in COLUMNS)
        assert row["pairs_per_second"] > 0
    assert written["settings"] == {"queries": 2, "depth": 3, "max_length": 40, "int8": False} | {
        "model": str(saved_folders("qwen3"))
    }
    assert "scifact" in capsys.readouterr().out


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SystemExit, match="is not a folder: name one with targets/"):
        first_look.main(["--data", str(tmp_path / "nowhere")])
