"""Ctrl-C: whenever it comes, a command ends with one line and exit code 130."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_CODE = 128 + signal.SIGINT
# A terminal and a program in between may each pass on the same Ctrl-C.
_SAME_SECONDS = 1.0
_RETRY_SECONDS = 0.05


class Interrupts:
    """What became of Ctrl-C in a block of `one_line_interrupts`."""

    def __init__(self) -> None:
        self._since: float | None = None

    @property
    def is_interrupted(self) -> bool:
        """Whether there was one."""
        return self._since is not None

    def end(self) -> None:
        """Take note that the interrupt has been reported, and ignore further ones."""
        self._since = math.inf

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Handle the signal SIGINT."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            raise KeyboardInterrupt
        if now - self._since > _SAME_SECONDS:
            os._exit(EXIT_CODE)

    def handle_dropped(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Interrupt again if Python has dropped the interrupt, as it does in finalizers; report other errors."""
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)
            return
        self._since = None
        timer = threading.Timer(_RETRY_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()


@contextmanager
def one_line_interrupts(is_program: bool = False) -> Iterator[Interrupts]:
    """Turn Ctrl-C in this block into SystemExit with code 130, after one line on standard error.

    The interrupt unwinds the block as usual, so that temporary files are removed. Libraries in C may turn it into
    another error, or lose it: whatever error ends the block after an interrupt counts as that, and a lost interrupt
    comes again. A second Ctrl-C ends the process at once. Off the main thread, where Python sets no handlers, nothing
    changes.

    Args:
        is_program: Whether the process ends with the block: then Ctrl-C ends it at once from there on.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    handler_before = signal.signal(signal.SIGINT, interrupts.handle)
    hook_before, sys.unraisablehook = sys.unraisablehook, interrupts.handle_dropped
    try:
        yield interrupts
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == EXIT_CODE and not interrupts.is_interrupted:
            # A block in this one has dealt with it.
            interrupts.end()
            raise
        if not interrupts.is_interrupted:
            raise
        _say_interrupted()
        # Python has marked an interrupt that passed through code made from a string, and would end by the signal.
        exec("")
        raise SystemExit(EXIT_CODE) from None
    finally:
        handler_after = signal.SIG_IGN if interrupts.is_interrupted else _exit_at_once
        signal.signal(signal.SIGINT, handler_after if is_program else handler_before)
        sys.unraisablehook = hook_before


def _exit_at_once(signum: int, frame: FrameType | None) -> None:
    _say_interrupted()
    os._exit(EXIT_CODE)


def _say_interrupted() -> None:
    # Not by print, which the interrupt may have come in the middle of.
    with suppress(OSError):
        os.write(2, b"querit: interrupted.\n")
