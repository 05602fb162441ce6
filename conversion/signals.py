"""What commands do about Ctrl-C and SIGTERM. Imports nothing that takes time."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Gives SIGINT and SIGTERM to `handler`; not one that the process was started to ignore, as by nohup.

    A `KeyboardInterrupt` that `handler` raises while Python runs a destructor or a callback is printed and dropped there; the
    signal is then sent again.
    """
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    report = sys.unraisablehook

    def send_again(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            return report(dropped)
        number = dropped.exc_value.args[0] if dropped.exc_value.args else signal.SIGINT
        threading.Timer(0.01, _send, [number]).start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, former in before.items():
            signal.signal(number, former)


def interrupt(signum: int, frame: object) -> None:
    """A handler that ends what runs through the blocks that clean up: by a `KeyboardInterrupt` with the signal's number."""
    raise KeyboardInterrupt(signum)


def _send(number: int) -> None:
    """To the main thread, which it wakes where it waits; not on Windows, where a thread cannot be sent one."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)
