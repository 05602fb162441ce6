"""What commands do about Ctrl-C and SIGTERM. Imports nothing that takes time."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Gives SIGINT and SIGTERM to `handler`; not one that the process was started to ignore, as by nohup."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
