"""Writers of queries: language models at hand, and language models behind a server."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, validate_call

from .corpus import cut, tidy
from .endpoint import Endpoint, Malformed, Refused
from .prompts import INSTRUCTION, Request, completion_of, messages_of
from .shards import key_of
from .weights import device, identity_of, without_special


class Generator(Protocol):
    """What writes queries.

    Attributes:
        identity: Values of JSON that decide what it writes. Queries are kept under it.
        batch_size: Requests a call of `generate` gets.
    """

    identity: Any
    batch_size: int

    def generate(self, requests: Sequence[Request]) -> Sequence[str | None]:
        """A query for each request; None where none came."""


class TransformersGenerator:
    """A causal language model through `transformers.generate`.

    Models with a chat template are asked; others continue a text, for which `shots` are worth having.

    Args:
        model: Folder or repository.
        template: The instruction, for chat templates; see `prompts.INSTRUCTION`.
        shots: (document text, query) pairs of any collection, for models without a chat template.
        max_chars: Of a document; the rest is not shown.
        max_new_tokens: Of a query.
        temperature: 0 for the likeliest query; above, queries are drawn.
        top_p: Share of the likeliest tokens that are drawn from.
        batch_size: Requests at once.
        seed: Of the draws, which depend on seed and batch alone.
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
        self.settings = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.settings |= {"temperature": temperature, "top_p": top_p}

    @cached_property
    def identity(self) -> Any:
        """Of the weights, of what they read, and of how queries are drawn."""
        prompt = [self.template, self.shots, self.max_chars]
        return ["transformers", identity_of(self.name), prompt, self.settings, self.batch_size, self.seed]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.name, padding_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(self.name, dtype="auto").to(device()).eval(), tokenizer

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[str]:
        """The first line of what the model writes for each request."""
        model, tokenizer = self._loaded
        prompts = [self._prompt(request) for request in requests]
        is_chat = tokenizer.chat_template is not None
        inputs = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=not is_chat).to(model.device)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int.from_bytes(key_of(self.seed, prompts)[:7]))
            # A line is all that is wanted, and a model without a chat template does not know when to stop.
            stop = {} if is_chat else {"stop_strings": ["\n"], "tokenizer": tokenizer}
            written = model.generate(**inputs, **self.settings, **stop, pad_token_id=tokenizer.pad_token_id)
        written = written[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        # Nothing after it: it was cut off where its tokens ended, unless its end is a token of its own.
        ends = torch.tensor([tokenizer.pad_token_id, *_ends_of(model)], device=written.device)
        has_ended = torch.isin(written[:, -1], ends).tolist()
        return [
            first_line(text) if ended or not (_is_one_line(text) and text[-1:] != "\n") else ""
            for text, ended in zip(texts, has_ended, strict=True)
        ]

    def _prompt(self, request: Request) -> str:
        _, tokenizer = self._loaded
        request = _shortened(request, self.max_chars)
        # What looks like the end of a turn in a document is no such thing.
        document = {name: without_special(text, tokenizer) for name, text in request.document.items()}
        request = replace(request, document=document)
        if tokenizer.chat_template is None:
            return completion_of(request, self.shots)
        options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        return tokenizer.apply_chat_template(messages_of(request, self.template), **options)


def _ends_of(model: Any) -> list[int]:
    """Tokens that end what the model writes."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class EndpointGenerator:
    """An OpenAI-compatible server, vLLM for one: its `/chat/completions`.

    Args:
        url: Up to the route, `http://host:8000/v1`.
        model: The name it goes by there.
        template: The instruction; see `prompts.INSTRUCTION`.
        version: Changed by you when the server has got other weights under the same name.
        max_chars: Of a document; the rest is not sent.
        max_tokens: Of a query.
        temperature: 0 for the likeliest query.
        seed: Sent with each request, differing from request to request.
        batch_size: Requests written down at once.
        extra_body: What else goes with each request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`.
        **options: Those of `Endpoint`.
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
        self.settings = {"model": model, "max_tokens": max_tokens, "temperature": temperature} | (extra_body or {})
        self.endpoint = Endpoint(f"{url.rstrip('/')}/chat/completions", **options)
        self.identity = ["endpoint", self.settings, version, template, max_chars, seed]

    def generate(self, requests: Sequence[Request]) -> list[str | None]:
        """The first line of each answer; None where it was refused, or malformed to the last attempt."""
        return self.endpoint.map(self._query_of, requests)

    def _query_of(self, request: Request) -> str | None:
        messages = messages_of(_shortened(request, self.max_chars), self.template)
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{messages}".encode("utf-8", "surrogatepass")).digest()[:4])
        payload = self.settings | {"messages": messages, "seed": seed}
        try:
            return self.endpoint.ask(payload, _content)
        except (Malformed, Refused):
            return None


def _content(answer: Any) -> str:
    choice = answer["choices"][0]
    content = choice["message"]["content"]
    if not isinstance(content, str):
        raise Malformed(f"The answer's content is {content!r}.")
    return "" if choice.get("finish_reason") == "length" and _is_one_line(content) else first_line(content)


def _is_one_line(text: str) -> bool:
    """Whether the first line may go on: the answer was cut off within it."""
    return "\n" not in text.strip()


def first_line(text: str) -> str:
    """The first line with anything in it, without quotes, a list's mark or a field's name around it.

    Example:
        ```python
        >>> first_line('\\n**Question:** "Who wrote Faust?"\\nI hope this helps!')
        'Who wrote Faust?'
        ```
    """
    # What a model thinks before it answers is no answer.
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


def _shortened(request: Request, max_chars: int) -> Request:
    return replace(request, document=cut(request.document, max_chars))
