"""Packs through whole models: the scores of transformers' own backbones, whatever is saved on the way."""

import copy
import threading
from contextlib import ExitStack, contextmanager

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING

from modeling_querit import QueritConfig, QueritForSequenceRanking, engine_querit, moe_querit, ranking_querit
from modeling_querit.attention_querit import CURRENT_RUN
from modeling_querit.engine_querit import attends_plainly
from modeling_querit.precision_querit import Arithmetic
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
}
COMBINATIONS = [
    ALL,
    Optimizations(share_prefix=False),
    Optimizations(reads_last_only=False),
    Optimizations(share_prefix=False, reads_last_only=False),
    Optimizations(packs=False),
]


def encode(model, pairs=PAIRS):
    encoded = model.processor.encode([query for query, _ in pairs], [document for _, document in pairs])
    return [each.input_ids for each in encoded]


def score(model, pairs=PAIRS, **kwargs):
    return [score for _, score in score_stream(model, pairs, **kwargs)]


def plain(model, pairs=PAIRS):
    """The scores of plain forward passes, one pair at a time."""
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).score.item() for ids in encode(model, pairs)]


@pytest.fixture(scope="module")
def made(processor):
    """Models by their names in MODELS, with the scores of PAIRS by transformers' own backbones."""
    cache = {}

    def get(name):
        if name not in cache:
            architecture, kwargs = MODELS[name]
            model = tiny.make_model(architecture, processor, **kwargs)
            cache[name] = model, [tiny.reference_score(model, ids) for ids in encode(model)]
        return cache[name]

    return get


@pytest.fixture
def own(made):
    """A copy to change at will."""

    def get(name):
        model, expected = made(name)
        processor, model = model.processor, copy.deepcopy(model)
        model.processor = processor
        return model, expected

    return get


def make_other(model_type, processor, **kwargs):
    """A model with a backbone that tiny.py does not know."""
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
def rows_through(module):
    """How many tokens each call of a module computes; hooks of the engine come after this one."""
    counts = []
    handle = module.register_forward_hook(lambda module, args, output: counts.append(args[0].shape[:-1].numel()))
    try:
        yield counts
    finally:
        handle.remove()


def shared(input_ids):
    """How many tokens several texts begin with."""
    return next(place for place, tokens in enumerate(zip(*input_ids, strict=False)) if len(set(tokens)) > 1)


def hooks_of(model):
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


@contextmanager
def is_left_as_it_was(model):
    modes, hooks = [module.training for module in model.modules()], hooks_of(model)
    implementation = model.model.config._attn_implementation
    yield
    assert [module.training for module in model.modules()] == modes
    assert hooks_of(model) == hooks
    assert model.model.config._attn_implementation == implementation
    assert CURRENT_RUN.get() is None


# Scores


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizations", COMBINATIONS, ids=str)
@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_scores_are_the_reference_scores(made, name, optimizations, batch_tokens):
    model, expected = made(name)
    with is_left_as_it_was(model):
        scores = score(model, batch_tokens=batch_tokens, optimizations=optimizations)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert model not in ranking_querit._unpackable


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "gemma3_text"])
def test_whichever_attention_the_model_is_set_to(own, name, implementation):
    model, expected = own(name)
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
    for batch_tokens in [150, 100_000]:
        assert score(model, batch_tokens=batch_tokens) == pytest.approx(expected, abs=1e-5)
    assert attends_plainly(model.model)
    assert model not in ranking_querit._unpackable


# What is saved


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "deepseek_v3 with small queries"])
@pytest.mark.parametrize("optimizations", COMBINATIONS, ids=str)
@pytest.mark.parametrize("batch_tokens", [150, 100_000])
def test_tokens_that_are_computed(own, name, optimizations, batch_tokens):
    model, _ = own(name)
    of_query, singles = encode(model)[:7], encode(model)[7:]
    in_packs = sum(map(len, of_query + singles))
    if optimizations.share_prefix:
        in_packs -= 6 * shared(of_query) + shared(singles)
    first, last = model.model.layers[0], model.model.layers[-1]
    queries = ["q_a_proj", "q_b_proj"] if "small" in name else ["q_proj"]
    keys = "k_proj" if name == "qwen3" else "kv_a_proj_with_mqa"
    of_all = [first.mlp, *(getattr(first.self_attn, part) for part in [*queries, "o_proj"])]
    of_all.append(getattr(last.self_attn, keys))
    of_read = [last.mlp, last.post_attention_layernorm]
    of_read += [getattr(last.self_attn, part) for part in [*queries, "o_proj"]]
    with ExitStack() as stack:
        all_rows, read_rows, [scored] = (
            [stack.enter_context(rows_through(part)) for part in parts] for parts in (of_all, of_read, [model.score])
        )
        score(model, batch_tokens=batch_tokens, optimizations=optimizations)
    assert sum(scored) == len(PAIRS)
    if not optimizations.packs:
        # Padding.
        assert all(sum(counts) > in_packs for counts in all_rows + read_rows)
        return
    assert {sum(counts) for counts in all_rows} == {in_packs}
    assert {sum(counts) for counts in read_rows} == {len(PAIRS) if optimizations.reads_last_only else in_packs}
    assert all(count <= max(batch_tokens, tiny.MAX_LENGTH) for count in all_rows[0])


def test_norm_and_head_see_only_what_is_read(own):
    model, _ = own("qwen3")
    with rows_through(model.model.norm) as counts:
        score(model)
    assert counts == [len(PAIRS)]
    with rows_through(model.model.norm) as counts:
        score(model, optimizations=Optimizations(reads_last_only=False))
    assert counts[0] > len(PAIRS)


# What is left behind


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_after_an_error_in_the_backbone(own, name, training, error):
    model, expected = own(name)
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
    # From another thread, so that no lock can be left behind either.
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
    """A thread that ranks, halted in the middle: `(its scores so far, go_on)`."""
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


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "gemma3_text"])
def test_a_plain_forward_pass_beside_a_run(own, name, implementation):
    model, expected = own(name)
    model.set_attn_implementation(implementation)
    with halted(model, layer=-1) as (results, go_on):
        assert plain(model) == pytest.approx(expected, abs=1e-5)
        assert results == []
        go_on()
        assert results[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_a_plain_forward_pass_that_a_run_ends_in(own, name, implementation):
    """What it began with, masks too, goes on to serve it."""
    model, expected = own(name)
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
def test_a_plain_forward_pass_that_a_run_begins_in(own, name, implementation):
    model, expected = own(name)
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
def test_two_threads_rank_at_once(own, name):
    model, expected = own(name)
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
            # It may well wait for its turn instead.
            inside.wait(0.2)
            go_on()
            first_is_done.set()
        other.join(60)
    assert of_first[0] == pytest.approx(expected[0], abs=1e-5)
    assert results[0] == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.parametrize("packs", [True, False])
def test_two_threads_rank_a_model_in_training(processor, monkeypatch, packs):
    """The first to finish must not put dropout back for the second."""
    model = tiny.make_model("qwen3", processor, attention_dropout=0.5)
    expected = score(model)
    model.train()
    arrived, others, results = threading.Event(), [], []
    scores = ranking_querit._Window.scores

    def spied(window, progress):
        if threading.current_thread() in others:
            arrived.set()
        return scores(window, progress)

    monkeypatch.setattr(ranking_querit._Window, "scores", spied)

    def work():
        results.append(score(model, batch_tokens=64, optimizations=Optimizations(packs=packs)))

    others.append(threading.Thread(target=work, daemon=True))
    with halted(model, layer=0) as (first, go_on):
        others[0].start()
        assert arrived.wait(60)
        # Long enough for it to note the modes, if it does not wait for its turn.
        others[0].join(0.1)
        go_on()
    others[0].join(60)
    assert first[0] == pytest.approx(expected, abs=1e-5)
    assert results[0] == pytest.approx(expected, abs=1e-5)
    assert all(module.training for module in model.modules())


# Precision


@pytest.fixture
def computes(monkeypatch):
    """Says in which dtypes the processor is fastest with weights in bfloat16: of states, of products."""

    def say(states, products):
        told = Arithmetic(states, products)
        for module in (engine_querit, moe_querit):
            monkeypatch.setattr(
                module, "fastest_arithmetic", lambda _, dtype: told if dtype == BF16 else Arithmetic(dtype, dtype)
            )

    return say


@pytest.fixture
def in_bfloat16(own):
    """A model in bfloat16, and the scores of its weights in float32."""

    def get(name):
        model, _ = own(name)
        model.bfloat16()
        processor, exact = model.processor, copy.deepcopy(model).float()
        exact.processor = processor
        return model, plain(exact)

    return get


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"gemma3_text"}))
@pytest.mark.parametrize("optimizations", [ALL, Optimizations(packs=False)], ids=str)
def test_float32_arithmetic_where_that_is_faster(in_bfloat16, computes, name, optimizations):
    model, exact = in_bfloat16(name)
    computes(F32, F32)
    assert score(model, batch_tokens=150, optimizations=optimizations) == pytest.approx(exact, abs=1e-5)
    assert {parameter.dtype for parameter in model.parameters()} == {BF16}


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("optimizations", [ALL, Optimizations(packs=False)], ids=str)
def test_products_in_bfloat16_where_these_are_faster(in_bfloat16, computes, name, optimizations):
    model, exact = in_bfloat16(name)

    def errors():
        scores = score(model, batch_tokens=150, optimizations=optimizations)
        return [abs(one - other) for one, other in zip(scores, exact, strict=True)]

    computes(BF16, BF16)
    plain_bfloat16 = errors()
    computes(F32, BF16)
    found = errors()
    assert 1e-5 < max(found) < 0.1
    assert found != plain_bfloat16
    assert model not in ranking_querit._unconvertible
    # Where rounding sends a token to other experts, it is chance which is nearer.
    assert sum(found) < sum(plain_bfloat16) or name.startswith("deepseek_v3")


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("states", "converts"), [(BF16, True), (F32, False)])
def test_bfloat16_arithmetic_where_that_is_not(in_bfloat16, computes, name, packs, states, converts):
    model, exact = in_bfloat16(name)
    computes(states, states)
    scores = score(model, batch_tokens=150, optimizations=Optimizations(packs=packs, converts=converts))
    assert scores == pytest.approx(plain(model), abs=0.1)
    assert max(abs(one - other) for one, other in zip(scores, exact, strict=True)) > 1e-4


def test_float32_models_are_not_converted(own, computes, monkeypatch):
    model, expected = own("qwen3")
    computes(F32, F32)
    monkeypatch.setattr(engine_querit, "Float32Arithmetic", lambda *_: pytest.fail("converted"))
    assert score(model) == pytest.approx(expected, abs=1e-5)


# Backbones that packs cannot go through


@pytest.fixture
def attempts(monkeypatch):
    """One entry for every pack that is tried."""
    made, score_pack = [], ranking_querit.score_pack

    def spied(model, pack, *args, **kwargs):
        made.append(pack)
        return score_pack(model, pack, *args, **kwargs)

    monkeypatch.setattr(ranking_querit, "score_pack", spied)
    return made


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
        # Tokens see later ones.
        ("gemma3_text", {"head_dim": 8, "sliding_window": 16, "use_bidirectional_attention": True}),
    ],
)
def test_attention_that_packs_cannot_express(processor, attempts, model_type, kwargs):
    model = make_other(model_type, processor, **kwargs)
    if model_type == "gemma2":
        # As newer versions of transformers do by themselves: nothing else knows of soft caps.
        model.set_attn_implementation("eager")
    expected = plain(model)
    for batch_tokens in [150, 100_000]:
        with is_left_as_it_was(model):
            assert score(model, batch_tokens=batch_tokens) == pytest.approx(expected, abs=1e-5)
    # It is not tried again.
    assert len(attempts) == 1


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
def test_other_kinds_of_layers_are_not_packed(processor, attempts, model_type, kwargs):
    model = make_other(model_type, processor, **kwargs)
    assert not attends_plainly(model.model)
    assert score(model, batch_tokens=150) == pytest.approx(plain(model), abs=1e-5)
    assert attempts == []


@pytest.mark.parametrize(("name", "value"), [("_supports_attention_backend", False), ("_is_stateful", True)])
def test_backbones_that_do_not_use_the_interface_are_not_packed(made, attempts, monkeypatch, name, value):
    model, expected = made("qwen3")
    monkeypatch.setattr(type(model.model), name, value)
    assert not attends_plainly(model.model)
    assert score(model, batch_tokens=150) == pytest.approx(expected, abs=1e-5)
    assert attempts == []


@pytest.mark.parametrize(
    ("kinds", "is_plain"),
    [
        (None, True),
        (["full_attention"] * 2, True),
        (["sliding_attention", "full_attention"], True),
        (["linear_attention", "full_attention"], False),
        (["full_attention", "conv"], False),
    ],
)
def test_attends_plainly(own, kinds, is_plain):
    model, _ = own("qwen3")
    model.model.config.layer_types = kinds
    assert attends_plainly(model.model) == is_plain
