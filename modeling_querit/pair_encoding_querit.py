"""The text of a (query, document) pair, and its token ids: Querit's input format, which rerankers are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from .arguments_querit import describe
from .tokenizer_backend_querit import copy_backend, first_size, first_tokens, reach

DEFAULT_INSTRUCTION = "Judge whether the Content meets the requirements based on the Query."
CLS_TOKEN = "[CLS]"
# Maximum number of tokens in a pair for the published models, `[CLS]` included.
MAX_LENGTH = 4096

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


class PairEncoder:
    """Encodes pairs as the reference does (mteb's `QueritWrapper`), with a copy of a tokenizer that nothing changes.

    The text is `"{instruction} Query: {query}; Content: {document}"`, tokenized as one string without special
    tokens, followed by the id of `[CLS]`. Title and text of a document are joined by a space, and white space at its
    ends is dropped, whether it is a string or has a title. Where the reference is silent or wrong:

    - A pair over the limit loses the end of its document, then the end of its query, and never anything of the
      instruction, the words in between or `[CLS]`; the reference drops the first tokens too.
    - The name of a special token in a text (`[CLS]`, `<|im_end|>`) is text; the reference reads it as the token.
    - A lone surrogate, which is no character, becomes U+FFFD.

    Args:
        backend: Tokenizer of the tokenizers library with a `[CLS]` token; it is copied.

    Raises:
        ValueError: if the tokenizer has no `[CLS]`.

    Example:
        ```python
        >>> [pair] = PairEncoder(tokenizer.backend_tokenizer).encode(["who wrote Faust"], ["Goethe, in 1831."])
        >>> tokenizer.decode(pair.input_ids[-1])
        '[CLS]'
        ```
    """

    def __init__(self, backend: Tokenizer):
        cls_token_id = backend.token_to_id(CLS_TOKEN)
        if cls_token_id is None:
            raise ValueError(
                f"The tokenizer has no {CLS_TOKEN} token, where the model reads its score; "
                "modeling_querit.from_backbone adds one to a plain decoder."
            )
        self.cls_token_id: int = cls_token_id
        self.backend = copy_backend(backend)
        # Names of special tokens in a text are text.
        self.backend.encode_special_tokens = True
        self._lookahead = reach(self.backend)

    def encode(
        self,
        queries: Sequence[str],
        documents: Sequence[Document],
        instruction: str | Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> list[EncodedPair]:
        """Tokenize pairs of a query and a document.

        Args:
            queries: The query of each pair.
            documents: The document of each pair: a string or `{"title", "text"}`.
            instruction: One instruction for all pairs, or one for each; the default instruction if None.
            max_length: Maximum number of tokens in a pair, `[CLS]` included; None for no limit.

        Returns:
            The encoded pairs, in order.

        Raises:
            TypeError: if a query, document or instruction is not text.
            ValueError: if the counts differ, an instruction leaves no room for `[CLS]` within `max_length`, or the
                tokenizer is set to cut words at random.
        """
        # Of the model, which all copies of a tokenizer share.
        if getattr(self.backend.model, "dropout", None):
            raise ValueError(
                "The tokenizer cuts words at random (BPE dropout), and so would scores be: set "
                "tokenizer.backend_tokenizer.model.dropout = None."
            )
        if isinstance(queries, str) or isinstance(documents, str | dict):
            raise TypeError("queries and documents are lists: put a single one in brackets.")
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
        if max_length is None:
            encodings = self.backend.encode_batch_fast([prompt.text for prompt in prompts], add_special_tokens=False)
            return [EncodedPair([*encoding.ids, self.cls_token_id]) for encoding in encodings]
        return self._encode_within(prompts, max_length - 1)

    def _encode_within(self, prompts: Sequence[_Prompt], limit: int) -> list[EncodedPair]:
        """Tokenize prompts to at most `limit` tokens before `[CLS]`."""
        is_short = [len(prompt.text) <= 2 * first_size(limit) for prompt in prompts]
        texts = [prompt.text for prompt, short in zip(prompts, is_short, strict=True) if short]
        encodings = iter(self.backend.encode_batch_fast(texts, add_special_tokens=False))
        encoded = []
        for prompt, short in zip(prompts, is_short, strict=True):
            ids = next(encodings).ids if short else None
            fits = ids is not None and len(ids) <= limit
            encoded.append(EncodedPair([*(ids or []), self.cls_token_id]) if fits else self._cut(prompt, limit))
        return encoded

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
        after = self.backend.encode(prompt.text[prompt.query_end : prompt.content_start], add_special_tokens=False).ids
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
        encoding = first_tokens(self.backend, text, limit, self._lookahead)
        return encoding.ids, encoding.offsets


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
    return replace_surrogates(text)


def replace_surrogates(text: str) -> str:
    """Replace surrogates, which UTF-8 cannot encode: pairs by their character, lone ones by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
