"""Packs through models in bfloat16, computed in the dtypes that are fastest on the processor."""

import copy

import pytest
import torch
from packs import MODELS, plain, score

from modeling_querit import mixed_precision_querit, modeling_querit, moe_querit
from modeling_querit.mixed_precision_querit import ComputeDtypes
from modeling_querit.scoring_querit import ALL, Optimizations

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def fastest(monkeypatch):
    """Sets the dtypes of hidden states and products that the processor computes fastest with bfloat16 weights."""

    def set_dtypes(hidden_states, products):
        dtypes = ComputeDtypes(hidden_states, products)
        for module in (modeling_querit, moe_querit):
            monkeypatch.setattr(
                module, "fastest_dtypes", lambda _, dtype: dtypes if dtype == BF16 else ComputeDtypes(dtype, dtype)
            )

    return set_dtypes


@pytest.fixture
def in_bfloat16(fresh_model):
    """A model in bfloat16, and the scores of its weights in float32."""

    def get(name):
        model, _ = fresh_model(name)
        model.bfloat16()
        processor, exact = model.processor, copy.deepcopy(model).float()
        exact.processor = processor
        return model, plain(exact)

    return get


@pytest.mark.parametrize("name", sorted(name for name in MODELS if "gemma3" not in name))
@pytest.mark.parametrize("optimizations", [ALL, Optimizations(packing=False)], ids=str)
def test_float32_arithmetic_where_that_is_faster(in_bfloat16, fastest, name, optimizations):
    model, exact = in_bfloat16(name)
    fastest(F32, F32)
    assert score(model, batch_tokens=150, optimizations=optimizations) == pytest.approx(exact, abs=1e-5)
    assert {parameter.dtype for parameter in model.parameters()} == {BF16}


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("optimizations", [ALL, Optimizations(packing=False)], ids=str)
def test_products_in_bfloat16_where_these_are_faster(in_bfloat16, fastest, name, optimizations):
    model, exact = in_bfloat16(name)

    def errors():
        scores = score(model, batch_tokens=150, optimizations=optimizations)
        return [abs(score - expected) for score, expected in zip(scores, exact, strict=True)]

    fastest(BF16, BF16)
    plain_bfloat16 = errors()
    fastest(F32, BF16)
    mixed = errors()
    assert 1e-5 < max(mixed) < 0.1
    assert mixed != plain_bfloat16
    # Where rounding sends a token to other experts, it is chance which is nearer.
    assert sum(mixed) < sum(plain_bfloat16) or name.startswith("deepseek_v3")


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("dtype", "mixed_precision"), [(BF16, True), (F32, False)])
def test_bfloat16_arithmetic_where_float32_is_not_faster(in_bfloat16, fastest, name, packing, dtype, mixed_precision):
    model, exact = in_bfloat16(name)
    fastest(dtype, dtype)
    optimizations = Optimizations(packing=packing, mixed_precision=mixed_precision)
    scores = score(model, batch_tokens=150, optimizations=optimizations)
    assert scores == pytest.approx(plain(model), abs=0.1)
    assert max(abs(score - expected) for score, expected in zip(scores, exact, strict=True)) > 1e-4


def test_float32_models_are_not_converted(fresh_model, fastest, monkeypatch):
    model, expected = fresh_model("qwen3")
    fastest(F32, F32)
    monkeypatch.setattr(mixed_precision_querit, "Float32Arithmetic", lambda *_: pytest.fail("converted"))
    assert score(model) == pytest.approx(expected, abs=1e-5)
