"""Generators, which write queries: language models on this machine or behind a server.

To add one, write a class with the members of `Generator` here or in a file of its own, and list it in `GENERATORS`;
options of the YAML file become keyword arguments of its constructor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, validate_call

from ..cache import key_of
from ..checkpoints.identity import identity_of
from ..checkpoints.loading import default_device
from .corpus import CacheIdentity, tidy, truncate
from .endpoint import Endpoint, Malformed, Refused
from .extractive import ExtractiveGenerator
from .prompts import INSTRUCTION, QueryRequest, completion_of, messages_of, without_special_tokens
from .settings import ENDPOINT, EXTRACTIVE, construct

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Generator(Protocol):
    """Writes queries.

    A generator that asks a server has it as `endpoint`, whose retries are reported.

    Attributes:
        identity: JSON values that decide what it writes: weights, prompts, settings. Queries are cached under them.
        batch_size: Maximum number of requests per call of `generate`.
    """

    batch_size: int

    @property
    def identity(self) -> CacheIdentity:
        """JSON values that decide the results."""

    def generate(self, requests: Sequence[QueryRequest]) -> Sequence[str | None]:
        """Write a query for each request.

        Returns:
            Texts; an empty one where the model gave no usable answer, and None where it may give one in another run.
        """


class TransformersGenerator:
    """A causal language model, by `transformers.generate`.

    Models with a chat template get an instruction; others continue a few-shot prompt.

    Args:
        model: Folder or repository.
        template: Instruction for models with a chat template; see `prompts.INSTRUCTION`.
        shots: (document text, query) pairs of any collection, for models without a chat template.
        max_chars: Characters of a document that the model sees.
        max_new_tokens: Maximum number of tokens per query.
        temperature: Sampling temperature; 0 for greedy decoding.
        top_p: Probability mass of the tokens that are sampled from, in (0, 1].
        batch_size: Requests of a forward pass.
        seed: Seed of the sampling, which depends on the seed and the batch alone.
    """

    @validate_call
    def __init__(
        self,
        model: str,
        *,
        template: str = INSTRUCTION,
        shots: Sequence[Sequence[str]] = (),
        max_chars: PositiveInt = 2000,
        max_new_tokens: PositiveInt = 64,
        temperature: NonNegativeFloat = 0.7,
        top_p: float = 0.95,
        batch_size: PositiveInt = 16,
        seed: NonNegativeInt = 0,
    ):
        self.name, self.template, self.max_chars, self.batch_size = model, template, max_chars, batch_size
        self.shots = [({"title": "", "text": text}, query) for text, query in shots]
        self.seed = seed
        self.generate_options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.generate_options |= {"temperature": temperature, "top_p": top_p}

    @cached_property
    def identity(self) -> CacheIdentity:
        """Weights, prompt and sampling; the batch size too, since padding and sampling depend on it."""
        prompt = [self.template, self.shots, self.max_chars]
        return ["transformers", identity_of(self.name), prompt, self.generate_options, self.batch_size, self.seed]

    @cached_property
    def _model_and_tokenizer(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.name, padding_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(self.name, dtype="auto").to(default_device()).eval(), tokenizer  # type: ignore[arg-type]

    @torch.inference_mode()
    def generate(self, requests: Sequence[QueryRequest]) -> list[str]:
        """Return the first line of the model's answer to each request; empty where the answer is cut off within it."""
        model, tokenizer = self._model_and_tokenizer
        prompts = [self.prompt_of(request) for request in requests]
        is_chat = tokenizer.chat_template is not None
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=not is_chat).to(model.device)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int.from_bytes(key_of(self.seed, prompts)[:7]))
            # A base model does not know when to stop, and one line is all that is needed.
            stop = {} if is_chat else {"stop_strings": ["\n"], "tokenizer": tokenizer}
            output = model.generate(  # type: ignore[operator]
                **inputs, **self.generate_options, **stop, pad_token_id=tokenizer.pad_token_id
            )
        answers = output[:, inputs["input_ids"].shape[1] :]  # (requests, new tokens)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        # An answer whose last token does not end it was cut off by max_new_tokens.
        end_tokens = torch.tensor([tokenizer.pad_token_id, *_end_tokens(model)], device=answers.device)
        is_complete = torch.isin(answers[:, -1], end_tokens).tolist()  # (requests,)
        return [
            first_line(text) if complete or not (_is_one_line(text) and text[-1:] != "\n") else ""
            for text, complete in zip(texts, is_complete, strict=True)
        ]

    def prompt_of(self, request: QueryRequest) -> str:
        """Return the text that the model continues."""
        _, tokenizer = self._model_and_tokenizer
        request = _truncated(request, self.max_chars)
        # The name of a special token in a document would be tokenized as that token.
        document = {name: without_special_tokens(text, tokenizer) for name, text in request.document.items()}
        request = replace(request, document=document)
        if tokenizer.chat_template is None:
            return completion_of(request, self.shots)
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        return str(tokenizer.apply_chat_template(messages_of(request, self.template), **options))


def _end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids of the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class EndpointGenerator:
    """A language model behind an OpenAI-compatible server, such as vLLM: its route `/chat/completions`.

    Args:
        url: Base URL, such as `http://host:8000/v1`.
        model: Name of the model on the server.
        template: Instruction; see `prompts.INSTRUCTION`.
        version: A word to change when the server has other weights under the same name: queries are cached under it.
        max_chars: Characters of a document that are sent.
        max_tokens: Maximum number of tokens per query.
        temperature: Sampling temperature; 0 for greedy decoding.
        seed: Seed from which the seed of each request is derived.
        batch_size: Requests whose queries are written to the cache together.
        extra_body: Further fields of each request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`.
        **options: Options of `Endpoint`.
    """

    @validate_call
    def __init__(
        self,
        url: str,
        model: str,
        *,
        template: str = INSTRUCTION,
        version: str = "1",
        max_chars: PositiveInt = 8000,
        max_tokens: PositiveInt = 96,
        temperature: NonNegativeFloat = 0.7,
        seed: NonNegativeInt = 0,
        batch_size: PositiveInt = 64,
        extra_body: dict[str, Any] | None = None,
        **options: Any,
    ):
        self.template, self.max_chars, self.batch_size, self.seed = template, max_chars, batch_size, seed
        self.payload = {"model": model, "max_tokens": max_tokens, "temperature": temperature} | (extra_body or {})
        self.endpoint = Endpoint(f"{url.rstrip('/')}/chat/completions", **options)
        self.identity: CacheIdentity = ["endpoint", self.payload, version, template, max_chars, seed]

    def generate(self, requests: Sequence[QueryRequest]) -> list[str | None]:
        """Return the first line of each answer; None where the server refused, or its last answer was malformed."""
        return self.endpoint.map(self._generate_one, requests)

    def _generate_one(self, request: QueryRequest) -> str | None:
        messages = messages_of(_truncated(request, self.max_chars), self.template)
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{messages}".encode("utf-8", "surrogatepass")).digest()[:4])
        try:
            return self.endpoint.post(self.payload | {"messages": messages, "seed": seed}, _content)
        except (Malformed, Refused):
            return None


# Type in the settings -> class. The extractive generator is listed for its name: it needs the collection.
GENERATORS: dict[str, Callable[..., Generator]] = {
    EXTRACTIVE: ExtractiveGenerator,
    "transformers": TransformersGenerator,
    ENDPOINT: EndpointGenerator,
}


def make_generators(settings: Mapping[str, Mapping[str, Any]], extractive: ExtractiveGenerator) -> dict[str, Generator]:
    """Make generators from the section `queries.generators`.

    Args:
        settings: Name -> options, with the `type` among them if it is not the name.
        extractive: The extractive generator of the collection, for entries of that type.

    Raises:
        ValueError: if a type or an option is unknown, or an option is out of its range; the message names it.
    """
    generators: dict[str, Generator] = {}
    for name, section in settings.items():
        options, where = dict(section), f"queries.generators.{name}"
        kind = options.pop("type", name)
        if kind != EXTRACTIVE:
            generators[name] = construct(GENERATORS, kind, options, where)
        elif options:
            raise ValueError(f"{where}: {EXTRACTIVE} has no option {next(iter(options))!r}: leave it out.")
        else:
            generators[name] = extractive
    return generators


def _content(answer: Any) -> str:
    """Return the query in an answer of `/chat/completions`."""
    choice = answer["choices"][0]
    content = choice["message"]["content"]
    if not isinstance(content, str):
        raise Malformed(f"The content of the answer is {content!r}, not a string.")
    return "" if choice.get("finish_reason") == "length" and _is_one_line(content) else first_line(content)


def _is_one_line(text: str) -> bool:
    """Whether an answer that was cut off ends within its first line."""
    return "\n" not in text.strip()


def first_line(text: str) -> str:
    """Return the first line of an answer that is not blank, without quotes, list marker or field name around it.

    Example:
        ```python
        >>> first_line('\\n**Question:** "Who wrote Faust?"\\nI hope this helps!')
        'Who wrote Faust?'
        ```
    """
    # Reasoning is not part of the answer.
    text = text.rpartition("</think>")[2]
    if text.lstrip().startswith("<think>"):
        return ""
    line = next((line for line in text.splitlines() if line.strip(' \t*"-')), "")
    line = line.strip().lstrip("-*# ").strip()
    name, colon, rest = line.partition(":")
    if colon and name.strip("* ").lower() in ("question", "query", "search", "claim", "title", "keywords", "answer"):
        line = rest
    line = tidy(line.strip(" *`"))
    quotes = '"\u201c\u201d\u201e\u00ab\u00bb'
    return line.strip(quotes).strip() if line[:1] in quotes and line[-1:] in quotes else line


def _truncated(request: QueryRequest, max_chars: int) -> QueryRequest:
    return replace(request, document=truncate(request.document, max_chars))
