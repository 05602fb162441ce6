"""What is kept of what was used last, by threads that know nothing of each other."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class Recent:
    """Values by key, of which so many are kept; those that were used longest ago go.

    Args:
        most: to keep.
        forget: called with a value that goes.
    """

    def __init__(self, most: int, forget: Callable[[Any], object] = lambda value: None):
        self.most, self.forget = most, forget
        self._values: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """None where there is none."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Any, value: Any) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            gone = [self._values.popitem(last=False)[1] for _ in range(len(self._values) - self.most)]
        for value in gone:
            self.forget(value)
