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

from .asking import AUTO, Model, Person, Picture, Settings
from .loading import Loading
from .people import People, open_upload
from .rendering import problem_html, status_html


logger = logging.getLogger(__name__)

EXPECTED = (ValueError, OSError, ImportError, NotImplementedError)  # their sentences are for users

DRAWINGS_AT_ONCE = 4
LENGTHS, TEMPERATURES, BEAMS = (1, 1024), (0, 2), (1, 8)  # from which to which

Upload = dict[str, Any]  # what gradio says about a file that somebody uploaded: its "path" here, its "orig_name" there


def picture_input(label: str, height: int, elem_id: str) -> gr.Image:
    """By upload, from the clipboard or the camera. Handlers get an `Upload`."""
    sources = ["upload", "clipboard", "webcam"]
    # A mirrored picture, which gradio takes otherwise, is another: nothing in it can be read.
    video = {"facingMode": "environment", "width": {"ideal": 1920}, "height": {"ideal": 1440}}
    camera = gr.WebcamOptions(mirror=False, constraints={"video": video})
    look = {"label": label, "height": height, "elem_id": elem_id, "buttons": []}
    return gr.Image(sources=sources, webcam_options=camera, type="filepath", **look)


@dataclass
class Shared:
    """What all tabs work with.

    Attributes:
        picture, question: of the tabs about one picture.
        settings: the controls under "More", in the order that `settings_of` takes.
        fills: controls that offer what the model has, and how to fill them once it is known.
    """

    loading: Loading
    people: People
    at_once: int
    settings: list[gr.components.Component]
    picture: gr.Image | None = None
    question: gr.Textbox | None = None
    fills: dict[gr.components.Component, Callable[[], dict[str, Any]]] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        """Handlers are called once it is there."""
        return self.loading.model

    def number_control(self, label: str, info: str | None = None, auto: bool = True, among: int = 1) -> gr.Radio:
        """Offers the checkpoint's numbers of visual tokens, once it is there.

        Args:
            auto: whether "auto" is one of them.
            among: how many frames share what one picture may cost, at first.
        """

        def offered() -> dict[str, Any]:
            scales, value = self.loading.scales, self.loading.default
            if scales and (among > 1 or (value == AUTO and not auto)):
                value = max((scale for scale in scales if scale * among <= max(scales)), default=min(scales))
            return {"choices": [*scales, *([AUTO] if auto and len(scales) > 1 else [])], "value": value}

        radio = gr.Radio(**offered(), label=label, info=info, elem_classes="m3-numbers")
        self.fills[radio] = offered
        return radio

    def ask_and_stop(self, text: str) -> tuple[gr.Button, gr.Button]:
        """A button that asks the model, and one that ends what it says."""
        with gr.Row(elem_classes="m3-buttons"):
            ask, stop = gr.Button(text, variant="primary", size="md"), gr.Button("Stop", size="md")
        stop.click(self._stop, queue=False, show_progress="hidden", api_visibility="private")
        return ask, stop

    def on(
        self,
        triggers: list[Any],
        handler: Callable[..., Any],
        inputs: list[Any],
        outputs: list[Any],
        where: Any,
        draws: bool = False,
    ) -> Any:
        """Has a handler answer to events, in a queue, with its errors as sentences in the component `where`.

        One that `draws`, and asks nothing, does not wait for answers to others; of several it is the last that counts.
        """
        return gr.on(
            triggers,
            self.answering(handler, where),
            inputs,
            outputs,
            concurrency_id="drawing" if draws else "model",
            concurrency_limit=DRAWINGS_AT_ONCE if draws else self.at_once,
            show_progress="minimal",
            show_progress_on=where,
            trigger_mode="always_last" if draws else "once",
            preprocess=False,  # gradio would open pictures its own way; whether they were uploaded it has checked
            api_visibility="private",
        )

    def answering(self, handler: Callable[..., Iterable[Any]], where: Any) -> Callable[..., Iterator[Any]]:
        """A handler that waits for the model, and whose errors appear as sentences in a component.

        Those that nobody expected are told to the log as well.
        """

        @functools.wraps(handler)  # gradio looks at its signature
        def told(request: gr.Request, *args: Any) -> Iterator[Any]:
            person = self.people.of(request)
            try:
                for _ in self.loading.changes():
                    if not self.loading.is_ready:
                        yield {where: status_html(*self.loading.told, False, self.loading.sentence)}
                if self.loading.is_ready:
                    yield from handler(request, *args)
            except EXPECTED as error:
                yield {where: problem_html(" ".join(str(error).split()))}
            except Exception:  # gradio would show a bare "Error" on the page
                logger.exception("an answer failed")
                yield {where: problem_html("This failed, and not by your doing. What the command printed says why.")}
            finally:
                if person.is_gone:  # what was made since then goes, too
                    self.people.forget(request)

        return told

    def registers(self, medium: gr.components.Component) -> None:
        """Has the file of an upload go with who uploaded it, whether or not anything is asked about it."""

        def uploaded(upload: Upload | None, request: gr.Request) -> None:
            self.people.of(request, upload and upload["path"])

        medium.upload(uploaded, medium, queue=False, show_progress="hidden", preprocess=False, api_visibility="private")

    def person(self, request: gr.Request, *uploads: Upload | None) -> Person:
        """Whose event this is, ready for an answer."""
        person = self.people.of(request, *(upload and upload["path"] for upload in uploads))
        person.begin()
        return person

    def opened(self, upload: Upload | None, number: int | str | None) -> Picture:
        if upload is None:
            raise ValueError("There is no picture yet: upload one, paste it, or take an example.")
        return open_upload(upload["path"], name_of(upload), self.model.default if number is None else number)

    def _stop(self, request: gr.Request) -> None:
        self.people.of(request).stop_all()


def more_settings() -> list[gr.components.Component]:
    """Controls that are not shown yet."""
    return [
        gr.Textbox("", label="System prompt", lines=2, render=False),
        gr.Slider(*LENGTHS, 256, step=1, label="Length of the answer at most, in tokens", render=False),
        gr.Slider(*TEMPERATURES, 0, step=0.1, label="Temperature", info="0: always the likeliest word", render=False),
        gr.Slider(*BEAMS, 1, step=1, label="Beams", info="More than 1: an answer appears as a whole", render=False),
    ]


def settings_of(system: str, length: float, temperature: float, beams: float) -> Settings:
    """Raises `ValueError` for numbers that the controls do not let people choose: they come from a browser."""
    given = {"length": (length, LENGTHS), "temperature": (temperature, TEMPERATURES), "beams": (beams, BEAMS)}
    for name, (value, (least, most)) in given.items():
        if type(value) not in (int, float) or not least <= value <= most:
            raise ValueError(f"{name}={value!r} must be a number from {least} to {most}.")
    return Settings(str(system).strip(), int(length), float(temperature), int(beams))


def name_of(upload: Upload) -> str:
    """Of the file, where it came from."""
    return upload.get("orig_name") or Path(upload["path"]).name


def python_lines() -> gr.Textbox:
    """A place for the Python lines that repeat what is shown, and a button that copies them."""
    with gr.Accordion("The same in Python", open=False):
        lines = gr.Textbox(label="Python lines", lines=4, max_lines=20, interactive=False, elem_classes="m3-python")
    copy = gr.Button("Copy as Python", size="sm", elem_classes="m3-copy")
    copy.click(None, lines, js="(lines) => window.m3Copy(lines)", api_visibility="private")
    return lines


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
