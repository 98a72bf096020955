import copy

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from modeling_querit import QueritConfig, QueritForSequenceClassification, QueritForSequenceRanking, QueritOutput

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def padded(ids, side, extra=0):
    """Input ids and 2-D mask, padded with ids that would change the scores if they were read."""
    width = max(map(len, ids)) + extra
    rows, masks = [], []
    for text in ids:
        padding, zeros = [7] * (width - len(text)), [0] * (width - len(text))
        rows.append(padding + text if side == "left" else text + padding)
        masks.append(zeros + [1] * len(text) if side == "left" else [1] * len(text) + zeros)
    return torch.tensor(rows), torch.tensor(masks)


def scores_of(model, *args, **kwargs):
    with torch.inference_mode():
        return model(*args, **kwargs).score.squeeze(-1)


def causal(width):
    return torch.ones(width, width, dtype=torch.bool).tril()


def additive(mask, dtype=torch.float32, blocked=None):
    blocked = torch.finfo(dtype).min if blocked is None else blocked
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, blocked)


# Scores


def test_backbone_is_transformers_own(architecture, model):
    assert type(model.model) is tiny.BACKBONES[architecture]


def test_scores_are_those_of_the_reference(model, ids, reference):
    scores = [scores_of(model, torch.tensor([text])).item() for text in ids]
    assert scores == pytest.approx(reference, abs=1e-5)
    # The tolerances mean something: the pairs' scores lie far apart.
    assert np.ptp(reference) > 0.2


def test_score_is_the_difference_of_the_probabilities(model, ids):
    input_ids, mask = padded(ids, "left")
    with torch.inference_mode():
        output = model(input_ids, mask)
    assert type(output) is QueritOutput
    assert output.logits.shape == (len(ids), 2)
    assert output.score.shape == (len(ids), 1)
    assert output.logits.dtype == output.score.dtype == torch.float32
    assert output.loss is None
    assert output["score"] is output.score
    np.testing.assert_allclose(output.score[:, 0], tiny.softmax_difference(output.logits), **TOLERANCE)


def test_classifier_gives_half_the_difference_of_the_logits(model, saved_folder, ids):
    classifier = QueritForSequenceClassification.from_pretrained(saved_folder)
    input_ids, mask = padded(ids, "left")
    with torch.inference_mode():
        output, expected = classifier(input_ids, mask), model(input_ids, mask)
    assert output.logits.shape == (len(ids), 1)
    torch.testing.assert_close(output.logits.tanh(), expected.score, **TOLERANCE)
    torch.testing.assert_close(output.score, expected.score, **TOLERANCE)
    torch.testing.assert_close(output.logits[:, 0], (expected.logits[:, 1] - expected.logits[:, 0]) / 2)


def test_extreme_logits_give_no_nan(loaded, ids):
    with torch.no_grad():
        loaded.score.bias.copy_(torch.tensor([-1e4, 1e4]))
    assert scores_of(loaded, torch.tensor([ids[0]])).item() == 1


def test_tuple_output(model, ids):
    input_ids, mask = padded(ids, "left")
    with torch.inference_mode():
        output = model(input_ids, mask)
        logits, score = model(input_ids, mask, return_dict=False)
        loss, *rest = model(
            input_ids, mask, labels=torch.rand(len(ids)), query_ids=torch.zeros(len(ids)), return_dict=False
        )
    torch.testing.assert_close(logits, output.logits)
    torch.testing.assert_close(score, output.score)
    assert loss.shape == ()
    assert len(rest) == 2


def test_hidden_states_on_request(model, ids):
    input_ids = torch.tensor([ids[0]])
    output = model(input_ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.text_config.num_hidden_layers + 1
    logits = nn.functional.linear(output.hidden_states[-1][:, -1], model.score.weight, model.score.bias)
    torch.testing.assert_close(output.logits, logits)
    assert model(input_ids).hidden_states is None


# Masks


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_score(model, ids, reference, side, extra):
    input_ids, mask = padded(ids, side, extra)
    for dtype in [torch.long, torch.bool, torch.float32]:
        assert scores_of(model, input_ids, mask.to(dtype)).tolist() == pytest.approx(reference, abs=1e-5)


def test_padding_may_be_on_both_sides_in_one_batch(model, ids, reference):
    left, left_mask = padded(ids[:2], "left", extra=60)
    right, right_mask = padded(ids[2:4], "right", extra=60)
    width = min(left.shape[1], right.shape[1])
    input_ids = torch.cat([left[:, -width:], right[:, :width]])
    mask = torch.cat([left_mask[:, -width:], right_mask[:, :width]])
    assert scores_of(model, input_ids, mask).tolist() == pytest.approx(reference[:4], abs=1e-5)


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("form", ["boolean", "additive", "infinite"])
def test_masks_of_the_reference(model, ids, reference, content_cls_mask, form, extra):
    input_ids, mask = padded(ids, "left", extra)
    types = [[0] * (len(row) - len(text)) + [1] * (len(text) - 1) + [2] for row, text in zip(mask, ids, strict=True)]
    full = torch.stack([content_cls_mask(row_types) for row_types in types])
    assert full.shape == (len(ids), 1, *2 * input_ids.shape[1:])
    if form != "boolean":
        full = additive(full, blocked=None if form == "additive" else float("-inf"))
    assert scores_of(model, input_ids, full).tolist() == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("form", ["boolean", "additive"])
def test_four_dimensional_masks_with_padding_on_the_right(model, ids, reference, form):
    input_ids, mask = padded(ids, "right", 3)
    full = (mask[:, None, :, None] & mask[:, None, None, :]).bool() & causal(input_ids.shape[1])
    full = full if form == "boolean" else additive(full)
    assert scores_of(model, input_ids, full).tolist() == pytest.approx(reference, abs=1e-5)


def test_one_causal_mask_for_the_whole_batch(model, ids, reference):
    """A mask of one row is spread over the batch, as transformers' attention functions spread it."""
    width = len(ids[0])
    mask = causal(width)[None, None]
    other = [*ids[0][-2::-1], ids[0][-1]]
    rows = torch.tensor([ids[0], other])
    expected = [reference[0], tiny.reference_score(model, other)]
    assert scores_of(model, rows, mask).tolist() == pytest.approx(expected, abs=1e-5)
    assert scores_of(model, rows, additive(mask)).tolist() == pytest.approx(expected, abs=1e-5)


def packed(ids, pad=0):
    """Several sequences in one row under a block-diagonal mask, with padding before them."""
    width = pad + sum(map(len, ids))
    mask = torch.zeros(width, width, dtype=torch.bool)
    start, ends = pad, []
    for text in ids:
        mask[start : start + len(text), start : start + len(text)] = causal(len(text))
        start += len(text)
        ends.append(start - 1)
    input_ids = torch.tensor([[7] * pad + [token for text in ids for token in text]])
    position_ids = torch.tensor([[0] * pad + [position for text in ids for position in range(len(text))]])
    return input_ids, mask[None, None], position_ids, ends


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["boolean", "additive"])
@pytest.mark.parametrize("pad", [0, 4])
def test_packed_sequences_do_not_see_each_other(loaded, ids, reference, form, pad, attention):
    loaded.set_attn_implementation(attention)
    input_ids, mask, position_ids, ends = packed(ids[:3], pad)
    mask = mask if form == "boolean" else additive(mask)
    with torch.inference_mode():
        output = loaded(input_ids, mask, position_ids=position_ids, output_hidden_states=True)
        assert output.score.item() == pytest.approx(reference[2], abs=1e-5)
        logits = loaded.score(output.hidden_states[-1][0, ends])
    assert tiny.softmax_difference(logits.numpy()) == pytest.approx(reference[:3], abs=1e-5)
    # Without the blocks the score is another one.
    everything = torch.ones_like(input_ids)
    assert abs(scores_of(loaded, input_ids, everything, position_ids=position_ids).item() - reference[2]) > 1e-3


def test_plain_and_packed_rows_in_one_batch(model, ids, reference):
    input_ids, mask, position_ids, _ = packed([ids[0], ids[1]])
    width = input_ids.shape[1]
    plain_ids, plain_mask = padded([ids[2]], "left", width - len(ids[2]))
    plain = (plain_mask[:, None, :, None] & plain_mask[:, None, None, :]).bool() & causal(width)
    scores = scores_of(
        model,
        torch.cat([input_ids, plain_ids]),
        torch.cat([mask, plain]),
        position_ids=torch.cat([position_ids, (plain_mask.cumsum(-1) - 1).clamp(min=0)]),
    )
    assert scores.tolist() == pytest.approx([reference[1], reference[2]], abs=1e-5)


def test_a_mask_that_allows_later_tokens_is_applied(model, ids):
    """Masks may allow more than causal attention, not only less."""
    width = len(ids[0])
    everything = torch.ones(1, 1, width, width, dtype=torch.bool)
    seen = scores_of(model, torch.tensor([ids[0]]), everything).item()
    assert abs(seen - scores_of(model, torch.tensor([ids[0]])).item()) > 1e-4
    torch.testing.assert_close(seen, scores_of(model, torch.tensor([ids[0]]), additive(everything)).item(), **TOLERANCE)


@pytest.mark.parametrize("bias", [3.0, -3.0])
@pytest.mark.parametrize("index", [(-1, 0), (-1, -1)], ids=["last to first", "last to itself"])
def test_an_additive_mask_may_hold_biases(architecture, model, ids, reference, bias, index):
    mask = additive(causal(len(ids[0])))[None, None]
    mask[(..., *index)] += bias
    with torch.inference_mode():
        last = model.model(torch.tensor([ids[0]]), attention_mask=mask).last_hidden_state[:, -1]
        expected = tiny.softmax_difference(model.score(last).numpy()).item()
    assert abs(expected - reference[0]) > 1e-5
    assert scores_of(model, torch.tensor([ids[0]]), mask).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(5,), (1, 5, 5), (1, 1, 1, 5, 5)])
def test_other_masks_are_an_error(model, shape):
    with pytest.raises(ValueError, match=r"attention_mask.*shape"):
        model(torch.ones(1, 5, dtype=torch.long), torch.ones(shape))


# Positions and embeddings


def test_positions_count_from_the_first_token(model, ids, reference):
    input_ids, mask = padded(ids, "left", 4)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert scores_of(model, input_ids, mask, position_ids=positions).tolist() == pytest.approx(reference, abs=1e-5)


def test_the_backbone_gets_positions_counted_from_the_first_token(model, ids):
    """Rotary distances do not show where counting starts; decoders with learned positions would."""
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["position_ids"])

    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        scores_of(model, *padded(ids[:1], "left", 3))
        scores_of(model, *padded(ids[:1], "right", 3))
    finally:
        handle.remove()
    count = list(range(len(ids[0])))
    assert seen[0][0, 3:].tolist() == count
    assert seen[1][0, : len(count)].tolist() == count


def test_position_ids_are_used(model, ids):
    input_ids = torch.tensor([ids[0]])
    plain = torch.arange(len(ids[0]))[None]
    one, other = scores_of(model, input_ids, position_ids=plain), scores_of(model, input_ids, position_ids=plain * 3)
    assert abs(one - other).item() > 1e-4
    # Rotary positions count by their distance alone.
    torch.testing.assert_close(scores_of(model, input_ids, position_ids=plain + 9), one, rtol=0, atol=1e-4)


def test_embeddings_in_place_of_ids(model, ids, reference):
    input_ids, mask = padded(ids, "left")
    embeddings = model.get_input_embeddings()(input_ids)
    assert scores_of(model, inputs_embeds=embeddings, attention_mask=mask).tolist() == pytest.approx(
        reference, abs=1e-5
    )
    assert scores_of(model, inputs_embeds=embeddings[1:2, -len(ids[1]) :]).tolist() == pytest.approx(
        reference[1:2], abs=1e-5
    )


# Numbers


def test_bfloat16_model_gives_float32_scores(loaded, ids, reference):
    loaded.to(torch.bfloat16)
    input_ids, mask = padded(ids, "left")
    output = loaded(input_ids, mask, output_hidden_states=True)
    assert output.hidden_states[-1].dtype == torch.bfloat16
    assert output.logits.dtype == output.score.dtype == torch.float32
    # The head itself is computed in float32: scores are no multiples of what bfloat16 can hold.
    weight, bias = loaded.score.weight.detach().double().numpy(), loaded.score.bias.detach().double().numpy()
    logits = output.hidden_states[-1][:, -1].detach().double().numpy() @ weight.T + bias
    np.testing.assert_allclose(output.score[:, 0].detach(), tiny.softmax_difference(logits), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_stay_float32_under_autocast(loaded, ids, dtype):
    loaded.to(dtype)
    input_ids, mask = padded(ids, "left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = loaded(
            input_ids,
            mask,
            labels=torch.rand(len(ids)),
            query_ids=torch.zeros(len(ids), dtype=torch.long),
            output_hidden_states=True,
        )
    assert output.logits.dtype == output.score.dtype == output.loss.dtype == torch.float32
    weight, bias = loaded.score.weight.detach().double().numpy(), loaded.score.bias.detach().double().numpy()
    logits = output.hidden_states[-1][:, -1].detach().double().numpy() @ weight.T + bias
    np.testing.assert_allclose(output.logits.detach(), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output.score[:, 0].detach(), tiny.softmax_difference(logits), **TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_and_padding_under_autocast(loaded, ids, reference, attention):
    loaded.set_attn_implementation(attention)
    input_ids, mask, position_ids, _ = packed(ids[:2], pad=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = scores_of(loaded, input_ids, mask, position_ids=position_ids).item()
        alone = scores_of(loaded, torch.tensor([ids[1]])).item()
    assert score == pytest.approx(alone, abs=0.1)


def test_eager_attention_gives_the_same_scores(saved_folder, ids, reference):
    model = QueritForSequenceRanking.from_pretrained(saved_folder, attn_implementation="eager")
    assert model.model.config._attn_implementation == "eager"
    input_ids, mask = padded(ids, "left")
    assert scores_of(model, input_ids, mask).tolist() == pytest.approx(reference, abs=1e-5)


# Experts


@pytest.fixture
def kernels(monkeypatch):
    """Names of the experts functions that are called, in order."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    calls = []

    def spied(name, function):
        def run(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return run

    for name in ["querit", "grouped_mm", "batched_mm"]:
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, spied(name, ALL_EXPERTS_FUNCTIONS[name]))
    experts = modeling_deepseek_v3.DeepseekV3Experts
    # The eager loop is the only one that goes through one_hot.
    monkeypatch.setattr(nn.functional, "one_hot", spied("eager", nn.functional.one_hot))
    assert experts.forward.__wrapped__
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "querit", "grouped_mm", "batched_mm"])
def test_the_requested_experts_implementation_runs(saved_folders, ids, references, kernels, implementation):
    model = QueritForSequenceRanking.from_pretrained(
        saved_folders("deepseek_v3"), experts_implementation=implementation
    )
    assert model.model.config._experts_implementation == implementation
    input_ids, mask = padded(ids, "left")
    expected = references("deepseek_v3")
    kernels.clear()
    assert scores_of(model, input_ids, mask).tolist() == pytest.approx(expected, abs=1e-5)
    # One of the two layers has experts.
    assert kernels == [implementation]


def test_our_experts_implementation_is_the_default(saved_folders, ids, kernels):
    model = QueritForSequenceRanking.from_pretrained(saved_folders("deepseek_v3"))
    # Loading tries the model out without memory, on any implementation.
    kernels.clear()
    scores_of(model, torch.tensor([ids[0]]))
    assert kernels == ["querit"]


def test_the_experts_implementation_can_be_changed_later(saved_folders, ids, references, kernels):
    model = QueritForSequenceRanking.from_pretrained(saved_folders("deepseek_v3"))
    expected = references("deepseek_v3")[0]
    for implementation in ["batched_mm", "eager", "grouped_mm", "querit"]:
        kernels.clear()
        model.set_experts_implementation(implementation)
        score = scores_of(model, torch.tensor([ids[0]])).item()
        assert score == pytest.approx(expected, abs=1e-5)
        assert kernels == [implementation]


def test_an_unknown_experts_implementation_is_an_error(saved_folders):
    with pytest.raises(ValueError, match="no_such_kernel"):
        QueritForSequenceRanking.from_pretrained(saved_folders("deepseek_v3"), experts_implementation="no_such_kernel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_logits_are_float32(saved_folders, ids, dtype):
    model = QueritForSequenceRanking.from_pretrained(saved_folders("deepseek_v3"), dtype=dtype)
    assert model.dtype == dtype
    gate = model.model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32
    logits = []
    gate.register_forward_hook(lambda module, args, output: logits.append((args[0], output[0])))
    scores_of(model, torch.tensor([ids[0]]))
    [(states, routed)] = logits
    assert states.dtype == dtype
    assert routed.dtype == torch.float32
    exact = states.double().view(-1, 32) @ gate.weight.detach().double().T
    torch.testing.assert_close(routed.double(), exact, rtol=1e-5, atol=1e-5)


def test_routing_biases_move_the_scores(loaded, ids, architecture, reference):
    """So a checkpoint without them must not load."""
    gates = [module for name, module in loaded.named_modules() if name.endswith("mlp.gate")]
    assert len(gates) == (architecture == "deepseek_v3")
    for gate in gates:
        gate.e_score_correction_bias.copy_(torch.arange(tiny.EXPERTS))
        moved = [scores_of(loaded, torch.tensor([text])).item() for text in ids]
        assert np.abs(np.subtract(moved, reference)).max() > 1e-3


# Training


def test_head_starts_at_zero(architecture):
    model = QueritForSequenceRanking(QueritConfig(text_config=tiny.make_text_config(architecture)))
    assert not model.score.weight.any()
    assert not model.score.bias.any()
    # The backbone does not.
    assert model.get_input_embeddings().weight.std() > 0.1


def slow_hinge(scores, labels, query_ids, margin_scale):
    losses = [
        max(0.0, margin_scale * (labels[i] - labels[j]) - (scores[i] - scores[j]))
        for i in range(len(scores))
        for j in range(len(scores))
        if query_ids[i] == query_ids[j] and labels[i] > labels[j]
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("margin_scale", [0.8, 0.2])
def test_loss_is_the_hinge_over_pairs_of_one_query(loaded, ids, reference, margin_scale):
    loaded.config.margin_scale = margin_scale
    labels, query_ids = [1.0, 0.0, 0.35, 0.0, 1.0, 0.9], [3, 3, 3, 1, 1, 1]
    input_ids, mask = padded(ids, "left")
    output = loaded(input_ids, mask, labels=torch.tensor(labels), query_ids=torch.tensor(query_ids))
    expected = slow_hinge(reference, labels, query_ids, margin_scale)
    assert expected > 0.01
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)
    assert output.loss.dtype == torch.float32


def test_labels_may_be_integers(model, ids):
    input_ids, mask = padded(ids[:2], "left")
    query_ids = torch.tensor([0, 0])
    whole = model(input_ids, mask, labels=torch.tensor([1, 0]), query_ids=query_ids).loss
    assert whole.item() == model(input_ids, mask, labels=torch.tensor([1.0, 0.0]), query_ids=query_ids).loss.item()


def test_labels_without_query_ids_are_an_error(model, ids):
    with pytest.raises(ValueError, match="query_ids"):
        model(torch.tensor([ids[0]]), labels=torch.tensor([1.0]))


def test_query_ids_alone_give_no_loss(model, ids):
    assert model(torch.tensor([ids[0]]), query_ids=torch.tensor([0])).loss is None


def test_gradient_reaches_a_head_at_zero(architecture, processor, ids):
    model = tiny.make_model(architecture)
    nn.init.zeros_(model.score.weight)
    nn.init.zeros_(model.score.bias)
    input_ids, mask = padded(ids[:2], "left")
    output = model(input_ids, mask, labels=torch.tensor([1.0, 0.0]), query_ids=torch.tensor([0, 0]))
    assert output.score.tolist() == [[0], [0]]
    assert output.loss.item() == pytest.approx(0.8)
    output.loss.backward()
    assert model.score.weight.grad.abs().max() > 1e-3
    with torch.no_grad():
        model.score.weight -= 0.01 * model.score.weight.grad
    better, worse = scores_of(model, input_ids, mask).tolist()
    assert better > worse


def test_gradient_reaches_every_weight(loaded, ids):
    input_ids, mask = padded(ids, "left")
    labels = torch.linspace(0, 1, len(ids))
    loaded.config.margin_scale = 2.0
    loaded.train()
    loaded(input_ids, mask, labels=labels, query_ids=torch.zeros(len(ids), dtype=torch.long)).loss.backward()
    without = {name for name, parameter in loaded.named_parameters() if not parameter.grad.any()}
    assert without <= {"score.bias"}


def test_gradient_checkpointing_changes_no_gradient(loaded, ids):
    loaded.train()
    input_ids, mask = padded(ids[:2], "left")
    inputs = {"labels": torch.tensor([1.0, 0.0]), "query_ids": torch.tensor([0, 0])}
    loaded(input_ids, mask, **inputs).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in loaded.named_parameters()}
    loaded.zero_grad()
    loaded.gradient_checkpointing_enable()
    assert loaded.model.is_gradient_checkpointing
    loaded(input_ids, mask, **inputs).loss.backward()
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **TOLERANCE)


def test_the_trainer_divides_the_loss_by_the_accumulation_steps(model):
    assert model.accepts_loss_kwargs is False


# Other decoders


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def other(request, processor):
    kwargs = {}
    if request.param == "gemma3_text":
        # A window far shorter than the texts, on one of the two layers.
        kwargs = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return tiny.make_model(request.param, processor, **kwargs)


def test_any_decoder_can_be_the_backbone(other, ids, content_cls_mask, tmp_path):
    assert type(other.model) is tiny.BACKBONES[other.config.text_config.model_type]
    expected = [tiny.reference_score(other, text) for text in ids]
    input_ids, mask = padded(ids, "left", 3)
    assert scores_of(other, input_ids, mask).tolist() == pytest.approx(expected, abs=1e-5)
    types = [[0] * (len(row) - len(text)) + [1] * (len(text) - 1) + [2] for row, text in zip(mask, ids, strict=True)]
    full = torch.stack([content_cls_mask(row_types) for row_types in types])
    assert scores_of(other, input_ids, full).tolist() == pytest.approx(expected, abs=1e-5)
    assert scores_of(other, input_ids, additive(full)).tolist() == pytest.approx(expected, abs=1e-5)

    other.save_pretrained(tmp_path)
    again = QueritForSequenceRanking.from_pretrained(tmp_path)
    assert again.predict(tiny.pairs()).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_sliding_window_is_shorter_than_the_text(processor, ids):
    """Without this, the test above would prove nothing about windows."""
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    short = tiny.make_model("gemma3_text", sliding_window=8, **layers)
    long = tiny.make_model("gemma3_text", sliding_window=400, **layers)
    input_ids = torch.tensor([ids[0]])
    assert abs(scores_of(short, input_ids) - scores_of(long, input_ids)).item() > 1e-4


# Others


def test_copies_are_independent(model, ids):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.score.bias[1] += 1
    assert scores_of(model, torch.tensor([ids[0]])) != scores_of(twin, torch.tensor([ids[0]]))


def test_vocabulary_can_grow(loaded, ids, reference, tmp_path):
    loaded.resize_token_embeddings(520)
    assert loaded.config.text_config.vocab_size == 520
    loaded.save_pretrained(tmp_path)
    again = QueritForSequenceRanking.from_pretrained(tmp_path)
    assert again.get_input_embeddings().num_embeddings == 520
    assert scores_of(again, torch.tensor([ids[0]])).item() == pytest.approx(reference[0], abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_padding_that_sees_itself_is_padding(model, side, dtype):
    """The usual guard against an empty row of the softmax."""
    ids = [pair.input_ids for pair in model.processor.encode([tiny.QUERY] * 3, ["a novel by lee", "", "x y z"])]
    expected = [tiny.reference_score(model, text) for text in ids]
    input_ids, mask = padded(ids, side)
    tokens = mask.bool()
    plain = tokens[:, None, :, None] & tokens[:, None, None, :] & torch.ones(tokens.shape[1:] * 2).tril().bool()
    guarded = (plain | torch.eye(tokens.shape[1]).bool()).to(dtype)
    assert scores_of(model, input_ids=input_ids, attention_mask=guarded).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_text_of_one_token_is_a_token(model):
    input_ids = torch.tensor([[2], [2]])
    mask = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    assert torch.equal(
        scores_of(model, input_ids=input_ids, attention_mask=mask), scores_of(model, input_ids=input_ids)
    )


def test_a_forward_pass_without_inputs_says_what_to_give(model):
    with pytest.raises(ValueError, match="give input_ids, inputs_embeds or a pack"):
        model()
