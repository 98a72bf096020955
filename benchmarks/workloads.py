"""What is ranked: seeded texts of known lengths, their real token counts, the arithmetic that they need at least."""

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

# A word with the space before it, as byte-level tokenizers write it: one token.
_WORD = re.compile(r"Ġ[a-z]{3,}")
# Parts of an attention layer whose output later tokens read.
_KEYS_AND_VALUES = ("k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj")


class Workload(NamedTuple):
    """One query, and documents whose lengths follow a lognormal distribution.

    Args:
        documents: How many.
        median, sigma: Of a document's tokens.
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
    # For trying the benchmark out.
    "tiny": Workload(documents=4, median=12, sigma=0.3, query=20),
}


@dataclass(frozen=True)
class Task:
    """A workload made out: its texts, and their tokens as the processor makes them.

    Args:
        name: Of the workload.
        query, documents: The texts.
        input_ids: Of each pair.
    """

    name: str
    query: str
    documents: list[str]
    input_ids: list[list[int]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(query, document) for each document."""
        return [(self.query, document) for document in self.documents]

    @property
    def prefix(self) -> int:
        """Tokens that all pairs begin with."""
        return len(common_prefix(self.input_ids))

    def statistics(self) -> dict[str, Any]:
        """Counts of real tokens."""
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
    """A workload's texts; `documents` overrides how many."""
    workload = WORKLOADS[name]
    rng, words = random.Random(f"{seed} {name}"), words_of(processor.tokenizer)
    fixed = len(processor.encode(["a"], ["a"])[0].input_ids)
    query = " ".join(rng.choices(words, k=max(1, workload.query - fixed)))
    count = workload.documents if documents is None else documents
    texts = list(make_documents(words, rng, count, workload.median, workload.sigma))
    return Task(name, query, texts, [pair.input_ids for pair in processor.encode([query] * len(texts), texts)])


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """English-looking words that are one token each."""
    return [token[1:] for token in sorted(tokenizer.get_vocab()) if _WORD.fullmatch(token)]


def make_documents(words: Sequence[str], rng: random.Random, count: int, median: int, sigma: float) -> Iterator[str]:
    """Texts of random words, lognormal in length."""
    for _ in range(count):
        yield " ".join(rng.choices(words, k=max(1, round(rng.lognormvariate(math.log(median), sigma)))))


def needed_flops(layers: nn.ModuleList, config: PreTrainedConfig, task: Task) -> float:
    """Arithmetic that the scores of a task need at least.

    The linear layers and active experts for each distinct token, what all pairs begin with counted once; in the last
    layer keys and values for all tokens, the rest for those that are read; attention for pairs of tokens that see each
    other. Norms, activations and the like count as nothing.
    """
    read, lengths, prefix = len(task.input_ids), [len(ids) for ids in task.input_ids], task.prefix
    tokens = task.statistics()["tokens_distinct"]
    products = 0.0
    for place, layer in enumerate(layers):
        everything, keys_and_values = _products(layer, config)
        if place < len(layers) - 1:
            products += everything * tokens
        else:
            products += keys_and_values * tokens + (everything - keys_and_values) * read
    seen_inside = _triangle(prefix) + sum(_triangle(length) - _triangle(prefix) for length in lengths)
    attention = _attention_of_a_pair(config) * ((len(layers) - 1) * seen_inside + sum(lengths))
    return 2.0 * (products + attention)


def _products(layer: nn.Module, config: PreTrainedConfig) -> tuple[float, float]:
    """Multiplications that a token takes in a layer: all, and those for keys and values."""
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
    """Multiplications for a query and a key that it sees, in one layer."""
    if hasattr(config, "kv_lora_rank"):
        size = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        size = 2 * config.head_dim
    return config.num_attention_heads * size


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
