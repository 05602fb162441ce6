"""What the tabs of the page share: controls, and how a handler's answers and errors come to the page."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from .asking import Model, Person, Picture, Settings
from .people import People, open_upload
from .rendering import problem_html


logger = logging.getLogger(__name__)

EXPECTED = (ValueError, OSError, ImportError, NotImplementedError)  # their sentences are for users


@dataclass(frozen=True)
class Upload:
    """A file that somebody uploaded, and its name there."""

    path: str
    name: str


def picture_input(label: str, height: int, elem_id: str) -> gr.Image:
    """By upload, from the clipboard or the camera. Handlers get an `Upload`."""
    sources = ["upload", "clipboard", "webcam"]
    return _as_uploaded(
        gr.Image(label=label, height=height, elem_id=elem_id, sources=sources, type="filepath", buttons=[])
    )


def video_input(label: str, height: int, elem_id: str) -> gr.Video:
    """By upload. Handlers get an `Upload`."""
    return _as_uploaded(gr.Video(label=label, height=height, elem_id=elem_id, sources=["upload"], buttons=[]))


def _as_uploaded(medium: Any) -> Any:
    """Gives handlers the file as it is: `m3-ask` and we open it alike, with a sentence where it is none.

    On the object and not in a class of our own: gradio writes a file of types beside the code of each.
    """

    def preprocess(payload: Any) -> Upload | None:
        if payload is None or payload.path is None:
            return None
        return Upload(payload.path, payload.orig_name or Path(payload.path).name)

    medium.preprocess = preprocess
    return medium


@dataclass
class Shared:
    """What all tabs work with.

    Attributes:
        picture, question: of the tabs about one picture.
        settings: the controls under "More", in the order that `settings_of` takes.
        numbers: controls that offer the checkpoint's numbers of visual tokens, filled once it is there; and whether "auto" is one.
        buttons: that can be pressed from then on.
    """

    model: Model
    people: People
    settings: list[gr.components.Component]
    picture: gr.Image | None = None
    question: gr.Textbox | None = None
    numbers: list[tuple[gr.Radio, bool]] = field(default_factory=list)
    buttons: list[gr.Button] = field(default_factory=list)

    def number_control(self, label: str, info: str | None = None, auto: bool = True) -> gr.Radio:
        radio = gr.Radio([], label=label, info=info, elem_classes="m3-numbers")
        self.numbers.append((radio, auto))
        return radio

    def ask_and_stop(self, text: str) -> tuple[gr.Button, gr.Button]:
        """A button that asks the model, and one that ends what it says."""
        with gr.Row(elem_classes="m3-buttons"):
            ask, stop = gr.Button(text, variant="primary", size="md", interactive=False), gr.Button("Stop", size="md")
        self.buttons.append(ask)
        stop.click(self._stop, queue=False, show_progress="hidden", api_visibility="private")
        return ask, stop

    def on(
        self,
        triggers: list[Any],
        handler: Callable[..., Any],
        inputs: list[Any],
        outputs: list[Any],
        where: Any,
        trigger_mode: str = "once",
    ) -> Any:
        """Has a handler answer to events, in the queue for the model, with its errors as sentences in the component `where`."""
        return gr.on(
            triggers,
            in_sentences(handler, where),
            inputs,
            outputs,
            concurrency_id="model",
            concurrency_limit=self.model.at_once,
            show_progress="minimal",
            show_progress_on=where,
            trigger_mode=trigger_mode,
            api_visibility="private",
        )

    def registers(self, medium: gr.components.Component) -> None:
        """Has the file of an upload go with who uploaded it, whether or not anything is asked about it."""

        def uploaded(upload: Upload | None, request: gr.Request) -> None:
            self.people.of(request, upload and upload.path)

        medium.upload(uploaded, medium, queue=False, show_progress="hidden", api_visibility="private")

    def person(self, request: gr.Request, *uploads: Upload | None) -> Person:
        """Whose event this is, ready for an answer."""
        person = self.people.of(request, *(upload and upload.path for upload in uploads))
        person.stop.clear()
        return person

    def opened(self, upload: Upload | None, number: int | str | None) -> Picture:
        if upload is None:
            raise ValueError("There is no picture yet: upload one, paste it, or take an example.")
        return open_upload(upload.path, upload.name, self.model.default if number is None else number)

    def _stop(self, request: gr.Request) -> None:
        self.people.of(request).stop.set()


def more_settings() -> list[gr.components.Component]:
    """Controls that are not shown yet."""
    return [
        gr.Textbox("", label="System prompt", lines=2, render=False),
        gr.Slider(1, 1024, 256, step=1, label="Length of the answer at most, in tokens", render=False),
        gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: always the likeliest word", render=False),
        gr.Slider(1, 8, 1, step=1, label="Beams", info="More than 1: an answer appears as a whole", render=False),
    ]


def settings_of(system: str, length: float, temperature: float, beams: float) -> Settings:
    return Settings(system.strip(), int(length), float(temperature), int(beams))


def asked(question: str) -> str:
    """Raises `ValueError` for a question without words."""
    if not question.strip():
        raise ValueError("There is no question yet: write one first.")
    return question


def python_lines() -> gr.Textbox:
    """A place for the Python lines that repeat what is shown, and a button that copies them."""
    with gr.Accordion("The same in Python", open=False):
        lines = gr.Textbox(label="Python lines", lines=4, max_lines=20, interactive=False, elem_classes="m3-python")
    copy = gr.Button("Copy as Python", size="sm", elem_classes="m3-copy")
    copy.click(None, lines, js="(lines) => window.m3Copy(lines)", api_visibility="private")
    return lines


def in_sentences(handler: Callable[..., Iterable[Any]], where: Any) -> Callable[..., Iterator[Any]]:
    """A handler whose errors appear as sentences in a component; those that nobody expected are told to the log as well."""

    @functools.wraps(handler)
    def told(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from handler(*args, **kwargs)
        except EXPECTED as error:
            yield {where: problem_html(" ".join(str(error).split()))}
        except Exception:
            logger.exception("an answer failed")
            yield {where: problem_html("This failed, and not by your doing. What the command printed says why.")}

    return told


def paced(answers: Iterator[Any], every: float = 0.05) -> Iterator[Any]:
    """The answers, so often that a page can follow, and the last one."""
    shown, last, pending = 0.0, None, False
    with closing(answers):
        for last in answers:
            pending = time.monotonic() - shown < every
            if not pending:
                yield last
                shown = time.monotonic()
        if pending:
            yield last
