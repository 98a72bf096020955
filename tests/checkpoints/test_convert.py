import json

import pytest
import tiny

from modeling_querit import QueritForSequenceRanking
from modeling_querit.checkpoints.convert import convert_checkpoint


def test_writes_the_well_formed_folder(model, tmp_path):
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    destination = convert_checkpoint(source, tmp_path / "deep" / "destination")
    names = {path.name for path in destination.iterdir()}
    assert {"config.json", "model.safetensors", "modules.json", "chat_template.jinja", "modeling_querit.py"} <= names
    assert json.loads((destination / "config.json").read_text())["model_type"] == "querit"
    converted = QueritForSequenceRanking.from_pretrained(destination)
    expected = model.predict(tiny.pairs()).tolist()
    assert converted.predict(tiny.pairs()).tolist() == pytest.approx(expected, abs=1e-6)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["destination"]


def test_the_dtype_asked_for(model, tmp_path):
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    convert_checkpoint(source, tmp_path / "destination", dtype="bfloat16")
    assert json.loads((tmp_path / "destination" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_is_there_is_not_overwritten(model, tmp_path):
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    (tmp_path / "destination").mkdir()
    (tmp_path / "destination" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="destination exists"):
        convert_checkpoint(source, tmp_path / "destination")
    assert [path.name for path in (tmp_path / "destination").iterdir()] == ["notes.txt"]


def test_nothing_is_written_of_a_checkpoint_that_lacks_something(model, tmp_path):
    tensors = tiny.published_tensors(model)
    del tensors["head.bias"]
    source = tiny.write_published(tmp_path / "source", model, tensors)
    with pytest.raises(ValueError, match=r"score\.bias"):
        convert_checkpoint(source, tmp_path / "destination")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_into_the_folder_one_stands_in(model, tmp_path, monkeypatch):
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert (convert_checkpoint(source, ".") / "config.json").exists()


def test_a_source_that_is_nowhere(tmp_path):
    with pytest.raises(OSError, match="nowhere is no folder"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "destination")
    assert not (tmp_path / "destination").exists()
