"""Loading models by name, in int8 as well."""

import pytest
import tiny
import torch
from transformers import TorchAoConfig

from modeling_querit import QueritForSequenceRanking
from modeling_querit.checkpoints import loading

torchao = pytest.importorskip("torchao.quantization")


@pytest.fixture
def quantized(saved_folders, architecture):
    return loading.load_model(saved_folders(architecture), int8=True)


def test_linear_layers_are_int8_and_the_head_is_not(quantized):
    assert isinstance(quantized.model.layers[0].mlp.down_proj.weight, torchao.Int8Tensor)
    assert isinstance(quantized.model.layers[1].self_attn.o_proj.weight, torchao.Int8Tensor)
    assert type(quantized.score.weight) is torch.nn.Parameter


def test_scores_in_int8_are_close(quantized, model):
    exact, scores = model.predict(tiny.pairs()), quantized.predict(tiny.pairs())
    assert not torch.equal(scores, exact)
    # On average: with weights this large, rounding routes some tokens to another expert.
    assert (scores - exact).abs().mean() < 0.1
    # Each token has its own scale: a batch changes scores only where float32 rounding changes an int8 value.
    alone = [quantized.predict([pair]).item() for pair in tiny.pairs()]
    assert scores.tolist() == pytest.approx(alone, abs=0.02)


def test_a_custom_config_leaves_the_head_out_too(saved_folders):
    config = TorchAoConfig(
        torchao.Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=["model.layers.0.self_attn.o_proj"]
    )
    model = QueritForSequenceRanking.from_pretrained(saved_folders("qwen3"), quantization_config=config)
    assert config.modules_to_not_convert == ["model.layers.0.self_attn.o_proj"]
    for layer in (model.score, model.model.layers[0].self_attn.o_proj):
        assert type(layer.weight) is torch.nn.Parameter
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, torchao.Int8Tensor)


def test_int8_without_torchao_is_an_error(saved_folders, monkeypatch):
    monkeypatch.setattr(loading, "is_torchao_available", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        loading.load_model(saved_folders("qwen3"), int8=True)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "../nowhere"])
def test_a_path_without_a_folder_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"There is no folder {name}"):
        loading.check_local_path(name)


def test_repositories_and_folders_are_no_missing_paths(tmp_path):
    loading.check_local_path("someone/model")
    loading.check_local_path(str(tmp_path))
