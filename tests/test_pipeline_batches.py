"""`pipeline(..., batch_size=n)` answers as one by one, though pictures are cut into different numbers of tiles."""

import copy
import pickle

import pytest
import torch
from conftest import CHECKPOINTS, picture
from test_processing import PINPOINTS, tiny_processor
from transformers import pipeline


def chat(question, *names):
    images = [{"type": "image", "image": picture(name)} for name in names]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


CHATS = [
    chat("What?", "img3_1000x300.png"),
    chat("And what may this be, in some more words?", "img1_640x480.png"),
    chat("Which of both?", "img4_200x700.png", "img1_640x480.png"),
]


@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_chats_of_a_batch_are_answered_as_one_by_one(name, batch_size, loaded):
    model, processor = loaded[name]
    if name == "llava-next-m3":
        prepared = [
            processor.image_processor(picture(file))["image_tile_grids"][0]
            for file in ("img3_1000x300.png", "img1_640x480.png")
        ]
        assert prepared[0] != prepared[1]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    kwargs = {"processor_kwargs": {"num_visual_tokens": 9}, "max_new_tokens": 8, "return_full_text": False}
    alone = [pipe(text=messages, **kwargs)[0]["generated_text"] for messages in CHATS]
    batched = [answers[0]["generated_text"] for answers in pipe(text=CHATS, batch_size=batch_size, **kwargs)]
    assert batched == alone
    assert len(set(alone)) == len(alone), "the chats must matter for this to show anything"


def test_plain_prompts_of_a_batch_are_answered_as_one_by_one(loaded):
    model, processor = loaded["llava-next-m3"]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    prompts = [
        {"images": picture(name), "text": f"USER: <image>\n{question} ASSISTANT:"}
        for name, question in (("img3_1000x300.png", "What?"), ("img1_640x480.png", "And what is this?"))
    ]
    kwargs = {"num_visual_tokens": 9, "max_new_tokens": 8, "return_full_text": False}
    alone = [pipe(prompt, **kwargs)[0]["generated_text"] for prompt in prompts]
    assert [
        answers[0]["generated_text"] for answers in pipe((prompt for prompt in prompts), batch_size=2, **kwargs)
    ] == alone


def test_tiles_are_joined_as_the_image_processor_would_have_done():
    processor = tiny_processor("spatial_unpad", PINPOINTS)
    images = [picture("img3_1000x300.png"), picture("img1_640x480.png")]
    alone = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    together = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert alone[0].shape[1] != alone[1].shape[1]
    for joined in (torch.cat(alone), torch.cat(tensors=alone, dim=0), torch.cat([alone[0], torch.Tensor(alone[1])], 0)):
        assert torch.equal(joined, together) and type(joined) is torch.Tensor
    assert torch.cat(alone[:1] * 2, dim=1).shape[1] == 2 * alone[0].shape[1]
    for wrong in ([alone[0], alone[1][..., :-1]], [alone[0], alone[1][0]]):
        with pytest.raises(RuntimeError):
            torch.cat(wrong)
    with pytest.raises(RuntimeError):
        torch.cat(alone, dim=2)


def test_tiles_are_plain_tensors_to_everyone_else():
    pixels = tiny_processor("flat", PINPOINTS)(images=picture("img3_1000x300.png"), return_tensors="pt")["pixel_values"]
    for made in (
        pixels[0],
        pixels * 2,
        copy.deepcopy(pixels),
        pickle.loads(pickle.dumps(pixels)),
        torch.stack([pixels]),
    ):
        assert type(made) is torch.Tensor
    assert torch.equal(copy.deepcopy(pixels), pixels)
    assert pixels.to(torch.bfloat16).dtype == torch.bfloat16
