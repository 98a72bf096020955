"""Teachers, which score how relevant a document is to a query, each on a scale of its own.

To add one, write a class with the members of `Teacher` here or in a file of its own, and list it in `TEACHERS`;
options of the YAML file become keyword arguments of its constructor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from pydantic import PositiveInt, validate_call

from ..cache import key_of
from ..checkpoints.identity import identity_of
from ..checkpoints.loading import default_device, load_model
from ..checkpoints.safetensors_io import parse_dtype
from ..pair_encoding_querit import document_text
from .candidates import FirstStage, is_first_stage, make_first_stage
from .corpus import CacheIdentity, CorpusDocument
from .endpoint import Endpoint, Malformed, Refused
from .prompts import without_special_tokens
from .settings import CROSS_ENCODER, ENDPOINT, FIRST_STAGE, CandidateSettings, TeacherSettings, construct

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..modeling_querit import QueritForSequenceRanking

# A query and a document.
TeacherPair = tuple[str, CorpusDocument]

# The prompt of Qwen3-Reranker.
_YES_NO_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Teacher(Protocol):
    """Scores pairs of a query and a document.

    A teacher that asks a server has it as `endpoint`, whose retries are reported.

    Attributes:
        identity: JSON values that decide its scores: weights, prompts, lengths. Scores are cached under them.
        batch_size: Maximum number of pairs per call of `score`.
    """

    batch_size: int

    @property
    def identity(self) -> CacheIdentity:
        """JSON values that decide the results."""

    def score(self, pairs: Sequence[TeacherPair]) -> Sequence[float | None]:
        """Score pairs, on any scale; None for a pair that could not be scored."""


class CrossEncoderTeacher:
    """A reranker: a Querit model, or any that sentence-transformers' `CrossEncoder` loads.

    Args:
        model: Folder or repository, or `mini`.
        max_length: Maximum number of tokens per pair; the model's own limit by default.
        instruction: Instruction for a Querit model; the model's own by default.
        library: Library that loads the model: `querit` or `sentence-transformers`.
        dtype: Data type of the weights: `auto` (that of the checkpoint), `float32`, `bfloat16` or `float16`.
        batch_size: Pairs whose scores are written to the cache together.
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
        parse_dtype(dtype)
        if library not in ("querit", "sentence-transformers"):
            raise ValueError(f"library is {library!r}: choose querit or sentence-transformers.")
        if instruction is not None and library != "querit":
            raise ValueError("instruction is for rerankers of library querit: leave it out.")
        self.name, self.library, self.dtype = model, library, dtype
        self.max_length, self.instruction, self.batch_size = max_length, instruction, batch_size

    @cached_property
    def identity(self) -> CacheIdentity:
        """Library, weights, and what decides the model's input."""
        settings = [self.dtype, self.max_length, self.instruction]
        return ["cross-encoder", self.library, identity_of(self.name), *settings]

    @cached_property
    def _querit_model(self) -> QueritForSequenceRanking:
        return load_model(self.name, self.dtype, device=default_device())

    @cached_property
    def _cross_encoder(self) -> CrossEncoder:
        from sentence_transformers import CrossEncoder

        return CrossEncoder(self.name, max_length=self.max_length, model_kwargs={"dtype": self.dtype})

    def score(self, pairs: Sequence[TeacherPair]) -> list[float]:
        """Return scores of a Querit model, in [-1, 1]; of another, the output of its `predict`."""
        if self.library == "querit":
            options: dict[str, Any] = {"max_length": self.max_length, "instruction": self.instruction}
            return self._querit_model.predict(list(pairs), show_progress_bar=False, **options).tolist()
        texts = [(query, document_text(document)) for query, document in pairs]
        return [float(score) for score in self._cross_encoder.predict(texts, show_progress_bar=False)]


class _YesNoModel(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    yes: int
    no: int


class CausalLMTeacher:
    """A causal language model asked whether the document answers the query: the logit of yes minus that of no.

    Args:
        model: Folder or repository.
        prompt: Prompt with `{instruction}`, `{query}` and `{document}`, after which the answer is the next token; that
            of Qwen3-Reranker by default.
        instruction: Task in one sentence.
        yes, no: Answers of one token each.
        max_length: Tokens of a prompt; longer documents are truncated.
        batch_size: Pairs of a forward pass.
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
                raise ValueError(f"prompt has no {field}: add it where the {field[1:-1]} goes.")
        self.name, self.prompt, self.instruction = model, prompt, instruction
        self.answers, self.max_length, self.batch_size = (yes, no), max_length, batch_size

    @cached_property
    def identity(self) -> CacheIdentity:
        """Weights, prompt and length."""
        return ["causal-lm", identity_of(self.name), self.prompt, self.instruction, self.answers, self.max_length]

    @cached_property
    def _loaded(self) -> _YesNoModel:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(self.name, dtype="auto").to(default_device()).eval()  # type: ignore[arg-type]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        answer_ids = [tokenizer.encode(answer, add_special_tokens=False) for answer in self.answers]
        for answer, ids in zip(self.answers, answer_ids, strict=True):
            if len(ids) != 1:
                raise ValueError(f"{answer!r} is {len(ids)} tokens of {self.name}: choose an answer of one token.")
        (yes,), (no,) = answer_ids
        return _YesNoModel(model, tokenizer, yes, no)

    @torch.inference_mode()
    def score(self, pairs: Sequence[TeacherPair]) -> list[float]:
        """Return logit differences."""
        model, tokenizer, yes, no = self._loaded
        input_ids = [self._encode(query, document_text(document)) for query, document in pairs]
        inputs = tokenizer.pad({"input_ids": input_ids}, return_tensors="pt").to(model.device)
        # With padding on the left, learned absolute positions have to start at the first token.
        if "position_ids" in signature(model.forward).parameters:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()  # (pairs, vocabulary)
        return (logits[:, yes] - logits[:, no]).tolist()

    def _encode(self, query: str, document: str) -> list[int]:
        """Tokenize the prompt, with the document truncated so that what follows it stays."""
        tokenizer = self._loaded.tokenizer
        query, document = (without_special_tokens(text, tokenizer) for text in (query, document))
        before, after = (
            part.replace("{instruction}", self.instruction).replace("{query}", query)
            for part in self.prompt.split("{document}", 1)
        )
        # The token that texts begin with, if any; an empty text may be [BOS, EOS].
        bos = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
        fixed = sum(len(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after))
        room = max(0, self.max_length - len(bos) - fixed)
        offsets = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) > room:
            document = document[: offsets[room - 1][1]] if room else ""
        # Encoded as one text, so that no token boundary is forced where the document begins or ends.
        return bos + tokenizer.encode(before + document + after, add_special_tokens=False)


class FirstStageTeacher:
    """A first stage as a teacher: BM25 or an encoder.

    Args:
        stage: First stage over the documents that are scored.
        batch_size: Pairs whose scores are written to the cache together.
    """

    @validate_call
    def __init__(self, stage: Any, batch_size: PositiveInt = 2048):
        self.stage: FirstStage = stage
        self.batch_size = batch_size

    @property
    def identity(self) -> CacheIdentity:
        """CacheIdentity of the first stage."""
        return ["first-stage", self.stage.identity]

    def score(self, pairs: Sequence[TeacherPair]) -> list[float]:
        """Return the BM25 scores or cosines."""
        scores: list[float] = []
        for query, group in groupby(pairs, key=lambda pair: pair[0]):
            scores += self.stage.scores(query, [document["_id"] for _, document in group])
        return scores


class EndpointTeacher:
    """A reranker behind a server with a route `/rerank`, such as vLLM, Infinity, Jina or Cohere.

    Args:
        url: Base URL, such as `http://host:8000/v1`.
        model: Name of the model on the server.
        version: A word to change when the server has other weights under the same name: scores are cached under it.
        batch_size: Pairs whose scores are written to the cache together.
        max_chars: Characters of a document that are sent.
        extra_body: Further fields of each request, such as `{"truncate_prompt_tokens": 8192}`.
        **options: Options of `Endpoint`.
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
        self.payload, self.batch_size, self.max_chars = {"model": model, **(extra_body or {})}, batch_size, max_chars
        self.endpoint = Endpoint(f"{url.rstrip('/')}/rerank", **options)
        # Not the URL: the same model on another machine gives the same scores.
        self.identity: CacheIdentity = ["endpoint", self.payload, version, max_chars]

    def score(self, pairs: Sequence[TeacherPair]) -> list[float | None]:
        """Return scores; None for the pairs of a query that the server refused, or whose last answer was malformed."""
        queries = [
            (query, [document for _, document in group]) for query, group in groupby(pairs, key=lambda pair: pair[0])
        ]
        return [score for scores in self.endpoint.map(self._score_documents, queries) for score in scores]

    def _score_documents(self, request: tuple[str, list[CorpusDocument]]) -> list[float | None]:
        query, documents = request
        texts = [document_text(document)[: self.max_chars] for document in documents]
        payload = {**self.payload, "query": query, "documents": texts, "top_n": len(texts)}
        try:
            return self.endpoint.post(payload, lambda answer: _scores_by_index(answer["results"], len(texts)))
        except (Malformed, Refused):
            return [None] * len(texts)


# Type in the settings -> class. First stages are listed for their name: they need the collection.
TEACHERS: dict[str, Callable[..., Teacher]] = {
    CROSS_ENCODER: CrossEncoderTeacher,
    "causal-lm": CausalLMTeacher,
    FIRST_STAGE: FirstStageTeacher,
    ENDPOINT: EndpointTeacher,
}


def make_teachers(
    settings: Mapping[str, TeacherSettings],
    candidates: CandidateSettings,
    first_stages: Mapping[str, FirstStage],
    documents: Mapping[str, CorpusDocument],
    cache: Path,
) -> dict[str, Teacher]:
    """Make teachers from the section `teachers`.

    Args:
        settings: The section.
        candidates: The section `candidates`, for first stages that are teachers only.
        first_stages: First stages by name; a teacher of that name is the same index.
        documents: Documents by id.
        cache: Folder in which embeddings are cached.

    Raises:
        ValueError: if a type or an option is unknown, or an option is out of its range; the message names it.
    """
    teachers: dict[str, Teacher] = {}
    for name, section in settings.items():
        kind, options = teacher_type(name, section, first_stages), dict(section.model_extra or {})
        if kind == FIRST_STAGE:
            model = options.pop("model", name)
            options["stage"] = first_stages.get(model) or make_first_stage(model, documents, candidates, cache)
        teachers[name] = construct(TEACHERS, kind, options, f"teachers.{name}")
    return teachers


def teacher_type(name: str, settings: TeacherSettings, first_stages: Sequence[str] | Mapping[str, FirstStage]) -> str:
    """Return the type of a teacher: its `type`, or else `first-stage` if its name is that of one, or else its name."""
    return settings.type or (FIRST_STAGE if name in first_stages or is_first_stage(name) else name)


def _scores_by_index(results: Sequence[Mapping[str, Any]], count: int) -> list[float | None]:
    """Sort scores into the order of the documents, from results in the order of the scores."""
    scores = {result["index"]: result["relevance_score"] for result in results}
    if len(results) != count or scores.keys() != set(range(count)):
        raise Malformed(f"The answer to {count} documents has {len(results)} scores.")
    for score in scores.values():
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise Malformed(f"A score is {score!r}, not a finite number.")
    return [float(scores[index]) for index in range(count)]


def pair_key(teacher: Teacher, pair: TeacherPair) -> bytes:
    """Cache key of a pair's score: that of another prompt, model or text differs."""
    query, document = pair
    return key_of(teacher.identity, query, document.get("title") or "", document["text"])
