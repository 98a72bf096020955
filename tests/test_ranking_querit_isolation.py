"""What ranking leaves of a model to others: all of it, for other threads, children and whoever interrupts it."""

import copy
import functools
import os
import pickle
import signal
import sys
import threading
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from packs import PAIRS, hooks_of, is_left_as_it_was, plain, score

import modeling_querit
from modeling_querit import QueritConfig, QueritForSequenceRanking
from modeling_querit.scoring_querit import Optimizations


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


class Halt:
    """A forward hook that halts one thread; may be copied and pickled."""

    def __init__(self, thread, inside, may_go_on):
        self.thread, self.inside, self.may_go_on = thread, inside, may_go_on

    def __call__(self, module, args):
        if threading.current_thread() is self.thread:
            self.inside.set()
            assert self.may_go_on.wait(60)

    def __reduce__(self):
        return functools.partial, (do_nothing,)


def do_nothing(module, args):
    """What is left of the hook in another process."""


@contextmanager
def halted(model, layer):
    """A thread that ranks, halted in the middle: `(results, go_on)`."""
    inside, may_go_on, results = threading.Event(), threading.Event(), []
    thread = threading.Thread(target=lambda: results.append(score(model)), daemon=True)

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(Halt(thread, inside, may_go_on))
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


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_is_copied_beside_a_ranking_is_as_it_was(fresh_model, training):
    model, expected = fresh_model("qwen3")
    model.train(training)
    modes, implementation = [module.training for module in model.modules()], model.model.config._attn_implementation
    with halted(model, layer=-1) as (results, go_on):
        hooks = hooks_of(model)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for copied in copies:
            assert [module.training for module in copied.modules()] == modes
            assert copied.model.config._attn_implementation == implementation
            assert hooks_of(copied) == hooks == 1
        assert [score(copied) for copied in copies] == [pytest.approx(expected, abs=1e-5)] * 2
        assert results == []
        go_on()
        assert results[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("training", [True, False])
def test_a_child_forked_during_a_ranking_ranks(fresh_model, training):
    model, expected = fresh_model("qwen3")
    model.train(training)
    with halted(model, layer=0):
        child = os.fork()
        if child == 0:
            # Whatever happens, the child must not run the rest of the tests.
            try:
                signal.alarm(60)
                is_right = score(model) == pytest.approx(expected, abs=1e-5)
                os._exit(0 if is_right and all(module.training == training for module in model.modules()) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Interrupts


@contextmanager
def interrupted_at(moment):
    """Raise KeyboardInterrupt when this many lines and calls of the package have been run; yields their count."""
    package, count = str(Path(modeling_querit.__file__).parent), [0]

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(package):
            return None
        count[0] += 1
        if count[0] == moment:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "training"), [("qwen3", False), ("deepseek_v3", True)])
def test_an_interrupt_at_any_moment_leaves_nothing_behind(fresh_model, name, training):
    model, expected = fresh_model(name)
    model.train(training)
    pairs = PAIRS[:3]
    with interrupted_at(None) as count:
        score(model, pairs)
    assert count[0] > 500
    moments = range(1, count[0], count[0] // 150)
    for moment in moments:
        with is_left_as_it_was(model), pytest.raises(KeyboardInterrupt), interrupted_at(moment):
            score(model, pairs)
        assert not torch.is_inference_mode_enabled()
    assert score(model) == pytest.approx(expected, abs=1e-5)
    assert in_thread(lambda: score(model)) == pytest.approx(expected, abs=1e-5)
    model.eval()
    assert plain(model) == pytest.approx(expected, abs=1e-5)


def test_a_replaced_forward_that_cannot_evaluate_is_named(fresh_model):
    """A closure computes with the module itself, which is in training mode, so dropout would change the scores."""
    model, expected = fresh_model("qwen3")
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda states: forward(states)
    assert score(model) == pytest.approx(expected, abs=1e-5)
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        score(model)


def test_a_bound_forward_is_evaluated(fresh_model):
    """As accelerate replaces the forward of models that it prepares, and of modules that it offloads."""
    model, expected = fresh_model("qwen3")
    layer = model.model.layers[0]
    layer.forward = types.MethodType(type(layer).forward, layer)
    layer.mlp.forward = functools.partial(type(layer.mlp).forward, layer.mlp)
    layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.9))
    model.train()
    assert score(model) == pytest.approx(expected, abs=1e-5)
