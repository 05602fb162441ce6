"""The tab that shows the picture as the model sees it, with its visual tokens drawn over it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gradio as gr

from .controls import Shared, Upload
from .rendering import notes_html


DRAWINGS = [("Grid", "grid"), ("Mean colours", "mean"), ("Similarity to one token", "similarity")]


def see_tab(shared: Shared, tab: gr.Tab) -> None:
    number = shared.number_control("Visual tokens", "What each view of the picture is averaged to", auto=False)
    drawing = gr.Radio(DRAWINGS, value="grid", label="Show")
    token = gr.Slider(1, 2, 1, step=1, label="Token", info="In reading order; or click into the picture")
    notes = gr.HTML()
    shown = gr.Image(
        label="As the model sees it",
        type="filepath",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="m3-seen",
        alt_text="The picture as the model sees it; a click chooses a token",
    )

    def draw(
        request: gr.Request, upload: Upload | None, scale: int | None, what: str, token_number: float
    ) -> Iterator[dict[Any, Any]]:
        from modeling_m3.overlay import see

        shared.people.of(request, upload and upload["path"])
        if upload is None or scale is None:
            yield {
                shown: None,
                notes: notes_html("Upload a picture at the left, and it is shown as the model sees it."),
            }
            return
        if shared.model.processor is None:
            raise ValueError(
                "A server does not tell how its model sees: start m3-demo with --model, too, of the same checkpoint."
            )
        picture = shared.opened(upload, scale)
        seen = see(shared.model.processor, picture.image)
        boxes = seen.boxes(scale)
        at = min(int(token_number), len(boxes)) - 1
        values, chosen = None, None
        words = f"{len(boxes):,} visual tokens: {_views(seen, scale)}"
        if what == "similarity":
            values, chosen = shared.model.similarities(picture, at), at
            words = f"How similar each token is to {boxes[at].describe()}: from dark (unlike) to yellow (alike)."
        file = shared.people.new_file(request, f"m3-{what}-{scale}.png")
        seen.draw(scale, what, values, chosen).save(file)
        shared.people.draw(request, str(file))
        # The value only where it has to change: people may have gone on to another token meanwhile.
        limit = gr.update(maximum=max(2, len(boxes)), **({} if at + 1 == token_number else {"value": at + 1}))
        yield {shown: str(file), notes: notes_html(words), token: limit}

    def draw_if_open(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        if shared.people.of(request).tab == "See":
            yield from draw(request, *values)
        else:
            yield {notes: gr.skip()}  # where nothing is yielded gradio empties every output

    def choose(
        request: gr.Request, event: gr.SelectData, upload: Upload | None, scale: int | None
    ) -> Iterator[dict[Any, Any]]:
        from modeling_m3.overlay import see

        found = None
        if upload is not None and scale is not None and shared.model.processor is not None:
            seen = see(shared.model.processor, shared.opened(upload, scale).image)
            found = seen.token_at(*event.index, scale)
        if found is None:
            yield {notes: notes_html("There is no visual token here.")}
        else:
            yield {token: found + 1, drawing: "similarity"}

    outputs = [shown, notes, token, drawing]
    inputs = [shared.picture, number, drawing, token]
    triggers = [tab.select, number.change, drawing.change, token.change]
    shared.on(triggers, draw, inputs, outputs, notes, draws=True)
    shared.on([shared.picture.change], draw_if_open, inputs, outputs, notes, draws=True)
    shared.on([shown.select], choose, [shared.picture, number], outputs, notes, draws=True)


def _views(seen: Any, scale: int) -> str:
    side = math.isqrt(scale)
    grid = f"{side} x {side} for each view"
    return f"{grid}, the base view and {seen.layout.num_tiles - 1} tiles." if seen.canvas else f"{side} x {side}."
