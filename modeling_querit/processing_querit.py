"""From instruction, query, title and content to the token ids a Querit reranker was trained on."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.processors import Sequence as NoSpecialTokens
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .tokenizing_querit import copy_backend, first_size, first_tokens, reach
from .validation_querit import one_line, read_json_object

DEFAULT_INSTRUCTION = "Judge whether the Content meets the requirements based on the Query."
CLS_TOKEN = "[CLS]"
# A folder with none of these has no tokenizer.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "tiktoken.model"),
)
# Those that other runtimes ask for.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "mask_token", "pad_token")
# Maximum number of tokens in a pair for the published models, `[CLS]` included.
MAX_LENGTH = 4096

TEMPLATE_END = (
    "{%- if ns.title -%}{%- set ns.document = ns.title + ' ' + ns.document -%}{%- endif -%}"
    "{{- ns.document | trim -}}"
    "{{- '" + CLS_TOKEN + "' -}}"
)
# The same text for runtimes that render messages: sentence-transformers, vLLM. They have no default system message,
# so the template holds the default instruction.
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

# A document is its text, or a mapping with "text" and perhaps "title".
Document = str | dict[str, Any]
# A query and a document.
Pair = tuple[str, Document]


class EncodedPair(NamedTuple):
    """One tokenized (query, document) pair.

    Args:
        input_ids: Token ids; the last is that of `[CLS]`.
        cut_content: Number of tokens cut at the end of the document, title and text, to make the pair fit; at least so
            many where the document is so long that its end is not even tokenized.
        cut_query: Number of tokens cut at the end of the query; in a very long one, at least so many.
    """

    input_ids: list[int]
    cut_content: int = 0
    cut_query: int = 0


class QueritProcessor:
    """Turns queries and documents into model inputs, exactly as the reference does (mteb's `QueritWrapper`).

    The text is `"{instruction} Query: {query}; Content: {document}"`, tokenized as one string without special
    tokens, followed by the id of `[CLS]`. Title and text of a document are joined by a space, and white space at its
    ends is dropped, whether it is a string or has a title. Where the reference is silent or wrong:

    - A pair over `max_length` loses the end of its document, then the end of its query, and never anything of the
      instruction, the words in between or `[CLS]`; the reference drops the first tokens too.
    - The name of a special token in a text (`[CLS]`, `<|im_end|>`) is text; the reference reads it as the token.
    - A lone surrogate, which is no character, becomes U+FFFD.

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
        cls_token_id = tokenizer.backend_tokenizer.token_to_id(CLS_TOKEN)
        if cls_token_id is None:
            raise ValueError(
                f"The tokenizer has no {CLS_TOKEN} token, where the model reads its score; "
                "modeling_querit.from_backbone adds one to a plain decoder."
            )
        self._backend = copy_backend(tokenizer.backend_tokenizer)
        # Names of special tokens in a text are text.
        self._backend.encode_special_tokens = True
        self._special_tokens = {
            name: str(value) for name, value in tokenizer.special_tokens_map.items() if name in _SPECIAL_TOKENS
        }
        self._reach = reach(self._backend)
        self.max_length: int = check_count("max_length", max_length) or min(tokenizer.model_max_length, MAX_LENGTH)
        self.cls_token_id: int = cls_token_id
        self._tokenizer = self.portable_tokenizer()
        self._num_added_tokens = len(self._tokenizer.added_tokens_decoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> QueritProcessor:
        return QueritProcessor(self.portable_tokenizer(), self.max_length)

    def __reduce__(self) -> tuple[Any, ...]:
        return QueritProcessor, (self.portable_tokenizer(), self.max_length)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer as a saved folder holds it; changes to it change neither scores nor what the model saves."""
        return self._tokenizer

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], max_length: int | None = None, **kwargs: Any
    ) -> QueritProcessor:
        """Load the tokenizer of a folder or repository; `kwargs` go to `AutoTokenizer` (`revision`, `token`, ...)."""
        with explain_tokenizer_errors(name_or_path):
            # AutoTokenizer needs only the model_type of the config, but would first ask to trust its code.
            config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path, **kwargs)
            config = SimpleNamespace(
                model_type=config_dict.get("model_type"), tokenizer_class=config_dict.get("tokenizer_class")
            )
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, config=config, trust_remote_code=False, **kwargs)
            processor = cls(tokenizer, max_length)
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
        token, largest = max(self._backend.get_vocab().items(), key=lambda item: item[1])
        if largest >= vocabulary_size:
            raise ValueError(
                f"{name}: the tokenizer gives {one_line(token, 40)!r} the id {largest}, but the model has "
                f"{vocabulary_size} embeddings: use the tokenizer of these weights."
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer as other runtimes need it: `[CLS]`, left padding, chat template, no added tokens."""
        self._check_same_tokens()
        self.portable_tokenizer().save_pretrained(save_directory)

    def portable_tokenizer(self) -> PreTrainedTokenizerFast:
        """Copy the tokenizer into the generic class that every runtime loads alike."""
        backend = copy_backend(self._backend)
        # Some runtimes tokenize the rendered text with special tokens, which would put a <bos> in front.
        backend.post_processor = NoSpecialTokens([])
        # The class would copy it once more, which takes seconds for a large vocabulary.
        backend.__deepcopy__ = lambda memo: backend  # type: ignore[attr-defined]
        portable = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            cls_token=CLS_TOKEN,
            padding_side="left",
            truncation_side="right",
            model_max_length=self.max_length,
            chat_template=CHAT_TEMPLATE,
            clean_up_tokenization_spaces=False,
            **{"pad_token": self._special_tokens.get("eos_token", CLS_TOKEN)} | self._special_tokens,
        )
        del backend.__deepcopy__  # type: ignore[attr-defined]
        return portable

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
        """Tokenize pairs of a query and a document, each to at most `max_length` ids.

        Args:
            queries: The query of each pair.
            documents: The document of each pair: a string or `{"title", "text"}`.
            instruction: One instruction for all pairs, or one for each; the default instruction if None.
            max_length: Maximum number of tokens in a pair; by default the processor's own.

        Returns:
            The encoded pairs, in order.

        Raises:
            TypeError: if a query, document or instruction is not text.
            ValueError: if the counts differ, or an instruction leaves no room for `[CLS]` within `max_length`.
        """
        if isinstance(queries, str) or isinstance(documents, str | dict):
            raise TypeError("queries and documents are lists: put a single one in brackets.")
        self._check_same_tokens()
        limit = (check_count("max_length", max_length) or self.max_length) - 1
        instructions = (
            [instruction] * len(queries) if instruction is None or isinstance(instruction, str) else instruction
        )
        if not len(queries) == len(documents) == len(instructions):
            raise ValueError(
                f"{len(queries)} queries, {len(documents)} documents and {len(instructions)} instructions: "
                "give the same number of each."
            )
        prompts = [
            _Prompt(
                _clean(DEFAULT_INSTRUCTION if pair_instruction is None else pair_instruction, "instruction"),
                _clean(query, "query"),
                document_text(document),
            )
            for pair_instruction, query, document in zip(instructions, queries, documents, strict=True)
        ]
        if not prompts:
            return []
        is_short = [len(prompt.text) <= 2 * first_size(limit) for prompt in prompts]
        texts = [prompt.text for prompt, short in zip(prompts, is_short, strict=True) if short]
        encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        encoded = []
        for prompt, short in zip(prompts, is_short, strict=True):
            ids = next(encodings).ids if short else None
            fits = ids is not None and len(ids) <= limit
            encoded.append(EncodedPair([*(ids or []), self.cls_token_id]) if fits else self._cut(prompt, limit))
        return encoded

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
        pad_id = self._backend.token_to_id(self._special_tokens.get("pad_token", CLS_TOKEN)) or 0
        batch = {
            "input_ids": [[pad_id] * (width - len(ids)) + list(ids) for ids in input_ids],
            "attention_mask": [[0] * (width - len(ids)) + [1] * len(ids) for ids in input_ids],
        }
        return BatchEncoding(batch, tensor_type=return_tensors)

    def _cut(self, prompt: _Prompt, limit: int) -> EncodedPair:
        """Cut a prompt to `limit` tokens: first the end of the document, then the end of the query."""
        ids, offsets = self._head(prompt.text, limit)
        if len(ids) <= limit:
            return EncodedPair([*ids, self.cls_token_id])
        fixed = sum(start < prompt.content_start for start, _ in offsets)
        if fixed <= limit:
            return EncodedPair([*ids[:limit], self.cls_token_id], cut_content=len(ids) - limit)
        # Counted by their ends: the first word of the content often shares its token with the space before it.
        cut_content = sum(end > prompt.content_start for _, end in offsets)
        if prompt.content_start < len(prompt.text):
            cut_content = max(cut_content, 1)
        # Tokenized separately: a query's last token may reach over its end (`?;`, `);`), and would include the `;`.
        ids, offsets = self._head(prompt.text[: prompt.query_end], limit)
        after = self._backend.encode(prompt.text[prompt.query_end : prompt.content_start], add_special_tokens=False).ids
        before = sum(start < prompt.query_start for start, _ in offsets)
        room = limit - before - len(after)
        if room < 0:
            raise ValueError(
                f"The instruction takes {before} tokens and the words after the query {len(after)}: more than "
                f"max_length = {limit + 1} has room for; shorten the instruction or raise max_length."
            )
        start = ids[: before + room]
        return EncodedPair([*start, *after, self.cls_token_id], cut_content, cut_query=len(ids) - len(start))

    def _head(self, text: str, limit: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize a text, or so much of it that its first `limit` tokens are certain: ids and character offsets."""
        encoding = first_tokens(self._backend, text, limit, self._reach)
        return encoding.ids, encoding.offsets


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


class _Prompt:
    """The text of a pair, and the character offsets of its parts."""

    def __init__(self, instruction: str, query: str, content: str):
        before, after = f"{instruction} Query:", "; Content: "
        # The space before the query counts as part of it: tokenizers join it to the first word.
        self.query_start = len(before)
        self.query_end = len(before) + 1 + len(query)
        self.content_start = self.query_end + len(after)
        self.text = f"{before} {query}{after}{content}"


def document_text(document: Document) -> str:
    """Join title and text of a document by a space, as mteb does.

    Args:
        document: A string, or `{"title", "text"}`; an empty or missing title adds nothing.

    Returns:
        The text without white space at its ends, as mteb strips it; lone surrogates are U+FFFD.

    Raises:
        TypeError: if the document has no text, or its title is not a string.

    Example:
        ```python
        >>> document_text({"title": "Faust", "text": "A tragedy by Goethe."})
        'Faust A tragedy by Goethe.'
        ```
    """
    if isinstance(document, str):
        return _clean(document, "document").strip()
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise TypeError(f"A document is a string or a dict with a 'text', not {describe(document)}.")
    title, text = document.get("title"), _clean(document["text"], "document")
    return (text if title is None or title == "" else f"{_clean(title, 'title')} {text}").strip()


def _clean(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"A {what} is a string, not {describe(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        # Surrogates cannot be encoded as UTF-8: pairs become their character, lone ones U+FFFD.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def check_count(name: str, value: Any) -> int | None:
    """Check an optional number that a user gives.

    Args:
        name: Name of the argument.
        value: Integer of at least 1, of Python, numpy or torch; or None.

    Returns:
        The same as an int, or None.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below 1.
    """
    if value is None:
        return None
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name} is {describe(value)}: give an integer of at least 1.")
    if count < 1:
        raise ValueError(f"{name} is {count}: give an integer of at least 1.")
    return count


def describe(value: Any) -> str:
    """Type and beginning of a value that a user gave, for error messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
