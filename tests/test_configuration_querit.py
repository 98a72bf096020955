import json
import shutil

import pytest
import tiny
import torch
from transformers import AutoConfig, DeepseekV3Config, LlamaConfig, Qwen3Config

from modeling_querit import QueritConfig, QueritForSequenceRanking


def on_meta(config):
    with torch.device("meta"):
        return QueritForSequenceRanking(config)


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


def test_a0_4b_has_the_published_counts():
    model = on_meta(QueritConfig.a0_4b())
    assert count(model.model.parameters()) == 4_919_636_992
    assert count(model.get_input_embeddings().parameters()) == 131_907_584
    assert count(model.score.parameters()) == 2_050

    experts = [tensor for name, tensor in model.named_parameters() if ".mlp.experts." in name]
    assert len(experts) == 23 * 2
    assert all(tensor.shape[0] == 128 for tensor in experts)
    assert model.config.text_config.num_experts_per_tok == 4
    biases = [tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert count(biases) == 23 * 128
    assert count(model.parameters()) - count(experts) * 124 // 128 + count(biases) == 433_833_858


def test_qwen3_4b_has_the_published_counts():
    model = on_meta(QueritConfig.qwen3_4b())
    assert count(model.parameters()) == 4_021_782_018
    assert count(model.get_input_embeddings().parameters()) == 388_264_960
    text_config = model.config.text_config
    assert (text_config.num_attention_heads, text_config.num_key_value_heads, text_config.head_dim) == (32, 8, 128)
    assert text_config.rope_parameters["rope_theta"] == 1e6
    assert text_config.max_position_embeddings == 40_960


def test_presets_take_further_arguments():
    assert QueritConfig.a0_4b(margin_scale=0.5).margin_scale == 0.5
    assert QueritConfig.qwen3_4b(margin_scale=0.5).margin_scale == 0.5


def test_the_default_backbone_is_qwen3():
    config = QueritConfig()
    assert type(config.text_config) is Qwen3Config
    assert config.margin_scale == 0.8
    assert config.num_labels == 1


@pytest.mark.parametrize("as_dict", [False, True])
def test_text_config_may_be_a_config_or_a_dict(architecture, as_dict):
    text_config = tiny.make_text_config(architecture)
    config = QueritConfig(text_config=text_config.to_dict() if as_dict else text_config)
    assert type(config.text_config) is type(text_config)
    assert config.text_config.hidden_size == 32
    assert config.get_text_config() is config.text_config
    assert config.pad_token_id == 0


def test_a_text_config_dict_is_not_changed():
    text_config = {"model_type": "deepseek_v3", "hidden_size": 64}
    QueritConfig(text_config=text_config)
    assert text_config == {"model_type": "deepseek_v3", "hidden_size": 64}


@pytest.mark.parametrize("text_config", [{"hidden_size": 64}, {"model_type": "no_such_decoder"}])
def test_an_unknown_backbone_is_an_error(text_config):
    with pytest.raises(ValueError, match="model_type"):
        QueritConfig(text_config=text_config)


def test_deepseek_routing_is_spelled_out_for_vllm():
    text_config = QueritConfig(text_config={"model_type": "deepseek_v3"}).text_config
    assert (text_config.topk_method, text_config.scoring_func) == ("noaux_tc", "sigmoid")
    own = QueritConfig(text_config=DeepseekV3Config(topk_method="greedy")).text_config
    assert (own.topk_method, own.scoring_func) == ("greedy", "sigmoid")
    assert not hasattr(QueritConfig(text_config=LlamaConfig()).text_config, "topk_method")


def test_round_trip_through_a_dict_and_a_folder(architecture, tmp_path):
    config = QueritConfig(text_config=tiny.make_text_config(architecture), margin_scale=0.3)
    config.save_pretrained(tmp_path)
    for again in [
        QueritConfig.from_dict(config.to_dict()),
        QueritConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ]:
        assert type(again) is QueritConfig
        assert again.margin_scale == 0.3
        assert type(again.text_config) is type(config.text_config)
        assert again.text_config.to_dict() == config.text_config.to_dict()


def test_saved_config(saved_folder, architecture):
    saved = json.loads((saved_folder / "config.json").read_text())
    assert saved["model_type"] == "querit"
    assert saved["architectures"] == ["QueritForSequenceRanking"]
    assert saved["auto_map"] == {
        "AutoConfig": "configuration_querit.QueritConfig",
        "AutoModel": "modeling_querit.QueritForSequenceRanking",
        "AutoModelForSequenceClassification": "modeling_querit.QueritForSequenceClassification",
    }
    assert saved["sentence_transformers"] == {"activation_fn": "torch.nn.modules.activation.Tanh"}
    assert saved["text_config"]["model_type"] == architecture
    assert saved["tie_word_embeddings"] is False
    # One label is written as num_labels or as the labels themselves; both read back as one.
    assert saved.get("num_labels", len(saved.get("id2label", ()))) == 1
    assert QueritConfig.from_pretrained(saved_folder).num_labels == 1


def test_saving_anew_forgets_the_repository_that_auto_map_named(saved_folder, tmp_path):
    shutil.copy(saved_folder / "config.json", tmp_path)
    config = QueritConfig.from_pretrained(tmp_path)
    config.auto_map = {key: f"somebody/repository--{value}" for key, value in config.auto_map.items()}
    config.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert not any("--" in value for value in auto_map.values())


def test_the_folder_a_backbone_came_from_is_not_written_down(architecture, tmp_path):
    tiny.make_text_config(architecture).save_pretrained(tmp_path / "private-backbone")
    text_config = AutoConfig.from_pretrained(tmp_path / "private-backbone")
    QueritConfig(text_config=text_config).save_pretrained(tmp_path / "saved")
    assert "private-backbone" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_published_config_becomes_the_backbone(architecture, tmp_path):
    published = tiny.make_text_config(architecture).to_dict()
    published |= {"architectures": ["MLQwen3Model"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = QueritConfig.from_pretrained(tmp_path)
    assert type(config) is QueritConfig
    assert config.text_config.model_type == architecture
    assert config.text_config.hidden_size == 32
    assert config.dtype == torch.bfloat16
    assert config.num_labels == 1
    assert config.pad_token_id == 0
