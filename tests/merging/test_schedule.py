"""Schedules of weights, against plain interpolation and mergekit."""

import re

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_querit.merging.schedule import GROUPS, Schedule, group_of

MLP = "model.layers.{}.mlp.up_proj.weight"
NORM = "model.layers.{}.input_layernorm.weight"

COMMON = {
    "score.weight": "score",
    "score.bias": "score",
    "model.embed_tokens.weight": "embeddings",
    "model.norm.weight": None,
    "model.layers.N.input_layernorm.weight": None,
    "model.layers.N.post_attention_layernorm.weight": None,
    "model.layers.N.mlp.gate_proj.weight": "mlp",
    "model.layers.N.mlp.up_proj.weight": "mlp",
    "model.layers.N.mlp.down_proj.weight": "mlp",
    "model.layers.N.self_attn.q_proj.weight": "attention",
    "model.layers.N.self_attn.o_proj.weight": "attention",
}
EXPECTED_GROUPS = {
    "qwen3": COMMON
    | {
        "model.layers.N.self_attn.k_proj.weight": "attention",
        "model.layers.N.self_attn.v_proj.weight": "attention",
        "model.layers.N.self_attn.q_norm.weight": "attention",
        "model.layers.N.self_attn.k_norm.weight": "attention",
    },
    "deepseek_v3": COMMON
    | {
        "model.layers.N.self_attn.kv_a_proj_with_mqa.weight": "attention",
        "model.layers.N.self_attn.kv_a_layernorm.weight": "attention",
        "model.layers.N.self_attn.kv_b_proj.weight": "attention",
        "model.layers.N.mlp.gate.weight": "router",
        "model.layers.N.mlp.gate.e_score_correction_bias": "router",
        "model.layers.N.mlp.experts.N.gate_proj.weight": "experts",
        "model.layers.N.mlp.experts.N.up_proj.weight": "experts",
        "model.layers.N.mlp.experts.N.down_proj.weight": "experts",
        "model.layers.N.mlp.shared_experts.gate_proj.weight": "experts",
        "model.layers.N.mlp.shared_experts.up_proj.weight": "experts",
        "model.layers.N.mlp.shared_experts.down_proj.weight": "experts",
    },
}


def second(schedule, key):
    """Return the coefficient of the second of two models."""
    coefficients = schedule.coefficients(key)
    assert coefficients.dtype == torch.float64
    assert coefficients.sum().item() == pytest.approx(1, abs=1e-15)
    return coefficients[1].item()


# Groups


def test_every_tensor_of_a_saved_folder_has_its_group(saved_folder, architecture):
    actual = {re.sub(r"\.\d+\.", ".N.", key): group_of(key) for key in tiny.read_tensors(saved_folder)}
    assert actual == EXPECTED_GROUPS[architecture]


def test_every_group_can_be_set_separately(saved_folder):
    for key in tiny.read_tensors(saved_folder):
        for group in GROUPS:
            schedule = Schedule.from_t(["0.25", f"{group}=0.75"], layers=2)
            assert second(schedule, key) == (0.75 if group_of(key) == group else 0.25)


# From the first layer to the last


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(2, 40))
def test_gradients_are_interpolated_linearly(values, layers):
    schedule = Schedule.from_t([":".join(map(str, values))], layers)
    actual = [second(schedule, MLP.format(layer)) for layer in range(layers)]
    positions = np.linspace(0, len(values) - 1, layers)
    np.testing.assert_allclose(actual, np.interp(positions, np.arange(len(values)), values), rtol=0, atol=1e-12)


@pytest.mark.slow
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.integers(2, 40))
def test_gradients_equal_those_of_mergekit(values, layers):
    evaluate_setting = pytest.importorskip("mergekit.config").evaluate_setting
    schedule = Schedule.from_t([":".join(map(str, values))], layers)
    for layer in range(layers):
        expected = evaluate_setting(MLP.format(layer), values, layer / (layers - 1), validate=float)
        assert second(schedule, MLP.format(layer)) == pytest.approx(expected, abs=1e-9)


def test_tensors_outside_of_layers_follow_the_first_or_last_layer():
    schedule = Schedule.from_t(["0.1:0.5:0.8"], layers=5)
    assert second(schedule, "model.embed_tokens.weight") == second(schedule, NORM.format(0)) == pytest.approx(0.1)
    for key in ("model.norm.weight", "score.weight", "score.bias", NORM.format(4)):
        assert second(schedule, key) == pytest.approx(0.8)
    assert second(schedule, NORM.format(2)) == pytest.approx(0.5)


def test_a_group_may_have_a_gradient():
    schedule = Schedule.from_t(["mlp=0:1"], layers=3)
    assert [second(schedule, MLP.format(layer)) for layer in range(3)] == [0, 0.5, 1]
    assert [second(schedule, NORM.format(layer)) for layer in range(3)] == [0.5, 0.5, 0.5]


def test_gradients_work_with_a_single_layer():
    schedule = Schedule.from_t(["0.2:0.4"], layers=1)
    for key in (NORM.format(0), "score.weight", "model.embed_tokens.weight"):
        assert 0.2 <= second(schedule, key) <= 0.4
    assert second(Schedule.from_t(["0.3"], layers=1), NORM.format(0)) == pytest.approx(0.3)


def test_indices_of_experts_are_not_those_of_layers():
    schedule = Schedule.from_t(["0:1"], layers=11)
    assert second(schedule, "model.layers.5.mlp.experts.10.up_proj.weight") == pytest.approx(0.5)


# Weights of any number of models


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], [1 / 3, 1 / 3, 1 / 3]),
        (["1,2,1"], [0.25, 0.5, 0.25]),
        (["0,0,7"], [0, 0, 1]),
        ([" 1 , 1 , 2 "], [0.25, 0.25, 0.5]),
        (["1e-3,1e-3,2e-3"], [0.25, 0.25, 0.5]),
        (["mlp=1,0,0"], [1, 0, 0]),
        (["1,0,0", "mlp=0,1,0", "attention=0,0,1"], [0, 1, 0]),
    ],
)
def test_weights_are_divided_by_their_sum(texts, expected):
    schedule = Schedule.from_weights(texts, models=3, layers=4)
    assert schedule.coefficients(MLP.format(2)).tolist() == pytest.approx(expected, abs=1e-15)


def test_each_weight_may_have_a_gradient():
    schedule = Schedule.from_weights(["1,0:3"], models=2, layers=3)
    assert [second(schedule, NORM.format(layer)) for layer in range(3)] == pytest.approx([0, 0.6, 0.75])


def test_without_t_both_models_have_equal_weights():
    assert second(Schedule.from_t([], layers=4), NORM.format(1)) == 0.5


def test_setting_a_group_leaves_the_others_alone():
    schedule = Schedule.from_t(["score=0"], layers=4)
    assert second(schedule, "score.weight") == 0
    assert second(schedule, NORM.format(1)) == 0.5


@given(st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=4), min_size=2, max_size=5), st.integers(1, 12))
def test_weights_sum_to_one_or_are_an_error(gradients, layers):
    texts = [",".join(":".join(map(str, gradient)) for gradient in gradients)]
    schedule = Schedule.from_weights(texts, len(gradients), layers)
    for layer in range(layers):
        depth = layer / (layers - 1) if layers > 1 else 1.0
        weights = [np.interp(depth * (len(values) - 1), np.arange(len(values)), values) for values in gradients]
        if sum(weights) > 1e-9:
            expected = np.array(weights) / sum(weights)
            np.testing.assert_allclose(schedule.coefficients(MLP.format(layer)).numpy(), expected, rtol=0, atol=1e-6)
        elif sum(weights) == 0:
            with pytest.raises(ValueError, match=f"All weights of {MLP.format(layer)} are 0"):
                schedule.coefficients(MLP.format(layer))


def test_all_weights_zero_names_the_tensor():
    schedule = Schedule.from_weights(["1,1", "mlp=1:0,1:0"], models=2, layers=3)
    assert schedule.coefficients(MLP.format(1)).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"All weights of model\.layers\.2\.mlp\.up_proj\.weight are 0"):
        schedule.coefficients(MLP.format(2))


# Errors


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["1.5"], r"t is 1\.5: it must be in \[0, 1\], from the first model to the second"),
        (["-0.1"], r"t is -0\.1: it must be in \[0, 1\]"),
        (["0:0.5:2"], r"t is 0:0\.5:2: it must be in \[0, 1\]"),
        (["nan"], r"t is nan: it must be in \[0, 1\]"),
        (["inf"], r"t is inf: it must be in \[0, 1\]"),
        (["mlp=-1"], r"t is -1: it must be in \[0, 1\]"),
        (["half"], "'half' is not a number, or numbers from the first layer to the last"),
        ([""], "'' is not a number"),
        (["mlp="], "'' is not a number"),
        (["0:"], "'0:' is not a number"),
        (["0.5,0.5"], "'0.5,0.5' is not a number"),
        (["gate=0.5"], "gate=0.5: there is no group 'gate'; choose from score, embeddings, attention, router"),
        (["MLP=0.5"], "there is no group 'MLP'"),
        (["mlp=attention=0.5"], "there is no group 'mlp=attention'"),
        (["0.5", "0.6"], "0.5 and 0.6: a group is set twice"),
        (["mlp=0.5", "0.1", "mlp=0.6"], "a group is set twice"),
    ],
)
def test_invalid_positions_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_t(texts, layers=3)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["1,2"], "weights are 1,2: give 3 of them, one per model, separated by commas"),
        (["1,2,3,4"], "give 3 of them"),
        (["1"], "give 3 of them"),
        (["mlp=1,2"], "weights are 1,2: give 3 of them"),
        (["1,-2,1"], "weights are 1,-2,1: a weight must be finite and not negative"),
        (["1,nan,1"], "a weight must be finite and not negative"),
        (["1,inf,1"], "a weight must be finite and not negative"),
        (["1,1:1e999,1"], "a weight must be finite and not negative"),
        (["1,,1"], "'' is not a number"),
        (["a,b,c"], "'a' is not a number"),
        (["router2=1,1,1"], "there is no group 'router2'"),
        (["1,1,1", "1,1,2"], "a group is set twice"),
    ],
)
def test_invalid_weights_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_weights(texts, models=3, layers=3)
