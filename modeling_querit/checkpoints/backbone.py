"""New rerankers from pretrained decoders: the start of training."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..configuration_querit import QueritConfig
from ..modeling_querit import QueritForSequenceRanking
from ..pair_encoding_querit import CLS_TOKEN, DEFAULT_INSTRUCTION
from ..processing_querit import QueritProcessor, explain_tokenizer_errors
from ..validation_querit import CONFIG_FILE, check_builds, check_config, check_model, read_json_object

logger = logging.getLogger(__name__)


def from_backbone(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    revision: str | None = None,
) -> QueritForSequenceRanking:
    """Put an untrained ranking head on a pretrained decoder; the head is zero, so every score is 0 until it is trained.

    A head at random would saturate the bounded score where the decoder's hidden states are large, and with it the
    gradients. `[CLS]` replaces a token that the decoder leaves unused, if there is one; otherwise the vocabulary grows
    by one.

    Args:
        name_or_path: Folder or repository of a causal decoder, with its tokenizer.
        gguf_file: Name of a GGUF file in it, which is dequantized while it is read.
        dtype: Data type of the weights.
        max_length: Maximum length of a pair in tokens; by default the tokenizer's, at most 4,096.
        revision: Branch, tag or commit of the repository.

    Example:
        ```python
        >>> model = from_backbone("Qwen/Qwen3-0.6B")
        >>> model.rank("a", ["b"])[0].score
        0.0
        ```
    """
    source: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    if revision:
        source["revision"] = revision
    if not gguf_file:
        # Pickles may run code when they are loaded.
        source["use_safetensors"] = True
        check_decoder(name_or_path)
    with explain_tokenizer_errors(name_or_path):
        tokenizer = _with_cls(AutoTokenizer.from_pretrained(name_or_path, **source))
    backbone = AutoModel.from_pretrained(name_or_path, dtype=dtype, **source, **_dequantize_options(gguf_file))
    if len(tokenizer) > backbone.config.vocab_size:
        backbone.resize_token_embeddings(len(tokenizer))
    text_config = backbone.config.get_text_config()
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    _copy_bos_embedding(backbone, tokenizer)
    # On the meta device first: the backbone's weights come from the checkpoint, only the head is new.
    with torch.device("meta"):
        model = QueritForSequenceRanking(QueritConfig(text_config=text_config, dtype=dtype))
    model.model = backbone
    model.score.to_empty(device=backbone.device)
    model.score.to(dtype)
    torch.nn.init.zeros_(model.score.weight)
    torch.nn.init.zeros_(model.score.bias)
    model.processor = QueritProcessor(tokenizer, max_length)
    return model.eval()


def check_decoder(
    folder: str | os.PathLike[str], build: Callable[[PreTrainedConfig], torch.nn.Module] = AutoModel.from_config
) -> None:
    """Check a plain model's folder before anything is built from it; the name of a repository passes.

    Args:
        folder: Folder of the model.
        build: Function that builds the model, by default a decoder without a head.

    Raises:
        OSError, ValueError: as in `check_config` and `check_model`.
    """
    folder = Path(folder)
    if folder.is_dir():
        place = folder / CONFIG_FILE
        content = read_json_object(place)
        check_config(content, place)
        config_class = CONFIG_MAPPING[content["model_type"]]
        check_builds(config_class, content, place)
        check_model(folder, config_class.from_dict(content), build)


def _copy_bos_embedding(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the first token of the default instruction the embedding of `<bos>`.

    A decoder pretrained with `<bos>` at the start of every text uses it as its attention sink, and the text of a Querit
    pair has none: the loss of Gemma 3 270M on plain text rises from 3.49 to 5.14 nats per token. With this it is 3.49
    again, at the cost of the previous meaning of that one token.
    """
    if tokenizer.bos_token_id is None or tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        return
    first_token = tokenizer(DEFAULT_INSTRUCTION, add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        # (vocabulary, hidden)
        embeddings: torch.Tensor = backbone.get_input_embeddings().weight  # type: ignore[assignment]
        embeddings[first_token] = embeddings[tokenizer.bos_token_id]


def _dequantize_options(gguf_file: str | None) -> dict[str, Any]:
    if gguf_file is None:
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:  # transformers without GgufConfig always dequantizes
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _with_cls(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add a `[CLS]` token to a tokenizer, in place of an unused one if there is any."""
    if CLS_TOKEN in tokenizer.get_vocab():
        return tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    unused = next((token["content"] for token in spec["added_tokens"] if _is_unused(token["content"])), None)
    if unused is None:
        tokenizer.add_special_tokens({"cls_token": CLS_TOKEN})
        return tokenizer
    for token in spec["added_tokens"]:
        if token["content"] == unused:
            token.update(content=CLS_TOKEN, special=True)
    vocab = spec["model"]["vocab"]
    if unused in vocab:
        vocab[CLS_TOKEN] = vocab.pop(unused)
    special_tokens = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        model_max_length=tokenizer.model_max_length,
        **special_tokens | {"cls_token": CLS_TOKEN},
    )


def _is_unused(token: str) -> bool:
    return token.strip("<|>[]").startswith(("unused", "reserved"))
