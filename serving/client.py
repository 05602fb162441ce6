"""Asks a server of `m3-serve` about pictures, on the official `openai` package.

client = Client("http://localhost:8000/v1")
client.ask("photo.jpg", "What is this?", num_visual_tokens=36).text
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from openai import APIError, AsyncOpenAI, OpenAI
from PIL import Image, UnidentifiedImageError


Picture = str | os.PathLike | bytes | Image.Image
AUTO = "auto"
SURE = 0.99  # an answer as probable as this is kept, where the client chooses
BUDGETS = "/m3/budgets"


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        text: of the answer.
        num_visual_tokens: per tile, that it was asked with; None where the server's default was taken.
        prompt_tokens, answer_tokens: as the server counts them; of "auto", those of all requests together.
        finish_reason: "stop", or "length" of an answer that was cut off.
        requests: how many it took.
    """

    text: str
    num_visual_tokens: int | None
    prompt_tokens: int
    answer_tokens: int
    finish_reason: str
    requests: int = 1


class _Asking:
    """What a request is made of; shared by both clients."""

    _class: type
    _scales: list[int] | None = None

    def __init__(
        self,
        base_url: str = "http://localhost:8000/v1",
        model: str | None = None,
        api_key: str = "none",
        timeout: float = 120,
        max_retries: int = 2,
    ):
        self.openai = self._class(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=max_retries)
        self.model = model

    def _request(
        self, pictures: Picture | Sequence[Picture], question: str, number: int | None, more: dict[str, Any]
    ) -> dict[str, Any]:
        several = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
        content = [{"type": "image_url", "image_url": {"url": as_url(picture)}} for picture in several]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        more = {"temperature": 0, **more}
        if number is not None:
            given = more.pop("extra_body", {})
            more["extra_body"] = {**given, "mm_processor_kwargs": {"num_visual_tokens": number}}
        return {"messages": messages, **more}


class Client(_Asking):
    """Asks and waits.

    Args:
        base_url: of the server, as "http://localhost:8000/v1".
        model: its name there; the only one that the server has if None.
        api_key: where the server wants one.
        timeout: of a request, in seconds.
        max_retries: of a request that failed by the connection, or because the server was busy.
    """

    _class = OpenAI

    def ask(
        self,
        pictures: Picture | Sequence[Picture],
        question: str,
        num_visual_tokens: int | str | None = None,
        auto_keep: float = SURE,
        **request: Any,
    ) -> Answer:
        """The answer to a question.

        Args:
            pictures: one or several: a path, a URL that the server may fetch, the bytes of a file, a PIL image.
            question: what to ask.
            num_visual_tokens: per tile; the server's default if None. "auto" asks at a coarse number first, and again, finer,
                while the answer is less probable than `auto_keep`: at most three requests, each with the picture encoded anew.
            auto_keep: how probable an answer must be.
            request: fields of OpenAI's chat completions, such as `max_tokens`. Greedy unless there is a `temperature`.

        Raises:
            ValueError: there is no such picture, or something that is none.
            openai.APIError: what the server answered instead, with its sentence.
        """
        if num_visual_tokens != AUTO:
            return self._ask(pictures, question, num_visual_tokens, request)[0]
        steps, answers = _steps(self.scales, auto_keep), []
        for number in steps:
            answer, chance = self._ask(pictures, question, number, {**request, "logprobs": True})
            answers.append(answer)
            if chance >= auto_keep or number == steps[-1]:
                break
        return _together(answers)

    def stream(
        self,
        pictures: Picture | Sequence[Picture],
        question: str,
        num_visual_tokens: int | None = None,
        **request: Any,
    ) -> Iterator[str]:
        """Pieces of the answer as they come; arguments as `ask`, but for "auto", whose answer may be thrown away."""
        _check_streamed(num_visual_tokens)
        request = self._request(pictures, question, num_visual_tokens, request)
        for chunk in self.openai.chat.completions.create(model=self._model(), stream=True, **request):
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content

    @property
    def scales(self) -> list[int]:
        """Numbers of visual tokens that the server offers, ascending."""
        if self._scales is None:
            url = _root(str(self.openai.base_url)) + BUDGETS
            self._scales = _scales_of(self.openai.get(url, cast_to=object))
        return self._scales

    def _ask(self, pictures: Any, question: str, number: int | None, request: dict) -> tuple[Answer, float]:
        request = self._request(pictures, question, number, request)
        return _read(self.openai.chat.completions.create(model=self._model(), **request), number)

    def _model(self) -> str:
        self.model = self.model or self.openai.models.list().data[0].id
        return self.model


class AsyncClient(_Asking):
    """As `Client`, for `await`, so that many questions are under way together."""

    _class = AsyncOpenAI

    async def ask(
        self,
        pictures: Picture | Sequence[Picture],
        question: str,
        num_visual_tokens: int | str | None = None,
        auto_keep: float = SURE,
        **request: Any,
    ) -> Answer:
        """As `Client.ask`."""
        if num_visual_tokens != AUTO:
            return (await self._ask(pictures, question, num_visual_tokens, request))[0]
        steps, answers = _steps(await self.scales(), auto_keep), []
        for number in steps:
            answer, chance = await self._ask(pictures, question, number, {**request, "logprobs": True})
            answers.append(answer)
            if chance >= auto_keep or number == steps[-1]:
                break
        return _together(answers)

    async def stream(
        self,
        pictures: Picture | Sequence[Picture],
        question: str,
        num_visual_tokens: int | None = None,
        **request: Any,
    ) -> AsyncIterator[str]:
        """As `Client.stream`."""
        _check_streamed(num_visual_tokens)
        request = self._request(pictures, question, num_visual_tokens, request)
        chunks = await self.openai.chat.completions.create(model=await self._model(), stream=True, **request)
        async for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content

    async def scales(self) -> list[int]:
        """As `Client.scales`."""
        if self._scales is None:
            url = _root(str(self.openai.base_url)) + BUDGETS
            self._scales = _scales_of(await self.openai.get(url, cast_to=object))
        return self._scales

    async def _ask(self, pictures: Any, question: str, number: int | None, request: dict) -> tuple[Answer, float]:
        request = self._request(pictures, question, number, request)
        return _read(await self.openai.chat.completions.create(model=await self._model(), **request), number)

    async def _model(self) -> str:
        if self.model is None:
            self.model = (await self.openai.models.list()).data[0].id
        return self.model


def as_url(picture: Picture) -> str:
    """A picture as a request has it: a URL as it is, all else as a data URI of the file's own bytes, or of a PNG.

    Raises:
        ValueError: there is no such file, or what is given is no picture.
    """
    if isinstance(picture, str) and picture.startswith(("http://", "https://", "data:")):
        return picture
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        content = buffer.getvalue()
    elif isinstance(picture, (bytes, bytearray)):
        content = bytes(picture)
    elif isinstance(picture, (str, os.PathLike)):
        if not os.path.isfile(picture):
            raise ValueError(f"There is no picture {os.fspath(picture)}.")
        with open(picture, "rb") as file:
            content = file.read()
    else:
        raise ValueError(f"{type(picture).__name__} is no picture: give a path, a URL, bytes or a PIL image.")
    return f"data:{_media_type(content)};base64,{base64.b64encode(content).decode()}"


def _media_type(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as opened:
            return Image.MIME.get(opened.format or "", "image/png")
    except UnidentifiedImageError:
        raise ValueError(f"These {len(content):,} bytes are no picture that PIL can open.") from None


def _steps(scales: list[int], keep: float) -> list[int]:
    """Coarse, then the second finest, then the finest: the rule of a checkpoint without a fitted choice."""
    if not 0 < keep <= 1:
        raise ValueError(f"auto_keep={keep!r}: give a share above 0 and up to 1, as 0.99.")
    return sorted({scales[min(1, len(scales) - 1)], *scales[-2:]})


def _read(completion: Any, number: int | None) -> tuple[Answer, float]:
    """The answer, and how probable it is where that was asked for."""
    [choice], usage = completion.choices, completion.usage
    tokens = choice.logprobs.content if choice.logprobs else None
    chance = math.exp(sum(token.logprob for token in tokens)) if tokens else 0.0
    answer = Answer(
        (choice.message.content or "").strip(),
        number,
        usage.prompt_tokens,
        usage.completion_tokens,
        choice.finish_reason,
    )
    return answer, chance


def _together(answers: list[Answer]) -> Answer:
    last = answers[-1]
    return Answer(
        last.text,
        last.num_visual_tokens,
        sum(answer.prompt_tokens for answer in answers),
        sum(answer.answer_tokens for answer in answers),
        last.finish_reason,
        len(answers),
    )


def _check_streamed(number: Any) -> None:
    if number == AUTO:
        raise ValueError("num_visual_tokens='auto' may throw an answer away, so it is not streamed: use ask.")


def _scales_of(found: Any) -> list[int]:
    if not isinstance(found, dict) or "scales" not in found:
        raise ValueError(f"The server tells no budgets at {BUDGETS}: was it started by m3-serve?")
    return sorted(found["scales"])


def _root(base_url: str) -> str:
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc}"


__all__ = ["APIError", "Answer", "AsyncClient", "Client", "as_url"]
