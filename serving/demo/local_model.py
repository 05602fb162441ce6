"""A checkpoint in this process, as the page asks it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import modeling_m3
from m3_evaluation import operations
from modeling_m3.any_checkpoint import find
from modeling_m3.automatic_generation_m3 import can_be_cut
from modeling_m3.outputs_m3 import CACHE_NAME, M3LlavaEncodedImages
from modeling_m3.overlay import similarities
from modeling_m3.processing_m3 import MAKES_TEXT_PLAIN

from .as_python import lines_for_checkpoint
from .asking import AUTO, Answer, Compared, Cost, Message, Person, Picture, Settings
from .chat_cache import ChatCache
from .recent import Recent
from .stepwise import StepwiseAnswer


Tell = Callable[[str, float | None], None]
OF_PICTURES = ("pixel_values", "image_sizes", "image_tile_grids", "num_visual_tokens")
CHATS_AT_MOST = 8  # whose keys and values are kept; an older chat is computed anew with its next turn
ENCODED_AT_MOST = 8  # pictures whose features are kept, for the next click into one of them


class LocalModel:
    """See `asking.Model`.

    Args:
        checkpoint: a folder or an id on the Hub; m3-tiny if None.
        quantize, dtype, revision: as `m3-ask` has them.
        device: where to run; the GPU if there is one, if None.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        quantize: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        device: str | None = None,
    ):
        self.checkpoint, self.options = checkpoint, {"quantize": quantize, "dtype": dtype, "revision": revision}
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._encoded = Recent(ENCODED_AT_MOST)
        self._remembered = Recent(CHATS_AT_MOST, Person.take)
        # An answer lets go of it after every token, for who clicks into a picture meanwhile.
        self._computing = threading.Lock()
        self._tokenizing = threading.Lock()  # padding and truncation are a state of the tokenizer; decoding has none

    @property
    def name(self) -> str:
        """Without the folders it lies in: others may see the page."""
        if self.checkpoint is None:
            return "m3-tiny"
        return Path(self.checkpoint).resolve().name if Path(self.checkpoint).is_dir() else self.checkpoint

    def load(self, tell: Tell) -> None:
        tell(f"Looking for {self.name}", None)
        packages = [logging.getLogger(package) for package in (modeling_m3.__name__, "m3_conversion")]
        notices = _Notices(tell)
        for package in packages:
            package.addHandler(notices)
        previous = transformers_logging.set_tqdm_hook(lambda factory, args, kwargs: _Bar(*args, tell=tell, **kwargs))
        try:
            named = modeling_m3.default_checkpoint() if self.checkpoint is None else self.checkpoint
            found = find(named, **self.options)
            self.model, self.processor = found.load(device_map=self.device)
        finally:
            transformers_logging.set_tqdm_hook(previous)
            for package in packages:
                package.removeHandler(notices)
        self.config = self.model.config
        self.model.model.language_model.register_forward_pre_hook(self._count_text, with_kwargs=True)
        self.model.model.vision_tower.register_forward_pre_hook(self._count_tiles)
        self.scales = self.processor.visual_token_scales
        self.offers_auto = len(self.scales) > 1
        self.default = self.processor.num_visual_tokens or self.scales[-1]
        parameters = self.model.num_parameters()
        size = f"{parameters / 1e9:.3g} billion" if parameters >= 1e9 else f"{parameters / 1e6:.2g} million"
        precision = str(self.model.dtype).removeprefix("torch.")
        quantized = getattr(self.config, "quantization_config", None)
        if bits := [bits for bits in (4, 8) if getattr(quantized, f"load_in_{bits}bit", False)]:
            precision += f" with a language model in {bits[0]} bits"
        length = self.config.context_length
        context = "context of any length" if length is None else f"context of {length:,} tokens"
        self.facts = f"{size} parameters, {precision}, on {self.model.device}, {context}"
        tell("Warming up", None)  # the first call is slower
        blank = Picture(Image.new("RGB", (64, 64)), "blank", self.scales[0], "blank")
        for _ in self.answer([Message("user", "?", (blank,))], Settings(max_new_tokens=2), Person()):
            pass

    def answer(self, messages: Sequence[Message], settings: Settings, person: Person) -> Iterator[Answer]:
        pictures = [picture for message in messages for picture in message.pictures]
        inputs = self._inputs(messages, settings.system)
        keys = [(picture.key, picture.num_visual_tokens) for picture in pictures]
        remembers = settings.num_beams == 1 and not any(p.num_visual_tokens == AUTO or p.is_video for p in pictures)
        remembered = person.take()
        if remembers and remembered is not None:
            ids, counts = inputs["input_ids"][0].tolist(), self._counts(inputs)
            length, seen = remembered.shared_with(ids, keys, counts, self.processor.image_token_id)
            if length:
                if beyond := len(remembered.ids) - length:
                    remembered.cache.crop(-beyond)
                inputs = _without_pictures(inputs, seen) | {CACHE_NAME: remembered.cache}
        output = yield from self._growing(inputs, settings, person, [picture.num_visual_tokens for picture in pictures])
        cache = getattr(output, CACHE_NAME, None)
        if remembers and can_be_cut(cache):
            kept = ChatCache(output.sequences[0, : cache.get_seq_length()].tolist(), keys, cache)
            if person.keep(kept):
                self._remembered.put(id(person), person)

    def compare(self, picture: Picture, question: str, settings: Settings, person: Person) -> Iterator[Compared]:
        encoded, seconds, flops = self._encode(picture)
        rows, answers = {}, {}
        for number in [*self.scales, *([AUTO] if self.offers_auto else [])]:
            at = replace(picture, image=encoded, num_visual_tokens=number, is_video=True)
            inputs = self._inputs([Message("user", question, (at,))], settings.system)
            rows[number] = self._growing(inputs | {"encoded_images": encoded}, settings, person, [number])
            answers[number] = Answer(num_visual_tokens=(number,))
        try:
            while rows:
                for number in list(rows):
                    is_first = not answers[number].cost.seconds
                    try:
                        answers[number] = next(rows[number])
                    except StopIteration:
                        del rows[number]
                    except ValueError as error:  # of this row alone: it is longer than the context, most of all
                        answers[number] = replace(answers[number], finished="error", error=str(error))
                        del rows[number]
                    if is_first:
                        yield Compared(dict(answers), seconds, flops)
                yield Compared(dict(answers), seconds, flops)
        finally:
            for row in rows.values():
                row.close()

    def similarities(self, picture: Picture, token: int) -> list[float]:
        encoded = self._encoded.get(picture.key)
        if encoded is None:
            encoded, _, _ = self._encode(picture)
        return similarities(self.model, encoded, token, picture.num_visual_tokens)

    def as_python(self, picture: Picture, question: str, settings: Settings, numbers: Sequence[int | str]) -> str:
        checkpoint = None if self.checkpoint is None else self.name
        has_marks = bool(self._marks_in([settings.system, question]))
        return lines_for_checkpoint(checkpoint, self.options, picture.name, question, settings, numbers, has_marks)

    def _inputs(self, messages: Sequence[Message], system: str) -> dict[str, Any]:
        """A chat's prompt and its pictures, prepared as `m3-ask` does it."""
        chat, numbers = [], []
        if system:
            chat.append({"role": "system", "content": [{"type": "text", "text": system}]})
        for message in messages:
            kinds = ["video" if picture.is_video else "image" for picture in message.pictures]
            media = [{"type": kind, kind: picture.image} for kind, picture in zip(kinds, message.pictures)]
            chat.append({"role": message.role, "content": [*media, {"type": "text", "text": message.text}]})
            numbers += [picture.num_visual_tokens for picture in message.pictures]
        written = self._marks_in([system, *(message.text for message in messages)])
        if written and not MAKES_TEXT_PLAIN:
            raise ValueError(
                f"The question holds {written[0]}, which is no text to a checkpoint: transformers 5.24 can ask it as text."
            )
        with self._tokenizing:
            inputs = self.processor.apply_chat_template(
                chat,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"num_visual_tokens": numbers} if numbers else {},
                **({"sanitize_control_tokens": True} if written else {}),
            )
        return dict(inputs.to(self.model.device))

    def _marks_in(self, texts: Sequence[str]) -> list[str]:
        """What of people's words a tokenizer would take for its own tokens."""
        marks = [token.content for token in self.processor.tokenizer.added_tokens_decoder.values()]
        return [mark for mark in marks if any(mark in text for text in texts)]

    def _growing(
        self, inputs: dict[str, Any], settings: Settings, person: Person, numbers: Sequence[int | str]
    ) -> Generator[Answer, None, Any]:
        """An answer, each time a token more of it; returns what `generate` returned.

        Args:
            numbers: visual tokens of every picture, also of those that a cache holds.
        """
        chooses = AUTO in numbers
        prompt = inputs["input_ids"][0]
        text = int((prompt != self.processor.image_token_id).sum())
        sampling = {"do_sample": settings.temperature > 0}
        if settings.temperature:
            sampling["temperature"] = settings.temperature
        call = {**inputs, **sampling, "num_beams": settings.num_beams, "max_new_tokens": settings.max_new_tokens}
        with _counting() as flops:
            step = StepwiseAnswer(self.model, self.processor.tokenizer, person.stop, flops.end, **call)
        answer = Answer(num_visual_tokens=tuple(numbers))
        cost = Cost() if chooses else Cost(len(prompt) - text, len(prompt))
        try:
            goes_on = True
            while goes_on:
                with self._computing:
                    goes_on = step.step()
                flops.end()
                cost = replace(cost, prefill_flops=flops.count, seconds=step.seconds)
                cost = replace(cost, first_token_seconds=step.first_token_seconds, answer_tokens=step.tokens)
                if not goes_on and chooses:
                    chosen = step.output.num_visual_tokens.tolist()
                    spent, written = step.output.visual_tokens_spent.item(), sum(self._counts(inputs, chosen))
                    answer = replace(answer, num_visual_tokens=tuple(chosen))
                    cost = replace(cost, visual_tokens=spent, prompt_tokens=text + written)
                if not goes_on:
                    answer = replace(answer, finished=self._end(step))
                yield replace(answer, text=step.text, cost=cost)
        finally:
            step.close()
        return step.output

    def _end(self, step: StepwiseAnswer) -> str:
        ends = self.model.generation_config.eos_token_id
        if int(step.output.sequences[0, -1]) in (ends if isinstance(ends, list) else [ends]):
            return "stop"
        return "stopped" if step.is_stopped else "length"

    def _counts(self, inputs: dict[str, Any], numbers: Sequence[int] | None = None) -> list[int]:
        """Visual tokens of each picture of a prompt."""
        if "encoded_images" in inputs:
            layouts = inputs["encoded_images"].layouts
        else:
            layouts = [self.processor.image_layout(inputs, i) for i in range(len(inputs.get("num_visual_tokens", ())))]
        numbers = inputs["num_visual_tokens"].tolist() if numbers is None and layouts else numbers
        return [layout.count(number) for layout, number in zip(layouts, numbers or ())]

    def _encode(self, picture: Picture) -> tuple[M3LlavaEncodedImages, float, float]:
        """A picture's features, and the seconds and FLOPs that it took to compute them."""
        inputs = self._inputs([Message("user", "", (replace(picture, num_visual_tokens=self.scales[0]),))], "")
        with self._computing, _counting() as flops, torch.no_grad():
            begin = time.perf_counter()
            encoded = self.model.encode_images(
                inputs["pixel_values"], inputs.get("image_sizes"), inputs["image_tile_grids"]
            )
            encoded.tile_features.flatten()[0].item()  # a GPU is done by then
            seconds = time.perf_counter() - begin
        self._encoded.put(picture.key, encoded)
        return encoded, seconds, flops.count

    def _count_text(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if flops := _FLOPS.get():
            b, s = kwargs["inputs_embeds"].shape[:2]
            cache = kwargs.get(CACHE_NAME)
            before = 0 if cache is None else int(cache.get_seq_length())
            flops.add(operations.language_model(self.config, b, s, before + s))

    def _count_tiles(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if flops := _FLOPS.get():
            flops.add(operations.vision(self.config, len(args[0])))


class _Flops:
    """Of one prefill, whatever else is computed meanwhile."""

    def __init__(self) -> None:
        self.count, self._ended = 0.0, False

    def add(self, done: Any) -> None:
        if not self._ended:
            self.count += sum(operation.times * operation.flops for operation in done)

    def end(self) -> None:
        self._ended = True


_FLOPS: ContextVar[_Flops | None] = ContextVar("flops", default=None)  # of the prefill that this thread computes


@contextmanager
def _counting() -> Iterator[_Flops]:
    flops = _Flops()
    token = _FLOPS.set(flops)
    try:
        yield flops
    finally:
        _FLOPS.reset(token)


def _without_pictures(inputs: dict[str, Any], seen: int) -> dict[str, Any]:
    """Without the first pictures, which a cache holds."""
    left = len(inputs.get("num_visual_tokens", ())) - seen
    kept = {name: value for name, value in inputs.items() if name not in OF_PICTURES}
    return kept | ({name: inputs[name][seen:] for name in OF_PICTURES if name in inputs} if left else {})


class _Bar(tqdm):
    """A progress bar of transformers that tells the page."""

    def __init__(self, *args: Any, tell: Tell, **kwargs: Any):
        self.tell = tell
        super().__init__(*args, **{**kwargs, "disable": False, "gui": True})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self.tell(self.desc.rstrip(": "), self.n / self.total if self.total else None)


class _Notices(logging.Handler):
    """What finding a checkpoint says about itself, such as that it is converted first."""

    def __init__(self, tell: Tell):
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(record.getMessage(), None)
