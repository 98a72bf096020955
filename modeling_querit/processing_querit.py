"""A tokenizer as its model uses it: pairs to batches of token ids, and the tokenizer files of a saved folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .arguments_querit import check_count
from .pair_encoding_querit import CLS_TOKEN, MAX_LENGTH, Document, EncodedPair, PairEncoder
from .tokenization_querit import QueritTokenizer, make_tokenizer
from .validation_querit import one_line, read_json_object

# A folder with none of these has no tokenizer.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "tiktoken.model"),
)
# Those that other runtimes ask for.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "mask_token", "pad_token")


class QueritProcessor:
    """Turns queries and documents into model inputs, in Querit's input format (see `PairEncoder`).

    `tokenizer` is there for others: it is what a saved folder holds, and anybody may let it pad, truncate or save
    itself, a Trainer for example, since pairs are encoded by a copy that nothing changes. To rank and save with other
    tokens, assign `model.processor = QueritProcessor(changed_tokenizer)`.

    Args:
        tokenizer: A fast tokenizer with a `[CLS]` token; it is copied.
        max_length: Maximum number of tokens in a pair, `[CLS]` included; by default that of the tokenizer, but at most
            4,096.

    Raises:
        ValueError: if the tokenizer is not a fast one or has no `[CLS]`.

    Example:
        ```python
        >>> processor = QueritProcessor.from_pretrained(modeling_querit.default_model_path())
        >>> processor(["who wrote Faust"], ["Goethe finished Faust in 1831."]).keys()
        dict_keys(['input_ids', 'attention_mask'])
        ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer: convert it to a tokenizer.json first."
            )
        self._pairs = PairEncoder(tokenizer.backend_tokenizer)
        self.cls_token_id: int = self._pairs.cls_token_id
        self._special_tokens = {
            name: str(value) for name, value in tokenizer.special_tokens_map.items() if name in _SPECIAL_TOKENS
        }
        self.max_length: int = check_count("max_length", max_length) or min(tokenizer.model_max_length, MAX_LENGTH)
        self._tokenizer = self.portable_tokenizer()
        self._num_added_tokens = len(self._tokenizer.added_tokens_decoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> QueritProcessor:
        return QueritProcessor(self.portable_tokenizer(), self.max_length)

    def __reduce__(self) -> tuple[Any, ...]:
        return QueritProcessor, (self.portable_tokenizer(), self.max_length)

    @property
    def tokenizer(self) -> QueritTokenizer:
        """The tokenizer as a saved folder holds it; changes to it change neither scores nor what the model saves."""
        return self._tokenizer

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], max_length: int | None = None, **kwargs: Any
    ) -> QueritProcessor:
        """Load the tokenizer of a folder or repository; `kwargs` go to `AutoTokenizer` (`revision`, `token`, ...)."""
        with explain_tokenizer_errors(name_or_path):
            processor = cls(_load_tokenizer(name_or_path, **kwargs), max_length)
            # What is broken inside a tokenizer shows when it tokenizes.
            processor.encode(["query"], ["document"], max_length=MAX_LENGTH if max_length else None)
        return processor

    def check_fits(self, vocabulary_size: int, name: str | os.PathLike[str]) -> None:
        """Check that a model has an embedding for every token.

        Args:
            vocabulary_size: Number of the model's embeddings.
            name: Name of the model, for the error message.

        Raises:
            ValueError: if it has not.
        """
        token, largest = max(self._pairs.backend.get_vocab().items(), key=lambda item: item[1])
        if largest >= vocabulary_size:
            raise ValueError(
                f"{name}: the tokenizer gives {one_line(token, 40)!r} the id {largest}, but the model has "
                f"{vocabulary_size} embeddings: use the tokenizer of these weights."
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer as other runtimes need it, with the code of `QueritTokenizer`."""
        self._check_same_tokens()
        self.portable_tokenizer().save_pretrained(save_directory)

    def portable_tokenizer(self) -> QueritTokenizer:
        """Copy the tokenizer into the class of a saved folder."""
        return make_tokenizer(QueritTokenizer, self._pairs.backend, self.max_length, self._special_tokens)

    def generic_tokenizer(self) -> PreTrainedTokenizerFast:
        """Copy the tokenizer into the class that every runtime has, which cannot encode pairs."""
        return make_tokenizer(PreTrainedTokenizerFast, self._pairs.backend, self.max_length, self._special_tokens)

    def _check_same_tokens(self) -> None:
        if len(self._tokenizer.added_tokens_decoder) != self._num_added_tokens:
            raise ValueError(
                "Tokens were added to model.processor.tokenizer, which the processor does not know: set "
                "model.processor = QueritProcessor(model.processor.tokenizer)."
            )

    def encode(
        self,
        queries: Sequence[str],
        documents: Sequence[Document],
        instruction: str | Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> list[EncodedPair]:
        """Tokenize pairs of a query and a document, each to at most `max_length` ids; see `PairEncoder.encode`.

        Args:
            queries: The query of each pair.
            documents: The document of each pair: a string or `{"title", "text"}`.
            instruction: One instruction for all pairs, or one for each; the default instruction if None.
            max_length: Maximum number of tokens in a pair; by default the processor's own.
        """
        self._check_same_tokens()
        return self._pairs.encode(
            queries, documents, instruction, check_count("max_length", max_length) or self.max_length
        )

    def __call__(
        self,
        queries: Sequence[str],
        documents: Sequence[Document],
        instruction: str | Sequence[str] | None = None,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchEncoding:
        """Encode pairs into one batch padded on the left: `input_ids` and `attention_mask`, (batch, sequence)."""
        encoded = self.encode(queries, documents, instruction, max_length)
        return self.pad([pair.input_ids for pair in encoded], return_tensors=return_tensors)

    def pad(self, input_ids: Sequence[Sequence[int]], return_tensors: str | None = "pt") -> BatchEncoding:
        """Pad lists of token ids on the left to the longest: `input_ids` and `attention_mask`, (batch, sequence)."""
        width = max((len(ids) for ids in input_ids), default=0)
        pad_id = self._pairs.backend.token_to_id(self._special_tokens.get("pad_token", CLS_TOKEN)) or 0
        batch = {
            "input_ids": [[pad_id] * (width - len(ids)) + list(ids) for ids in input_ids],
            "attention_mask": [[0] * (width - len(ids)) + [1] * len(ids) for ids in input_ids],
        }
        return BatchEncoding(batch, tensor_type=return_tensors)


def _load_tokenizer(name_or_path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load any tokenizer without code of its repository; ours is in this package, or beside this file."""
    if get_tokenizer_config(name_or_path, **kwargs).get("tokenizer_class") == QueritTokenizer.__name__:
        return PreTrainedTokenizerFast.from_pretrained(name_or_path, **kwargs)
    # AutoTokenizer needs only the model_type of the config, but would first ask to trust its code.
    config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path, **kwargs)
    config = SimpleNamespace(
        model_type=config_dict.get("model_type"), tokenizer_class=config_dict.get("tokenizer_class")
    )
    return AutoTokenizer.from_pretrained(name_or_path, config=config, trust_remote_code=False, **kwargs)


@contextmanager
def explain_tokenizer_errors(name: str | os.PathLike[str]) -> Iterator[None]:
    """Raise one sentence with the model's name for whatever goes wrong while its tokenizer is read.

    Raises:
        OSError: if it has no tokenizer.
        ValueError: if the tokenizer cannot be read.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except OSError as error:
        raise OSError(f"{name} has no tokenizer that can be read ({one_line(error)}).") from error
    except BaseException as error:
        # Broad: the tokenizers library raises bare exceptions, and panics, which are not even that.
        raise ValueError(
            f"{_broken_tokenizer_file(name)}: the tokenizer cannot be read ({one_line(error)})."
        ) from error


def _broken_tokenizer_file(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The file of a folder that is at fault: the settings if they are no JSON object, else the tokenizer itself."""
    for file_name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = Path(name, file_name)
        if path.is_file():
            try:
                read_json_object(path)
            except ValueError:
                return path
    path = Path(name, "tokenizer.json")
    if path.is_file():
        try:
            Tokenizer.from_file(str(path))
        except BaseException:
            return path
        return Path(name, "tokenizer_config.json")
    return name
