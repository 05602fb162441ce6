"""Pictures as people hold them: each is the picture that a path to the same file is, or is refused by name."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS, picture
from PIL import Image
from test_image_processing import BACKENDS
from test_processing import PROMPT, word_tokenizer
from transformers import CLIPImageProcessorPil, pipeline

from modeling_m3 import M3LlavaImageProcessorPil, M3LlavaProcessor
from modeling_m3.pictures import open_pictures


PHOTO = GOLDENS / "images" / "photo_400x266.png"
FORMS = {
    "path": Path,
    "bytes": lambda file: Path(file).read_bytes(),
    "bytearray": lambda file: bytearray(Path(file).read_bytes()),
    "BytesIO": lambda file: io.BytesIO(Path(file).read_bytes()),
    "open file": lambda file: open(file, "rb"),
    "cell with bytes": lambda file: {"bytes": Path(file).read_bytes(), "path": None},
    "cell with a path": lambda file: {"bytes": None, "path": str(file)},
}


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    """A file that EXIF says to rotate, which the original does not do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path_factory.mktemp("pictures") / "rotated.jpg"
    picture("img5_97x53.png").convert("RGB").save(file, exif=exif)
    return str(file)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_image_processor_takes_every_form(backend, form, rotated):
    image_processor, make = backend(), FORMS[form]
    expected = image_processor(Image.open(rotated), return_tensors="pt")["pixel_values"]
    for images in (make(rotated), [make(rotated)], (make(rotated),), [[make(rotated)], None], iter([make(rotated)])):
        assert torch.equal(image_processor(images, return_tensors="pt")["pixel_values"], expected)
    twice = [make(rotated)] * 2  # one open file, two pictures
    assert torch.equal(image_processor(twice, return_tensors="pt")["pixel_values"], expected.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("form", FORMS)
def test_processor_chat_and_pipeline_take_every_form(form, rotated, loaded):
    model, processor = loaded["llava15-m3"]
    make = FORMS[form]
    expected = processor(images=rotated, text=PROMPT, num_visual_tokens=9, return_tensors="pt")
    inputs = processor(images=make(rotated), text=PROMPT, num_visual_tokens=9, return_tensors="pt")
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)

    def chat(image, key="image"):
        return [{"role": "user", "content": [{"type": "image", key: image}, {"type": "text", "text": "What is this?"}]}]

    def prepared(messages):
        kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        return processor.apply_chat_template(messages, processor_kwargs={"num_visual_tokens": 9}, **kwargs)

    for key in ("image", "path", "url"):
        inputs = prepared(chat(make(rotated), key))
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(inputs["input_ids"], prepared(chat(rotated))["input_ids"])
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    kwargs = {"processor_kwargs": {"num_visual_tokens": 9}, "max_new_tokens": 4, "return_full_text": False}
    assert (
        pipe(text=chat(make(rotated)), **kwargs)[0]["generated_text"]
        == pipe(text=chat(rotated), **kwargs)[0]["generated_text"]
    )


def test_a_chat_from_a_data_set_has_a_none_for_every_key_that_another_part_has(loaded):
    _, processor = loaded["llava15-m3"]
    image = picture("img5_97x53.png")
    content = [
        {"type": "image", "image": image, "path": None, "text": None},
        {"type": "text", "image": None, "path": None, "text": "What is this?"},
    ]
    plain = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs, expected = (
        processor.apply_chat_template([{"role": "user", "content": parts}], **kwargs) for parts in (content, plain)
    )
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("images", "marks"), [
    ([PHOTO, None], [1, 0]),
    ([None, PHOTO], [0, 1]),
    ([[PHOTO], None], [1, 0]),
    ([None, [PHOTO, None]], [0, 1]),
    ([[None], [PHOTO]], [0, 1]),
    (np.array([None, picture("photo_400x266.png")], dtype=object), [0, 1]),
    ([{"bytes": None, "path": None}, PHOTO], [0, 1]),
    ([None], [0]),
    ([None, None], [0, 0]),
    ([[None], [None]], [0, 0]),
])  # fmt: skip
def test_none_is_no_image(images, marks, loaded):
    _, processor = loaded["llava15-m3"]
    texts = ["USER: " + "<image>" * count + " Hello ASSISTANT:" for count in marks]
    inputs = processor(images=images, text=texts, num_visual_tokens=9, padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [9 * count for count in marks]
    if any(marks):
        expected = processor.image_processor(PHOTO, return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs["pixel_values"], expected)
    else:
        assert set(inputs) == {"input_ids", "attention_mask"}


def test_none_in_place_of_a_list_keeps_prompts_and_images_together(loaded):
    _, processor = loaded["llava15-m3"]
    with pytest.raises(ValueError, match=r"\[1, 0\].*\[0, 1\]"):
        processor(images=[None, [PHOTO]], text=["<image> a", "b"], padding=True)


def test_transformers_own_image_processors_get_opened_files():
    clip = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = M3LlavaProcessor(clip, word_tokenizer(), patch_size=2)
    inputs = processor(images=[PHOTO, None], text="look <image>", num_visual_tokens=36)
    assert np.array_equal(inputs["pixel_values"][0], clip(picture(PHOTO.name))["pixel_values"][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("images", "message"), [
    (Path("nothing.png"), "There is no picture at nothing.png"),
    (Path(__file__).parent, "There is no picture at .*tests"),
    (Path(__file__), "test_pictures.py is not a picture that PIL can open"),
    (b"no picture", "these 10 bytes hold is not a picture"),
    ({"bytes": b"", "path": "a.png"}, "these 0 bytes hold is not a picture"),
    (io.BytesIO(b"no picture"), "this file holds is not a picture"),
    (io.StringIO("text"), "type StringIO is no picture"),
    ("nothing.png", "nothing.png"),
    ("data:image/png;base64,AAAA", "AAAA"),
    (3, "'3' of type int is no picture"),
    ({"image": "a.png"}, "type dict is no picture"),
    (None, "'None' of type NoneType is no picture"),
    ([], "no picture among the images"),
    ([None, [None]], "no picture among the images"),
    (np.zeros((2, 2, 2, 2, 3)), r"shape \(2, 2, 2, 2, 3\) and float64 holds no picture"),
    (torch.zeros(3, 0, 5), r"shape \(3, 0, 5\) and torch.float32 holds no picture"),
    ([np.zeros((0, 5, 3), np.uint8)], r"shape \(0, 5, 3\) and uint8 holds no picture"),
    (np.zeros((5, 5, 3), complex), "complex128 holds no picture"),
    (np.full((5, 5, 3), "a"), "<U1 holds no picture"),
    (Image.new("RGB", (0, 5)), "0x5 pixels has none"),
])  # fmt: skip
def test_what_is_no_picture_is_refused_by_name(images, message, backend):
    with pytest.raises(ValueError, match=message) as error:
        backend()(images)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    file = tmp_path / "bomb.png"
    Image.new("1", (300, 300)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    for given in (str(file), file):
        with pytest.raises(ValueError, match=r"bomb\.png.*90000 pixels"):
            M3LlavaImageProcessorPil()(given)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    with pytest.warns(Image.DecompressionBombWarning):
        M3LlavaImageProcessorPil()(file)


def test_urls_are_left_to_transformers():
    assert open_pictures(["https://example.com/a.png", None]) == ["https://example.com/a.png"]
