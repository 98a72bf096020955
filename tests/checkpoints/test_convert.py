"""Conversion to Querit's layout and to the published one."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file
from tiny_checkpoints import adapt
from transformers import AutoModel

from modeling_querit import QueritForSequenceRanking
from modeling_querit.checkpoints.convert import convert_to_published, convert_to_querit, convert_to_seq_cls
from modeling_querit.checkpoints.loading import load_for_training


@pytest.mark.slow
def test_a_published_checkpoint_becomes_a_complete_folder(model, tmp_path):
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    destination = convert_to_querit(source, tmp_path / "deep" / "destination")
    names = {path.name for path in destination.iterdir()}
    assert {"config.json", "model.safetensors", "modules.json", "chat_template.jinja", "modeling_querit.py"} <= names
    assert json.loads((destination / "config.json").read_text())["model_type"] == "querit"
    converted = QueritForSequenceRanking.from_pretrained(destination)
    expected = model.predict(tiny.pairs()).tolist()
    assert converted.predict(tiny.pairs()).tolist() == pytest.approx(expected, abs=1e-6)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["destination"]


@pytest.mark.slow
def test_the_config_states_the_data_type(model, tmp_path):
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    convert_to_querit(source, tmp_path / "destination", dtype="bfloat16")
    assert json.loads((tmp_path / "destination" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_with_content_is_not_overwritten(model, tmp_path):
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    (tmp_path / "destination").mkdir()
    (tmp_path / "destination" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="destination exists"):
        convert_to_querit(source, tmp_path / "destination")
    assert [path.name for path in (tmp_path / "destination").iterdir()] == ["notes.txt"]


def test_an_incomplete_checkpoint_is_not_converted(model, tmp_path):
    tensors = tiny.published_tensors(model)
    del tensors["head.bias"]
    source = tiny.write_published(tmp_path / "source", model, tensors)
    with pytest.raises(ValueError, match=r"score\.bias"):
        convert_to_querit(source, tmp_path / "destination")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_an_adapter_becomes_a_complete_folder(saved_folder, tmp_path, dtype):
    adapt(tmp_path / "adapter", saved_folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    folder = convert_to_querit(tmp_path / "adapter", tmp_path / "new", dtype)
    assert {path.name for path in folder.iterdir()} == {path.name for path in saved_folder.iterdir()}
    expected, actual = tiny.read_tensors(tmp_path / "merged"), tiny.read_tensors(folder)
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(
            actual[key].float(), tensor, rtol=2e-6 if dtype == "auto" else 1e-2, atol=2e-6 if dtype == "auto" else 1e-2
        )
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == ("float32" if dtype == "auto" else dtype)


@pytest.mark.slow
def test_a_link_to_an_empty_folder_is_filled(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    (tmp_path / "new").symlink_to(tmp_path / "disk")
    convert_to_querit(tmp_path / "model", tmp_path / "new")
    assert (tmp_path / "new").is_symlink()
    assert (tmp_path / "disk" / "config.json").exists()


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(FileExistsError, match="name a folder in it"):
        convert_to_querit(tmp_path / "model", tmp_path / "disk")


def test_the_working_directory_is_filled(model, tmp_path, monkeypatch):
    source = tiny.write_published(tmp_path / "source", model, tiny.published_tensors(model))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert (convert_to_querit(source, ".") / "config.json").exists()


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(OSError, match=r"There is no folder .*nowhere"):
        convert_to_querit(tmp_path / "nowhere", tmp_path / "destination")
    assert not (tmp_path / "destination").exists()


# The published layout


def assert_equal_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key


@pytest.fixture
def published(saved_folder, tmp_path):
    return convert_to_published(saved_folder, tmp_path / "published")


def test_published_weights_have_the_keys_of_the_first_release(published, model):
    assert_equal_tensors(tiny.read_tensors(published), tiny.published_tensors(model))


def test_the_published_config_is_flat(published, model, architecture):
    config = json.loads((published / "config.json").read_text())
    assert config["model_type"] == architecture
    assert config["architectures"] == [f"ML{tiny.BACKBONES[architecture].__name__}"]
    assert not hasattr(transformers, config["architectures"][0])
    assert config["dtype"] == "float32"
    assert not config.keys() & {"auto_map", "text_config", "margin_scale", "sentence_transformers"}
    text_config = model.config.text_config
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters", "pad_token_id"):
        assert config[key] == getattr(text_config, key), key


def test_the_published_folder_has_a_tokenizer_and_no_code(published, processor):
    names = {path.name for path in published.iterdir()}
    assert names - {"chat_template.jinja"} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(published)
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert tokenizer.cls_token == "[CLS]"
    assert tokenizer.model_max_length == tiny.MAX_LENGTH


def test_the_published_folder_has_no_local_paths(published, saved_folder):
    for path in published.iterdir():
        for folder in (saved_folder.parent, published.parent):
            assert str(folder).encode() not in path.read_bytes(), path.name


def test_the_published_folder_loads_with_equal_scores(published, model):
    loaded = QueritForSequenceRanking.from_pretrained(published)
    assert_equal_tensors(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.predict(tiny.pairs()), model.predict(tiny.pairs()))


def test_other_architectures_are_published_too(processor, tmp_path):
    model = tiny.make_model("gemma3_text", processor)
    model.save_pretrained(tmp_path / "source")
    published = convert_to_published(tmp_path / "source", tmp_path / "published")
    assert json.loads((published / "config.json").read_text())["architectures"] == ["MLGemma3TextModel"]
    loaded = QueritForSequenceRanking.from_pretrained(published)
    assert_equal_tensors(loaded.state_dict(), model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"prefix": ""}, {"shards": 3}], ids=str)
def test_conversion_there_and_back_keeps_everything(model, tmp_path, layout):
    tensors = tiny.published_tensors(model, layout.get("prefix", "model."))
    source = tiny.write_published(tmp_path / "source", model, tensors, layout.get("shards", 1))
    ours = convert_to_querit(source, tmp_path / "ours")
    again = convert_to_published(ours, tmp_path / "again")
    directly = convert_to_published(source, tmp_path / "directly")
    for folder in (again, directly):
        assert_equal_tensors(tiny.read_tensors(folder), tiny.published_tensors(model))
        config = json.loads((folder / "config.json").read_text())
        before = json.loads((source / "config.json").read_text())
        for key in before.keys() - {"architectures", "_name_or_path"}:
            assert config[key] == before[key], key
    # A second round trip changes nothing.
    assert_equal_tensors(tiny.read_tensors(convert_to_querit(again, tmp_path / "ours again")), tiny.read_tensors(ours))


@pytest.mark.slow
def test_code_written_for_the_first_release_gives_the_same_scores(published, model):
    """Inputs by mteb, the backbone by AutoModel, the head by numpy: no code of this package."""
    mteb = pytest.importorskip("mteb.models.model_implementations.querit_models")
    wrapper = mteb.QueritWrapper.__new__(mteb.QueritWrapper)
    wrapper.tokenizer, wrapper.device = transformers.AutoTokenizer.from_pretrained(published), torch.device("cpu")
    wrapper.cls_token_id, wrapper.pad_token_id = model.processor.cls_token_id, wrapper.tokenizer.pad_token_id
    wrapper.max_length = 80
    documents = [document for document in tiny.DOCUMENTS if isinstance(document, str)]
    inputs = wrapper.process_inputs([wrapper.format_instruction(None, tiny.QUERY, document) for document in documents])

    backbone = AutoModel.from_pretrained(published).eval()
    assert type(backbone) is type(model.model)
    with torch.inference_mode():
        states = backbone(**inputs).last_hidden_state[:, -1].double().numpy()
    head = {key: tensor.double().numpy() for key, tensor in tiny.read_tensors(published).items() if "head." in key}
    scores = tiny.softmax_difference(states @ head["head.weight"].T + head["head.bias"])
    assert model.predict(tiny.pairs(documents)).tolist() == pytest.approx(scores, abs=1e-4)
    assert np.ptp(scores) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_published_layout_is_written_in_a_data_type(saved_folder, model, tmp_path, dtype):
    published = convert_to_published(saved_folder, tmp_path / "published", dtype)
    expected = {
        key: tensor if key.endswith("e_score_correction_bias") else tensor.to(getattr(torch, dtype))
        for key, tensor in tiny.published_tensors(model).items()
    }
    assert_equal_tensors(tiny.read_tensors(published), expected)
    assert json.loads((published / "config.json").read_text())["dtype"] == dtype
    # "auto" keeps it.
    again = convert_to_published(published, tmp_path / "again")
    assert_equal_tensors(tiny.read_tensors(again), expected)
    assert QueritForSequenceRanking.from_pretrained(again).dtype == getattr(torch, dtype)


def test_the_published_folder_is_loaded_for_training_with_its_head(published, model):
    """A plain decoder would get a head at zero."""
    reranker = load_for_training(published)
    assert_equal_tensors(reranker.state_dict(), model.state_dict())
    scores = reranker.predict(tiny.pairs())
    assert torch.equal(scores, model.predict(tiny.pairs()))

    decoder = published.parent / "decoder"
    plain = copy.deepcopy(model.model)
    plain.save_pretrained(decoder)
    model.processor.tokenizer.save_pretrained(decoder)
    assert load_for_training(decoder).predict(tiny.pairs()).tolist() == [0.0] * len(scores)


def test_the_published_layout_does_not_overwrite_a_folder(saved_folder, tmp_path):
    (tmp_path / "destination").mkdir()
    (tmp_path / "destination" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="destination exists"):
        convert_to_published(saved_folder, tmp_path / "destination")
    assert [path.name for path in (tmp_path / "destination").iterdir()] == ["notes.txt"]


def remove_the_head(folder):
    tensors = tiny.read_tensors(folder)
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_the_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def insert_nan(folder):
    tensors = tiny.read_tensors(folder)
    tensors["score.bias"][1] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("write", [convert_to_querit, convert_to_published, convert_to_seq_cls])
@pytest.mark.parametrize("damage", [remove_the_head, truncate, remove_the_tokenizer, insert_nan])
def test_a_damaged_checkpoint_is_not_converted(saved_folder, tmp_path, write, damage):
    source = Path(shutil.copytree(saved_folder, tmp_path / "source"))
    damage(source)
    with pytest.raises((ValueError, OSError)):
        write(source, tmp_path / "written")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
def test_the_command_converts_to_the_published_layout(querit, model, saved_folder, tmp_path):
    code, out, _ = querit("convert", saved_folder, tmp_path / "new", "--to", "published", "--dtype", "float32")
    assert (code, out) == (0, f"Wrote {tmp_path / 'new'}\n")
    assert_equal_tensors(tiny.read_tensors(tmp_path / "new"), tiny.published_tensors(model))


def test_the_command_refuses_an_unknown_layout(querit, saved_folders, tmp_path):
    code, out, err = querit("convert", saved_folders("qwen3"), tmp_path / "new", "--to", "onnx")
    assert (code, out) == (2, "")
    assert "'onnx' is not" in err
    assert list(tmp_path.iterdir()) == []


# What is passed on, and what is written is loaded


@pytest.mark.slow
@pytest.mark.parametrize("convert", [convert_to_querit, convert_to_published, convert_to_seq_cls])
def test_licence_and_notices_are_passed_on(saved_folder, tmp_path, convert):
    source = shutil.copytree(saved_folder, tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: gemma\nbase_model: google/gemma\nlanguage: de\n---\n# A model\n")
    (source / "NOTICE").write_text("Gemma is provided under its terms.")
    folder = convert(source, tmp_path / "new")
    card = (folder / "README.md").read_text()
    for line in ("license: gemma", "base_model: google/gemma", "language: de", "Gemma is provided under its terms."):
        assert line in card
    assert (folder / "NOTICE").read_text() == "Gemma is provided under its terms."


@pytest.mark.slow
@pytest.mark.parametrize("convert", [convert_to_querit, convert_to_published, convert_to_seq_cls])
def test_what_is_written_is_loaded_before_it_appears(saved_folder, tmp_path, monkeypatch, convert):
    """A disk that loses a part of what was written."""
    from modeling_querit.checkpoints import convert as module

    def copy_and_lose(folder, *args, **kwargs):
        copy_weights(folder, *args, **kwargs)
        os.truncate(folder / "model.safetensors", 5000)

    copy_weights = module.copy_weights
    monkeypatch.setattr(module, "copy_weights", copy_and_lose)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        convert(saved_folder, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
