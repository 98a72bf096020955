"""From a plain causal decoder to an untrained reranker: where training starts."""

from __future__ import annotations

import json
import logging
import os

import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..configuration_querit import QueritConfig
from ..modeling_querit import QueritForSequenceRanking
from ..processing_querit import CLS_TOKEN, DEFAULT_INSTRUCTION, QueritProcessor

logger = logging.getLogger(__name__)


def from_backbone(
    name_or_path: str | os.PathLike,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    revision: str | None = None,
) -> QueritForSequenceRanking:
    """An untrained reranker on a pretrained decoder: its head is zero, so every score is 0 until it is trained.

    `[CLS]` takes the place of a token that the decoder's makers left unused, if there is one; otherwise the
    vocabulary grows by one.

    Args:
        name_or_path: Folder or repository of a causal decoder, with its tokenizer.
        gguf_file: Name of a GGUF file in it, dequantized while it is read.
        dtype: Of the weights.
        max_length: Tokens a pair may have; by default what the tokenizer states, 4,096 at most.
        revision: Of the repository.

    Example:
        ```python
        >>> model = from_backbone("Qwen/Qwen3-0.6B")
        >>> model.rank("a", ["b"])[0].score
        0.0
        ```
    """
    hub = {"gguf_file": gguf_file} if gguf_file else {}
    if revision:
        hub["revision"] = revision
    tokenizer = _with_cls(AutoTokenizer.from_pretrained(name_or_path, **hub))
    backbone = AutoModel.from_pretrained(name_or_path, dtype=dtype, **hub, **_dequantized(gguf_file))
    if len(tokenizer) > backbone.config.vocab_size:
        backbone.resize_token_embeddings(len(tokenizer))
    text_config = backbone.config.get_text_config()
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    _seat_bos(backbone, tokenizer)
    # On the meta device first: the backbone's weights come from the checkpoint, only the head is made here.
    with torch.device("meta"):
        model = QueritForSequenceRanking(QueritConfig(text_config=text_config, dtype=dtype))
    model.model = backbone
    model.score.to_empty(device=backbone.device)
    model.score.to(dtype)
    torch.nn.init.zeros_(model.score.weight)
    torch.nn.init.zeros_(model.score.bias)
    model.processor = QueritProcessor(tokenizer, max_length)
    return model.eval()


def _seat_bos(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the token that opens the default instruction the embedding of `<bos>`.

    A decoder that always saw `<bos>` first in pretraining rests its attention on it, and the text of a Querit
    pair has none: Gemma 3 270M then predicts text with 5.14 nats a token instead of 3.49. This brings 3.49 back, and
    costs no more than that one token's old meaning, at the very start of a text.
    """
    if tokenizer.bos_token_id is None or tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        return
    first = tokenizer(DEFAULT_INSTRUCTION, add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        embeddings = backbone.get_input_embeddings().weight
        embeddings[first] = embeddings[tokenizer.bos_token_id]


def _dequantized(gguf_file: str | None) -> dict:
    if gguf_file is None:
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:  # before GgufConfig, transformers always dequantized
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _with_cls(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with a `[CLS]` token, in the place of an unused one if there is any."""
    if CLS_TOKEN in tokenizer.get_vocab():
        return tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    unused = next((each["content"] for each in spec["added_tokens"] if _is_unused(each["content"])), None)
    if unused is None:
        tokenizer.add_special_tokens({"cls_token": CLS_TOKEN})
        return tokenizer
    for token in spec["added_tokens"]:
        if token["content"] == unused:
            token.update(content=CLS_TOKEN, special=True)
    vocab = spec["model"]["vocab"]
    if unused in vocab:
        vocab[CLS_TOKEN] = vocab.pop(unused)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        model_max_length=tokenizer.model_max_length,
        **special | {"cls_token": CLS_TOKEN},
    )


def _is_unused(token: str) -> bool:
    return token.strip("<|>[]").startswith(("unused", "reserved"))
