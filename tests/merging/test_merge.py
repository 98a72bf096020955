"""Merged tensors, against slow formulas."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny_checkpoints import (
    adapt,
    assert_close,
    assert_same,
    bits,
    change,
    merged,
    slow_karcher,
    slow_linear,
    slow_slerp,
    tensors_of,
)

from modeling_querit import QueritForSequenceRanking
from modeling_querit.checkpoints import safetensors_io
from modeling_querit.checkpoints.safetensors_io import StoredTensor
from modeling_querit.merging import merge
from modeling_querit.merging.merge import merge_checkpoints, open_merger
from modeling_querit.merging.methods import METHODS, MergeMethod
from modeling_querit.merging.recipe import Recipe

ROUTING_BIAS = "e_score_correction_bias"


# Values


@pytest.mark.slow
def test_two_models_are_merged_by_slerp(family, tmp_path):
    t = 0.3
    actual = merged(tmp_path / "new", family[:2], t=[str(t)])
    expected = {key: slow_slerp(*tensors, t) for key, tensors in tensors_of(family[:2]).items()}
    assert_close(actual, expected)
    # Some pairs are far apart, so that the linear mean differs.
    linear = {key: slow_linear(tensors, [1 - t, t]) for key, tensors in tensors_of(family[:2]).items()}
    assert sum(np.abs(linear[key] - tensor).max() > 1e-3 for key, tensor in expected.items()) > 5


def test_half_precision_is_rounded_only_once(families, architecture, tmp_path):
    models = [str(folder) for folder in families(architecture, torch.bfloat16)[:2]]
    actual = merged(tmp_path / "new", models, t=["0.3"])
    for key, tensors in tensors_of(models).items():
        exact = slow_slerp(*tensors, 0.3)
        is_routing = key.endswith(ROUTING_BIAS)
        assert actual[key].dtype is (torch.float32 if is_routing else torch.bfloat16), key
        # Half a unit in the last of eight bits, and the rounding of float32.
        error = np.abs(actual[key].double().numpy() - exact) - (1e-6 if is_routing else 2**-8) * np.abs(exact)
        assert error.max() < 1e-6, key


@pytest.mark.slow
def test_three_models_are_merged_by_the_spherical_mean(families, tmp_path):
    family = [str(folder) for folder in families("qwen3")]
    actual = merged(tmp_path / "new", family, weights=["1,2,1"])
    for key, tensors in tensors_of(family).items():
        cosines = [a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b) for a in tensors for b in tensors]
        if min(cosines) > 0.9995:
            np.testing.assert_allclose(actual[key].numpy(), slow_linear(tensors, [1, 2, 1]), rtol=1e-5, atol=1e-6)
            continue
        # The factors of the mean direction are applied to the tensors themselves.
        units = np.stack([tensor.ravel() / np.linalg.norm(tensor) for tensor in tensors])
        if np.linalg.matrix_rank(units) < 3:
            continue
        factors = np.linalg.lstsq(units.T, slow_karcher(units, [1, 2, 1]), rcond=None)[0]
        expected = sum(factor * tensor for factor, tensor in zip(factors, tensors, strict=True))
        np.testing.assert_allclose(actual[key].numpy(), expected, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("order", [[1, 2, 0], [2, 1, 0]])
def test_the_order_of_models_does_not_matter(families, tmp_path, order):
    family = [str(folder) for folder in families("qwen3")]
    weights = [1, 2, 3]
    expected = merged(tmp_path / "one", family, weights=["1,2,3"])
    shuffled = ",".join(str(weights[index]) for index in order)
    actual = merged(tmp_path / "two", [family[index] for index in order], weights=[shuffled])
    assert_close(actual, {key: tensor.double().numpy() for key, tensor in expected.items()})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("t", "index"), [("0", 0), ("1:1", 1)])
def test_the_ends_of_t_are_the_models_themselves(families, architecture, tmp_path, dtype, t, index):
    models = [str(folder) for folder in families(architecture, dtype)[:2]]
    assert_same(merged(tmp_path / "new", models, t=[t]), tiny.read_tensors(Path(models[index])))


@pytest.mark.slow
def test_a_model_with_all_the_weight_is_the_result(family, tmp_path):
    actual = merged(tmp_path / "new", family, weights=["0,0,5"])
    assert_same(actual, tiny.read_tensors(Path(family[2])))


def test_a_model_merged_with_itself_is_unchanged(pair, tmp_path):
    assert_same(merged(tmp_path / "new", [pair[0], pair[0]]), tiny.read_tensors(Path(pair[0])))


def test_linear_is_the_weighted_mean(family, tmp_path):
    actual = merged(tmp_path / "new", family, method="linear", weights=["1,2,5"])
    assert_close(actual, {key: slow_linear(tensors, [1, 2, 5]) for key, tensors in tensors_of(family).items()})


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 0.7, 1.5])
def test_task_arithmetic_adds_scaled_task_vectors(family, saved_folder, tmp_path, scale):
    actual = merged(
        tmp_path / "new", family, method="task_arithmetic", base=str(saved_folder), weights=["1,1,2"], scale=scale
    )
    expected = {}
    for key, (base, *tensors) in tensors_of([saved_folder, *family]).items():
        expected[key] = base + scale * slow_linear([tensor - base for tensor in tensors], [1, 1, 2])
    assert_close(actual, expected)
    if scale == 0:
        assert_same(actual, tiny.read_tensors(saved_folder))


def test_groups_and_layers_have_their_own_t(families, tmp_path):
    models = [str(folder) for folder in families("deepseek_v3")[:2]]
    actual = merged(tmp_path / "new", models, t=["0:1", "experts=0.25", "score=0"])
    one, two = (tiny.read_tensors(Path(folder)) for folder in models)
    experts = "model.layers.1.mlp.experts.3.up_proj.weight"
    np.testing.assert_allclose(
        actual[experts].numpy(), slow_slerp(one[experts].numpy(), two[experts].numpy(), 0.25), rtol=1e-5, atol=1e-6
    )
    for key in ("score.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert bits(actual[key]) == bits(one[key]), key
    for key in ("model.norm.weight", "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.gate.weight"):
        assert bits(actual[key]) == bits(two[key]), key


@pytest.mark.slow
def test_the_size_of_chunks_does_not_matter(family, tmp_path, monkeypatch):
    expected = merged(tmp_path / "large", family, weights=["1,2,3"])
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 100)
    actual = merged(tmp_path / "small", family, weights=["1,2,3"])
    assert_close(actual, {key: tensor.double().numpy() for key, tensor in expected.items()})


@pytest.fixture
def three_threads():
    count = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(count)


@pytest.mark.slow
def test_the_number_of_threads_does_not_matter(family, tmp_path, three_threads):
    """Afterwards torch has as many threads as before."""
    actual = merged(tmp_path / "three", family, weights=["3,1,2"])
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    assert_same(actual, merged(tmp_path / "one", family, weights=["3,1,2"]))


@pytest.mark.slow
def test_the_layout_of_models_does_not_matter(model, families, saved_folder, tmp_path):
    other = str(families(model.config.text_config.model_type)[1])
    published = tiny.write_published(tmp_path / "published", model, tiny.published_tensors(model, ""), shards=3)
    assert_same(
        merged(tmp_path / "one", [str(published), other], t=["0.4"]),
        merged(tmp_path / "two", [str(saved_folder), other], t=["0.4"]),
    )


@pytest.mark.slow
def test_adapters_are_applied_before_the_merge(pair, tmp_path):
    adapt(tmp_path / "adapter", pair[0]).merge_and_unload().save_pretrained(tmp_path / "whole")
    actual = merged(tmp_path / "one", [str(tmp_path / "adapter"), pair[1]], t=["0.4"])
    expected = merged(tmp_path / "two", [str(tmp_path / "whole"), pair[1]], t=["0.4"])
    assert_close(actual, {key: tensor.double().numpy() for key, tensor in expected.items()}, atol=1e-5)


# Data types


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_merge_has_the_data_type_of_the_recipe(families, tmp_path, dtype):
    models = [str(folder) for folder in families("deepseek_v3")[:2]]
    actual = merged(tmp_path / "new", models, dtype=dtype)
    routing = {key: tensor.dtype for key, tensor in actual.items() if key.endswith(ROUTING_BIAS)}
    assert set(routing.values()) == {torch.float32}
    assert {tensor.dtype for key, tensor in actual.items() if key not in routing} == {getattr(torch, dtype)}
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["dtype"] == dtype
    loaded = QueritForSequenceRanking.from_pretrained(tmp_path / "new")
    assert loaded.dtype is getattr(torch, dtype)
    expected = merged(tmp_path / "exact", models, dtype="float32")
    assert_same(actual, {key: tensor.to(actual[key].dtype) for key, tensor in expected.items()})


def test_different_data_types_give_the_wider_one(families, tmp_path):
    wide, half = families("qwen3")[0], families("qwen3", torch.bfloat16)[1]
    actual = merged(tmp_path / "new", [str(half), str(wide)], t=["0.5"])
    assert {tensor.dtype for tensor in actual.values()} == {torch.float32}
    assert_close(actual, {key: slow_slerp(*tensors, 0.5) for key, tensors in tensors_of([half, wide]).items()})
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_an_overflow_in_float16_is_refused(pair, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"
    large = change(pair[0], tmp_path / "large", lambda tensors: tensors | {key: tensors[key] * 1e6})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        merge_checkpoints(Recipe([str(large), pair[1]], dtype="float16"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("scale", [3e38, 1e300, -1e300])
def test_a_scale_that_overflows_is_refused(family, saved_folder, tmp_path, scale):
    recipe = Recipe(family, method="task_arithmetic", base=str(saved_folder), scale=scale)
    with pytest.raises(ValueError, match=r"would overflow in torch\.float32"):
        merge_checkpoints(recipe, tmp_path / "new")


@pytest.mark.slow
def test_heads_that_cancel_out_are_refused(pair, tmp_path):
    key = "score.weight"
    opposite = change(pair[0], tmp_path / "opposite", lambda tensors: tensors | {key: -tensors[key]})
    with pytest.raises(ValueError, match="heads cancel out"):
        merge_checkpoints(Recipe([pair[0], str(opposite)]), tmp_path / "new")
    merge_checkpoints(Recipe([pair[0], str(opposite)], t=["0.5", "score=0"]), tmp_path / "new")


def test_quantized_weights_are_refused(pair, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"
    folder = change(pair[0], tmp_path / "small", lambda tensors: tensors | {key: tensors[key].to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=rf"{re.escape(key)}.* is stored as torch\.float8_e4m3fn: quantized"):
        merge_checkpoints(Recipe([str(folder), pair[1]]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Several merges of the same models


@pytest.mark.slow
def test_gram_matrices_are_computed_once(family, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "CHUNK_ELEMENTS", 300)
    grams, reads = [], []
    gram_matrix, read = merge.gram_matrix, StoredTensor.read
    monkeypatch.setattr(merge, "gram_matrix", lambda chunk: grams.append(None) or gram_matrix(chunk))
    monkeypatch.setattr(StoredTensor, "read", lambda self, rows: reads.append(self.offset) or read(self, rows))
    recipes = {name: Recipe(family[:2], t=[t]) for name, t in [("one", "0.3"), ("two", "0.8"), ("three", "0.3")]}
    counts = []
    merger = open_merger(recipes["one"], tmp_path / "temporary")
    for name, recipe in recipes.items():
        grams.clear(), reads.clear()
        (tmp_path / name).mkdir()
        merger.write(tmp_path / name, recipe)
        counts.append((len(grams), len(reads)))
    assert counts[0][0] > 100
    assert counts[1] == counts[2]
    assert counts[1][0] == 0
    assert counts[1][1] < 0.6 * counts[0][1]
    assert_same(tiny.read_tensors(tmp_path / "three"), tiny.read_tensors(tmp_path / "one"))
    for name in ("one", "two"):
        fresh = merged(tmp_path / f"fresh {name}", family[:2], t=recipes[name].t)
        assert_same(tiny.read_tensors(tmp_path / name), fresh)
        assert QueritForSequenceRanking.from_pretrained(tmp_path / name).config.text_config.num_hidden_layers == 2


def test_nan_is_refused_in_every_merge(pair, tmp_path):
    key = "score.bias"
    spoilt = change(pair[1], tmp_path / "spoilt", lambda tensors: tensors | {key: torch.tensor([0, float("nan")])})
    recipe = Recipe([pair[0], str(spoilt)])
    merger = open_merger(recipe, tmp_path / "temporary")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=r"score\.bias of .*spoilt holds NaN"):
            merger.write(tmp_path / name, recipe)


def test_a_method_is_added_by_one_entry(pair, tmp_path, monkeypatch):
    def first_only(gram, weights):
        return torch.tensor([1.0, 0.0], dtype=torch.float64)

    monkeypatch.setitem(METHODS, "first", MergeMethod(first_only))
    assert_same(merged(tmp_path / "new", pair, method="first"), tiny.read_tensors(Path(pair[0])))
    with pytest.raises(ValueError, match="first has no use for a base"):
        Recipe(pair, method="first", base=pair[0])


def test_a_method_with_a_base_is_added_by_one_entry(pair, saved_folders, tmp_path, monkeypatch):
    def base_only(gram, weights, scale):
        assert (len(gram), weights[0].item(), scale) == (3, 0, 0.5)
        return torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)

    monkeypatch.setitem(METHODS, "base", MergeMethod(base_only, uses_base=True))
    base = saved_folders("qwen3")
    actual = merged(tmp_path / "new", pair, method="base", base=str(base), scale=0.5)
    assert_same(actual, tiny.read_tensors(base))
    with pytest.raises(ValueError, match="base needs a base"):
        Recipe(pair, method="base")
