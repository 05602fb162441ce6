"""What an operator decides about budgets and pictures. `m3-serve` hands it to the server's processes in their environment."""

import json
import os
from dataclasses import asdict, dataclass, field


VARIABLE = "M3_SERVE_SETTINGS"


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Attributes:
        folder: of the checkpoint.
        scales: numbers of visual tokens per tile that it offers, ascending.
        default: that of requests which name none.
        image_token: the mark that stands for a picture in a prompt.
        details: by `detail` of OpenAI's image parts, that of requests with it.
        max_picture_bytes: of one picture's file.
        max_picture_pixels: of one picture, width times height.
        max_request_bytes: of one request.
        domains: hosts that pictures may be fetched from; none if empty.
        url: where the server listens, for the line that says so.
    """

    folder: str
    scales: list[int]
    default: int
    image_token: str = "<image>"
    details: dict[str, int] = field(default_factory=dict)
    max_picture_bytes: int = 20_000_000
    max_picture_pixels: int = 50_000_000
    max_request_bytes: int = 100_000_000
    domains: list[str] = field(default_factory=list)
    url: str = ""

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> "Settings":
        """Raises `ValueError` where `m3-serve` did not start this process."""
        if VARIABLE not in os.environ:
            raise ValueError(f"{VARIABLE} is not set: start the server by m3-serve.")
        return cls(**json.loads(os.environ[VARIABLE]))
