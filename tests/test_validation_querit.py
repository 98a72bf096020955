"""Broken folders: config, index, headers and tokenizer are checked before anything is built; file and key are named."""

import json
import resource
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from modeling_querit import QueritConfig, QueritForSequenceRanking
from modeling_querit.validation_querit import check_config, find_culprit, one_line, read_json_object, weight_files


@pytest.fixture
def folder(saved_folder, tmp_path):
    return shutil.copytree(saved_folder, tmp_path / "folder")


def edit_config(folder, **changes):
    """Set keys of `text_config` or, where the config has them there, of the whole; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part = config if key in ("text_config", "dtype", "margin_scale") else config["text_config"]
        part[key] = value
        if value is None:
            del part[key]
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder):
    with pytest.raises((ValueError, OSError)) as error:
        QueritForSequenceRanking.from_pretrained(folder)
    message = str(error.value)
    assert len(message) < 290
    assert "\n" not in message
    assert str(folder) in message
    return message


# The config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", "32"), ("hidden_size", 0), ("num_attention_heads", -2), ("vocab_size", 1.5)),
        *(("num_hidden_layers", 10**9), ("num_hidden_layers", 1000), ("hidden_size", 10**9), ("head_dim", True)),
        *(("rms_norm_eps", -1), ("rms_norm_eps", "x"), ("hidden_act", "x"), ("hidden_act", ["silu"])),
        *(("layer_types", ["full_attention"]), ("layer_types", "x"), ("attention_dropout", 2)),
        *(("attn_implementation", "someone/kernel"), ("quantization_config", {"quant_method": "x"})),
        *(("quantization_config", 3), ("dtype", "int7"), ("dtype", 3), ("margin_scale", "x"), ("rope_parameters", [])),
        *(("text_config", None), ("text_config", 3), ("model_type", "x"), ("model_type", ["qwen3"])),
    ],
)
def test_a_key_with_an_impossible_value_is_named(folder, key, value):
    edit_config(folder, **{key: value})
    message = refusal(folder)
    assert message.startswith(str(folder / "config.json"))
    assert key in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_experts_per_tok", 9), ("n_group", 3), ("topk_group", 2), ("n_routed_experts", 10**6)],
)
def test_experts_that_do_not_add_up_are_named(saved_folders, tmp_path, key, value):
    folder = shutil.copytree(saved_folders("deepseek_v3"), tmp_path / "folder")
    edit_config(folder, **{key: value})
    assert f"config.json: {key} is {value}" in refusal(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 2**50])
def test_numbers_without_a_size_are_refused(number):
    with pytest.raises(ValueError, match=r"^config\.json: rope_scaling_factor is "):
        check_config({"model_type": "qwen3", "rope_scaling_factor": number}, "config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    assert refusal(folder).startswith(f"{folder / 'config.json'} is ")


@pytest.mark.parametrize("loads", [QueritConfig, QueritForSequenceRanking])
def test_without_config_nothing_is_allocated(folder, loads):
    """A default config has 4,096 x 32 layers: 26 GB."""
    (folder / "config.json").unlink()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileNotFoundError, match=r"folder/config\.json is missing"):
        loads.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_key_is_found_by_what_mends_the_config():
    def attempt(config):
        if config.get("width") == 3 or config["text_config"].get("depth") == 4:
            raise ValueError("no")

    assert find_culprit({"width": 3, "text_config": {}}, attempt, ValueError("no")) == "width"
    assert find_culprit({"width": 1, "text_config": {"model_type": "x", "depth": 4}}, attempt, ValueError()) == "depth"
    assert find_culprit({"width": 3, "text_config": {"depth": 4}}, attempt, ValueError("no")) is None


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "torchao", "hqq"])
def test_a_quantization_that_cannot_be_loaded_is_one_sentence(folder, method):
    """Its package is missing here, or its settings are incomplete."""
    edit_config(folder, quantization_config={"quant_method": method, "load_in_4bit": True})
    assert "with this quantization_config cannot be loaded" in refusal(folder)


# Weights


def shard(folder, **index):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map} | index
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_a_sharded_folder_loads(folder, scores):
    shard(folder)
    assert QueritForSequenceRanking.from_pretrained(folder).predict(tiny.pairs()).tolist() == scores


@pytest.mark.parametrize(
    ("index", "named"),
    [
        *(({"weight_map": value}, "weight_map") for value in (None, [], {}, 3)),
        *(({"weight_map": {"a": value}}, "a is in") for value in (None, 3, "x.bin", "../outside.safetensors")),
        ({"weight_map": {"a": "model-00001-of-00001.safetensors"}}, "has a, but it does not"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"metadata": None}, "metadata"),
        ({"metadata": {"dtype": "x"}}, "metadata"),
    ],
)
def test_a_broken_index_is_named(folder, index, named):
    shard(folder, **index)
    assert named in refusal(folder)


def test_weights_outside_the_folder_are_not_read(folder, tmp_path):
    shard(folder)
    (folder / "model-00001-of-00001.safetensors").rename(tmp_path / "outside.safetensors")
    text = (folder / "model.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").write_text(
        text.replace("model-00001-of-00001.safetensors", "../outside.safetensors")
    )
    assert "which is not a safetensors file beside it" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_read(folder, name):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / name)
    assert f"{name} may run code when it is loaded" in refusal(folder)
    with pytest.raises(FileNotFoundError, match="has no safetensors files"):
        weight_files(folder)


def test_weights_that_are_no_floating_point_numbers_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight is stored as torch.int64" in refusal(folder)


def test_another_format_in_the_header_is_named(folder):
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "mlx"})
    assert "format 'mlx'" in refusal(folder)


# The tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("tokenizer.json", content) for content in (b"", b"{}", b"\xff", b"[]")),
        *(("tokenizer_config.json", content) for content in (b"", b"\xff", b"[]")),
    ],
)
def test_a_broken_tokenizer_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    assert refusal(folder).startswith(f"{folder / name}: the tokenizer cannot be read")


def test_a_tokenizer_without_cls_is_refused(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("[CLS]", "[XXX]"))
    assert "has no [CLS] token" in refusal(folder)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(folder, processor):
    tokenizer = processor.portable_tokenizer()
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(folder)
    size = len(tokenizer) - 1
    model = tiny.make_model("qwen3", vocab_size=size)
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    assert f"the tokenizer gives '<beyond>' the id {size}, but the model has {size} embeddings" in refusal(folder)


# Messages


def test_messages_of_libraries_are_cut():
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line("x" * 1000, 50)) == 50


def test_files_that_are_too_large_are_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="too many for such a file"):
        read_json_object(tmp_path / "config.json")
