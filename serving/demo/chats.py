"""A chat on the page: what was said, and the pictures that wait for the next message. Several threads may work on one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .asking import Message, Person, Picture


Shown = tuple[Picture, str]  # a picture and its file


@dataclass
class Chat:
    """One person's.

    Attributes:
        messages: for the model.
        shown: for the page, with every picture as a message of its own.
    """

    messages: list[Message] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)
    _waiting: list[Shown] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _is_answering: bool = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While a message is answered. Raises `ValueError` where another one is: they would change the chat under each other."""
        with self._lock:
            if self._is_answering:
                raise ValueError("An answer is under way: wait for it, or press Stop.")
            self._is_answering = True
        try:
            yield
        finally:
            self._is_answering = False

    def add(self, picture: Shown) -> list[Picture]:
        """Has a picture wait for the next message. Returns all that wait."""
        with self._lock:
            self._waiting.append(picture)
            return [held for held, _ in self._waiting]

    def take(self) -> list[Shown]:
        """The pictures that wait: they belong to the message that is sent now, and those that come later to the next."""
        with self._lock:
            taken, self._waiting = self._waiting, []
        return taken


def chat_of(person: Person) -> Chat:
    """Theirs; a new one where there is none."""
    with person.lock:
        person.chat = person.chat or Chat()
        return person.chat
