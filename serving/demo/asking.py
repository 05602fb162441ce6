"""What the page asks a model, and what it hears: the same words for a checkpoint in this process and for a server."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

from PIL import Image


AUTO = "auto"  # as modeling_m3.visual_tokens has it, which brings torch: the page is there before that


@dataclass(frozen=True)
class Picture:
    """A picture, or the frames of a video, and what each tile or frame may cost.

    Attributes:
        image: the picture; a video's frames, as `sample_video` took them.
        name: of the user's file.
        num_visual_tokens: a scale of the checkpoint, or "auto".
        key: the same for the same pixels.
    """

    image: Image.Image | Any
    name: str
    num_visual_tokens: int | str
    key: str
    is_video: bool = False


@dataclass(frozen=True)
class Message:
    """A turn of a chat. `role` is "user" or "assistant"."""

    role: str
    text: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How a model answers. Greedy at temperature 0; `num_beams` above 1 answers all at once.

    Raises:
        ValueError: for a number that cannot be, or temperature and beams together.
    """

    system: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("num_beams", 1), ("temperature", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)!r}: it must be {least} or more.")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"{self.num_beams} beams search for the likeliest answer, a temperature of {self.temperature:g} draws one: "
                "set the temperature to 0, or use 1 beam."
            )


@dataclass(frozen=True)
class Cost:
    """What an answer took, as far as it is known by now.

    Attributes:
        visual_tokens: of all pictures, in the prompt; of "auto", in all its passes.
        prompt_tokens: visual tokens and text.
        prefill_flops: of the vision tower, the projector and the prompt, what a cache held not counted; None where the shape
            of the model is not known.
        first_token_seconds, seconds: until the first token, and until now.
        answer_tokens: so far.
    """

    visual_tokens: int | None = None
    prompt_tokens: int | None = None
    prefill_flops: float | None = None
    first_token_seconds: float | None = None
    seconds: float = 0.0
    answer_tokens: int | None = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first."""
        if self.first_token_seconds is None or not self.answer_tokens or self.answer_tokens < 2:
            return None
        return (self.answer_tokens - 1) / max(self.seconds - self.first_token_seconds, 1e-9)


@dataclass(frozen=True)
class Answer:
    """An answer as far as it came.

    Attributes:
        num_visual_tokens: per tile, of each picture; what "auto" came to, once that is known.
        finished: "" while more comes, then "stop", "length" of one that reached its limit, or "stopped" by the user.
        error: a sentence, where there is no answer.
    """

    text: str = ""
    cost: Cost = Cost()
    num_visual_tokens: tuple[int | str, ...] = ()
    finished: str = ""
    error: str = ""


@dataclass
class Person:
    """One open page: what is kept between its questions, and goes with it. Several threads may be at work for one.

    Attributes:
        stop: of the answer that was asked for last; set once the user wants no more of it.
        kept: what a model remembers of the chat; nothing while an answer has it.
        chat: what was said.
        drawing: the file of the picture that was drawn last.
        tab: that is open.
        is_gone: whether the page was closed, maybe while an answer was under way.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    kept: Any = None
    chat: Any = None
    drawing: str = ""
    tab: str = ""
    is_gone: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _stops: WeakSet[threading.Event] = field(default_factory=WeakSet, repr=False, compare=False)

    def begin(self) -> None:
        """Another answer is asked for; those of before that were stopped stay so."""
        with self.lock:
            self._stops.add(self.stop)
            self.stop = threading.Event()

    def stop_all(self) -> None:
        """No more of any answer under way."""
        with self.lock:
            for stop in (self.stop, *self._stops):
                stop.set()

    def take(self) -> Any:
        """What is kept, for one answer alone, which changes it."""
        with self.lock:
            kept, self.kept = self.kept, None
        return kept

    def keep(self, kept: Any) -> bool:
        """Keeps it for the next answer; not of who has left."""
        with self.lock:
            self.kept = None if self.is_gone else kept
            return not self.is_gone

    def leave(self) -> None:
        """Nothing is kept of them any more."""
        with self.lock:
            self.is_gone, self.kept, self.chat = True, None, None
        self.stop_all()

    def forget_chat(self) -> None:
        with self.lock:
            self.kept = self.chat = None
        self.stop_all()


class Model(Protocol):
    """What answers. Everything but `name` is there only after `load`."""

    name: str
    scales: list[int]  # from the coarse to the fine
    offers_auto: bool
    default: int | str
    processor: Any  # None where pictures cannot be shown as the model sees them
    facts: str  # what is said about it once it is there

    def load(self, tell: Any) -> None:
        """Gets ready; `tell(words, share)` hears how far it is, share from 0 to 1 or None."""

    def answer(self, messages: Sequence[Message], settings: Settings, person: Person) -> Iterator[Answer]:
        """To the last message, as it comes."""

    def compare(self, picture: Picture, question: str, settings: Settings, person: Person) -> Iterator[Compared]:
        """Of one picture at every scale, and by "auto" where there is a choice; they come together."""

    def similarities(self, picture: Picture, token: int) -> list[float]:
        """Of one visual token to each of the picture's."""

    def as_python(self, picture: Picture, question: str, settings: Settings, numbers: Sequence[int | str]) -> str:
        """The lines that repeat it."""


@dataclass(frozen=True)
class Compared:
    """Answers by number of visual tokens, from the coarse to the fine, and what encoding the picture took, once for all."""

    answers: dict[int | str, Answer]
    encoding_seconds: float | None = None
    encoding_flops: float | None = None
