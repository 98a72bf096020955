"""LoRA adapters as tensors, against peft's own merge."""

import json

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import LINEAR_LAYERS, adapt, bits, make_adapter, whole

from modeling_querit import QueritForSequenceRanking
from modeling_querit.checkpoints.adapters import apply_adapter, base_model_of
from modeling_querit.checkpoints.safetensors_io import open_weights

peft = pytest.importorskip("peft")
# peft warns of adapters as unusual as these.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

SETTINGS = {
    "as querit train makes them": {},
    "one layer": {"layers_to_transform": [1]},
    "attention only": {"target_modules": ["q_proj", "o_proj"], "modules_to_save": None},
    "linear layers by a pattern": {"target_modules": r".*\.layers\.\d+\..*_proj"},
    "rank-stabilised": {"use_rslora": True},
    "ranks by pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 8, r".*\.o_proj": 1}},
    "alphas by pattern": {
        "alpha_pattern": {"q_proj": 1, r"layers.0.*\.down_proj": 32, r"^model\.layers\.1\.mlp\..*": 5}
    },
    "ranks and alphas by pattern": {
        "rank_pattern": {"o_proj": 2, "down_proj": 3},
        "alpha_pattern": {"o_proj": 7, r"mlp\.up_proj": 9},
        "use_rslora": True,
    },
    "alpha below the rank": {"r": 3, "lora_alpha": 1},
    "the head as well": {"target_modules": [*LINEAR_LAYERS, "score"], "modules_to_save": None},
    "embeddings in full": {"modules_to_save": ["score", "embed_tokens"]},
    "with dropout": {"lora_dropout": 0.5},
    "gaussian initialisation": {"init_lora_weights": "gaussian"},
    "orthogonal initialisation": {"init_lora_weights": "orthogonal"},
}


def edit_tensors(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_config(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def read(folder, base):
    return apply_adapter(folder, open_weights(base))


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_tensors_equal_those_that_peft_merges(saved_folder, tmp_path, settings):
    adapted = adapt(tmp_path / "adapter", saved_folder, **SETTINGS[settings])
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected, before = tiny.read_tensors(tmp_path / "merged"), tiny.read_tensors(saved_folder)
    actual = read(tmp_path / "adapter", saved_folder)
    assert actual.keys() == expected.keys()
    moved = 0
    for key, tensor in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (tensor.dtype, tuple(tensor.shape)), key
        torch.testing.assert_close(whole(actual[key]), tensor, rtol=1e-6, atol=2e-6)
        moved += (tensor - before[key]).abs().max() > 0.01
    assert moved > 1


def test_an_adapter_that_peft_loads_again_is_the_same(saved_folder, tmp_path):
    adapt(tmp_path / "adapter", saved_folder)
    again = peft.PeftModel.from_pretrained(QueritForSequenceRanking.from_pretrained(saved_folder), tmp_path / "adapter")
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    actual = read(tmp_path / "adapter", saved_folder)
    for key, tensor in tiny.read_tensors(tmp_path / "merged").items():
        torch.testing.assert_close(whole(actual[key]), tensor, rtol=1e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_of_a_half_precision_base_stay_in_float32(saved_folders, tmp_path, dtype):
    model = QueritForSequenceRanking.from_pretrained(saved_folders("qwen3")).to(dtype)
    model.save_pretrained(tmp_path / "base")
    adapt(tmp_path / "adapter", tmp_path / "base")
    key = "model.layers.1.mlp.down_proj"
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    up, down = (stored[f"base_model.model.{key}.lora_{name}.weight"].double() for name in "BA")
    expected = tiny.read_tensors(tmp_path / "base")[f"{key}.weight"].double() + 6 / 4 * up @ down
    actual = read(tmp_path / "adapter", tmp_path / "base")[f"{key}.weight"]
    assert actual.dtype is dtype
    assert whole(actual).dtype is torch.float32
    np.testing.assert_allclose(whole(actual).numpy(), expected.numpy(), rtol=1e-6, atol=1e-6)


def test_rows_are_rows_of_the_whole_tensor(saved_folders, tmp_path):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    tensor = read(tmp_path / "adapter", saved_folders("qwen3"))["model.layers.0.mlp.up_proj.weight"]
    rows = [tensor.read(slice(start, start + 7)) for start in range(0, 63, 7)] + [tensor.read(slice(63, 64))]
    torch.testing.assert_close(torch.cat(rows), whole(tensor), rtol=1e-6, atol=1e-6)


def test_overwriting_what_was_read_changes_nothing(saved_folders, tmp_path):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    tensor = read(tmp_path / "adapter", saved_folders("qwen3"))["model.layers.0.mlp.up_proj.weight"]
    first = whole(tensor).clone()
    whole(tensor).zero_()
    assert bits(whole(tensor)) == bits(first)


def test_unchanged_tensors_are_those_of_the_base(saved_folders, tmp_path):
    base = open_weights(saved_folders("qwen3"))
    adapt(tmp_path / "adapter", saved_folders("qwen3"), target_modules=["q_proj"])
    actual = apply_adapter(tmp_path / "adapter", base)
    touched = {key for key in base if key.startswith("score.") or ".q_proj." in key}
    assert {key for key, tensor in actual.items() if tensor is not base[key]} == touched


def test_an_adapter_names_its_base(saved_folders, tmp_path):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    assert base_model_of(tmp_path / "adapter") == str(saved_folders("qwen3"))


# Adapters that are refused

UNSUPPORTED = {
    "DoRA": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "biases of its own": {"lora_bias": True, "target_modules": ["score"], "modules_to_save": None},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained tokens": {"trainable_token_indices": [3, 4]},
    # Their initialisation changes the base model, and so does loading them.
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    # It applies only to the tokens after an invocation.
    "activated": {"alora_invocation_tokens": [3, 4]},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", UNSUPPORTED)
def test_unsupported_kinds_of_lora_are_refused(saved_folders, tmp_path, settings):
    adapt(tmp_path / "adapter", saved_folders("qwen3"), **UNSUPPORTED[settings])
    with pytest.raises(ValueError, match="not a plain LoRA") as error:
        read(tmp_path / "adapter", saved_folders("qwen3"))
    assert "adapter" in str(error.value)


def test_adapters_of_expert_parameters_are_refused(saved_folders, tmp_path):
    adapt(tmp_path / "adapter", saved_folders("deepseek_v3"), target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match="not a plain LoRA"):
        read(tmp_path / "adapter", saved_folders("deepseek_v3"))


def test_another_kind_of_adapter_is_refused(saved_folders, tmp_path):
    model = QueritForSequenceRanking.from_pretrained(saved_folders("qwen3"))
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is not a plain LoRA adapter: merge it into its base model with peft"):
        read(tmp_path / "adapter", saved_folders("qwen3"))


def test_an_adapter_of_another_architecture_is_refused(saved_folders, tmp_path):
    adapt(tmp_path / "adapter", saved_folders("qwen3"), target_modules=["k_proj"])
    with pytest.raises(
        ValueError,
        match=r"its base model has no model\.layers\.\d\.self_attn\.k_proj\.weight: the adapter",
    ):
        read(tmp_path / "adapter", saved_folders("deepseek_v3"))


@pytest.mark.parametrize("settings", [{"hidden_size": 48}, {"intermediate_size": 96}])
def test_an_adapter_of_a_wider_model_is_refused(saved_folders, processor, tmp_path, settings):
    wider = tiny.make_model("qwen3", processor, **settings)
    make_adapter(tmp_path / "adapter", wider, target_modules=["down_proj"], modules_to_save=None)
    with pytest.raises(
        ValueError, match=r"update of model\.layers\.0\.mlp\.down_proj\.weight does not match its shape"
    ):
        read(tmp_path / "adapter", saved_folders("qwen3"))


def test_a_head_of_another_shape_is_named(saved_folders, tmp_path):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    key = "base_model.model.score.weight"
    edit_tensors(tmp_path / "adapter", lambda tensors: tensors.update({key: torch.ones(1, 32)}))
    with pytest.raises(ValueError, match=r"score\.weight"):
        read(tmp_path / "adapter", saved_folders("qwen3"))


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_an_update_is_named(saved_folders, tmp_path, half):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    key = f"base_model.model.model.layers.0.mlp.down_proj.lora_{half}.weight"
    edit_tensors(tmp_path / "adapter", lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj"):
        read(tmp_path / "adapter", saved_folders("qwen3"))


def test_halves_of_different_ranks_are_named(saved_folders, tmp_path):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    edit_tensors(tmp_path / "adapter", lambda tensors: tensors.update({key: torch.ones(32, 3)}))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj"):
        read(tmp_path / "adapter", saved_folders("qwen3"))


@pytest.mark.parametrize("name", [None, ""])
def test_an_adapter_without_a_base_is_refused(saved_folders, tmp_path, name):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    edit_config(tmp_path / "adapter", base_model_name_or_path=name)
    with pytest.raises(ValueError, match=r"adapter_config\.json does not name its base model: add it as"):
        base_model_of(tmp_path / "adapter")


def test_an_adapter_without_weights_is_refused(saved_folders, tmp_path):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter has no safetensors files"):
        read(tmp_path / "adapter", saved_folders("qwen3"))


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "UNKNOWN"}'])
def test_a_damaged_config_is_named(saved_folders, tmp_path, content):
    adapt(tmp_path / "adapter", saved_folders("qwen3"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match="adapter"):
        base_model_of(tmp_path / "adapter")
