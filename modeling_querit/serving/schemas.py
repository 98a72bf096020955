"""What requests and answers look like: the shapes of Jina, Cohere, vLLM and Text Embeddings Inference (TEI)."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..pair_encoding_querit import Document


def _check_document(document: Any) -> Document:
    is_object = isinstance(document, dict) and isinstance(document.get("text"), str)
    if isinstance(document, str) or (is_object and isinstance(document.get("title"), str | None)):
        return document
    raise PydanticCustomError("document", "a document is a text, or an object with a 'text' and perhaps a 'title'")


_OBJECT_SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "title": {"type": "string"}},
    "required": ["text"],
}
AnyDocument = Annotated[
    Any,
    AfterValidator(_check_document),
    WithJsonSchema({"anyOf": [{"type": "string"}, _OBJECT_SCHEMA], "title": "Document"}),
]


class _Request(BaseModel):
    # A field whose name is mistyped would silently have no effect.
    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="Name of the served model; another one is refused.")
    instruction: str | None = Field(None, description="The task in one sentence, in place of the default instruction.")
    truncate_prompt_tokens: StrictInt | None = Field(
        None, ge=-1, description="Maximum number of tokens of a pair; -1 is the model's own."
    )
    truncate: StrictBool = Field(True, description="Whether pairs that are too long are cut; else they are refused.")
    user: str | None = Field(None, description="Ignored.")
    priority: StrictInt | None = Field(None, description="Ignored.")

    @property
    def max_length(self) -> int | None:
        """Maximum number of tokens of a pair, if the request names one."""
        return None if self.truncate_prompt_tokens in (None, -1) else self.truncate_prompt_tokens


class RerankRequest(_Request):
    """A query, and documents to put in order: `documents` as Jina, Cohere and vLLM name them, `texts` as TEI does."""

    query: str = Field(description="The query.")
    documents: list[AnyDocument] | None = Field(
        None, min_length=1, description="Texts, or objects with a 'text' and perhaps a 'title', which come back whole."
    )
    texts: list[AnyDocument] | None = Field(None, min_length=1, description="The documents, for an answer as TEI's.")
    top_n: StrictInt | None = Field(None, ge=1, description="Number of documents to return; all by default.")
    return_documents: StrictBool | None = Field(
        None, description="Whether results hold their documents; by default they do, except at /v2/rerank."
    )
    return_text: StrictBool = Field(False, description="The same for `texts`.")
    raw_scores: StrictBool = Field(False, description="Not supported: true is refused.")
    max_tokens_per_doc: StrictInt | None = Field(
        None, ge=1, description="Not supported: a number below the model's maximum length is refused."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.documents is None) == (self.texts is None):
            raise PydanticCustomError("documents", "give the documents as 'documents' or as 'texts'")
        if self.raw_scores:
            raise PydanticCustomError("raw_scores", "raw_scores is not supported: scores are p1 - p0, from -1 to 1")
        return self


class ScoreRequest(_Request):
    """Pairs to score, as vLLM names them: one text with many, or as many queries as documents."""

    text_1: str | list[str] | None = Field(None, description="The query, or one for each document.")
    text_2: AnyDocument | list[AnyDocument] | None = Field(None, description="The document, or several.")
    queries: str | list[str] | None = Field(None, description="Another name of text_1.")
    documents: AnyDocument | list[AnyDocument] | None = Field(None, description="Another name of text_2.")

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        given = (
            {name for name in ("text_1", "text_2", "queries", "documents") if values.get(name) is not None}
            if (isinstance(values, dict))
            else {"text_1", "text_2"}
        )
        if given not in ({"text_1", "text_2"}, {"queries", "documents"}):
            raise PydanticCustomError("names", "give 'text_1' and 'text_2', or 'queries' and 'documents'")
        return values

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        queries, documents = self._sides()
        if not queries or not documents:
            raise PydanticCustomError("empty", "there are no pairs: give at least one text on either side")
        if len(queries) not in (1, len(documents)):
            counts = f"{len(queries)} queries and {len(documents)} documents"
            raise PydanticCustomError("counts", f"{counts} make no pairs: give one query, or one for each document")
        return self

    def _sides(self) -> tuple[list[str], list[Document]]:
        queries = self.queries if self.text_1 is None else self.text_1
        documents: Any = self.documents if self.text_2 is None else self.text_2
        return (
            [queries] if isinstance(queries, str) else list(queries or []),
            documents if isinstance(documents, list) else [documents],
        )

    def pairs(self) -> list[tuple[str, Document]]:
        """The (query, document) pairs."""
        queries, documents = self._sides()
        return list(zip(queries * len(documents) if len(queries) == 1 else queries, documents, strict=True))


class RerankResult(BaseModel):
    """One document of a ranking; `relevance_score` is p1 - p0, in [-1, 1]."""

    index: int
    relevance_score: float
    document: dict[str, Any] | None = None


class Usage(BaseModel):
    """Number of tokens that a request came to, `[CLS]` and instruction included."""

    prompt_tokens: int
    total_tokens: int


class RerankResponse(BaseModel):
    """Documents, best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Usage


class TextResult(BaseModel):
    """One document of a ranking as TEI gives it."""

    index: int
    score: float
    text: str | None = None


class PairScore(BaseModel):
    """The score of one pair, in [-1, 1]."""

    index: int
    object: str = "score"
    score: float


class ScoreResponse(BaseModel):
    """Scores of pairs, in the order in which they were given."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[PairScore]
    usage: Usage


class ErrorDetail(BaseModel):
    """What was wrong, in one sentence."""

    message: str
    type: str
    code: int


class ErrorResponse(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail
