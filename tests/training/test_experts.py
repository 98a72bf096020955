import copy

import pytest
import torch
from small_runs import make_trainer
from tiny import EXPERTS, make_model

from modeling_querit.training.experts import ExpertLoadCallback, expert_layers, freeze, load_metrics, router_of


@pytest.fixture
def mixture(processor):
    return make_model("deepseek_v3", processor)


def test_load_metrics_of_balanced_and_of_one_sided_counts():
    assert load_metrics(torch.tensor([5, 5, 5, 5])) == {
        "expert_load_max": 1.0,
        "expert_load_entropy": pytest.approx(1.0),
        "expert_dead": 0,
    }
    one_sided = load_metrics(torch.tensor([8, 0, 0, 0]))
    assert one_sided == {"expert_load_max": 4.0, "expert_load_entropy": 0.0, "expert_dead": 3}


def count_tokens(layer):
    """A list that receives the tokens of each expert at every training pass."""
    passes = []

    def count(experts, args):
        if experts.training:
            passes.append(torch.bincount(args[1].flatten(), minlength=EXPERTS))

    layer.experts.register_forward_pre_hook(count)
    return passes


@pytest.mark.slow
def test_the_load_is_logged_by_layer(mixture, tmp_path):
    ((name, layer),) = expert_layers(mixture)
    passes = count_tokens(layer)
    trainer = make_trainer(mixture, tmp_path, max_steps=2, logging_steps=2, callbacks=[ExpertLoadCallback()])
    trainer.train()
    log = trainer.state.log_history[0]
    counts = sum(passes)
    assert log[f"expert_load_max/{name}"] == pytest.approx(counts.max().item() / counts.float().mean().item())
    assert log["expert_load_max"] == log[f"expert_load_max/{name}"]
    assert log["expert_dead"] == (counts == 0).sum()
    assert 0 < log["expert_load_entropy"] <= 1
    # Only the hook of count_tokens is left.
    assert len(layer.experts._forward_pre_hooks) == 1


@pytest.mark.slow
def test_the_bias_rises_for_idle_experts_and_falls_for_busy_ones(mixture, tmp_path):
    ((_, layer),) = expert_layers(mixture)
    before = router_of(layer).e_score_correction_bias.clone()
    passes = count_tokens(layer)
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    make_trainer(mixture, tmp_path, callbacks=[ExpertLoadCallback(0.001)], **settings).train()
    assert len(passes) == 2
    counts = sum(passes).float()
    expected = before + 0.001 * torch.sign(counts.mean() - counts)
    torch.testing.assert_close(router_of(layer).e_score_correction_bias, expected)


@pytest.mark.slow
def test_the_bias_is_kept_in_float32(mixture, tmp_path):
    mixture = mixture.bfloat16()
    ((_, layer),) = expert_layers(mixture)
    before = router_of(layer).e_score_correction_bias.float()
    make_trainer(mixture, tmp_path, max_steps=1, callbacks=[ExpertLoadCallback(1e-4)]).train()
    moved = router_of(layer).e_score_correction_bias
    assert moved.dtype == torch.float32
    assert (moved - before).abs().max() == pytest.approx(1e-4, rel=1e-2)


def last_log(output_dir, rate, processor):
    """The log of the last third of a run on a mixture whose router begins by preferring some experts."""
    model = make_model("deepseek_v3", processor)
    ((_, layer),) = expert_layers(model)
    with torch.no_grad():
        router_of(layer).e_score_correction_bias.copy_(torch.linspace(0.5, -0.5, EXPERTS))
    callbacks = [ExpertLoadCallback(rate)]
    trainer = make_trainer(
        model, output_dir, callbacks=callbacks, max_steps=90, logging_steps=30, losses=["listwise_kl"]
    )
    trainer.train()
    return trainer.state.log_history[2]


@pytest.mark.slow
def test_biases_keep_experts_alive_at_equal_loss(tmp_path, processor):
    """Without them, experts that the router does not prefer die; with them, the load is even."""
    left_alone, balanced = last_log(tmp_path, 0.0, processor), last_log(tmp_path, 0.01, processor)
    assert left_alone["expert_dead"] >= 3
    assert left_alone["expert_load_entropy"] < 0.7
    assert left_alone["expert_load_max"] > 3
    assert balanced["expert_dead"] == 0
    assert balanced["expert_load_entropy"] > 0.98
    assert balanced["expert_load_max"] < 1.3
    assert balanced["loss"] == pytest.approx(left_alone["loss"], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["router", "experts"])
def test_frozen_parts_do_not_change(mixture, tmp_path, parts):
    ((name, _),) = expert_layers(mixture)
    assert freeze(mixture, parts) > 0
    before = copy.deepcopy(mixture.state_dict())
    make_trainer(mixture, tmp_path, max_steps=1, learning_rate=1e-2).train()
    frozen = {"router": f"{name}.gate.weight", "experts": f"{name}.experts.down_proj"}
    for part, key in frozen.items():
        assert torch.equal(before[key], mixture.state_dict()[key]) == (part == parts)


@pytest.mark.slow
def test_dense_models_have_no_expert_load(processor, tmp_path):
    dense = make_model("qwen3", processor)
    with pytest.raises(ValueError, match="dense"):
        make_trainer(dense, tmp_path, callbacks=[ExpertLoadCallback()]).train()
    with pytest.raises(ValueError, match="dense"):
        freeze(dense, "router")


@pytest.mark.slow
def test_a_router_without_bias_cannot_be_balanced(mixture, tmp_path):
    ((_, layer),) = expert_layers(mixture)
    trainer = make_trainer(mixture, tmp_path, callbacks=[ExpertLoadCallback(0.001)])
    del router_of(layer).e_score_correction_bias
    with pytest.raises(ValueError, match="e_score_correction_bias"):
        trainer.train()
