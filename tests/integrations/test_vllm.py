"""vLLM serves a saved folder as it is, by the plugin of the package; `make test-vllm` builds the environment."""

import pytest
import tiny
import torch
from vllm_server import SIZES, needs_vllm, reranked, serve

from modeling_querit import QueritConfig
from modeling_querit.integrations.vllm import decoder_of, fold_head


def test_a_backbone_that_vllm_would_score_wrongly_is_refused():
    assert decoder_of(QueritConfig(text_config=tiny.make_text_config("qwen3"))) == "Qwen3ForCausalLM"
    with pytest.raises(ValueError, match="not for llama: use querit serve"):
        decoder_of(QueritConfig(text_config=tiny.make_text_config("llama")))
    both_directions = tiny.make_text_config("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match=r"both directions.*use querit serve"):
        decoder_of(QueritConfig(text_config=both_directions))


def test_the_head_of_two_logits_becomes_one():
    weight, bias, other = torch.randn(2, 4), torch.randn(2), torch.randn(2, 3)
    folded = dict(fold_head([("score.weight", weight), ("score.bias", bias), ("model.norm.weight", other)]))
    state = torch.randn(4)
    z0, z1 = weight @ state + bias
    assert (folded["score.weight"] @ state + folded["score.bias"]).item() == pytest.approx(
        ((z1 - z0) / 2).item(), abs=1e-6
    )
    assert folded["model.norm.weight"] is other


@pytest.fixture(scope="module", params=SIZES)
def model(processor, request):
    return tiny.make_model(request.param, processor, **SIZES[request.param])


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    work = tmp_path_factory.mktemp("vllm")
    model.save_pretrained(work / "reranker")
    with serve(work, "reranker", []) as served:
        yield served


@needs_vllm
def test_vllm_gives_the_scores_of_predict(served, model):
    expected = model.predict(tiny.pairs(tiny.STRINGS)).tolist()
    for route in ("/rerank", "/v1/rerank", "/v2/rerank"):
        assert reranked(served, route, query=tiny.QUERY, documents=tiny.STRINGS) == pytest.approx(expected, abs=1e-5)


@needs_vllm
def test_documents_are_cut_before_cls(served, model):
    [expected] = model.predict([(tiny.QUERY, tiny.LONG_DOCUMENT)], max_length=100).tolist()
    scores = reranked(served, query=tiny.QUERY, documents=[tiny.LONG_DOCUMENT], truncate_prompt_tokens=100)
    assert scores == pytest.approx([expected], abs=1e-5)
