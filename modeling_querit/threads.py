"""Threads that have nothing left to do once what they were started for has failed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads; if the block ends with an error or Ctrl-C, what has not begun does not begin any more.

    Args:
        count: How many at most.

    Example:
        ```python
        >>> with threads(2) as pool:
        ...     pool.submit(sum, [1, 2]).result()
        3
        ```
    """
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
