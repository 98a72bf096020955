"""Which checkpoints can be merged, and what the error names where two cannot."""

import dataclasses
import json
import shutil

import pytest
import tiny
import torch
from tiny_checkpoints import vary

from modeling_querit import QueritProcessor
from modeling_querit.checkpoints.checkpoint import open_checkpoint
from modeling_querit.checkpoints.safetensors_io import InMemoryTensor
from modeling_querit.merging.compatibility import check_compatible


@pytest.fixture
def open_by_name(tmp_path):
    return lambda name: open_checkpoint(str(name), tmp_path / "temporary")


@pytest.fixture
def checkpoint(saved_folder, open_by_name):
    return open_by_name(saved_folder)


def test_values_data_types_and_irrelevant_settings_may_differ(saved_folder, checkpoint, tmp_path, open_by_name):
    other = open_by_name(vary(saved_folder, tmp_path / "other", seed=1, dtype=torch.bfloat16))
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["text_config"] |= {"use_cache": False, "transformers_version": "4.0.0", "attention_dropout": 0.1}
    config["text_config"] |= {"initializer_range": 0.5, "pad_token_id": 3, "output_hidden_states": True}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    check_compatible([checkpoint, other, open_by_name(tmp_path / "other")])


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 0.5), ("max_position_embeddings", 128)])
def test_a_different_setting_is_named(saved_folder, checkpoint, tmp_path, open_by_name, key, value):
    shutil.copytree(saved_folder, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    before, config["text_config"][key] = config["text_config"][key], value
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"other has {key} {value!r}, .* has {before!r}: only models of one"):
        check_compatible([checkpoint, open_by_name(tmp_path / "other")])


def test_architectures_that_differ(saved_folders, open_by_name):
    with pytest.raises(ValueError, match="only models of one architecture can be merged") as error:
        check_compatible([open_by_name(saved_folders(architecture)) for architecture in tiny.ARCHITECTURES])
    assert all(str(saved_folders(architecture)) in str(error.value) for architecture in tiny.ARCHITECTURES)


def test_vocabularies_that_differ_name_a_token(saved_folder, checkpoint, tmp_path, open_by_name):
    shutil.copytree(saved_folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    vocab["Ġcontent"], vocab["Ġthe"] = vocab["Ġthe"], vocab["Ġcontent"]
    path.write_text(json.dumps(spec))
    with pytest.raises(
        ValueError, match=r"other has another vocabulary .*'Ġcontent' is \d+, not \d+, and 1 more tokens"
    ):
        check_compatible([checkpoint, open_by_name(tmp_path / "other")])


def test_an_additional_token_makes_another_vocabulary(saved_folder, checkpoint, tmp_path, open_by_name):
    shutil.copytree(saved_folder, tmp_path / "other")
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[NEW]"]})
    QueritProcessor(tokenizer).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"'\[NEW\]' is \d+, not None, and 0 more tokens differ"):
        check_compatible([checkpoint, open_by_name(tmp_path / "other")])


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_tokenizer_with_other_splitting_rules_is_named(saved_folder, checkpoint, tmp_path, open_by_name, part):
    shutil.copytree(saved_folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    other = {"normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: other[part]}))
    with pytest.raises(ValueError, match=f"The tokenizer of .*other has another {part} than that of"):
        check_compatible([checkpoint, open_by_name(tmp_path / "other")])


def test_a_missing_tensor_is_named(checkpoint):
    tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if "layers.1" not in key}
    other = dataclasses.replace(checkpoint, name="other", tensors=tensors)
    for pair in ([checkpoint, other], [other, checkpoint]):
        with pytest.raises(ValueError, match=r"other lacks model\.layers\.1\.\S+ \(and \d+ more\), which "):
            check_compatible(pair)


def test_a_tensor_of_another_shape_is_named(checkpoint):
    tensors = checkpoint.tensors | {"score.bias": InMemoryTensor(torch.ones(3))}
    other = dataclasses.replace(checkpoint, name="other", tensors=tensors)
    with pytest.raises(ValueError, match=r"score\.bias has shape \(3,\) in other, but \(2,\) in "):
        check_compatible([checkpoint, other])


def test_all_checkpoints_are_compared(checkpoint):
    tensors = checkpoint.tensors | {"score.bias": InMemoryTensor(torch.ones(3))}
    with pytest.raises(ValueError, match=r"score\.bias has shape \(3,\) in third"):
        check_compatible([checkpoint, checkpoint, dataclasses.replace(checkpoint, name="third", tensors=tensors)])
