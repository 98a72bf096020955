"""Checkpoints as they were published, and damaged ones."""

import copy
import json
import re
import shutil

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from modeling_querit import QueritForSequenceClassification, QueritForSequenceRanking

TOLERANCE = {"rtol": 0, "atol": 1e-5}


# Loading what was published


@pytest.mark.slow
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_published_layouts_load(model, ids, reference, tmp_path, layout):
    options = dict(tiny.LAYOUTS[layout])
    tensors = tiny.published_tensors(model, options.pop("prefix", "model."))
    if options.pop("lm_head", False):
        tensors["lm_head.weight"] = torch.randn(512, 32)
    folder = tiny.write_published(tmp_path / "published", model, tensors, **options)
    assert "auto_map" not in json.loads((folder / "config.json").read_text())

    published = QueritForSequenceRanking.from_pretrained(folder)
    assert type(published) is QueritForSequenceRanking
    assert type(published.model) is type(model.model)
    assert not published.training
    state = published.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert published.predict(tiny.pairs()).tolist() == pytest.approx(reference, abs=1e-5)

    # Saved, it is in our layout; no tensor is changed on the way out or on the way back in.
    published.save_pretrained(tmp_path / "saved")
    expected = {
        (
            "score." + key.removeprefix("head.") if key.startswith("head.") else "model." + key.removeprefix("model.")
        ): tensor
        for key, tensor in tensors.items()
        if not key.startswith("lm_head.")
    }
    saved = tiny.read_tensors(tmp_path / "saved")
    assert saved.keys() == expected.keys()
    for key, tensor in saved.items():
        assert torch.equal(tensor, expected[key]), key
    again = QueritForSequenceRanking.from_pretrained(tmp_path / "saved").state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again[key], tensor), key


def test_published_folder_scores_as_the_reference_does(model, tmp_path, content_cls_mask):
    """mteb's own inputs, transformers' own backbone, numpy: no code of this package."""
    import importlib

    folder = tiny.write_published(tmp_path, model, tiny.published_tensors(model))
    wrapper_class = importlib.import_module("mteb.models.model_implementations.querit_models").QueritWrapper
    wrapper = wrapper_class.__new__(wrapper_class)
    wrapper.tokenizer, wrapper.device = model.processor.tokenizer, torch.device("cpu")
    wrapper.cls_token_id, wrapper.pad_token_id, wrapper.max_length = model.processor.cls_token_id, 0, 80
    documents = [document for document in tiny.DOCUMENTS if isinstance(document, str)]
    inputs = wrapper.process_inputs([wrapper.format_instruction(None, tiny.QUERY, document) for document in documents])

    backbone = type(model.model).from_pretrained(folder).eval()
    with torch.inference_mode():
        states = backbone(**inputs).last_hidden_state[:, -1].double().numpy()
    head = tiny.read_tensors(folder)
    logits = states @ head["head.weight"].double().numpy().T + head["head.bias"].double().numpy()
    expected = tiny.softmax_difference(logits)

    published = QueritForSequenceRanking.from_pretrained(folder)
    assert published.predict(tiny.pairs(documents)).tolist() == pytest.approx(expected, abs=1e-4)
    with torch.inference_mode():
        assert published(**inputs)["score"].squeeze(-1).tolist() == pytest.approx(expected, abs=1e-4)


def test_published_bfloat16_weights_stay_bfloat16(model, tmp_path):
    tensors = {
        key: tensor if key.endswith("e_score_correction_bias") else tensor.bfloat16()
        for key, tensor in tiny.published_tensors(model).items()
    }
    folder = tiny.write_published(tmp_path / "published", model, dict(sorted(tensors.items())))
    published = QueritForSequenceRanking.from_pretrained(folder)
    assert published.dtype == torch.bfloat16
    published.save_pretrained(tmp_path / "saved")
    saved = tiny.read_tensors(tmp_path / "saved")
    for key, tensor in tensors.items():
        ours = saved[key.replace("head.", "score.")]
        assert ours.dtype == tensor.dtype, key
        assert torch.equal(ours, tensor), key
    assert QueritForSequenceRanking.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float32", "bfloat16"])
def test_dtype_on_loading_is_that_of_every_weight(model, tmp_path, dtype):
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = QueritForSequenceRanking.from_pretrained(tmp_path, dtype=dtype)
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    assert loaded.config.dtype == loaded.config.text_config.dtype == expected


def test_saving_in_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = QueritForSequenceRanking.from_pretrained(tmp_path).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again[key], tensor), key


def test_the_auto_classes_know_the_folder(saved_folder):
    assert type(AutoModel.from_pretrained(saved_folder)) is QueritForSequenceRanking
    classifier = AutoModelForSequenceClassification.from_pretrained(saved_folder)
    assert type(classifier) is QueritForSequenceClassification


def test_what_the_classifier_saves_loads_as_the_ranker(saved_folder, model, tmp_path):
    QueritForSequenceClassification.from_pretrained(saved_folder).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is QueritForSequenceRanking
    torch.testing.assert_close(again.predict(tiny.pairs()), model.predict(tiny.pairs()), **TOLERANCE)


def test_loading_info_on_request(saved_folder):
    model, info = QueritForSequenceRanking.from_pretrained(saved_folder, output_loading_info=True)
    assert type(model) is QueritForSequenceRanking
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


# Damaged checkpoints

DAMAGES = {
    "head": ["head.weight", "head.bias"],
    "head weight": ["head.weight"],
    "head bias": ["head.bias"],
    "backbone weight": ["model.layers.1.self_attn.o_proj.weight"],
    "embedding": ["model.embed_tokens.weight"],
    "norm": ["model.norm.weight"],
}
MOE_DAMAGES = {
    "routing bias": ["model.layers.1.mlp.gate.e_score_correction_bias"],
    "experts of a layer": [f"model.layers.1.mlp.experts.{index}.down_proj.weight" for index in range(tiny.EXPERTS)],
}
NAMED = {
    "head": r"score\.weight|score\.bias",
    "head weight": r"(head|score)\.weight",
    "head bias": r"(head|score)\.bias",
    "experts of a layer": r"layers\.1\.mlp\.experts.*down_proj",
}


def assert_error_names(folder, pattern, loader=QueritForSequenceRanking):
    with pytest.raises(ValueError, match=pattern):
        loader.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_missing_weight_is_an_error_that_names_it(model, tmp_path, damage, prefix):
    tensors = tiny.published_tensors(model, prefix)
    for key in DAMAGES[damage]:
        del tensors[key if key.startswith("head.") else prefix + key.removeprefix("model.")]
    folder = tiny.write_published(tmp_path, model, tensors)
    assert_error_names(folder, NAMED.get(damage, DAMAGES[damage][0].replace(".", r"\.")))


@pytest.mark.parametrize("damage", MOE_DAMAGES)
def test_a_missing_weight_of_a_moe_layer_is_an_error_that_names_it(models, tmp_path, damage):
    model = models("deepseek_v3")
    tensors = tiny.published_tensors(model)
    for key in MOE_DAMAGES[damage]:
        del tensors[key]
    folder = tiny.write_published(tmp_path, model, tensors)
    assert_error_names(folder, NAMED.get(damage, MOE_DAMAGES[damage][0].replace(".", r"\.")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("index", [0, tiny.EXPERTS - 1])
def test_one_missing_expert_is_an_error_that_names_it(models, tmp_path, index, name):
    model = models("deepseek_v3")
    tensors = tiny.published_tensors(model)
    key = f"model.layers.1.mlp.experts.{index}.{name}.weight"
    del tensors[key]
    folder = tiny.write_published(tmp_path, model, tensors)
    assert_error_names(folder, rf"{re.escape(key)}|layers\.1\.mlp\.experts\.down_proj")


@pytest.mark.parametrize("shape", [(1, 32), (3, 32), (2, 16)])
def test_a_misshapen_head_is_an_error_that_names_it(model, tmp_path, shape):
    tensors = tiny.published_tensors(model)
    tensors["head.weight"] = torch.randn(shape)
    folder = tiny.write_published(tmp_path, model, tensors)
    assert_error_names(folder, rf"score\.weight.*\({shape[0]}, {shape[1]}\).*\(2, 32\)")


def test_a_misshapen_bias_is_an_error_that_names_it(model, tmp_path):
    tensors = tiny.published_tensors(model)
    tensors["head.bias"] = torch.randn(1)
    assert_error_names(tiny.write_published(tmp_path, model, tensors), r"score\.bias")


def test_damage_in_our_own_layout_is_an_error_too(saved_folder, tmp_path):
    shutil.copytree(saved_folder, tmp_path / "damaged")
    [path] = (tmp_path / "damaged").glob("*.safetensors")
    tensors = tiny.read_tensors(tmp_path / "damaged")
    del tensors["score.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    for loader in [QueritForSequenceRanking, QueritForSequenceClassification, AutoModel]:
        assert_error_names(tmp_path / "damaged", r"score\.bias", loader)


def test_a_plain_decoder_is_no_reranker(model, tmp_path):
    # Saving writes the class into the config, so not from the model that the other tests share.
    copy.deepcopy(model.model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score\.bias, score\.weight.*from_backbone"):
        QueritForSequenceRanking.from_pretrained(tmp_path)


def test_the_error_names_what_was_left_over(model, tmp_path):
    tensors = tiny.published_tensors(model)
    tensors["classifier.weight"] = tensors.pop("head.weight")
    folder = tiny.write_published(tmp_path, model, tensors)
    assert_error_names(folder, r"score\.weight.*classifier\.weight")
