# Copyright 2026 The M3 for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Chats with pictures and videos, and what stands beside one of these and is meant for it alone."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any


SAMPLING_OPTIONS = ("num_frames", "fps", "video_start", "video_end", "when_short", "video_fps")
VIDEO_OPTIONS = (*SAMPLING_OPTIONS, "video_layout", "total_visual_tokens", "add_timestamps")
NUMBER = "num_visual_tokens"
MEDIA = ("image", "image_url", "video")  # types of parts


class ChatVideo:  # no dataclass: transformers would make a dict of it
    """A video among the pictures of a chat, with what its part of the message says about it."""

    def __init__(self, video: Any, options: dict[str, Any]):
        self.video, self.options = video, options


def videos_as_images(conversation: Any) -> tuple[Any, list[bool]]:
    """A chat, or a list of them, with its videos as images; and whether each of its images is a video, in reading order."""
    flags: list[bool] = []

    def as_image(part: dict[str, Any]) -> dict[str, Any]:
        kind = part.get("type")
        flags.extend([kind == "video"] * (kind in MEDIA))
        return _as_image(part) if kind == "video" else part

    return _with_parts(conversation, as_image), flags


def take_options(conversation: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A chat, or a list of them, without the numbers beside its images; and what stands beside each image and video.

    Raises:
        ValueError: for a number beside a text, or in an `image_url` in place of beside it.
    """
    options: list[dict[str, Any]] = []

    def without_number(part: dict[str, Any]) -> dict[str, Any]:
        kind, url = part.get("type"), part.get("image_url")
        own = {name: part[name] for name in (NUMBER, *VIDEO_OPTIONS) if part.get(name) is not None}
        elsewhere = [url.get(NUMBER) if isinstance(url, dict) else None, None if kind in MEDIA else own.get(NUMBER)]
        for number in elsewhere:
            if number is not None:
                raise ValueError(
                    f"{NUMBER}={number!r} is beside no picture: it stands in the picture's part of a message, as in "
                    f'{{"type": "image", "path": ..., "{NUMBER}": 9}}.'
                )
        if kind in MEDIA:
            options.append({name: own[name] for name in own if kind == "video" or name == NUMBER})
        return part if kind == "video" else {name: value for name, value in part.items() if name != NUMBER}

    return _with_parts(conversation, without_number), options


def _with_parts(conversation: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy of a chat, or of a list of them, with what `change` makes of each part of a message."""
    conversation = getattr(conversation, "messages", conversation)  # a pipeline's Chat
    if not isinstance(conversation, (list, tuple)):
        return conversation
    changed: list[Any] = []
    for message in map(_as_dict, conversation):
        if not isinstance(message, dict):  # a chat of several
            changed.append(_with_parts(message, change))
            continue
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [change(part) if isinstance(part, dict) else part for part in map(_as_dict, content)]
        changed.append({**message, "content": content} if "content" in message else message)
    return changed


def _as_dict(entry: Any) -> Any:
    """A message or a part as a dict, of whatever transformers takes for one from 5.24 on: mappings, dataclasses, pydantic's models."""
    if is_dataclass(entry) and not isinstance(entry, type):
        return {field.name: getattr(entry, field.name) for field in fields(entry)}
    return dict(entry) if isinstance(entry, Mapping) or hasattr(entry, "model_dump") else entry


def _as_image(part: dict[str, Any]) -> dict[str, Any]:
    part = {key: value for key, value in part.items() if value is not None}
    sources = [part[key] for key in ("video", "path", "url") if key in part]
    options = {key: value for key, value in part.items() if key not in ("type", "video", "path", "url")}
    unknown = options.keys() - {*VIDEO_OPTIONS, NUMBER}
    if unknown or len(sources) > 1:
        raise ValueError(
            f"A video of a chat has {sorted(part)}: give one of video, path and url, and of options "
            f"{', '.join((NUMBER, *VIDEO_OPTIONS))}."
        )
    # Without a source it is a mark for a template alone.
    return {"type": "image", "image": ChatVideo(sources[0], options)} if sources else {"type": "image"}
