"""The tab for videos: the frames that the model is shown, each with what it costs, and a question about them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from modeling_m3.questions import check_question

from .asking import AUTO, Message, Person, Picture
from .controls import Shared, Upload, name_of, paced, settings_of
from .rendering import answer_html, cost_html


FRAMES, MOST_FRAMES = 6, 64


def video_tab(shared: Shared, tab: gr.Tab) -> None:
    video = gr.Video(label="Video", sources=["upload"], height=240, buttons=[], elem_id="m3-video")
    shared.registers(video)
    frames = gr.Slider(1, MOST_FRAMES, FRAMES, step=1, label="Frames", info="Evenly spaced")
    number = shared.number_control("Visual tokens of each frame", among=FRAMES)
    question = gr.Textbox(label="Question about the video", max_lines=6)
    ask, _ = shared.ask_and_stop("Ask about the video")
    shown = gr.HTML(answer_html(None))
    costs = gr.HTML(cost_html(None))
    drawn = gr.HTML()

    def sampled(upload: Upload | None, scale: int | str | None, count: float) -> Picture:
        from modeling_m3.videos import sample_video

        if upload is None:
            raise ValueError("There is no video yet: upload one.")
        scale = shared.model.default if scale is None else scale
        if type(count) not in (int, float) or not 1 <= count <= MOST_FRAMES:
            raise ValueError(f"frames={count!r} must be a number from 1 to {MOST_FRAMES}.")
        frames = sample_video(upload["path"], num_frames=int(count))
        return Picture(frames, name_of(upload), scale, upload["path"], is_video=True)

    def draw(
        request: gr.Request, upload: Upload | None, count: float, scale: int | str | None
    ) -> Iterator[dict[Any, Any]]:
        shared.people.of(request, upload and upload["path"])
        yield {drawn: "" if upload is None else frames_html(shared.model.processor, sampled(upload, scale, count))}

    def answer(
        request: gr.Request, upload: Upload | None, count: float, scale: int | str | None, words: str, *settings: Any
    ) -> Iterator[dict[Any, Any]]:
        person = Person(shared.person(request, upload).stop)
        picture, how = sampled(upload, scale, count), settings_of(*settings)
        messages = [Message("user", check_question(words), (picture,))]
        for said in paced(shared.model.answer(messages, how, person)):
            yield {shown: answer_html(said), costs: cost_html(said)}

    shared.on([video.change, frames.release, number.change], draw, [video, frames, number], [drawn], drawn, draws=True)
    inputs = [video, frames, number, question, *shared.settings]
    shared.on([ask.click, question.submit], answer, inputs, [shown, costs], shown)


def frames_html(processor: Any, video: Picture) -> str:
    """The frames with their visual tokens drawn over them, when each is shown, and what it costs."""
    from modeling_m3.overlay import see

    drawings = []
    times = video.image.timestamps or [None] * len(video.image)
    for place, (frame, moment) in enumerate(zip(video.image, times), start=1):
        if processor is not None:
            seen = see(processor, frame)
            seen = replace(seen, canvas=None, layout=replace(seen.layout, grid=None, size=None))  # a frame is one view
            scale = max(seen.scales) if video.num_visual_tokens == AUTO else video.num_visual_tokens
            frame = seen.draw(scale)
        written = io.BytesIO()
        frame.convert("RGB").save(written, "JPEG", quality=85)
        content = base64.b64encode(written.getvalue()).decode()
        when = "" if moment is None else f" at {moment:.1f} s"
        said = html.escape(f"Frame {place}{when}: {video.num_visual_tokens} visual tokens")
        drawings.append(
            f'<figure><img alt="" src="data:image/jpeg;base64,{content}"><figcaption>{said}</figcaption></figure>'
        )
    return f'<div class="m3-frames">{"".join(drawings)}</div>'
