"""What the page's server answers at all, and what a browser may load for it: only what is named here."""

import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse


# Gradio has more routes, for APIs, proxies and logs; the page needs none of them.
PAGE = re.compile(r"/(config|theme\.css|favicon\.ico|manifest\.json|(assets|static)/[^?]*)?")
EVENTS = re.compile(
    r"/gradio_api/(queue/(join|data)|upload|upload_progress|heartbeat/\w+|cancel|reset|startup-events|run/predict)"
)
FILES = "/gradio_api/file="
# A browser loads nothing from elsewhere, whatever an answer or a library would have it do.
POLICY = (
    "default-src 'self'; script-src 'self' blob: 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' blob: data:; object-src 'none'; base-uri 'self'; form-action 'none'"
)


class Guard:
    """ASGI middleware around gradio's application.

    Args:
        app: of gradio.
        files: the folder whose files may be asked for.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], files: str):
        self.app, self.files = app, files

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no WebSocket
            await send({"type": "websocket.close"})
            return
        path = unquote(scope["path"])
        is_file = path.startswith(f"{FILES}{self.files}/")

        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        is_there = ".." not in path.split("/") and (is_file or PAGE.fullmatch(path) or EVENTS.fullmatch(path))
        answers = self.app if is_there else PlainTextResponse("There is nothing here.", 404)
        await answers(scope, receive, with_policy)
