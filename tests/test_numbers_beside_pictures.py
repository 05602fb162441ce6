"""A number beside a picture of a chat is that picture's: inputs and answers are those of the same numbers given in a list."""

import base64
import io
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHECKPOINTS, GOLDENS, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel
from test_processing import tiny_processor
from transformers import pipeline

from m3_conversion.chat_templates import CHAT_TEMPLATES
from modeling_m3.processing_m3 import MAKES_TEXT_PLAIN


NAMES = ["img3_1000x300.png", "img1_640x480.png", "img5_97x53.png"]
QUESTION = {"type": "text", "text": "What is this?"}
ALL = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def image(number=None, name="img5_97x53.png"):
    part = {"type": "image", "image": picture(name)}
    return part if number is None else {**part, "num_visual_tokens": number}


def chat(*parts):
    return [{"role": "user", "content": [*parts, QUESTION]}]


def without_numbers(chat):
    parts = [
        [{key: part[key] for key in part if key != "num_visual_tokens"} for part in turn["content"]] for turn in chat
    ]
    return [{**turn, "content": content} for turn, content in zip(chat, parts)]


def told(conversation):
    """All keys of a conversation, and what stands there but pictures."""
    if isinstance(conversation, list):
        return [told(entry) for entry in conversation]
    if isinstance(conversation, dict):
        return {key: told(value) for key, value in conversation.items()}
    return type(conversation) if isinstance(conversation, Image.Image) else repr(conversation)


def prepared(processor, conversation, **options):
    return processor.apply_chat_template(conversation, **ALL, processor_kwargs=options)


def equal(inputs, others):
    return inputs.keys() == others.keys() and all(torch.equal(inputs[name], others[name]) for name in inputs)


SCALES = [1, 4, 9, 16, 36, 144]
OWN = st.sampled_from([None, None, *SCALES, "auto", np.int64(9), torch.tensor(36)])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_inputs_are_those_of_a_list(data):
    processor = tiny_processor()
    processor.chat_template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image> ' }}{% endfor %}{% endfor %}"
    )
    processor.visual_token_scales = SCALES
    processor.num_visual_tokens = default = data.draw(st.sampled_from([None, 1, 36, "auto"]), "default")
    turns = st.lists(st.lists(OWN, max_size=2), min_size=1, max_size=3)
    chats = data.draw(st.lists(turns, min_size=1, max_size=3), "numbers beside the pictures of each turn of each chat")
    own = [number for turns in chats for turn in turns for number in turn]
    asked = data.draw(
        st.one_of(
            st.none(),
            st.sampled_from([9, "auto"]),
            st.lists(st.sampled_from(SCALES), min_size=len(own), max_size=len(own)),
        ),
        "in processor_kwargs",
    )
    messages = [[message for turn in turns for message in chat(*map(image, turn))] for turns in chats]
    before = told(messages)
    default = 144 if default is None else default
    each = asked if isinstance(asked, list) else [default if asked is None else asked] * len(own)
    expected = [call if number is None else number for number, call in zip(own, each)]
    options = {} if asked is None else {"num_visual_tokens": asked}
    inputs = prepared(processor, messages, padding=True, **options)
    assert equal(
        inputs, prepared(processor, list(map(without_numbers, messages)), padding=True, num_visual_tokens=expected)
    )
    assert told(messages) == before


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_pipelines_answer_each_picture_at_its_number(name, loaded):
    model, processor = loaded[name]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    numbers = [[1], [36, 9], [None], [144]]
    chats = [chat(*(image(n, file) for n, file in zip(own, NAMES[1:]))) for own in numbers]
    how = {"max_new_tokens": 6, "return_full_text": False}
    call = {"processor_kwargs": {"num_visual_tokens": 9}}

    expected = []
    for one, own in zip(chats, numbers):
        inputs = prepared(processor, without_numbers(one), num_visual_tokens=[9 if n is None else n for n in own])
        ids = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(ids, skip_special_tokens=True).strip())
    assert len(set(expected)) == len(expected), "the numbers must matter for this to show anything"
    assert pipe(text=chats[0], **call, **how)[0]["generated_text"].strip() == expected[0]
    for several, options in ((chats, {"batch_size": 2}), ((one for one in chats), {})):
        answers = pipe(several, **call, **how, **options)
        assert [answer[0]["generated_text"].strip() for answer in answers] == expected


def test_a_chat_goes_on_from_what_the_pipeline_returned(loaded):
    model, processor = loaded["llava15-m3"]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    first = pipe(text=chat(image(9)), max_new_tokens=4)[0]["generated_text"]
    assert first[0]["content"][0]["num_visual_tokens"] == 9
    turns = [*first[:-1], {"role": "assistant", "content": [{"type": "text", "text": first[-1]["content"]}]}]
    second = pipe(text=[*turns, *chat(image(36), image())], max_new_tokens=4)[0]["generated_text"]
    [alone] = pipe(
        text=without_numbers([*turns, *chat(image(), image())]),
        processor_kwargs={"num_visual_tokens": [9, 36, 576]},
        max_new_tokens=4,
        return_full_text=False,
    )
    assert second[-1]["content"] == alone["generated_text"]


def data():
    buffer = io.BytesIO()
    picture("img5_97x53.png").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": str(GOLDENS / "images" / "img5_97x53.png")},
        {"type": "image", "url": str(GOLDENS / "images" / "img5_97x53.png")},
        {"type": "image", "url": f"data:image/png;base64,{data()}"},
        {"type": "image", "base64": data()},
        {"type": "image", "image": np.array(picture("img5_97x53.png").convert("RGB"))},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data()}"}},
    ],
    ids=lambda part: f"{list(part)[1]}-{str(list(part.values())[1])[:9]}",
)
def test_under_whatever_key_a_picture_stands(part, loaded):
    _, processor = loaded["llava15-m3"]
    messages = chat({**part, "num_visual_tokens": 9}, {**part, "num_visual_tokens": None})
    before = told(messages)
    assert equal(
        prepared(processor, messages, num_visual_tokens=[None, 36]),
        prepared(processor, chat(image(), image()), num_visual_tokens=[9, 36]),
    )
    assert told(messages) == before


@dataclass
class Part:
    type: str
    image: Any = None
    text: str | None = None
    num_visual_tokens: int | None = None


class Turn(BaseModel, arbitrary_types_allowed=True):
    role: str
    content: list


def test_messages_and_parts_may_be_objects(loaded):
    """As transformers takes them from 5.24 on."""
    _, processor = loaded["llava15-m3"]
    parts = [Part("image", picture("img5_97x53.png"), num_visual_tokens=9), Part(**QUESTION)]
    expected = prepared(processor, chat(image()), num_visual_tokens=9)
    for turn in (
        Turn(role="user", content=parts),
        UserDict(role="user", content=[UserDict(part.__dict__) for part in parts]),
    ):
        assert equal(prepared(processor, [turn]), expected)


def test_templates_see_pictures_without_numbers(loaded):
    _, processor = loaded["llava15-m3"]
    part = {"type": "image", "path": str(GOLDENS / "images" / "img5_97x53.png")}
    template = "{% for m in messages %}{% for p in m.content %}{{ p }}{{ p | tojson }}{{ '<image>' if p.path }}{% endfor %}{% endfor %}"
    [seen, plain] = [
        processor.apply_chat_template(chat(one), chat_template=template, tokenize=True, processor_kwargs=call)
        for one, call in (({**part, "num_visual_tokens": 9}, None), (part, {"num_visual_tokens": 9}))
    ]
    assert seen == plain and processor.image_token_id in seen[0]


def test_masks_of_answers_and_unfinished_answers(loaded):
    _, processor = loaded["llava15-m3"]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    told_beside, told_apart = ([*chat(image(n)), answer, *chat(image(m)), answer] for n, m in ((9, 36), (None, None)))
    for how in ({"return_assistant_tokens_mask": True}, {"continue_final_message": True}):
        seen, expected = (
            processor.apply_chat_template(
                messages,
                chat_template=CHAT_TEMPLATES["vicuna_v1"],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=call,
                **how,
            )
            for messages, call in ((told_beside, None), (told_apart, {"num_visual_tokens": [9, 36]}))
        )
        assert seen.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(seen[name]), torch.as_tensor(expected[name])) for name in seen)
        if (
            MAKES_TEXT_PLAIN and "assistant_masks" in seen
        ):  # before 5.24 transformers loses them where placeholders stand before
            assert torch.as_tensor(seen["assistant_masks"]).any()


@pytest.mark.parametrize("number", [7, 0, 36.0, "36", True, [9], float("nan"), [], {"a": 9}], ids=str)
def test_a_wrong_number_is_refused_before_any_picture_is_opened(number, loaded):
    _, processor = loaded["llava15-m3"]
    missing = {"type": "image", "path": "/none.png"}
    with pytest.raises(ValueError, match=r"num_visual_tokens=.*not a number of .*\[1, 9, 36, 144, 576\], or auto"):
        prepared(processor, chat(missing, {**missing, "num_visual_tokens": number}))


PART = {"type": "image", "image": Image.new("RGB", (8, 8))}
REFUSED = {
    "beside a text": ([{**QUESTION, "num_visual_tokens": 9}], {}, "num_visual_tokens=9 is beside no picture"),
    "in an image_url": (
        [{"type": "image_url", "image_url": {"url": "x.png", "num_visual_tokens": 36}}],
        {},
        "num_visual_tokens=36 is beside no picture",
    ),
    "a short list": ([{**PART, "num_visual_tokens": 9}, PART], {"num_visual_tokens": [36]}, "2 images and videos"),
    "a list that no picture needs": ([{**PART, "num_visual_tokens": 9}], {"num_visual_tokens": [1, 1]}, r"\[1, 1\]: there are 1"),
    "a wrong one that no picture needs": ([{**PART, "num_visual_tokens": 9}], {"num_visual_tokens": 7}, "7 is not a number"),
    "no source": ([{"type": "image", "num_visual_tokens": 9}], {}, "need 1 image"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused(case, loaded):
    _, processor = loaded["llava15-m3"]
    parts, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        prepared(processor, chat(*parts), **options)


@pytest.mark.parametrize("kind, options", [("image", {"num_visual_tokens": 9}), ("video", {"num_frames": 3})])
def test_a_prompt_alone_cannot_carry_what_stands_beside_a_picture(kind, options, loaded):
    _, processor = loaded["llava15-m3"]
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value} stands beside .* tokenize=True"):
        processor.apply_chat_template(chat({"type": kind, "path": "x", **options}))
