"""Stage 4: teachers, which say how relevant a document is to a query, each on a scale of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from inspect import signature
from itertools import groupby
from typing import Any, Protocol

import torch
from pydantic import PositiveInt, validate_call

from ..checkpoints.loading import load_model
from ..checkpoints.streaming import dtype_named
from .corpus import Document
from .endpoint import Endpoint, Malformed, Refused
from .shards import key_of
from .weights import device, identity_of, without_special

Pair = tuple[str, Document]

_YES_NO_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Teacher(Protocol):
    """What scores pairs of a query and a document.

    Attributes:
        identity: Values of JSON that decide its scores: weights, prompts, lengths. Scores are kept under it.
        batch_size: Pairs a call of `score` gets.
    """

    identity: Any
    batch_size: int

    def score(self, pairs: Sequence[Pair]) -> Sequence[float | None]:
        """A score for each pair, on any scale; None for one that could not be scored."""


class CrossEncoderTeacher:
    """A reranker: one of ours, or any that sentence-transformers' `CrossEncoder` loads.

    Args:
        model: Folder or repository, or `mini`.
        max_length: Tokens a pair may have; the model's own limit by default.
        instruction: The task in one sentence, for ours; the model's own by default.
        library: `querit` or `sentence-transformers`.
        dtype: Of its weights: `auto` (that of the checkpoint), `float32`, `bfloat16` or `float16`.
        batch_size: Pairs scored, and written down, at once.
    """

    @validate_call
    def __init__(
        self,
        model: str = "mini",
        *,
        max_length: PositiveInt | None = None,
        instruction: str | None = None,
        library: str = "querit",
        dtype: str = "auto",
        batch_size: PositiveInt = 256,
    ):
        dtype_named(dtype)
        if library not in ("querit", "sentence-transformers"):
            raise ValueError(f"library is {library!r}: choose querit or sentence-transformers.")
        if instruction is not None and library != "querit":
            raise ValueError("instruction is for rerankers of library querit: leave it out.")
        self.name, self.library, self.dtype = model, library, dtype
        self.max_length, self.instruction, self.batch_size = max_length, instruction, batch_size

    @cached_property
    def identity(self) -> Any:
        """Of the weights and of what they read."""
        settings = [self.dtype, self.max_length, self.instruction]
        return ["cross-encoder", self.library, identity_of(self.name), *settings]

    @cached_property
    def _model(self) -> Any:
        if self.library == "querit":
            return load_model(self.name, self.dtype).to(device())
        from sentence_transformers import CrossEncoder

        return CrossEncoder(self.name, max_length=self.max_length, model_kwargs={"dtype": self.dtype})

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """Relevance scores of ours, in [-1, 1]; of others, what their `predict` gives."""
        if self.library == "querit":
            options = {"max_length": self.max_length, "instruction": self.instruction, "show_progress_bar": False}
            return self._model.predict([(query, document) for query, document in pairs], **options).tolist()
        texts = [(query, text_of(document)) for query, document in pairs]
        return [float(score) for score in self._model.predict(texts, show_progress_bar=False)]


class CausalLMTeacher:
    """A causal language model, asked whether the document answers the query: the logit of yes less that of no.

    The prompt is that of Qwen3-Reranker by default.

    Args:
        model: Folder or repository.
        prompt: With `{instruction}`, `{query}` and `{document}`; the next token is the answer.
        instruction: The task in one sentence.
        yes, no: The answers, a token each.
        max_length: Tokens of a prompt; documents are cut to it.
        batch_size: Pairs scored, and written down, at once.
    """

    @validate_call
    def __init__(
        self,
        model: str,
        *,
        prompt: str = _YES_NO_PROMPT,
        instruction: str = _INSTRUCTION,
        yes: str = "yes",
        no: str = "no",
        max_length: PositiveInt = 1024,
        batch_size: PositiveInt = 16,
    ):
        for field in ("{query}", "{document}"):
            if field not in prompt:
                raise ValueError(f"prompt has no {field}: it is where the {field[1:-1]} goes.")
        self.name, self.prompt, self.instruction = model, prompt, instruction
        self.answers, self.max_length, self.batch_size = (yes, no), max_length, batch_size

    @cached_property
    def identity(self) -> Any:
        """Of the weights and of what they read."""
        return ["causal-lm", identity_of(self.name), self.prompt, self.instruction, self.answers, self.max_length]

    @cached_property
    def _loaded(self) -> tuple[Any, Any, list[int]]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(self.name, dtype="auto").to(device()).eval()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        answers = [tokenizer.encode(answer, add_special_tokens=False) for answer in self.answers]
        for answer, tokens in zip(self.answers, answers, strict=True):
            if len(tokens) != 1:
                raise ValueError(f"{answer!r} is {len(tokens)} tokens of {self.name}: name an answer of one.")
        return model, tokenizer, [tokens[0] for tokens in answers]

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """Logit differences."""
        model, tokenizer, (yes, no) = self._loaded
        prompts = [self._tokens(query, text_of(document)) for query, document in pairs]
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
        if "position_ids" in signature(model.forward).parameters:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return (logits[:, yes] - logits[:, no]).tolist()

    def _tokens(self, query: str, document: str) -> list[int]:
        """The prompt, its document cut so that what comes after it stays."""
        _, tokenizer, _ = self._loaded
        query, document = (without_special(text, tokenizer) for text in (query, document))
        before, after = self.prompt.split("{document}", 1)
        filled = [part.replace("{instruction}", self.instruction).replace("{query}", query) for part in (before, after)]
        # What it begins texts with, if anything: [BOS], or [BOS, EOS] of nothing.
        start = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
        head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in filled)
        room = max(0, self.max_length - len(start) - len(head) - len(tail))
        ends = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(ends) > room:
            document = document[: ends[room - 1][1]] if room else ""
        # As one text: words must not be cut where the document begins.
        return start + tokenizer.encode(filled[0] + document + filled[1], add_special_tokens=False)


class FirstStageTeacher:
    """What found the candidates, BM25 or an encoder, as a teacher.

    Args:
        stage: With `identity` and `scores(query, document ids)`.
        batch_size: Pairs written down at once.
    """

    @validate_call
    def __init__(self, stage: Any, batch_size: PositiveInt = 2048):
        self.stage, self.batch_size = stage, batch_size

    @property
    def identity(self) -> Any:
        """That of the first stage: its documents, which BM25 weighs terms by, and its model."""
        return ["first-stage", self.stage.identity]

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """BM25 scores or cosines."""
        found: list[float] = []
        for query, group in groupby(pairs, key=lambda pair: pair[0]):
            found += self.stage.scores(query, [document["_id"] for _, document in group])
        return found


class EndpointTeacher:
    """A server with a `/rerank` route, as vLLM, Infinity, Jina and Cohere have it.

    Args:
        url: Up to the route, `http://host:8000/v1`.
        model: The name it goes by there.
        version: Changed by you when the server has got other weights under the same name: scores are kept under it.
        batch_size: Pairs written down at once.
        max_chars: Of a document; the rest is not sent.
        extra_body: What else goes with each request, such as `{"truncate_prompt_tokens": 8192}`.
        **options: Those of `Endpoint`.
    """

    @validate_call
    def __init__(
        self,
        url: str,
        model: str,
        *,
        version: str = "1",
        batch_size: PositiveInt = 256,
        max_chars: PositiveInt = 20_000,
        extra_body: dict[str, Any] | None = None,
        **options: Any,
    ):
        self.settings, self.batch_size, self.max_chars = {"model": model, **(extra_body or {})}, batch_size, max_chars
        self.endpoint = Endpoint(f"{url.rstrip('/')}/rerank", **options)
        # Which machine answers does not matter, what answers does.
        self.identity = ["endpoint", self.settings, version, max_chars]

    def score(self, pairs: Sequence[Pair]) -> list[float | None]:
        """The server's scores; None for the pairs of a query that was refused, or malformed to the last attempt."""
        queries = [(query, [pair for _, pair in group]) for query, group in groupby(pairs, key=lambda pair: pair[0])]
        return [score for scores in self.endpoint.map(self._scores_of, queries) for score in scores]

    def _scores_of(self, asked: tuple[str, list[Document]]) -> list[float | None]:
        query, documents = asked
        texts = [text_of(document)[: self.max_chars] for document in documents]
        payload = {**self.settings, "query": query, "documents": texts, "top_n": len(texts)}
        try:
            return self.endpoint.ask(payload, lambda answer: _in_order(answer["results"], len(texts)))
        except (Malformed, Refused):
            return [None] * len(texts)


def _in_order(results: Sequence[Mapping[str, Any]], count: int) -> list[float]:
    """Scores in the order of documents, from results in the order of scores."""
    scores = {result["index"]: result["relevance_score"] for result in results}
    if len(results) != count or scores.keys() != set(range(count)):
        raise Malformed(f"{count} documents were sent, and {len(results)} scores came back.")
    for score in scores.values():
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise Malformed(f"A score is {score!r}.")
    return [float(scores[index]) for index in range(count)]


def text_of(document: Mapping[str, str]) -> str:
    """Title and text, for models that know of one text."""
    return f"{document.get('title') or ''} {document['text']}".strip()


def pair_key(teacher: Teacher, pair: Pair) -> bytes:
    """Under which the score of a pair is kept: another prompt, model or text is another key."""
    query, document = pair
    return key_of(teacher.identity, query, document.get("title") or "", document["text"])
