"""Gets a model ready in a thread, while the page is there already and tells how far it is."""

import logging
import threading
import time
from collections.abc import Iterator

from .asking import Model


logger = logging.getLogger(__name__)


class Loading:
    """Of one model.

    Attributes:
        words, share: how far it is, the share from 0 to 1 or None.
        error: a sentence, where it cannot be had.
    """

    def __init__(self, model: Model):
        self.model, self.words, self.share, self.error = model, "Starting", None, ""
        self._done = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._load, daemon=True).start()

    @property
    def is_ready(self) -> bool:
        return self._done.is_set() and not self.error

    def changes(self, every: float = 0.25) -> Iterator[None]:
        """Once now, then whenever there is something new, until it is done."""
        shown = None
        while True:
            done = self._done.is_set()
            if done or shown != (shown := (self.words, self.share)):
                yield
            if done:
                return
            self._done.wait(every)

    def wait(self) -> None:
        self._done.wait()

    def _load(self) -> None:
        begin = time.perf_counter()
        try:
            self.model.load(self._tell)
            logger.warning("%s is ready after %.1f s", self.model.name, time.perf_counter() - begin)
        except (ValueError, OSError, ImportError, NotImplementedError) as error:
            self.error = " ".join(str(error).split())
        except Exception:
            logger.exception("loading failed")
            self.error = f"{self.model.name} cannot be loaded: what the command printed says why."
        self._done.set()

    def _tell(self, words: str, share: float | None) -> None:
        self.words, self.share = words, share
