"""A thread pool that stops at the first error."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool whose pending jobs are cancelled if the block ends with an error or Ctrl-C.

    Args:
        count: Maximum number of threads.

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
