"""Packs through whole models: the scores of transformers' own backbones, with every optimization on or off."""

import copy
import os
import threading
from contextlib import ExitStack, contextmanager

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING

from modeling_querit import (
    QueritConfig,
    QueritForSequenceRanking,
    mixed_precision_querit,
    modeling_querit,
    moe_querit,
)
from modeling_querit.mixed_precision_querit import ComputeDtypes
from modeling_querit.packed_attention_querit import PackingError
from modeling_querit.packed_forward_querit import exclusive, is_causal, supports_packing
from modeling_querit.packing_querit import plan_packs
from modeling_querit.ranking_querit import ALL, Optimizations, score_stream

F32, BF16 = torch.float32, torch.bfloat16
# A query with many documents, one of them cut at 256 tokens; two with a single one.
PAIRS = [*tiny.pairs(), (tiny.QUERY, tiny.LONG_DOCUMENT), ("nobody asked", "x"), ("a novel", "the judge wrote it")]
MODELS = {
    "qwen3": ("qwen3", {}),
    "qwen3 with one key": ("qwen3", {"num_key_value_heads": 1}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 with small queries": ("deepseek_v3", {"q_lora_rank": 8}),
    "llama": ("llama", {"num_key_value_heads": 1}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 7}),
    # The config halves the window: 9 tokens to each side, the token itself included.
    "gemma3_text in both directions": (
        "gemma3_text",
        {"sliding_window": 16, "num_hidden_layers": 7, "use_bidirectional_attention": True},
    ),
}
COMBINATIONS = [
    ALL,
    Optimizations(share_prefix=False),
    Optimizations(prune_last_layer=False),
    Optimizations(share_prefix=False, prune_last_layer=False),
    Optimizations(packing=False),
]


def encode(model, pairs=PAIRS):
    encoded = model.processor.encode([query for query, _ in pairs], [document for _, document in pairs])
    return [pair.input_ids for pair in encoded]


def score(model, pairs=PAIRS, **kwargs):
    return [score for _, score in score_stream(model, pairs, **kwargs)]


def plain(model, pairs=PAIRS):
    """Scores of plain forward passes, one pair at a time."""
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).score.item() for ids in encode(model, pairs)]


@pytest.fixture(scope="module")
def reference_model(processor):
    """Models by their names in MODELS, and the scores of PAIRS by transformers' own backbones. Not to be changed."""
    cache = {}

    def get(name):
        if name not in cache:
            architecture, kwargs = MODELS[name]
            model = tiny.make_model(architecture, processor, **kwargs)
            cache[name] = model, [tiny.reference_score(model, ids) for ids in encode(model)]
        return cache[name]

    return get


@pytest.fixture
def fresh_model(reference_model):
    """Copies of these models, to change at will."""

    def get(name):
        model, expected = reference_model(name)
        processor, model = model.processor, copy.deepcopy(model)
        model.processor = processor
        return model, expected

    return get


def make_other(model_type, processor, **kwargs):
    """A model with a backbone that is not in tiny.py."""
    common = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    config = QueritConfig(text_config=CONFIG_MAPPING[model_type](**common | kwargs))
    model = QueritForSequenceRanking(config).eval()
    with torch.no_grad():
        model.score.weight.normal_(std=0.1)
    model.processor = processor
    return model


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


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@contextmanager
def is_left_as_it_was(model):
    modes, hooks = [module.training for module in model.modules()], hooks_of(model)
    implementation = model.model.config._attn_implementation
    yield
    assert [module.training for module in model.modules()] == modes
    assert hooks_of(model) == hooks
    assert model.model.config._attn_implementation == implementation


@contextmanager
def forward_passes(model):
    """The forward passes of a model: the pack of each, or None for a padded batch."""
    packs = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: packs.append(kwargs.get("pack")), with_kwargs=True
    )
    try:
        yield packs
    finally:
        handle.remove()


# Scores


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "gemma3_text"])
def test_whichever_attention_the_model_is_set_to(fresh_model, name, implementation):
    model, expected = fresh_model(name)
    model.set_attn_implementation(implementation)
    with is_left_as_it_was(model):
        assert score(model, batch_tokens=150) == pytest.approx(expected, abs=1e-5)
    assert model.model.config._attn_implementation == implementation


@pytest.mark.slow
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


@pytest.mark.slow
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


# What a packed forward pass leaves behind


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_an_error_in_the_backbone_leaves_the_model_as_it_was(fresh_model, name, training, error):
    model, expected = fresh_model(name)
    model.train(training)

    def fail(module, args):
        assert not module.training
        raise error("stopped")

    with is_left_as_it_was(model):
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(error, match="stopped"):
            score(model)
        handle.remove()
    model.eval()
    assert plain(model) == pytest.approx(expected, abs=1e-5)
    # In another thread, which a lock left behind would block.
    assert in_thread(lambda: score(model)) == pytest.approx(expected, abs=1e-5)


# Threads


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(60)
    return results[0]


@contextmanager
def halted(model, layer):
    """A thread that ranks, halted in the middle: `(results, go_on)`."""
    inside, may_go_on, results = threading.Event(), threading.Event(), []
    thread = threading.Thread(target=lambda: results.append(score(model)), daemon=True)

    def halt(module, args):
        if threading.current_thread() is thread:
            inside.set()
            assert may_go_on.wait(60)

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(halt)
    thread.start()
    assert inside.wait(60)

    def go_on():
        may_go_on.set()
        thread.join(60)

    try:
        yield results, go_on
    finally:
        go_on()
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "gemma3_text"])
def test_a_plain_forward_pass_beside_a_ranking(fresh_model, name, implementation):
    model, expected = fresh_model(name)
    model.set_attn_implementation(implementation)
    with halted(model, layer=-1) as (results, go_on):
        assert plain(model) == pytest.approx(expected, abs=1e-5)
        assert results == []
        go_on()
        assert results[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_a_plain_forward_pass_in_which_a_ranking_ends(fresh_model, name, implementation):
    model, expected = fresh_model(name)
    model.set_attn_implementation(implementation)
    main = threading.current_thread()
    with halted(model, layer=-1) as (results, go_on):
        handle = model.model.layers[0].register_forward_pre_hook(
            lambda module, args: go_on() if threading.current_thread() is main else None
        )
        assert plain(model, PAIRS[:1]) == pytest.approx(expected[:1], abs=1e-5)
        handle.remove()
        assert results[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_a_plain_forward_pass_in_which_a_ranking_begins(fresh_model, name, implementation):
    model, expected = fresh_model(name)
    model.set_attn_implementation(implementation)
    main, ranked = threading.current_thread(), []

    def rank_beside(module, args):
        if threading.current_thread() is main:
            ranked.append(in_thread(lambda: score(model)))

    handle = model.model.layers[1].register_forward_pre_hook(rank_beside)
    assert plain(model, PAIRS[:1]) == pytest.approx(expected[:1], abs=1e-5)
    handle.remove()
    assert ranked[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_two_threads_rank_at_once(fresh_model, name):
    model, expected = fresh_model(name)
    results, start = {}, threading.Barrier(2)

    def work(number):
        start.wait(60)
        results[number] = [score(model, batch_tokens=80 + number) for _ in range(4)]

    threads = [threading.Thread(target=work, args=[number], daemon=True) for number in range(2)]
    with is_left_as_it_was(model):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [len(results[number]) for number in range(2)] == [4, 4]
    for scores in [*results[0], *results[1]]:
        assert scores == pytest.approx(expected, abs=1e-5)


def test_two_models_of_one_config_rank_at_once(processor):
    config = QueritConfig(text_config=tiny.make_text_config("qwen3"))
    first, second = models = [QueritForSequenceRanking(config).eval() for _ in range(2)]
    for model in models:
        torch.nn.init.normal_(model.score.weight, std=0.1)
        model.processor = processor
    assert first.model.config is second.model.config
    expected = [score(model) for model in models]
    results, inside, first_is_done = [], threading.Event(), threading.Event()

    def halt(module, args):
        inside.set()
        assert first_is_done.wait(60)

    second.model.layers[0].register_forward_pre_hook(halt)
    other = threading.Thread(target=lambda: results.append(score(second)), daemon=True)
    with is_left_as_it_was(first):
        with halted(first, layer=0) as (of_first, go_on):
            other.start()
            # It may as well wait for its turn.
            inside.wait(0.2)
            go_on()
            first_is_done.set()
        other.join(60)
    assert of_first[0] == pytest.approx(expected[0], abs=1e-5)
    assert results[0] == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_two_threads_rank_a_model_in_training(processor, packing):
    """The first to finish must not put dropout back for the second."""
    model = tiny.make_model("qwen3", processor, attention_dropout=0.5)
    expected = score(model)
    model.train()
    arrived, results = threading.Event(), []

    def work():
        def pairs():
            arrived.set()
            yield from PAIRS

        results.append(score(model, pairs(), batch_tokens=64, optimizations=Optimizations(packing=packing)))

    other = threading.Thread(target=work, daemon=True)
    with halted(model, layer=0) as (first, go_on):
        other.start()
        assert arrived.wait(60)
        # Long enough for it to note the modes, if it does not wait for its turn.
        other.join(0.2)
        go_on()
    other.join(60)
    assert first[0] == pytest.approx(expected, abs=1e-5)
    assert results[0] == pytest.approx(expected, abs=1e-5)
    assert all(module.training for module in model.modules())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_forked_during_a_ranking_is_not_blocked(reference_model):
    model, _ = reference_model("qwen3")
    with halted(model, layer=0):
        child = os.fork()
        if child == 0:
            # Whatever happens, the child must not run the rest of the tests.
            os._exit(0 if exclusive(model.model).acquire(timeout=5) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Precision


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


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in MODELS if "gemma3" not in name))
@pytest.mark.parametrize("optimizations", [ALL, Optimizations(packing=False)], ids=str)
def test_float32_arithmetic_where_that_is_faster(in_bfloat16, fastest, name, optimizations):
    model, exact = in_bfloat16(name)
    fastest(F32, F32)
    assert score(model, batch_tokens=150, optimizations=optimizations) == pytest.approx(exact, abs=1e-5)
    assert {parameter.dtype for parameter in model.parameters()} == {BF16}


@pytest.mark.slow
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


@pytest.mark.slow
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


# Backbones that packs cannot go through


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "kwargs"),
    [
        # Soft caps.
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
        # Sinks.
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 16}),
        # Two attentions in a module.
        ("diffllama", {}),
        # A window that only its mask knows of.
        ("phimoe", {"num_local_experts": 4, "sliding_window": 16}),
        # Keyword arguments do not reach its attention.
        ("nemotron", {}),
    ],
)
def test_attention_that_packs_cannot_express_is_padded(processor, model_type, kwargs):
    model = make_other(model_type, processor, **kwargs)
    if model_type == "gemma2":
        # As newer versions of transformers do by themselves: sdpa has no soft caps.
        model.set_attn_implementation("eager")
    expected = plain(model)
    with forward_passes(model) as packs:
        for batch_tokens in [150, 100_000]:
            with is_left_as_it_was(model):
                assert score(model, batch_tokens=batch_tokens) == pytest.approx(expected, abs=1e-5)
    # Packing is tried once, and not again.
    assert packs[0] is not None
    assert set(packs[1:]) == {None}


def test_the_reason_why_packs_are_refused_is_named(processor):
    pack = next(plan_packs([[1, 2]], [[0]], batch_tokens=2))
    model = make_other("diffllama", processor)
    with pytest.raises(PackingError, match="several attentions in one module"):
        model(pack=pack)
    model.set_attn_implementation("eager")
    with pytest.raises(PackingError, match="eager attention"):
        model(pack=pack)


def drop_keyword(method):
    """A method of a module that hands on all keyword arguments but one."""

    def without_keyword(*args, packed_forward=None, **kwargs):
        return method(*args, **kwargs)

    return without_keyword


def refuse_keyword(method):
    """A method of a module that takes only the keyword arguments it knows."""

    def strict(
        hidden_states, attention_mask, position_ids, past_key_values, position_embeddings, use_cache=False
    ):  # fmt: skip
        return method(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
        )

    return strict


@pytest.mark.parametrize("change", [drop_keyword, refuse_keyword])
@pytest.mark.parametrize("layers", [[0, 1], [0], [1]], ids=["all layers", "first layer", "last layer"])
def test_backbones_that_do_not_hand_on_the_keyword_are_padded(fresh_model, change, layers):
    model, expected = fresh_model("qwen3")
    for index in layers:
        layer = model.model.layers[index]
        layer.forward = change(layer.forward)
    with forward_passes(model) as packs:
        assert score(model) == pytest.approx(expected, abs=1e-5)
    assert packs[0] is not None
    assert set(packs[1:]) == {None}


def test_backbones_with_layers_that_do_not_attend_by_the_interface_are_padded(fresh_model):
    model, expected = fresh_model("qwen3")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def attend_plainly(hidden_states, packed_forward=None, attention_mask=None, **kwargs):
        # As a layer would that computes attention by itself, over the whole pack.
        mask = None if packed_forward is not None else attention_mask
        return forward(hidden_states, attention_mask=mask, **kwargs)

    attention.forward = attend_plainly
    with forward_passes(model) as packs:
        assert score(model) == pytest.approx(expected, abs=1e-5)
    assert set(packs[1:]) == {None}


@pytest.mark.parametrize(
    ("model_type", "kwargs"),
    [
        # Chunks.
        ("llama4_text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}),
        # Linear attention.
        ("minimax", {"num_local_experts": 4}),
        # Its own attention functions.
        ("stablelm", {}),
    ],
)
def test_other_types_of_layers_are_padded(processor, model_type, kwargs):
    model = make_other(model_type, processor, **kwargs)
    expected = plain(model)
    assert not supports_packing(model.model)
    with forward_passes(model) as packs:
        assert score(model, batch_tokens=150) == pytest.approx(expected, abs=1e-5)
    assert set(packs) == {None}


@pytest.mark.parametrize(("name", "value"), [("_supports_attention_backend", False), ("_is_stateful", True)])
def test_backbones_that_do_not_use_the_interface_are_padded(reference_model, monkeypatch, name, value):
    model, expected = reference_model("qwen3")
    monkeypatch.setattr(type(model.model), name, value)
    assert not supports_packing(model.model)
    with forward_passes(model) as packs:
        assert score(model, batch_tokens=150) == pytest.approx(expected, abs=1e-5)
    assert set(packs) == {None}


@pytest.mark.parametrize(
    ("layer_types", "is_supported"),
    [
        (None, True),
        (["full_attention"] * 2, True),
        (["sliding_attention", "full_attention"], True),
        (["linear_attention", "full_attention"], False),
        (["full_attention", "conv"], False),
    ],
)
def test_types_of_layers_that_packs_support(fresh_model, layer_types, is_supported):
    model, _ = fresh_model("qwen3")
    model.model.config.layer_types = layer_types
    assert supports_packing(model.model) == is_supported


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


@pytest.mark.slow
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
