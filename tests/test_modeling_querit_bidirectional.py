"""Backbones that attend in both directions, as EmbeddingGemma does, beside transformers' own Gemma3TextModel."""

import copy
import json
import os
import subprocess

import pytest
import tiny
import torch
from transformers import AutoModel, Gemma3TextConfig, Gemma3TextModel

from modeling_querit import QueritForSequenceRanking
from modeling_querit.packing_querit import plan_packs
from modeling_querit.training.arguments import QueritTrainingArguments
from modeling_querit.training.trainer import QueritTrainer

# Sliding and full attention in turn, with a window far smaller than the texts: 5 tokens to each side, itself included.
LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
WINDOW = 8
PAIRS = [*tiny.pairs(tiny.STRINGS), (tiny.QUERY, tiny.LONG_DOCUMENT), ("nobody asked", "x")]
FRESH_PROCESS = """
import json, sys
sys.modules["modeling_querit"] = None
folder, pairs = json.loads(sys.argv[1])
from transformers import AutoModel
from sentence_transformers import CrossEncoder
pairs = [tuple(pair) for pair in pairs]
auto_model = AutoModel.from_pretrained(folder, trust_remote_code=True).predict(pairs).tolist()
encoder = CrossEncoder(folder, trust_remote_code=True, device="cpu").predict(pairs).tolist()
print(json.dumps([auto_model, encoder]))
"""


@pytest.fixture(scope="module")
def bidirectional(processor):
    return tiny.make_model(
        "gemma3_text",
        processor,
        num_hidden_layers=len(LAYERS),
        layer_types=LAYERS,
        sliding_window=WINDOW,
        use_bidirectional_attention=True,
    )


@pytest.fixture(scope="module")
def token_ids(bidirectional):
    encoded = bidirectional.processor.encode([query for query, _ in PAIRS], [document for _, document in PAIRS])
    return [pair.input_ids for pair in encoded]


@pytest.fixture(scope="module")
def expected(bidirectional, token_ids):
    """Scores text by text: transformers' backbone from a config of its own, and numpy in float64."""
    config = Gemma3TextConfig(
        **tiny.make_text_config("gemma3_text", num_hidden_layers=len(LAYERS)).to_dict()
        | {"layer_types": LAYERS, "sliding_window": WINDOW, "use_bidirectional_attention": True}
    )
    assert config.sliding_window == WINDOW // 2 + 1
    assert min(map(len, token_ids)) > 2 * WINDOW
    backbone = Gemma3TextModel(config).eval()
    backbone.load_state_dict(bidirectional.model.state_dict())
    weight, bias = (tensor.detach().double().numpy() for tensor in bidirectional.score.parameters())
    scores = []
    for ids in token_ids:
        with torch.inference_mode():
            last = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1].double().numpy()
        scores.append(float(tiny.softmax_difference(weight @ last + bias)))
    return scores


def test_attention_in_both_directions_moves_the_scores(bidirectional, processor, expected):
    """Without this, the other tests would prove nothing."""
    causal = tiny.make_model(
        "gemma3_text", processor, num_hidden_layers=len(LAYERS), layer_types=LAYERS, sliding_window=WINDOW // 2 + 1
    )
    causal.load_state_dict(bidirectional.state_dict())
    difference = causal.predict(PAIRS) - torch.tensor(expected)
    assert difference.abs().min() > 1e-4


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_rank_and_predict(bidirectional, expected, batch_tokens):
    assert bidirectional.predict(PAIRS, batch_tokens=batch_tokens).tolist() == pytest.approx(expected, abs=1e-5)
    count = len(tiny.STRINGS)
    ranking = bidirectional.rank(tiny.QUERY, tiny.STRINGS, batch_tokens=batch_tokens)
    assert {ranked.index: ranked.score for ranked in ranking} == pytest.approx(
        dict(enumerate(expected[:count])), abs=1e-5
    )


@pytest.mark.parametrize("prune_last_layer", [True, False])
def test_packs_without_a_shared_prefix(bidirectional, token_ids, expected, prune_last_layer):
    [pack] = plan_packs(token_ids, [range(len(token_ids))], 100_000, share_prefix=False)
    with torch.inference_mode():
        scores = bidirectional(pack=pack, prune_last_layer=prune_last_layer).score.flatten().tolist()
    assert scores == pytest.approx([expected[pair] for pair in pack.pairs], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["2-D", "4-D boolean", "4-D additive"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batches(bidirectional, token_ids, expected, side, form, attention):
    model = copy.deepcopy(bidirectional)
    model.set_attn_implementation(attention)
    width = max(map(len, token_ids)) + 3
    input_ids = torch.full((len(token_ids), width), 7)
    mask = torch.zeros(len(token_ids), width, dtype=torch.long)
    for row, ids in enumerate(token_ids):
        columns = slice(width - len(ids), None) if side == "left" else slice(0, len(ids))
        input_ids[row, columns], mask[row, columns] = torch.tensor(ids), 1
    if form != "2-D":
        mask = mask.bool()
        mask = mask[:, None, :, None] & mask[:, None, None, :]
    if form == "4-D additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        scores = model(input_ids, mask).score.flatten().tolist()
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("form", ["boolean", "additive"])
def test_a_causal_mask_is_refused(bidirectional, token_ids, content_cls_mask, form):
    ids = token_ids[0]
    mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).tril()
    if form == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    with pytest.raises(ValueError, match="attention_mask is causal, but the backbone attends in both directions"):
        bidirectional(torch.tensor([ids]), mask)
    reference_mask = content_cls_mask([1] * (len(ids) - 1) + [2])[None]
    with pytest.raises(ValueError, match="attention_mask is causal"):
        bidirectional(torch.tensor([ids]), reference_mask)


@pytest.mark.slow
def test_a_saved_folder_loads_with_the_package(bidirectional, expected, tmp_path):
    bidirectional.save_pretrained(tmp_path)
    for loaded in (QueritForSequenceRanking.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert loaded.predict(PAIRS).tolist() == pytest.approx(expected, abs=1e-5)
    # The config halves the window on loading, and must do it once.
    loaded.save_pretrained(tmp_path / "again")
    again = QueritForSequenceRanking.from_pretrained(tmp_path / "again")
    assert again.model.config.sliding_window == bidirectional.model.config.sliding_window
    assert again.predict(PAIRS).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_saved_folder_loads_where_the_package_is_not_installed(bidirectional, expected, forked_python, tmp_path):
    pytest.importorskip("sentence_transformers")
    bidirectional.save_pretrained(tmp_path / "reranker")
    argument = json.dumps([str(tmp_path / "reranker"), PAIRS])
    done = subprocess.run(
        [forked_python, "-c", FRESH_PROCESS, argument],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    auto_model, encoder = json.loads(done.stdout.splitlines()[-1])
    assert auto_model == pytest.approx(expected, abs=1e-5)
    assert encoder == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("repeats_layers", [False, True])
def test_gradients_of_packs_are_those_of_padded_batches(bidirectional, token_ids, repeats_layers):
    model = copy.deepcopy(bidirectional).train()
    labels, query_ids = torch.linspace(0, 1, len(token_ids)), torch.zeros(len(token_ids), dtype=torch.long)
    inputs = bidirectional.processor.pad(token_ids)
    model(**inputs, labels=labels, query_ids=query_ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    if repeats_layers:
        model.gradient_checkpointing_enable()
    [pack] = plan_packs(token_ids, [range(len(token_ids))], 100_000, share_prefix=False)
    model(pack=pack, labels=labels[pack.pairs], query_ids=query_ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_the_trainer_packs_without_a_shared_prefix(bidirectional, expected, tmp_path):
    args = QueritTrainingArguments(output_dir=str(tmp_path), packing=True, report_to="none")
    collator = QueritTrainer.make_collator(bidirectional, args)
    count = len(tiny.STRINGS)
    batch = collator([{"query": tiny.QUERY, "documents": tiny.STRINGS, "labels": [0.0] * count}])
    assert not batch["pack"].has_shared_prefix
    del batch["labels"], batch["query_ids"]
    with torch.inference_mode():
        scores = bidirectional(**batch).score.flatten().tolist()
    assert scores == pytest.approx(expected[:count], abs=1e-5)
