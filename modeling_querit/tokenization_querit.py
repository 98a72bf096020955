"""The tokenizer that a saved folder holds: `tokenizer(query, document)` gives token ids in Querit's input format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy

from .arguments_querit import describe
from .pair_encoding_querit import CLS_TOKEN, DEFAULT_INSTRUCTION, Pair, PairEncoder
from .tokenizer_backend_querit import copy_backend

TEMPLATE_END = (
    "{%- if ns.title -%}{%- set ns.document = ns.title + ' ' + ns.document -%}{%- endif -%}"
    "{{- ns.document | trim -}}"
    "{{- '" + CLS_TOKEN + "' -}}"
)
# The text of a pair for runtimes that render messages: sentence-transformers, vLLM. They have no default system
# message, so the template holds the default instruction.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(instruction='" + DEFAULT_INSTRUCTION + "', query='', title='', document='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.instruction = message['content'] -%}"
    "{%- elif message['role'] == 'query' -%}{%- set ns.query = message['content'] -%}"
    "{%- elif message['role'] == 'title' -%}{%- set ns.title = message['content'] -%}"
    "{%- elif message['role'] == 'document' -%}{%- set ns.document = message['content'] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- ns.instruction + ' Query: ' + ns.query + '; Content: ' -}}" + TEMPLATE_END
)
# The end of the template in folders saved before documents without a title were stripped.
EARLIER_TEMPLATE_END = (
    "{%- if ns.title -%}{{- (ns.title + ' ' + ns.document) | trim -}}{%- else -%}{{- ns.document -}}{%- endif -%}"
    "{{- '" + CLS_TOKEN + "' -}}"
)

# What a tokenizer of another class writes between query and document: no model has an embedding for it.
_NOT_FOR_PAIRS = "[give trust_remote_code=True to the tokenizer, or use its chat template]"
_NO_TOKEN_ID = 2**31 - 1
# What a batch of token ids cannot answer.
_NEEDS_ENCODINGS = ("return_overflowing_tokens", "return_offsets_mapping", "is_split_into_words")
_DO_NOT_TRUNCATE = TruncationStrategy.DO_NOT_TRUNCATE
_PLAIN = {"padding_strategy": PaddingStrategy.DO_NOT_PAD, "return_tensors": None}
# How `_encode_plus` pads and what it returns.
_BATCH_OPTIONS = (
    *("padding_strategy", "max_length", "pad_to_multiple_of", "padding_side", "return_tensors", "return_length"),
    *("return_attention_mask", "return_token_type_ids", "return_special_tokens_mask"),
)

AnyTokenizer = TypeVar("AnyTokenizer", bound=PreTrainedTokenizerFast)


class QueritTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer whose pairs are a query and a document, encoded in Querit's input format.

    `tokenizer(query, document)`, also in batches and as a list of tuples, gives the ids that `PairEncoder` gives, with
    every kind of padding. A document may be `{"title", "text"}`; `instruction=...` replaces the default instruction.
    With `truncation=True`, "longest_first" or "only_second", the end of the document is cut first and the end of the
    query then, never `[CLS]`. Single texts are tokenized as they are, without special tokens, as runtimes that render
    the chat template want it; where such a text ends in `[CLS]`, truncation keeps it.

    In `tokenizer.json`, pairs hold an id that no model has, so that a tokenizer of another class cannot give a wrong
    score: pieces of a text have other tokens than the whole, `?;` for example.

    Example:
        ```python
        >>> tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        >>> tokenizer("who wrote Faust", "Goethe finished Faust in 1831.", return_tensors="pt").keys()
        dict_keys(['input_ids', 'attention_mask'])
        ```
    """

    # No __init__: for a class that has one, transformers builds a tokenizer of its own instead of reading the file.
    _pairs: PairEncoder | None = None
    _num_added_tokens = 0

    @property
    def pairs(self) -> PairEncoder:
        """Encoder of pairs, with the tokens that this tokenizer has now."""
        num_added_tokens = len(self.backend_tokenizer.get_added_tokens_decoder())
        if self._pairs is None or num_added_tokens != self._num_added_tokens:
            self._pairs, self._num_added_tokens = PairEncoder(self.backend_tokenizer), num_added_tokens
        return self._pairs

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pairs": None}

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Count the tokens around a pair, as for empty texts; none are added to a single text."""
        return len(self.pairs.encode([""], [""])[0].input_ids) if pair else 0

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Return the tokens of a text, or of a pair."""
        if pair is None:
            return super().tokenize(text, add_special_tokens=add_special_tokens, **kwargs)
        ids: list[int] = self(text, pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]
        return [str(self.convert_ids_to_tokens(id_)) for id_ in ids]

    def _encode_plus(  # type: ignore[override]  # what pairs have no use for is in kwargs
        self, text: Any, text_pair: Any = None, instruction: str | Sequence[str] | None = None, **kwargs: Any
    ) -> BatchEncoding:
        is_batch = isinstance(text, list | tuple)
        pairs = _as_pairs(text, text_pair, is_split=kwargs.get("is_split_into_words", False))
        limit = kwargs.get("max_length") if _truncates(kwargs) else None
        if pairs is not None:
            _check_pair_options(kwargs)
            rows = self._encode_pairs(pairs, instruction, limit, kwargs.get("add_special_tokens", True))
            return self._as_batch(rows, is_batch, **{name: kwargs[name] for name in _BATCH_OPTIONS if name in kwargs})
        if instruction is not None:
            raise ValueError("An instruction is part of a pair: give a query and a document.")
        if limit is None or not _may_lose_cls(text) or any(kwargs.get(name) for name in _NEEDS_ENCODINGS):
            return super()._encode_plus(text, None, **kwargs)
        texts = list(text) if is_batch else [text]
        rows = super()._encode_plus(texts, None, **kwargs | _PLAIN)["input_ids"]
        for single, row in zip(texts, rows, strict=True):
            if single.endswith(CLS_TOKEN) and len(row) == limit:
                row[-1] = self.pairs.cls_token_id
        return self._as_batch(rows, is_batch, **{name: kwargs[name] for name in _BATCH_OPTIONS if name in kwargs})

    def _encode_pairs(
        self, pairs: Sequence[Pair], instruction: str | Sequence[str] | None, limit: int | None, with_cls: bool
    ) -> list[list[int]]:
        queries, documents = [query for query, _ in pairs], [document for _, document in pairs]
        rows = [pair.input_ids for pair in self.pairs.encode(queries, documents, instruction, limit)]
        return rows if with_cls else [row[:-1] for row in rows]

    def _as_batch(
        self,
        rows: list[list[int]],
        is_batch: bool,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        **padding: Any,
    ) -> BatchEncoding:
        """Pad rows of token ids; one that is no batch stays a row, unless tensors are asked for."""
        columns: dict[str, Any] = {"input_ids": rows}
        if return_token_type_ids or (return_token_type_ids is None and "token_type_ids" in self.model_input_names):
            columns["token_type_ids"] = [[0] * len(row) for row in rows]
        if return_special_tokens_mask:
            columns["special_tokens_mask"] = [[int(id_ == self.cls_token_id) for id_ in row] for row in rows]
        if return_length:
            columns["length"] = [len(row) for row in rows]
        batch = self.pad(columns, padding=padding_strategy, return_tensors=return_tensors, **padding)
        if is_batch or return_tensors is not None:
            return batch
        return BatchEncoding({name: values[0] for name, values in batch.items()})


# Saving it copies this file and those that it imports, for runtimes without the package.
QueritTokenizer.register_for_auto_class("AutoTokenizer")


def make_tokenizer(
    tokenizer_class: type[AnyTokenizer], backend: Tokenizer, max_length: int, special_tokens: Mapping[str, str]
) -> AnyTokenizer:
    """Make the tokenizer of a saved folder: `[CLS]`, left padding, chat template, no added tokens.

    Args:
        tokenizer_class: `QueritTokenizer`, or `PreTrainedTokenizerFast`, which every runtime has.
        backend: Tokenizer of the tokenizers library with a `[CLS]` token; it is copied.
        max_length: Maximum number of tokens in a pair.
        special_tokens: Other special tokens by their names in transformers (`eos_token`, ...).
    """
    backend = copy_backend(backend)
    # No special tokens around a single text: some runtimes ask for them, which would put a <bos> in front.
    backend.post_processor = TemplateProcessing(
        single="$A", pair=["$A", _NOT_FOR_PAIRS, "$B:0"], special_tokens=[(_NOT_FOR_PAIRS, _NO_TOKEN_ID)]
    )
    # The class would copy it once more, which takes seconds for a large vocabulary.
    backend.__deepcopy__ = lambda memo: backend  # type: ignore[attr-defined]
    tokenizer = tokenizer_class(
        tokenizer_object=backend,
        cls_token=CLS_TOKEN,
        padding_side="left",
        truncation_side="right",
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **{"pad_token": special_tokens.get("eos_token", CLS_TOKEN), **special_tokens},
    )
    del backend.__deepcopy__  # type: ignore[attr-defined]
    return tokenizer


def _as_pairs(text: Any, text_pair: Any, *, is_split: bool) -> list[Pair] | None:
    """Return the pairs among the arguments of a tokenizer; None if these are single texts.

    Args:
        text: First argument of the tokenizer.
        text_pair: Second argument of the tokenizer.
        is_split: Whether single texts are lists of words.

    Raises:
        TypeError: if the numbers of queries and documents differ, one of the two is a list alone, or only some texts
            are pairs.
    """
    if text_pair is None:
        if is_split or not isinstance(text, list | tuple) or not any(map(_is_pair, text)):
            return None
        if not all(map(_is_pair, text)):
            raise TypeError("Only some of the texts are (query, document) pairs: give pairs, or single texts.")
        return [(query, document) for query, document in text]
    if isinstance(text, list | tuple) != isinstance(text_pair, list | tuple):
        raise TypeError(f"{describe(text)} with {describe(text_pair)}: give a query and a document, or a list of each.")
    if not isinstance(text, list | tuple):
        return [(text, text_pair)]
    if len(text) != len(text_pair):
        raise TypeError(f"{len(text)} queries and {len(text_pair)} documents: give the same number of each.")
    return list(zip(text, text_pair, strict=True))


def _is_pair(element: Any) -> bool:
    return isinstance(element, list | tuple) and len(element) == 2


def _truncates(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("truncation_strategy", _DO_NOT_TRUNCATE) != _DO_NOT_TRUNCATE


def _check_pair_options(kwargs: dict[str, Any]) -> None:
    for name in _NEEDS_ENCODINGS:
        if kwargs.get(name):
            raise ValueError(f"{name} cannot be had for pairs: query and document are parts of one text.")
    if kwargs.get("truncation_strategy") == TruncationStrategy.ONLY_FIRST:
        raise ValueError("truncation='only_first' would cut queries before documents: give truncation=True.")


def _may_lose_cls(text: Any) -> bool:
    texts = text if isinstance(text, list | tuple) else [text]
    return all(isinstance(single, str) for single in texts) and any(single.endswith(CLS_TOKEN) for single in texts)
