"""Ctrl-C and SIGTERM, and how a run that failed or was stopped goes on. Standard library only."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FAILURES = (ValueError, TypeError, OSError, RuntimeError, MemoryError)  # what a run may fail with, bugs aside


class Stopped(KeyboardInterrupt):
    """A run was told to stop, by Ctrl-C or SIGTERM."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 128 + number  # as shells have it: 130 and 143


class Unfinished(Exception):
    """A run that failed or was stopped, for the reason that is this exception's cause; says how to go on."""


@contextmanager
def goes_on(how: Callable[[BaseException], str]) -> Iterator[None]:
    """What fails or is stopped inside becomes Unfinished, with how(error) where that is anything."""
    try:
        yield
    except (*FAILURES, KeyboardInterrupt) as error:
        if kept := how(error):
            raise Unfinished(kept) from error
        raise


@contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM call `handle` with their number, unless the system is told to ignore them.

    Outside the main thread, which alone may choose, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    numbers = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    before = {n: signal.signal(n, lambda number, frame: handle(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_now(number: int) -> None:
    raise Stopped(number)
