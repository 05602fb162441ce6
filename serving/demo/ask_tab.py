"""The tabs that ask about the picture: at one number of visual tokens, and at all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from modeling_m3.questions import check_question

from .asking import Message, Person
from .controls import Shared, Upload, paced, python_lines, settings_of
from .rendering import answer_html, compared_html, cost_html


def ask_tab(shared: Shared, tab: gr.Tab) -> None:
    number = shared.number_control(
        "Visual tokens", "From the coarse to the fine: what the picture may cost, or each tile of it"
    )
    ask, _ = shared.ask_and_stop("Ask")
    shown = gr.HTML(answer_html(None))
    costs = gr.HTML(cost_html(None))
    lines = python_lines()

    def answer(
        request: gr.Request, upload: Upload | None, question: str, number: int | str | None, *settings: Any
    ) -> Iterator[dict[Any, Any]]:
        person = Person(shared.person(request, upload).stop)
        yield {costs: cost_html(None), lines: ""}
        question, picture, how = check_question(question), shared.opened(upload, number), settings_of(*settings)
        messages = [Message("user", question, (picture,))]
        for said in paced(shared.model.answer(messages, how, person)):
            yield {shown: answer_html(said), costs: cost_html(said)}
        yield {lines: shared.model.as_python(picture, question, how, [picture.num_visual_tokens])}

    inputs = [shared.picture, shared.question, number, *shared.settings]
    shared.on([ask.click], answer, inputs, [shown, costs, lines], shown)


def compare_tab(shared: Shared, tab: gr.Tab) -> None:
    gr.HTML("<p>The same question at every number of visual tokens, from one encoding of the picture.</p>")
    ask, _ = shared.ask_and_stop("Compare")
    shown = gr.HTML(compared_html(None))
    lines = python_lines()

    def compare(request: gr.Request, upload: Upload | None, question: str, *settings: Any) -> Iterator[dict[Any, Any]]:
        person = Person(shared.person(request, upload).stop)
        yield {lines: ""}
        question, picture, how = check_question(question), shared.opened(upload, None), settings_of(*settings)
        for compared in paced(shared.model.compare(picture, question, how, person)):
            yield {shown: compared_html(compared)}
        yield {lines: shared.model.as_python(picture, question, how, list(compared.answers))}

    shared.on([ask.click], compare, [shared.picture, shared.question, *shared.settings], [shown, lines], shown)
