"""Models of several backbones, and their scores with packs and without, which several test files share."""

from contextlib import contextmanager

import tiny
import torch
from transformers import CONFIG_MAPPING

from modeling_querit import QueritConfig, QueritForSequenceRanking
from modeling_querit.ranking_querit import score_stream

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


def encode(model, pairs=PAIRS):
    encoded = model.processor.encode([query for query, _ in pairs], [document for _, document in pairs])
    return [pair.input_ids for pair in encoded]


def score(model, pairs=PAIRS, **kwargs):
    return [score for _, score in score_stream(model, pairs, **kwargs)]


def plain(model, pairs=PAIRS):
    """Scores of plain forward passes, one pair at a time."""
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).score.item() for ids in encode(model, pairs)]


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
