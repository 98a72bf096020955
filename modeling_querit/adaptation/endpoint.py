"""Client for model servers: concurrent requests with retries, back-off and a rate limit."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Item = TypeVar("Item")

# Status codes of a request that is at fault itself, such as a document that is too long: others may succeed.
_REFUSED_STATUS = {400, 413, 422}
# Status codes after which the same request may succeed later, as it may after 5xx.
_TRANSIENT_STATUS = {408, 409, 425, 429}
# Failures before the first good answer from which on all requests count as wrong, and failures in a row from which on
# the server counts as gone.
_MAX_FAILURES = 8
_MAX_WAIT_SECONDS = 60.0
# Seconds to wait for a connection before a run begins.
_CHECK_SECONDS = 5.0


class Unavailable(ConnectionError):
    """The server could not be reached, or answered with a transient error.

    Args:
        message: Description of the failure.
        wait: Seconds that the server asked to wait, if it did.
    """

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class Malformed(RuntimeError):
    """The answer is cut off, or not in the expected form."""


class Refused(ValueError):
    """The server refuses this request, and would refuse it again."""


class Endpoint:
    """A route of a server that takes and returns JSON.

    Transient failures (no connection, timeouts, status 408, 409, 425, 429 and 5xx, malformed answers) are retried with
    exponential back-off, or after as long as `Retry-After` says. Status 400, 413 and 422 raise `Refused`, and so does a
    request that fails to the last attempt while the server answers others. Any other status, such as 401, raises
    ValueError at once, as do refusals and malformed answers if there has been no good answer before.

    Args:
        url: URL of the route.
        concurrency: Maximum number of concurrent requests.
        requests_per_minute: Maximum number of requests per minute and process; None for no limit.
        attempts: Most times that a request is sent.
        timeout: Seconds within which the whole answer has to arrive.
        api_key_variable: Environment variable that holds the API key, such as `OPENAI_API_KEY`. Without it no key is
            sent, so that no key reaches a server that it is not for.
        backoff: Upper bound of the first wait, in seconds; it doubles with each retry, and waits are drawn below it.

    Raises:
        ValueError: if the URL is invalid, a number is out of its range, or there is no such key.

    Example:
        ```python
        >>> endpoint = Endpoint("http://localhost:8000/v1/rerank", concurrency=4)
        >>> endpoint.post({"query": "fox", "documents": ["a fox"]}, lambda answer: answer["results"])
        ```
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
            raise ValueError(f"url is {url!r}: it has to begin with http:// or https://.")
        try:
            httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"url is {url!r}: {error}.") from None
        self.url, self.concurrency, self._timeout, self._attempts = url, concurrency, timeout, attempts
        #: Number of retries by their reason, `unavailable` or `malformed`.
        self.retries: Counter[str] = Counter()
        self._is_working, self._refusals, self._failures = False, 0, 0
        self._stopped = threading.Event()
        key = _read_key(api_key_variable)
        self._client = httpx.Client(
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=concurrency),
        )
        self._limiter = Limiter(Rate(requests_per_minute, Duration.MINUTE)) if requests_per_minute else None
        exponential = wait_random_exponential(multiplier=backoff, max=_MAX_WAIT_SECONDS)
        self._retrying = Retrying(
            retry=retry_if_exception_type((Unavailable, Malformed)),
            stop=stop_after_attempt(attempts) | stop_when_event_set(self._stopped),
            sleep=sleep_using_event(self._stopped),
            wait=lambda state: exponential(state) if (seconds := _requested_wait(state)) is None else seconds,
            before_sleep=self._count_retry,
            reraise=True,
        )

    def check(self) -> None:
        """Check that there is a server, whatever it answers, without the patience that requests have.

        Raises:
            Unavailable: if it cannot be reached.
        """
        try:
            with self._client.stream("GET", self.url, timeout=min(self._timeout, _CHECK_SECONDS)):
                pass
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise Unavailable(f"{self.url} could not be reached: {error}; start the server, or correct url.") from None
        except httpx.HTTPError:
            # It is there, and slow or strange: requests will tell.
            return

    def mark_as_working(self) -> None:
        """Take the server as one that answers, as its cached answers show: a refusal is then that request's fault."""
        self._is_working = True

    def post(self, payload: dict[str, Any], parse: Callable[[Any], Answer]) -> Answer:
        """Send a request, and parse its answer.

        Args:
            payload: JSON of the request.
            parse: Turns the JSON of the answer into the result; an error in it means that the answer is malformed.

        Raises:
            Unavailable, Malformed: if the last attempt failed in that way.
            Refused: if the server refuses this request, or answers others and never this one.
            ValueError: if the server refuses every request, or all its answers are malformed.
        """
        try:
            return self._retrying.copy()(self._post_once, payload, parse)
        except (Unavailable, Malformed) as error:
            self._failures += 1
            if isinstance(error, Unavailable) and self._is_working and self._failures < _MAX_FAILURES:
                raise Refused(str(error)) from error
            if isinstance(error, Malformed) and not self._is_working and self._failures >= _MAX_FAILURES:
                raise ValueError(f"{error} So was every answer before it.") from error
            raise

    def map(self, function: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
        """Call a function that posts for each item, `concurrency` at a time; results are in the order of the items."""
        self._stopped.clear()
        with threads(self.concurrency) as pool:
            try:
                futures = [pool.submit(function, item) for item in items]
                # The first error ends all: what has not been sent stays unsent.
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
                return [future.result() for future in futures]
            except BaseException:
                # Wakes requests that wait to be retried.
                self._stopped.set()
                raise

    def _post_once(self, payload: dict[str, Any], parse: Callable[[Any], Answer]) -> Answer:
        if self._limiter is not None:
            self._limiter.try_acquire(self.url)
        try:
            response = self._send(payload)
        except httpx.TimeoutException as error:
            raise Unavailable(f"{self.url} did not answer in time ({type(error).__name__}).") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.url} could not be reached: {error}") from None
        if response.status_code != 200:
            raise self._error_of(response)
        try:
            answer = response.json()
        except (ValueError, RecursionError) as error:
            raise Malformed(f"{self.url} answered with something that is not JSON: {error}") from None
        try:
            parsed = parse(answer)
        except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError) as error:
            raise Malformed(f"{self.url} answered in an unexpected form: {error!r}.") from None
        self._is_working, self._failures = True, 0
        return parsed

    def _error_of(self, response: httpx.Response) -> Exception:
        message = f"{self.url} answered {response.status_code}: {response.text[:200]}"
        if response.status_code in _TRANSIENT_STATUS or response.status_code >= 500:
            return Unavailable(message, _retry_after(response))
        self._refusals += 1
        others_may_succeed = self._is_working or self._refusals <= _MAX_FAILURES
        return (Refused if response.status_code in _REFUSED_STATUS and others_may_succeed else ValueError)(message)

    def _send(self, payload: dict[str, Any]) -> httpx.Response:
        # httpx's own timeout holds for each piece of an answer, not for the whole.
        deadline = time.monotonic() + self._timeout
        pieces = []
        with self._client.stream("POST", self.url, json=payload) as response:
            for piece in response.iter_raw():
                pieces.append(piece)
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer took too long")
        return httpx.Response(response.status_code, headers=response.headers, content=b"".join(pieces))

    def _count_retry(self, state: RetryCallState) -> None:
        if not self.retries:
            logger.warning("%s Trying again, for up to %d times.", _last_error(state), self._attempts)
        self.retries[type(_last_error(state)).__name__.lower()] += 1


def count_retries(users: Mapping[str, object]) -> Counter[str]:
    """Count the retries of generators or teachers that have an `endpoint`, as `name reason` -> number."""
    endpoints = {name: user.endpoint for name, user in users.items() if hasattr(user, "endpoint")}
    return Counter(
        {
            f"{name} {reason}": count
            for name, endpoint in endpoints.items()
            for reason, count in endpoint.retries.items()
        }
    )


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ValueError(f"api_key_variable is {variable!r}, but that variable is not set: set it, or leave it out.")
    key = os.environ[variable].strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"api_key_variable is {variable!r}, which holds no API key: a key is one line of ASCII.")
    return key


def _requested_wait(state: RetryCallState) -> float | None:
    """Return the seconds that the server asked to wait."""
    return getattr(_last_error(state), "wait", None)


def _last_error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds of the header `Retry-After`, at most a minute; None if it has none, or a date."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(seconds, _MAX_WAIT_SECONDS) if seconds >= 0 else None
