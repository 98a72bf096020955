"""Requests to model servers: many at once, repeated with back-off, no faster than allowed."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from typing import Annotated, Any, TypeVar

import httpx
from pydantic import Field, NonNegativeFloat, PositiveInt, validate_call
from pyrate_limiter import Duration, Limiter, Rate
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_random_exponential,
)

from ..threads import threads

Answer = TypeVar("Answer")
Item = TypeVar("Item")

# What is asked is at fault, such as a document that is longer than the model reads: others may be answered.
_REFUSED = {400, 413, 422}
# So many of these before the first answer: the request itself is wrong. So many in a row: the server is gone.
_REFUSALS = 8
# Too many requests, timeouts, and servers in trouble: the same request may succeed later.
_TRY_AGAIN = {408, 409, 425, 429}
_LONGEST_WAIT = 60.0


class Unavailable(ConnectionError):
    """A server that could not be reached, or answered with an error that may pass."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class Malformed(RuntimeError):
    """An answer that is cut off, or not of the form it has to be."""


class Refused(ValueError):
    """A request that the server does not answer, and would not if it were repeated."""


class Endpoint:
    """One route of a server that takes and returns JSON.

    Requests that fail for reasons that may pass (no connection, timeouts, status 408, 409, 425, 429 and 5xx, answers
    that are cut off or malformed) are repeated, after waits that double, or as long as `Retry-After` says. Those with
    status 400, 413 or 422 are `Refused`, and so is one that a server which answers others fails at to the last attempt.
    Others, such as 401, end the run at once, as do refusals and malformed answers without any good one.

    Args:
        url: Of the route.
        concurrency: Requests under way at once.
        requests_per_minute: At most, of each process; None: no limit.
        attempts: How often a request is made before it is given up.
        timeout: Seconds until an answer has to be there.
        api_key_variable: The environment variable that holds the key, such as `OPENAI_API_KEY`; without a name, none is
            sent, so that no key goes to a server that it is not for.
        backoff: Seconds of the first wait, at most; waits are drawn.

    Raises:
        ValueError: if the url has no scheme or is none, a number is below 1, or there is no key.
    """

    @validate_call
    def __init__(
        self,
        url: str,
        *,
        concurrency: PositiveInt = 8,
        requests_per_minute: PositiveInt | None = None,
        attempts: PositiveInt = 10,
        timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0,
        api_key_variable: str | None = None,
        backoff: NonNegativeFloat = 1.0,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}: it begins with http:// or https://.")
        try:
            httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"url is {url!r}: {error}.") from None
        self.url, self.concurrency, self._timeout = url, concurrency, timeout
        #: How often a request was repeated, by what was wrong.
        self.repeated: Counter[str] = Counter()
        self._answered, self._refusals, self._lost = False, 0, 0
        self._stopped = threading.Event()
        key = _key_of(api_key_variable)
        self._client = httpx.Client(
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=concurrency),
        )
        self._limiter = Limiter(Rate(requests_per_minute, Duration.MINUTE)) if requests_per_minute else None
        doubling = wait_random_exponential(multiplier=backoff, max=_LONGEST_WAIT)
        self._retrying = Retrying(
            retry=retry_if_exception_type((Unavailable, Malformed)),
            stop=stop_after_attempt(attempts) | stop_when_event_set(self._stopped),
            sleep=sleep_using_event(self._stopped),
            wait=lambda state: doubling(state) if (asked := _asked_for(state)) is None else asked,
            before_sleep=self._count,
            reraise=True,
        )

    def known_to_answer(self) -> None:
        """Answers of it are on disk: what it refuses now, it would not refuse all of."""
        self._answered = True

    def ask(self, payload: dict[str, Any], parse: Callable[[Any], Answer]) -> Answer:
        """Send a request, and return what `parse` makes of its answer; it raises `Malformed` if it cannot.

        Raises:
            Unavailable, Malformed: if that is how the last attempt ended.
            Refused: if the server refuses this request, or answers others and never this one.
            ValueError: if it refuses all, or answers nothing well; repeating them would not help.
        """
        try:
            return self._retrying.copy()(self._ask, payload, parse)
        except (Unavailable, Malformed) as error:
            self._lost += 1
            if isinstance(error, Unavailable) and self._answered and self._lost < _REFUSALS:
                raise Refused(str(error)) from error
            if isinstance(error, Malformed) and not self._answered and self._lost >= _REFUSALS:
                raise ValueError(f"{error} No answer was better.") from error
            raise

    def map(self, function: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
        """What a function that asks returns for each item, in order, so many at once as the server may get."""
        self._stopped.clear()
        with threads(self.concurrency) as pool:
            try:
                futures = [pool.submit(function, item) for item in items]
                # One request that is refused ends the run: those that were not sent stay unsent.
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
                return [future.result() for future in futures]
            except BaseException:
                # Nobody waits for what would be repeated.
                self._stopped.set()
                raise

    def _ask(self, payload: dict[str, Any], parse: Callable[[Any], Answer]) -> Answer:
        if self._limiter is not None:
            self._limiter.try_acquire(self.url)
        try:
            response = self._post(payload)
        except httpx.TimeoutException as error:
            raise Unavailable(f"{self.url} did not answer in time ({type(error).__name__}).") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.url} could not be reached: {error}") from None
        if response.status_code in _TRY_AGAIN or response.status_code >= 500:
            message = f"{self.url} answered {response.status_code}: {response.text[:200]}"
            raise Unavailable(message, _retry_after(response))
        if response.status_code != 200:
            self._refusals += 1
            is_one = response.status_code in _REFUSED and (self._answered or self._refusals <= _REFUSALS)
            raise (Refused if is_one else ValueError)(
                f"{self.url} answered {response.status_code}: {response.text[:200]}"
            )
        try:
            answer = response.json()
        except (ValueError, RecursionError) as error:
            raise Malformed(f"{self.url} answered what is no JSON: {error}") from None
        try:
            parsed = parse(answer)
        except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError) as error:
            raise Malformed(f"{self.url} answered something else than it should: {error!r}") from None
        self._answered, self._lost = True, 0
        return parsed

    def _post(self, payload: dict[str, Any]) -> httpx.Response:
        # httpx's own timeout is that of each piece of an answer.
        deadline = time.monotonic() + self._timeout
        pieces = []
        with self._client.stream("POST", self.url, json=payload) as response:
            for piece in response.iter_raw():
                pieces.append(piece)
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer took too long")
        return httpx.Response(response.status_code, headers=response.headers, content=b"".join(pieces))

    def _count(self, state: RetryCallState) -> None:
        self.repeated[type(state.outcome.exception()).__name__.lower()] += 1


def _key_of(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise ValueError(f"api_key_variable is {variable!r}, but there is no such variable: set it, or leave it out.")
    key = os.environ[variable].strip() if variable else None
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError(f"api_key_variable is {variable!r}, which holds no key: a key is plain ASCII, in one line.")
    return key


def _asked_for(state: RetryCallState) -> float | None:
    """The seconds that the server asked to wait."""
    return getattr(state.outcome.exception(), "wait", None)


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        return None
    return min(seconds, _LONGEST_WAIT) if seconds >= 0 else None
