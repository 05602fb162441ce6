"""How a request is refused: with a sentence, and one of HTTP's 4xx."""

import json
from typing import Any


class Refused(Exception):
    """A request that is answered with an error of HTTP's 4xx, and a sentence."""

    def __init__(self, message: str, parameter: str | None = None, status: int = 400):
        super().__init__(message)
        self.parameter, self.status = parameter, status


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
