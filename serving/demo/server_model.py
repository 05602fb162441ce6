"""A server, as the page asks it: one of `m3-serve`, or any that speaks OpenAI's interface and serves an M3, as vLLM does.

All requests are sent from one thread's event loop, so that each can be given up at any moment, before its first token too: its
connection is closed, by which vLLM stops computing.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError

from ..client import BUDGETS, SURE, AsyncClient, Client, _steps, as_url
from .as_python import lines_for_server
from .asking import AUTO, Answer, Compared, Cost, Message, Person, Picture, Settings


Tell = Callable[[str, float | None], None]
PATIENCE_SECONDS = 600  # that a server may take to start
STEP_SECONDS = 2.0
ANSWER_SECONDS = 600  # without a byte of an answer: where many ask, they wait for each other
STARTING = (502, 503, 504)  # what a proxy says of a server that is not there yet
HTTP_ERRORS = (import_module("httpx").HTTPError,) if find_spec("httpx") else ()  # openai 2 lets them through in streams


class ServerModel:
    """See `asking.Model`.

    Args:
        url: of the server, as "http://localhost:8000", with /v1 or without.
        model: its name there; the first that the server names if None.
        api_key: where the server wants one.
        checkpoint: that is served, a folder or an id on the Hub. By it, visual tokens and FLOPs are known, and the scales where
            the server does not tell them; loads its processor, not its weights.
        revision: of the checkpoint.

    Raises:
        ValueError: the URL is none.
    """

    at_once = 8

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        checkpoint: str | None = None,
        revision: str | None = None,
    ):
        self.root, self.place = _address(url)
        self.model, self.api_key, self.checkpoint, self.revision = model, api_key, checkpoint, revision
        self.names_model, self.name = model is not None, model or self.place
        self.processor, self.config = None, None

    def load(self, tell: Tell) -> None:
        client = Client(f"{self.root}/v1", api_key=self.api_key or "none", timeout=10, max_retries=0)
        self.model = self._model(client, tell)
        is_path = self.model.startswith((".", "/"))  # which is not for those to know who see the page
        self.name = PurePath(self.model).name if is_path else self.model
        budgets = self._budgets(client)
        if self.checkpoint is not None:
            tell(f"Reading the processor of {self.checkpoint}", None)
            self._read_checkpoint()
            own = {"scales": self.processor.visual_token_scales, "default": self.processor.num_visual_tokens}
            budgets = budgets or own
            if not set(budgets["scales"]) <= set(own["scales"]):
                raise ValueError(
                    f"{self.place} offers {budgets['scales']} visual tokens, but {self.checkpoint} {own['scales']}: name the "
                    "checkpoint that it serves."
                )
        if budgets is None:
            raise ValueError(
                f"{self.place} does not tell which numbers of visual tokens it offers: start it by m3-serve, or name the "
                "checkpoint that it serves by --model too."
            )
        self.scales = sorted(budgets["scales"])
        self.default = budgets.get("default") or self.scales[-1]
        self.offers_auto = len(self.scales) > 1
        self.facts = f"model {self.name} on {self.place}"
        self._client = _Asker(self.scales, f"{self.root}/v1", self.model, self.api_key or "none", ANSWER_SECONDS)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="asks the server", daemon=True).start()

    def answer(self, messages: Sequence[Message], settings: Settings, person: Person) -> Iterator[Answer]:
        kept, pictures = person.take() or {}, [picture for message in messages for picture in message.pictures]
        urls = {picture.key: kept.get(picture.key) or _urls(picture) for picture in pictures}
        person.keep(urls)
        asked = self._asked(messages, settings, urls)
        for answers in self._together({asked.number: asked}, person):
            answer = answers[asked.number]
            if answer.error:
                raise ValueError(answer.error)
            yield answer

    def compare(self, picture: Picture, question: str, settings: Settings, person: Person) -> Iterator[Compared]:
        urls, asked = {picture.key: _urls(picture)}, {}
        for number in [*self.scales, *([AUTO] if self.offers_auto and settings.num_beams == 1 else [])]:
            at = replace(picture, num_visual_tokens=number)
            asked[number] = self._asked([Message("user", question, (at,))], settings, urls)
        for answers in self._together(asked, person):
            yield Compared(answers)

    def similarities(self, picture: Picture, token: int) -> list[float]:
        raise ValueError("A server gives no features of a picture: start m3-demo with the checkpoint itself, --model.")

    def as_python(self, picture: Picture, question: str, settings: Settings, numbers: Sequence[int | str]) -> str:
        """Of a model that the operator named, or that a search by beams needs, with its name; never with the key."""
        model = self.model if self.names_model or settings.num_beams > 1 else None
        asked = (picture.name, question, settings, numbers, len(picture.image) if picture.is_video else None)
        return lines_for_server(f"{self.root}/v1", model, *asked, has_key=self.api_key is not None)

    def _model(self, client: Client, tell: Tell) -> str:
        """The name of the model; waits for a server that is still starting."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            tell(f"Waiting for {self.place}", None)
            try:
                found = client.openai.get("/models", cast_to=object)
                break
            except APIError as error:
                if not _is_starting(error) or time.monotonic() > end:
                    raise ValueError(self._sentence(error)) from None
            time.sleep(STEP_SECONDS)
        models = found.get("data") if isinstance(found, dict) else None
        if not isinstance(models, list) or not models or not all(isinstance(m, dict) and "id" in m for m in models):
            raise ValueError(f"{self.place} is no server of OpenAI's interface: at /v1/models it names no models.")
        names = [model["id"] for model in models]
        if self.model not in (None, *names):
            raise ValueError(f"{self.place} has no model {self.model}. Choose from: {', '.join(names)}.")
        return self.model or names[0]

    def _budgets(self, client: Client) -> dict[str, Any] | None:
        """What `m3-serve` tells; None of another server."""
        try:
            found = client.openai.get(self.root + BUDGETS, cast_to=object)
        except APIError as error:
            if getattr(error, "status_code", None) in (404, 405):
                return None
            raise ValueError(self._sentence(error)) from None
        return found if isinstance(found, dict) and found.get("scales") else None

    def _read_checkpoint(self) -> None:
        from transformers import AutoConfig, AutoProcessor  # only here: without a checkpoint the page starts faster

        from modeling_m3.any_checkpoint import find

        found = find(self.checkpoint, revision=self.revision)
        self.processor = AutoProcessor.from_pretrained(found.name, **found.processor_arguments)
        self.config = AutoConfig.from_pretrained(found.name, **found.processor_arguments)

    def _asked(self, messages: Sequence[Message], settings: Settings, urls: dict[str, list[str]]) -> _Asked:
        """A request. Raises `ValueError` for what no server answers in one."""
        pictures = [picture for message in messages for picture in message.pictures]
        numbers = {picture.num_visual_tokens for picture in pictures}
        if len(numbers) > 1:
            several = " and ".join(map(str, sorted(numbers, key=lambda number: (number == AUTO, number))))
            raise ValueError(
                f"The pictures of this chat have {several} visual tokens, but a server has one number for all pictures of a "
                "request: give them the same, or start m3-demo with the checkpoint itself, --model."
            )
        number = numbers.pop() if numbers else None
        if number == AUTO and settings.num_beams > 1:
            raise ValueError("auto goes by an answer's probability, which a server does not tell of beams: use 1 beam.")
        chat = [{"role": "system", "content": settings.system}] if settings.system else []
        for message in messages:
            shown = [url for picture in message.pictures for url in urls[picture.key]]
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in shown]
            chat.append({"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]})
        request = {"messages": chat, "max_tokens": settings.max_new_tokens, "temperature": settings.temperature}
        if settings.num_beams > 1:
            request |= {"n": settings.num_beams, "extra_body": {"use_beam_search": True}}
        if number not in (None, AUTO):
            more = {"mm_processor_kwargs": {"num_visual_tokens": number}}
            request["extra_body"] = {**request.get("extra_body", {}), **more}
        sizes = [(view.height, view.width) for picture in pictures for view in _views(picture)] if self.config else []
        return _Asked(request, number, len(pictures), sizes)

    def _together(self, asked: dict[Any, _Asked], person: Person) -> Iterator[dict[Any, Answer]]:
        """All requests at once, and their answers so far whenever one has grown. What is left at the end is given up."""
        answers = {key: Answer(num_visual_tokens=(one.number,) * one.pictures) for key, one in asked.items()}
        grown, stop = threading.Event(), person.stop

        async def grow(key: Any, one: _Asked) -> None:
            try:
                async for answer in self._automatic(one) if one.number == AUTO else self._streamed(one):
                    answers[key] = answer
                    grown.set()
            except Exception as error:  # of one alone: the others go on
                answers[key] = replace(answers[key], finished="error", error=self._sentence(error))
                grown.set()

        under_way = [asyncio.run_coroutine_threadsafe(grow(key, one), self._loop) for key, one in asked.items()]
        try:
            while any(not future.done() for future in under_way) or grown.is_set():
                if stop.is_set():
                    yield {key: replace(one, finished=one.finished or "stopped") for key, one in answers.items()}
                    return
                if grown.wait(0.05):
                    grown.clear()
                    yield dict(answers)
            for future in under_way:
                future.result()  # raises what is no fault of the server
        finally:
            for future in under_way:
                future.cancel()

    async def _streamed(self, asked: _Asked) -> AsyncIterator[Answer]:
        """An answer, as it is streamed."""
        usage = {"include_usage": True, "continuous_usage_stats": True}  # the second is vLLM's, others leave it out
        answer, text, finished = Answer(num_visual_tokens=(asked.number,) * asked.pictures), "", ""
        cost, begin = Cost(), time.perf_counter()
        create = self._client.openai.chat.completions.create
        async with await create(model=self.model, stream=True, stream_options=usage, **asked.request) as stream:
            async for chunk in stream:
                cost = replace(cost, seconds=time.perf_counter() - begin)
                choice = next((choice for choice in chunk.choices if choice.index == 0), None)  # of beams, the best
                new = (choice.delta.content if choice else "") or ""
                text += new
                if new:
                    cost = replace(cost, answer_tokens=cost.answer_tokens + 1)
                    cost = replace(cost, first_token_seconds=cost.first_token_seconds or cost.seconds)
                if chunk.usage and cost.prefill_flops is None:
                    cost = replace(cost, **self._prompt(asked, [asked.number], chunk.usage))
                if chunk.usage and (choice or "n" not in asked.request):  # at last, it is that of all beams
                    cost = replace(cost, answer_tokens=chunk.usage.completion_tokens)
                finished = (choice.finish_reason if choice else "") or finished
                if new:
                    yield replace(answer, text=text.strip(), cost=cost)
        if not finished:
            raise ValueError(f"{self.place} broke off before the answer was whole.")
        yield replace(answer, text=text.strip(), cost=cost, finished=finished)

    async def _automatic(self, asked: _Asked) -> AsyncIterator[Answer]:
        """An answer by the client's rule, whole: one that is streamed might be thrown away."""
        begin = time.perf_counter()
        found = await self._client.ask([], "", AUTO, **asked.request)
        numbers = _steps(self.scales, SURE)[: found.requests]
        seconds, prompt = time.perf_counter() - begin, self._prompt(asked, numbers, found)
        cost = Cost(**prompt, seconds=seconds, answer_tokens=found.answer_tokens)
        yield Answer(found.text, cost, (found.num_visual_tokens,) * asked.pictures, found.finish_reason)

    def _prompt(self, asked: _Asked, numbers: Sequence[int | None], usage: Any) -> dict[str, Any]:
        """What is known of the prompts of one question at these numbers; as if the server had nothing of them in a cache."""
        known = {"prompt_tokens": usage.prompt_tokens}
        if not asked.pictures:
            known["visual_tokens"] = 0
        elif details := getattr(usage, "prompt_tokens_details", None):  # vLLM's --enable-prompt-tokens-details
            known["visual_tokens"] = (getattr(details, "multimodal_tokens", None) or {}).get("image")
        if self.config is None:
            return known

        from m3_evaluation.operations import language_model, vision
        from modeling_m3.visual_tokens import tile_grid

        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        grids = [tile_grid(size, pinpoints, side) if pinpoints else None for size in asked.sizes]
        layouts = [self.config.image_layout(*view) for view in zip(grids, asked.sizes)]
        counts = [sum(layout.count(number) for layout in layouts) for number in numbers]
        text, tiles = (usage.prompt_tokens - sum(counts)) // len(numbers), sum(layout.num_tiles for layout in layouts)
        parts = [part for count in counts for part in language_model(self.config, 1, text + count, text + count)]
        parts += len(numbers) * vision(self.config, tiles) if tiles else []
        return {**known, "visual_tokens": sum(counts), "prefill_flops": sum(part.times * part.flops for part in parts)}

    def _sentence(self, error: BaseException) -> str:
        """What the server says, or what is wrong with it, without its key. Raises an error that is none of a server's."""
        if isinstance(error, APITimeoutError):
            return f"{self.place} did not answer in time."
        if isinstance(error, (APIConnectionError, *HTTP_ERRORS)):
            return f"{self.place} cannot be asked: {error.__cause__ or error}"
        body, status = getattr(error, "body", None), getattr(error, "status_code", None)
        if isinstance(body, dict) and isinstance(body.get("message"), str):
            said = body["message"]
        elif isinstance(error, APIStatusError):
            said = f"{self.place} answers {status} to {error.request.method} {error.request.url.path}."
        elif isinstance(error, (APIError, ValueError)):
            said = str(error)
        else:
            raise error
        said += " Give the key that the server wants: --api-key." if status in (401, 403) else ""
        return said.replace(self.api_key, "...") if self.api_key else said


@dataclass(frozen=True)
class _Asked:
    """A request.

    Attributes:
        request: of chat completions, but for the model.
        number: of visual tokens per tile, of all pictures; None where there are none.
        pictures: how many, a video being one.
        sizes: (height, width) of every picture and frame, where they are of use.
    """

    request: dict[str, Any]
    number: int | str | None
    pictures: int
    sizes: list[tuple[int, int]]


class _Asker(AsyncClient):
    """Whose scales are known, so that "auto" works with a server that does not tell them."""

    def __init__(self, scales: list[int], *client: Any):
        super().__init__(*client)
        self._known = scales

    async def scales(self) -> list[int]:
        return self._known


def _address(url: str) -> tuple[str, str]:
    """A server's URL without /v1, and its host and port."""
    parts = urlsplit(url.strip())
    if "@" in parts.netloc:
        raise ValueError(f"The URL of {parts.hostname} holds a name or a password: leave it out, and give --api-key.")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is no address of a server: give one as http://localhost:8000.")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}", parts.netloc


def _views(picture: Picture) -> list[Any]:
    return list(picture.image) if picture.is_video else [picture.image]


def _urls(picture: Picture) -> list[str]:
    """The picture, or a video's frames, as they lie: some servers would turn by EXIF, and lay what is transparent on white."""
    plain = [view.convert("RGB") for view in _views(picture)]
    for view in plain:
        view.info = {}
    return [as_url(view) for view in plain]


def _is_starting(error: BaseException | None) -> bool:
    """Whether nothing listens there yet, or a proxy says so."""
    if isinstance(error, APITimeoutError) or getattr(error, "status_code", None) in STARTING:
        return True
    while error is not None and not isinstance(error, ConnectionError):
        error = error.__cause__ or error.__context__
    return error is not None
