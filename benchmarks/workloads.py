"""Workloads: seeded texts of known lengths, their token counts, and a lower bound of the arithmetic they need."""

from __future__ import annotations

import math
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from modeling_querit import QueritProcessor
from modeling_querit.packing_querit import common_prefix

# A token that is a word with the space before it, as byte-level tokenizers and SentencePiece write it.
_WORD = re.compile(r"[Ġ▁][a-z]{3,}")
# Projections of an attention layer to keys and values, which later tokens attend to.
_KEYS_AND_VALUES = ("k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj")


class Workload(NamedTuple):
    """One query, and documents whose lengths follow a lognormal distribution.

    Args:
        documents: Number of documents.
        median: Median number of tokens per document.
        sigma: Standard deviation of the logarithm of a document's tokens.
        query: Tokens of instruction and query together.
    """

    documents: int
    median: int
    sigma: float
    query: int = 30


WORKLOADS = {
    "beir": Workload(documents=100, median=200, sigma=0.5),
    "miracl": Workload(documents=100, median=120, sigma=0.4),
    "long": Workload(documents=10, median=2000, sigma=0.1),
    # For tests of the benchmarks.
    "tiny": Workload(documents=4, median=12, sigma=0.3, query=20),
}


@dataclass(frozen=True)
class Task:
    """Texts of a workload with their token ids.

    Args:
        name: Name of the workload.
        query: Query text.
        documents: Document texts.
        input_ids: Token ids of each pair.
    """

    name: str
    query: str
    documents: list[str]
    input_ids: list[list[int]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The query with each document."""
        return [(self.query, document) for document in self.documents]

    @property
    def prefix(self) -> int:
        """Length of the shared prefix of all pairs, in tokens."""
        return len(common_prefix(self.input_ids))

    def statistics(self) -> dict[str, Any]:
        """Count tokens, without padding."""
        lengths = [len(ids) for ids in self.input_ids]
        tokens = sum(lengths)
        return {
            "pairs": len(lengths),
            "tokens": tokens,
            "tokens_a_pair_median": statistics.median(lengths),
            "tokens_a_pair_max": max(lengths),
            "tokens_shared": self.prefix,
            "tokens_distinct": tokens - self.prefix * (len(lengths) - 1),
        }


def make_task(name: str, processor: QueritProcessor, documents: int | None, seed: int) -> Task:
    """Draw the texts of a workload; `documents` overrides their number."""
    workload = WORKLOADS[name]
    rng, words = random.Random(f"{seed} {name}"), words_of(processor.tokenizer)
    fixed = len(processor.encode(["a"], ["a"])[0].input_ids)
    query = " ".join(rng.choices(words, k=max(1, workload.query - fixed)))
    count = workload.documents if documents is None else documents
    texts = list(make_documents(words, rng, count, workload.median, workload.sigma))
    return Task(name, query, texts, [pair.input_ids for pair in processor.encode([query] * len(texts), texts)])


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return lower-case words that are one token each."""
    return [token[1:] for token in sorted(tokenizer.get_vocab()) if _WORD.fullmatch(token)]


def make_documents(words: Sequence[str], rng: random.Random, count: int, median: int, sigma: float) -> Iterator[str]:
    """Draw texts of random words, whose lengths follow a lognormal distribution."""
    for _ in range(count):
        yield " ".join(rng.choices(words, k=max(1, round(rng.lognormvariate(math.log(median), sigma)))))


def needed_flops(layers: nn.ModuleList, config: PreTrainedConfig, task: Task) -> float:
    """Return a lower bound of the floating-point operations that the scores of a task need.

    Counted are the linear layers and active experts for each distinct token, with the shared prefix once; in the last
    layer keys and values for all tokens and the rest for last tokens alone; attention between tokens that attend to
    each other. Norms, activations and the like are not counted.
    """
    scored, lengths, prefix = len(task.input_ids), [len(ids) for ids in task.input_ids], task.prefix
    tokens = task.statistics()["tokens_distinct"]
    products = 0.0
    for index, layer in enumerate(layers):
        everything, keys_and_values = _products(layer, config)
        if index < len(layers) - 1:
            products += everything * tokens
        else:
            products += keys_and_values * tokens + (everything - keys_and_values) * scored
    attended = _triangle(prefix) + sum(_triangle(length) - _triangle(prefix) for length in lengths)
    attention = _attention_of_a_pair(config) * ((len(layers) - 1) * attended + sum(lengths))
    return 2.0 * (products + attention)


def _products(layer: nn.Module, config: PreTrainedConfig) -> tuple[float, float]:
    """Count multiplications for a token in a layer: of all linear layers, and of keys and values alone."""
    everything = keys_and_values = 0.0
    for name, parameter in layer.named_parameters():
        if parameter.dim() < 2:
            continue
        used = config.num_experts_per_tok / len(parameter) if parameter.dim() == 3 else 1.0
        everything += used * parameter.numel()
        if name.split(".")[-2] in _KEYS_AND_VALUES:
            keys_and_values += parameter.numel()
    return everything, keys_and_values


def _attention_of_a_pair(config: PreTrainedConfig) -> int:
    """Count multiplications for a token and a token it attends to, in one layer."""
    if hasattr(config, "kv_lora_rank"):
        size = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        size = 2 * config.head_dim
    return config.num_attention_heads * size


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
