"""What is asked of the server: a request's pictures are checked, and its budget is written where the engine reads it.

What is known to be safe is passed on, nothing else: parts of a message are texts and pictures in OpenAI's form, and a request
has one number of visual tokens for all its pictures, since vLLM's cache of pictures does not tell the entries of a list apart.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from PIL import ExifTags, Image, UnidentifiedImageError

from .refused import Refused, shown
from .settings import Settings
from .video_parts import NUMBER, with_frames


CHATS = ("/v1/chat/completions", "/tokenize")  # that take pictures
TEXTS = ("/v1/completions", "/detokenize")  # that have no place for one
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others of PIL's start programs, or fetch files
TOO_DEEP = "The request is nested too deeply."
DETAILS = ("low", "high", "auto")


@dataclass
class Asked:
    """A request that is passed on.

    Attributes:
        body: of what is passed on.
        num_visual_tokens: per tile; None of a request without pictures.
        sizes: (height, width) of its pictures, None of one that the engine fetches.
    """

    body: dict[str, Any]
    num_visual_tokens: int | None
    sizes: list[tuple[int, int] | None]


def read_request(content: bytes, path: str, settings: Settings) -> Asked:
    """What is passed on in place of a request.

    Args:
        content: of the request.
        path: as "/v1/chat/completions".
        settings: the operator's.

    Raises:
        Refused: with the sentence that answers it.
    """
    try:
        body = json.loads(content)
    except ValueError as error:
        raise Refused(f"The request is not JSON: {error}.") from None
    except RecursionError:
        raise Refused(TOO_DEEP) from None
    try:
        return _read(body, path, settings)
    except RecursionError:
        raise Refused(TOO_DEEP) from None


def _read(body: Any, path: str, settings: Settings) -> Asked:
    if not isinstance(body, dict):
        raise Refused("The request must be a JSON object.")
    _check_marks([body.get("prompt"), body.get("messages")], settings.image_token)
    messages = body.get("messages")
    if path not in CHATS or not isinstance(messages, list):
        if path not in TEXTS and _names_a_picture(body):
            raise Refused(f"Pictures are taken by {CHATS[0]}, as image_url parts of its messages; {path} takes none.")
        return Asked(_with_number(body, None), None, [])
    messages = [with_frames(message, settings) for message in messages]
    body = {**body, "messages": messages}
    parts = list(_pictures(messages))
    sizes = [_checked(part["image_url"], settings) for part in parts]
    number = _number(body, parts, settings)
    for part in parts:
        part.pop(NUMBER, None)  # the engine knows it of a whole request alone
    return Asked(_with_number(body, number if parts else None), number if parts else None, sizes)


def _pictures(messages: list[Any]) -> Iterator[dict[str, Any]]:
    """Every part with a picture, in order; only texts may stand beside them."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, str) or not isinstance(part, dict):
                continue
            kind = part.get("type")
            if kind == "image_url":
                given = part.get("image_url")
                if set(part) - {"type", "image_url", NUMBER} or not isinstance(given, dict):
                    raise Refused(
                        f'A picture is {{"type": "image_url", "image_url": {{"url": ...}}, "{NUMBER}": ...}}, with or without the '
                        f'number, and with a "detail" beside the url or not, and nothing else; this one has {shown(sorted(part))}.',
                        "messages",
                    )
                yield part
            elif kind not in ("text", "refusal") or _names_a_picture(part):
                raise Refused(
                    f"A part of a message of type {shown(kind)}: give text, image_url or video_url.", "messages"
                )
            elif part.get(NUMBER) is not None:
                raise Refused(
                    f"{NUMBER}={shown(part[NUMBER])} stands in a part of type {shown(kind)}: it goes beside a picture.",
                    NUMBER,
                )


def _checked(part: dict[str, Any], settings: Settings) -> tuple[int, int] | None:
    """The (height, width) of a picture that lies in the request, which is written again where vLLM would see another."""
    url = part.get("url")
    if not isinstance(url, str) or set(part) - {"url", "detail"}:
        raise Refused(
            f'"image_url" needs a "url", and takes a "detail"; it has {shown(sorted(part))}. {NUMBER} goes beside "image_url".',
            "image_url",
        )
    scheme = url[:5].lower()
    if scheme != "data:":
        host = _host(url) if scheme in ("http:", "https") else None
        if host is None:
            raise Refused(f"{shown(url)} is no picture: give a data URI, as data:image/png;base64,...", "url")
        if host not in settings.domains:
            raise Refused(
                f"Pictures are not fetched from {host}: send the picture as a data URI, or have the operator allow that host "
                "by --allowed-media-domains.",
                "url",
            )
        return None
    about, _, data = url.partition(",")
    if not about.lower().endswith(";base64"):
        raise Refused("A data URI must hold base64: data:image/png;base64,...", "url")
    if len(data) * 3 // 4 > settings.max_picture_bytes + 2:
        raise Refused(
            f"A picture of {len(data) * 3 // 4:,} bytes: {settings.max_picture_bytes:,} are allowed here.", "url", 413
        )
    try:
        content = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise Refused(f"A data URI does not hold base64: {error}.", "url") from None
    size, plain = _opened(content, settings)
    if plain is not None:
        part["url"] = f"data:image/png;base64,{base64.b64encode(plain).decode()}"
    return size


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _opened(content: bytes, settings: Settings) -> tuple[tuple[int, int], bytes | None]:
    """The (height, width) of a picture; and a PNG of it where it is turned by EXIF or not plainly RGB.

    M3 takes pictures as they lie, and drops transparency, as the original; vLLM turns them, and lays them on white.
    """
    if not content:
        raise Refused("A picture of 0 bytes.", "url")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > settings.max_picture_pixels:
                raise Refused(
                    f"A picture of {width}x{height} pixels: {settings.max_picture_pixels:,} pixels are allowed here.",
                    "url",
                    413,
                )
            plain = picture.mode in ("RGB", "L") and "transparency" not in picture.info
            if plain and picture.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                return (height, width), None
            buffer = io.BytesIO()
            rgb = picture.convert("RGB")
            rgb.info = {}  # or what it says would be written too
            rgb.save(buffer, "PNG", compress_level=1)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        none = isinstance(error, UnidentifiedImageError)
        what = f"none that can be opened: send {', '.join(FORMATS)}" if none else f"broken: {error}"
        raise Refused(f"A picture of {len(content):,} bytes is {what}.", "url") from None
    return (height, width), buffer.getvalue()


def _number(body: dict[str, Any], parts: list[dict[str, Any]], settings: Settings) -> int:
    """The number of visual tokens that a request names, beside its pictures or in `mm_processor_kwargs`, or by their `detail`."""
    given = body.get("mm_processor_kwargs")
    if given is not None and not isinstance(given, dict):
        raise Refused(f"mm_processor_kwargs {shown(given)}: give an object.", "mm_processor_kwargs")
    unknown = set(given or {}) - {NUMBER}
    if unknown:
        raise Refused(
            f"mm_processor_kwargs has {shown(sorted(unknown))}: num_visual_tokens is all that a request may set.",
            "mm_processor_kwargs",
        )
    details = [part["image_url"].get("detail") for part in parts]
    details = ["auto" if detail is None else detail for detail in details]
    for detail in details:
        if detail not in DETAILS:
            raise Refused(f"detail {shown(detail)}: give one of {', '.join(DETAILS)}.", "detail")
    found = [(part.get(NUMBER), "beside a picture") for part in parts]
    found.append(((given or {}).get(NUMBER), "in mm_processor_kwargs"))
    asked = {_allowed(number, settings): where for number, where in found if number is not None}
    if len(asked) > 1:
        raise Refused(
            f"{NUMBER} is {' and '.join(f'{number} {where}' for number, where in asked.items())}: a request has one number for "
            "all its pictures, since the engine keeps pictures by the whole request.",
            NUMBER,
        )
    if asked:
        return asked.popitem()[0]
    named = {settings.details.get(detail, settings.default) for detail in details}
    if len(named) > 1:
        raise Refused(
            f"The pictures' details stand for {sorted(named)} visual tokens: a request has one number for all its pictures.",
            "detail",
        )
    return named.pop() if named else settings.default


def _allowed(number: Any, settings: Settings) -> int:
    if isinstance(number, list):
        raise Refused(
            f"num_visual_tokens={shown(number)}: a request has one number for all its pictures, since the engine keeps "
            f"pictures by the whole request. Choose from {settings.scales}.",
            "num_visual_tokens",
        )
    if number == "auto":
        raise Refused(
            "num_visual_tokens='auto': a server cannot choose, as it answers in one pass; the client of m3_serving can. "
            f"Choose from {settings.scales}.",
            "num_visual_tokens",
        )
    if type(number) is not int or number not in settings.scales:
        raise Refused(
            f"num_visual_tokens={shown(number)} is not offered by this model. Choose from {settings.scales}.",
            "num_visual_tokens",
        )
    return number


def _with_number(body: dict[str, Any], number: int | None) -> dict[str, Any]:
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        if number is None and body.get(name):
            raise Refused(f"{name} is of pictures, and this request has none.", name)
    if body.get("media_io_kwargs"):
        raise Refused("media_io_kwargs: how pictures are read is not a request's to say.", "media_io_kwargs")
    return body if number is None else {**body, "mm_processor_kwargs": {"num_visual_tokens": number}}


def _check_marks(texts: Any, mark: str) -> None:
    """Refuses the mark of a picture where a user wrote it: it would be taken for the place of one."""
    if isinstance(texts, str) and mark in texts:
        raise Refused(f"A text contains {mark}, which stands for a picture: write it otherwise.", "messages")
    if isinstance(texts, (list, dict)):
        for value in texts.values() if isinstance(texts, dict) else texts:
            _check_marks(value, mark)


def _names_a_picture(value: Any) -> bool:
    """Whether anything in a request is, by its key or type, a picture, a sound or a film."""
    if isinstance(value, list):
        return any(map(_names_a_picture, value))
    if not isinstance(value, dict):
        return False
    kinds = ("image", "audio", "video")
    named = any(kind in str(key) for key in value for kind in kinds)
    return named or any(kind in str(value.get("type")) for kind in kinds) or any(map(_names_a_picture, value.values()))
