import pytest
import tiny
import torch
from transformers import pipeline

from modeling_querit.pair_encoding_querit import document_text


@pytest.fixture(scope="module")
def scorer(saved_folders):
    return pipeline("text-classification", str(saved_folders("qwen3")), trust_remote_code=True)


@pytest.fixture(scope="module")
def expected(models):
    return models("qwen3").predict(tiny.pairs([*tiny.STRINGS, tiny.LONG_DOCUMENT])).tolist()


PAIRS = [{"text": tiny.QUERY, "text_pair": document} for document in [*tiny.STRINGS, tiny.LONG_DOCUMENT]]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_score_is_that_of_predict(scorer, expected, batch_size):
    scores = [result["score"] for result in scorer(PAIRS, batch_size=batch_size)]
    assert scores == pytest.approx(expected, abs=1e-6)
    assert scorer(PAIRS[0])["score"] == pytest.approx(expected[0], abs=1e-6)
    assert scorer(PAIRS[0], top_k=1)[0]["score"] == pytest.approx(expected[0], abs=1e-6)


@pytest.mark.slow
def test_another_function_is_applied_to_the_logit(scorer, expected):
    logit = torch.atanh(torch.tensor(expected[0]))
    assert scorer(PAIRS[0], function_to_apply="sigmoid")["score"] == pytest.approx(
        torch.sigmoid(logit).item(), abs=1e-5
    )
    assert scorer(PAIRS[0], function_to_apply="none")["score"] == pytest.approx(logit.item(), abs=1e-5)


@pytest.mark.slow
def test_a_single_text_is_refused(scorer):
    with pytest.raises(ValueError, match=r"not in \[CLS\]"):
        scorer(document_text("who wrote the book"))
