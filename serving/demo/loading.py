"""Gets a model ready in a thread, while the page is there already and tells how far it is."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .asking import Model


logger = logging.getLogger(__name__)


class Loading:
    """Of one model.

    Args:
        make: the model, not loaded yet; called in the thread, since it may import much.
        done: called at the end, whether or not it is there.
        folder: of a checkpoint, whose numbers of visual tokens can be known before it is read.

    Attributes:
        scales, default: the numbers and which one is chosen, as far as they are known; `default` may be "auto".
        model: once `is_ready`.
        told: how far it is, in words, and the share from 0 to 1 or None; both together, since a thread tells them.
        error: why it cannot be had.
    """

    model: Model

    def __init__(self, make: Callable[[], Model], done: Callable[[], None], folder: Path | None = None):
        self.scales, self.default = _numbers_in(folder) if folder else ([], None)
        self.told: tuple[str, float | None] = ("Starting", None)
        self.error: Exception | None = None
        self._make, self._tell_end, self._done = make, done, threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._load, daemon=True).start()

    @property
    def words(self) -> str:
        return self.told[0]

    @property
    def share(self) -> float | None:
        return self.told[1]

    @property
    def is_ready(self) -> bool:
        return self._done.is_set() and self.error is None

    @property
    def sentence(self) -> str:
        """The error."""
        return "" if self.error is None else " ".join(str(self.error).split())

    def changes(self, every: float = 0.25) -> Iterator[None]:
        """Once now, then whenever there is something new, until it is done."""
        shown = None
        while True:
            done = self._done.is_set()
            if done or shown != (shown := self.told):
                yield
            if done:
                return
            self._done.wait(every)

    def _load(self) -> None:
        begin = time.perf_counter()
        try:
            model = self._make()
            model.load(self._tell)
            self.model, self.scales, self.default = model, model.scales, model.default
            logger.warning("%s is ready after %.1f s", model.name, time.perf_counter() - begin)
        except Exception as error:  # it is told on the page and where the command was started
            self.error = error
        self._done.set()
        self._tell_end()

    def _tell(self, words: str, share: float | None) -> None:
        self.told = words, share


def _numbers_in(folder: Path) -> tuple[list[int], int | str | None]:
    """What a checkpoint's files say; nothing where they are no M3's, which is told once it is loaded."""
    config, processor = (folder / name for name in ("config.json", "processor_config.json"))
    if not (config.is_file() and processor.is_file()):
        return [], None
    scales = json.loads(config.read_text(encoding="utf-8")).get("visual_token_scales") or []
    default = json.loads(processor.read_text(encoding="utf-8")).get("num_visual_tokens")
    return sorted(scales), default or max(scales, default=None)
