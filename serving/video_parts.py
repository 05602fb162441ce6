"""`video_url` parts of a request: its frames as pictures, so that the engine, which knows pictures alone, answers about videos.

A part is `{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,...", "num_frames": 6}}`; in place of `num_frames` there
may be `fps`, and `video_start` and `video_end` beside either; beside `video_url`, `num_visual_tokens`, as beside a picture. The frames stand
one a line, as pictures of a chat do.
"""

import base64
import binascii
import io
from typing import Any

from modeling_m3.videos import sample_video

from .refused import Refused, shown
from .settings import Settings


OPTIONS = ("num_frames", "fps", "video_start", "video_end")
NUMBER = "num_visual_tokens"
MOST_FRAMES = 256  # that are decoded for a request; how many pictures the engine takes is its own setting


def with_frames(message: Any, settings: Settings) -> Any:
    """The message with pictures in place of its videos. Raises `Refused` for what is no video in a data URI."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or not any(_is_video(part) for part in content):
        return message
    parts: list[Any] = []
    for part in content:
        parts += _frames(part, settings) if _is_video(part) else [part]
    return {**message, "content": parts}


def _is_video(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "video_url"


def _frames(part: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    given = part.get("video_url")
    number = {NUMBER: part[NUMBER]} if NUMBER in part else {}
    if set(part) - {"type", "video_url", *number} or not isinstance(given, dict) or set(given) - {"url", *OPTIONS}:
        raise Refused(
            f'A video is {{"type": "video_url", "video_url": {{"url": ...}}}}, with {", ".join(OPTIONS)} beside the url or not, {NUMBER} '
            f"beside the video_url or not, and nothing else; this one has {shown(sorted(given) if isinstance(given, dict) else sorted(part))}.",
            "messages",
        )
    about, _, data = str(given.get("url")).partition(",")
    if not about.lower().startswith("data:video/") or not about.lower().endswith(";base64"):
        raise Refused(f"{shown(given.get('url'))} is no video: give a data URI, as data:video/mp4;base64,...", "url")
    try:
        content = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise Refused(f"A data URI does not hold base64: {error}.", "url") from None
    try:
        frames = sample_video(content, **{name: given[name] for name in OPTIONS if given.get(name) is not None})
        if len(frames) > MOST_FRAMES:
            raise Refused(f"{len(frames)} frames of a video: {MOST_FRAMES} are allowed here.", "video_url")
        parts = []
        for frame in frames:
            if frame.width * frame.height > settings.max_picture_pixels:
                raise Refused(
                    f"A video of {frame.width}x{frame.height} pixels: {settings.max_picture_pixels:,} pixels are allowed here.",
                    "url",
                    413,
                )
            buffer = io.BytesIO()
            frame.save(buffer, "PNG", compress_level=1)
            url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}, **number})
    except (ValueError, TypeError) as error:
        raise Refused(str(error), "video_url") from None
    except ImportError as error:
        raise Refused(f"This server reads no videos: {error}", "video_url", 501) from None
    return parts
