import pytest
import torch

from benchmarks import workloads
from benchmarks.shapes import text_config
from modeling_querit import QueritConfig, QueritForSequenceRanking


@pytest.mark.slow
def test_texts_have_the_tokens_they_should(subject):
    task = workloads.make_task("beir", subject.model.processor, None, seed=0)
    facts = task.statistics()
    assert facts["pairs"] == 100
    assert 200 < facts["tokens_a_pair_median"] < 260
    assert 25 <= facts["tokens_shared"] <= 32
    assert task == workloads.make_task("beir", subject.model.processor, None, seed=0)


def test_needed_flops_equal_those_counted_by_hand():
    config = text_config("tiny_dense")
    with torch.device("meta"):
        model = QueritForSequenceRanking(QueritConfig(text_config=config))
    # Two pairs of three tokens that share one: 1 + 2 + 2 distinct tokens, two of them scored.
    task = workloads.Task("w", "q", ["a", "b"], [[1, 2, 3], [1, 4, 5]])
    hidden, heads, size, inner = 32, 2, 16, 64
    keys_and_values = 2 * hidden * size
    rest = 2 * hidden * heads * size + 3 * hidden * inner
    # The shared token attends to itself; the others of each pair attend to 2 and 3 tokens. In the last layer only the
    # last token of each pair, which attends to 3, counts.
    attention = heads * 2 * size * ((1 + 5 + 5) + 6)
    by_hand = 2 * (5 * (2 * keys_and_values + rest) + 2 * rest + attention)
    assert workloads.needed_flops(model.model.layers, config, task) == by_hand
