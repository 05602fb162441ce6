"""What commands do about Ctrl-C and SIGTERM. Imports nothing that takes time."""

import os
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


@contextmanager
def interrupting() -> Iterator[None]:
    """In a `with` block, Ctrl-C and SIGTERM raise `KeyboardInterrupt` with the signal's number as its argument.

    So does the end of the block, where code of others has caught it or has made another exception of it: nothing that comes after
    the block takes what was cut short for done.
    """
    came: list[int] = []

    def note(signum: int, frame: object) -> None:
        came.append(signum)
        interrupt(signum, frame)

    try:
        with handling_signals(note):
            yield
    except KeyboardInterrupt as stop:
        came += stop.args or [signal.SIGINT]
    finally:
        if came:
            raise KeyboardInterrupt(came[0])


@contextmanager
def stopping(command: str, then: str) -> Iterator[None]:
    """In a `with` block, or a function with this as decorator, Ctrl-C and SIGTERM end the command as its caller expects.

    Whatever cleans up does so; then there is one line, of the first of several processes, and the status 128 and the signal's number.

    Args:
        command: its name.
        then: what of it is there, or how it goes on, after "stopped; ".
    """
    try:
        with interrupting():
            yield
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":  # as launchers number processes
            print(f"{command}: stopped; {then}", file=sys.stderr)
        raise SystemExit(128 + stop.args[0]) from None


def _send(number: int) -> None:
    """To the main thread, which it wakes where it waits; not on Windows, where a thread cannot be sent one."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)
