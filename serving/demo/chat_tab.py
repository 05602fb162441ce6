"""The tab for chats: several turns, several pictures, each at its own number of visual tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from modeling_m3.questions import check_question

from .asking import Message, Person
from .chats import Chat, chat_of
from .controls import Shared, Upload, paced, picture_input, settings_of
from .rendering import ENDS, cost_html, notes_html


def chat_tab(shared: Shared, tab: gr.Tab) -> None:
    talk = gr.Chatbot(
        label="Chat",
        height=380,
        buttons=["copy"],
        feedback_options=None,
        placeholder="Ask about one picture or several, turn after turn.",
        elem_id="m3-talk",
    )
    problem, costs = gr.HTML(), gr.HTML(cost_html(None))
    text = gr.Textbox(label="Message", max_lines=6, elem_id="m3-message")
    send, _ = shared.ask_and_stop("Send")
    with gr.Row(elem_classes="m3-buttons"):
        retry, anew = gr.Button("Retry", size="md"), gr.Button("New chat", size="md")
    with gr.Accordion("Picture for the next message", open=True):
        picture = picture_input("Picture of the chat", 200, "m3-chat-picture")
        shared.registers(picture)
        number = shared.number_control("Visual tokens of this picture")
        add = gr.Button("Add another picture", size="md", elem_classes="m3-copy")

    def take(request: gr.Request, upload: Upload | None, scale: int | str | None) -> Iterator[dict[Any, Any]]:
        chat = chat_of(shared.people.of(request, upload and upload["path"]))
        waiting = chat.add((shared.opened(upload, scale), upload["path"]))
        names = ", ".join(f"{held.name} at {held.num_visual_tokens}" for held in waiting)
        yield {picture: None, problem: notes_html(f"With the next message: {names}.")}

    def say(
        request: gr.Request, words: str, upload: Upload | None, scale: int | str | None, *settings: Any
    ) -> Iterator[dict[Any, Any]]:
        chat = chat_of(shared.people.of(request, upload and upload["path"]))
        with chat.turn():
            person, how = shared.person(request), settings_of(*settings)
            words, last = check_question(words), [(shared.opened(upload, scale), upload["path"])] if upload else []
            new, before = [*chat.take(), *last], list(chat.shown)
            for held, file in new:
                named = f"{held.name}, {held.num_visual_tokens} visual tokens"
                chat.shown += [
                    {"role": "user", "content": {"path": file, "alt_text": named}},
                    {"role": "user", "content": f"*{held.num_visual_tokens} visual tokens*"},
                ]
            chat.shown.append({"role": "user", "content": words})
            chat.messages.append(Message("user", words, tuple(held for held, _ in new)))
            yield {talk: chat.shown, text: "", picture: None, problem: ""}
            try:
                yield from answer(chat, person, how)
            except Exception:  # whatever it was is told by who called; a turn without an answer is none
                chat.messages.pop()
                chat.shown = before
                yield {talk: before, text: words}
                raise

    def again(request: gr.Request, *settings: Any) -> Iterator[dict[Any, Any]]:
        chat = chat_of(shared.people.of(request))
        with chat.turn():
            person = shared.person(request)
            if len(chat.messages) < 2:
                raise ValueError("There is no answer yet that could be tried again.")
            how, messages, shown = settings_of(*settings), list(chat.messages), list(chat.shown)
            chat.messages.pop()
            chat.shown.pop()
            yield {problem: ""}
            try:
                yield from answer(chat, person, how)
            except Exception:  # as above: the earlier answer stays
                chat.messages, chat.shown = messages, shown
                yield {talk: shown}
                raise

    def answer(chat: Chat, person: Person, how: Any) -> Iterator[dict[Any, Any]]:
        said = None
        for said in paced(shared.model.answer(chat.messages, how, person)):
            end = f" *({ENDS[said.finished]})*" if said.finished in ENDS else ""
            yield {talk: [*chat.shown, {"role": "assistant", "content": said.text + end}], costs: cost_html(said)}
        chosen = iter(said.num_visual_tokens)
        chat.messages[:] = [*_at_chosen(chat.messages, chosen), Message("assistant", said.text)]
        chat.shown.append({"role": "assistant", "content": said.text + end})

    def forget(request: gr.Request) -> Iterator[dict[Any, Any]]:
        shared.people.of(request).forget_chat()
        yield {talk: [], text: "", picture: None, problem: "", costs: cost_html(None)}

    outputs = [talk, text, picture, problem, costs]
    shared.on([send.click, text.submit], say, [text, picture, number, *shared.settings], outputs, problem)
    shared.on([retry.click], again, shared.settings, outputs, problem)
    shared.on([add.click], take, [picture, number], outputs, problem, draws=True)
    shared.on([anew.click, talk.clear], forget, [], outputs, problem, draws=True)


def _at_chosen(messages: list[Message], chosen: Iterator[int]) -> Iterator[Message]:
    """What "auto" came to stays, so that later turns need not look again."""
    for message in messages:
        pictures = tuple(
            replace(held, num_visual_tokens=next(chosen, held.num_visual_tokens)) for held in message.pictures
        )
        yield replace(message, pictures=pictures)
