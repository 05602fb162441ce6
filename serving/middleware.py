"""In front of vLLM's server: checks requests, writes their budgets, counts visual tokens, and says why a prompt does not fit.

An ASGI middleware of vLLM's `--middleware m3_serving.middleware.Budgets`, which `m3-serve` asks for.
"""

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any

from prometheus_client import Counter

from modeling_m3 import M3LlavaProcessor

from .checked_requests import CHATS, Asked, Refused, read_request
from .settings import Settings


Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

BUDGETS = "/m3/budgets"  # what a client asks which numbers there are
TOO_LONG = re.compile(r"maximum (?:context|model) length[^\d.]*(\d+)")  # of vLLM's three sentences

VISUAL_TOKENS = Counter("m3_visual_tokens", "Visual tokens in answered requests.", ["num_visual_tokens"])
PICTURES = Counter("m3_pictures", "Pictures in answered requests.", ["num_visual_tokens"])


class Budgets:
    """The middleware.

    Args:
        app: what it stands in front of.
        settings: the operator's; those in the environment by default.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], settings: Settings | None = None):
        self.app, self.settings = app, settings or Settings.from_environment()

    @cached_property
    def processor(self) -> M3LlavaProcessor:
        return M3LlavaProcessor.from_pretrained(self.settings.folder)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._telling(send))
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] == BUDGETS and scope["method"] == "GET":
            await _answer(send, 200, {name: getattr(self.settings, name) for name in ("scales", "default", "details")})
        elif scope["method"] == "POST" and _is_json(scope):
            await self._checked(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            content = await _read(receive, self.settings.max_request_bytes)
            if not content:
                asked = Asked({}, None, [])
            else:
                asked = await asyncio.to_thread(read_request, content, path, self.settings)
                content = json.dumps(asked.body).encode()
        except Refused as refused:
            await _refuse(send, refused)
            return
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(content)).encode()))
        await self.app({**scope, "headers": headers}, _replayed(content, receive), self._explaining(asked, path, send))

    def _telling(self, send: Send) -> Send:
        async def told(message: dict[str, Any]) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                self._costs(Asked({}, None, []), self.settings.default)  # reads the processor before the first request
                print(f"m3-serve: listens on {self.settings.url}", file=sys.stderr, flush=True)

        return told

    def _explaining(self, asked: Asked, path: str, send: Send) -> Send:
        """Passes answers on as they come, but adds to the refusal of too long a prompt what would fit."""
        held: list[dict[str, Any]] = []

        async def explained(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 400 and asked.sizes and None not in asked.sizes:
                    held.append(message)
                    return
                if message["status"] < 400 and asked.num_visual_tokens is not None and path == CHATS[0]:
                    self._count(asked)
            elif held:
                held.append(message)
                if message.get("more_body"):
                    return
                content = b"".join(part.get("body", b"") for part in held[1:])
                content = await asyncio.to_thread(self._with_advice, content, asked)
                await _answer(send, 400, content)
                held.clear()
                return
            await send(message)

        return explained

    def _count(self, asked: Asked) -> None:
        label = str(asked.num_visual_tokens)
        PICTURES.labels(label).inc(len(asked.sizes))
        VISUAL_TOKENS.labels(label).inc(sum(self._costs(asked, asked.num_visual_tokens)))

    def _costs(self, asked: Asked, number: int) -> list[int]:
        """Placeholders of each picture whose size is known."""
        sizes = [size for size in asked.sizes if size is not None]
        return self.processor._get_num_multimodal_tokens(sizes, num_visual_tokens=number).num_image_tokens

    def _with_advice(self, content: bytes, asked: Asked) -> bytes:
        """A refusal of vLLM's; of a prompt that is too long, with the numbers of visual tokens at which it is not."""
        text = content.decode("utf-8", "replace")
        if (found := TOO_LONG.search(text)) is None:
            return content
        fits, room = int(found[1]), int(found[1]) - max(1, _new_tokens(asked.body))
        words = self._text_tokens(asked.body["messages"])
        needed = {scale: words + sum(self._costs(asked, scale)) for scale in self.settings.scales}
        enough = [scale for scale, tokens in needed.items() if tokens <= room]
        advice = f"num_visual_tokens={max(enough)} would fit." if enough else "No number of visual tokens would fit."
        sentence = (
            f"The prompt has {needed[asked.num_visual_tokens]} tokens at num_visual_tokens={asked.num_visual_tokens}, {words} of "
            f"them text. {room} fit, of a context of {fits} tokens and {fits - room} for the answer. {advice}"
        )
        return json.dumps({"error": _error(sentence, "num_visual_tokens", 400)}).encode()

    def _text_tokens(self, messages: list[dict[str, Any]]) -> int:
        chat = [{**message, "content": _as_template_parts(message.get("content"))} for message in messages]
        [ids] = self.processor.tokenize_prompts([self.processor.apply_chat_template(chat, add_generation_prompt=True)])
        return sum(token != self.processor.image_token_id for token in ids)


def _as_template_parts(content: Any) -> Any:
    if not isinstance(content, list):
        return content or ""
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"type": "image"} if part.get("type") == "image_url" else part for part in texts]


def _new_tokens(body: dict[str, Any]) -> int:
    return body.get("max_completion_tokens") or body.get("max_tokens") or 1


def _is_json(scope: Scope) -> bool:
    """As vLLM's routes read it; what says nothing of its type counts as JSON, so that nothing goes by unread."""
    kind = dict(scope["headers"]).get(b"content-type", b"application/json").split(b";")[0].strip().lower()
    return kind not in (b"multipart/form-data", b"application/x-www-form-urlencoded")


async def _read(receive: Receive, most: int) -> bytes:
    parts, length = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused("The client went away.")
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > most:
            raise Refused(f"The request is larger than the {most:,} bytes that are allowed here.", status=413)
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(content: bytes, receive: Receive) -> Receive:
    """The whole request in one piece, then whatever else comes, which is that the client goes away."""
    rest = [{"type": "http.request", "body": content, "more_body": False}]

    async def replayed() -> dict[str, Any]:
        return rest.pop() if rest else await receive()

    return replayed


def _error(message: str, parameter: str | None, status: int) -> dict[str, Any]:
    return {"message": message, "type": "BadRequestError", "param": parameter, "code": status}


async def _refuse(send: Send, refused: Refused) -> None:
    await _answer(send, refused.status, {"error": _error(str(refused), refused.parameter, refused.status)})


async def _answer(send: Send, status: int, content: Any) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
