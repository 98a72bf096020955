"""Packs through whole models: the scores of transformers' own backbones, with every optimization on or off."""

from contextlib import ExitStack, contextmanager

import pytest
import tiny
from packs import MODELS, PAIRS, encode, forward_passes, is_left_as_it_was, make_other, plain, score

from modeling_querit.packed_forward_querit import is_causal
from modeling_querit.packing_querit import plan_packs
from modeling_querit.scoring_querit import ALL, Optimizations

COMBINATIONS = [
    ALL,
    Optimizations(share_prefix=False),
    Optimizations(prune_last_layer=False),
    Optimizations(share_prefix=False, prune_last_layer=False),
    Optimizations(packing=False),
]


@contextmanager
def tokens_in(module):
    """Number of tokens that each call of a module computes; hooks that prune come after this one."""
    counts = []
    handle = module.register_forward_hook(lambda module, args, output: counts.append(args[0].shape[:-1].numel()))
    try:
        yield counts
    finally:
        handle.remove()


def prefix_length(input_ids):
    """Number of tokens that several texts share at their start."""
    return next(index for index, tokens in enumerate(zip(*input_ids, strict=False)) if len(set(tokens)) > 1)


# Scores


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizations", COMBINATIONS, ids=str)
@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_scores_are_the_reference_scores(reference_model, name, optimizations, batch_tokens):
    model, expected = reference_model(name)
    with is_left_as_it_was(model), forward_passes(model) as packs:
        scores = score(model, batch_tokens=batch_tokens, optimizations=optimizations)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert all((pack is not None) == optimizations.packing for pack in packs)
    shares_prefix = any(pack.has_shared_prefix for pack in packs if pack is not None)
    # With one token in a batch, each pack holds one pair.
    assert shares_prefix == (optimizations.packing and optimizations.share_prefix and "both" not in name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "gemma3_text"])
def test_whichever_attention_the_model_is_set_to(fresh_model, name, implementation):
    model, expected = fresh_model(name)
    model.set_attn_implementation(implementation)
    with is_left_as_it_was(model):
        assert score(model, batch_tokens=150) == pytest.approx(expected, abs=1e-5)
    assert model.model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    ("model_type", "kwargs"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("phi3", {"sliding_window": 16}),
        ("qwen3_moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        ("olmo2", {}),
        ("cohere2", {"sliding_window": 16}),
        ("gpt2", {"n_positions": 512, "n_layer": 3, "n_head": 4, "n_embd": 32}),
        # Its final norm comes before the first layer too.
        ("nanochat", {}),
    ],
)
def test_other_backbones(processor, model_type, kwargs):
    model = make_other(model_type, processor, **kwargs)
    expected = plain(model)
    with forward_passes(model) as packs:
        for batch_tokens in [150, 100_000]:
            assert score(model, batch_tokens=batch_tokens) == pytest.approx(expected, abs=1e-5)
    assert None not in packs


# What is computed


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "deepseek_v3 with small queries"])
@pytest.mark.parametrize("optimizations", COMBINATIONS, ids=str)
@pytest.mark.parametrize("batch_tokens", [150, 100_000])
def test_each_token_is_computed_once_and_in_the_last_layer_only_scored_ones(
    fresh_model, name, optimizations, batch_tokens
):
    model, _ = fresh_model(name)
    of_query, singles = encode(model)[:7], encode(model)[7:]
    in_packs = sum(map(len, of_query + singles))
    if optimizations.share_prefix:
        in_packs -= 6 * prefix_length(of_query) + prefix_length(singles)
    first, last = model.model.layers[0], model.model.layers[-1]
    queries = ["q_a_proj", "q_b_proj"] if "small" in name else ["q_proj"]
    keys = "k_proj" if name == "qwen3" else "kv_a_proj_with_mqa"
    of_all = [first.mlp, *(getattr(first.self_attn, part) for part in [*queries, "o_proj"])]
    of_all.append(getattr(last.self_attn, keys))
    of_scored = [last.mlp, last.post_attention_layernorm]
    of_scored += [getattr(last.self_attn, part) for part in [*queries, "o_proj"]]
    with ExitStack() as stack:
        all_positions, scored_positions, [scored] = (
            [stack.enter_context(tokens_in(part)) for part in parts] for parts in (of_all, of_scored, [model.score])
        )
        score(model, batch_tokens=batch_tokens, optimizations=optimizations)
    assert sum(scored) == len(PAIRS)
    if not optimizations.packing:
        # Padding.
        assert all(sum(counts) > in_packs for counts in all_positions + scored_positions)
        return
    assert {sum(counts) for counts in all_positions} == {in_packs}
    assert {sum(counts) for counts in scored_positions} == {len(PAIRS) if optimizations.prune_last_layer else in_packs}
    assert all(count <= max(batch_tokens, tiny.MAX_LENGTH) for count in all_positions[0])


def test_the_norm_sees_only_scored_tokens(fresh_model):
    model, _ = fresh_model("qwen3")
    with tokens_in(model.model.norm) as counts:
        score(model)
    assert counts == [len(PAIRS)]
    with tokens_in(model.model.norm) as counts:
        score(model, optimizations=Optimizations(prune_last_layer=False))
    assert counts[0] > len(PAIRS)


# Direction of attention


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"use_bidirectional_attention": False}, True),
        ({"use_bidirectional_attention": None}, True),
        ({"use_bidirectional_attention": "vision"}, True),
        ({"use_bidirectional_attention": True}, False),
        ({"use_bidirectional_attention": "all"}, False),
        ({"is_causal": False}, False),
        ({"is_causal": True, "use_bidirectional_attention": True}, True),
    ],
)
def test_the_direction_of_attention_is_in_the_config(fresh_model, settings, expected):
    model, _ = fresh_model("qwen3")
    for name, value in settings.items():
        setattr(model.model.config, name, value)
    assert is_causal(model.model) == expected


def test_a_shared_prefix_is_refused_for_attention_in_both_directions(reference_model):
    model, _ = reference_model("gemma3_text in both directions")
    [pack] = plan_packs([[1, 2, 3], [1, 2, 4]], [[0, 1]], batch_tokens=10)
    with pytest.raises(ValueError, match="share_prefix=False"):
        model(pack=pack)


def test_any_decoder_may_be_told_to_attend_in_both_directions(fresh_model):
    """By the `is_causal` of its config, where transformers heeds it."""
    model, causal_scores = fresh_model("llama")
    model.model.config.is_causal = False
    expected = plain(model)
    assert expected != pytest.approx(causal_scores, abs=1e-3)
    with forward_passes(model) as packs:
        assert score(model, batch_tokens=150) == pytest.approx(expected, abs=1e-5)
    assert None not in packs
