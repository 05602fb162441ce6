"""One encoding, many budgets: answers from `encode_images` are those from pixels, and the vision tower runs once."""

import re

import pytest
import torch
from conftest import CHECKPOINTS, GOLDENS, picture
from test_generation import GREEDY, answer, left_padded
from test_modeling import ANYRES, tiny_inputs, tiny_model
from typer.testing import CliRunner

from modeling_m3.__main__ import app


@pytest.fixture
def vision_calls():
    """Grows by one with every call of a vision tower."""
    calls = []

    def note(module, *_):
        if type(module).__name__ == "CLIPVisionModel":
            calls.append(module)

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    yield calls
    handle.remove()


def without_pixels(inputs):
    return {name: value for name, value in inputs.items() if name != "pixel_values"}


def encode(model, inputs):
    with torch.no_grad():
        return model.encode_images(inputs["pixel_values"], inputs.get("image_sizes"), inputs.get("image_tile_grids"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_budget_is_answered_from_one_encoding(name, loaded, vision_calls):
    model, processor = loaded[name]
    prompts = {
        scale: processor(
            images=picture("photo_400x266.png"),
            text="USER: <image>\nWhat is this? ASSISTANT:",
            num_visual_tokens=scale,
            return_tensors="pt",
        )
        for scale in processor.visual_token_scales
    }
    expected = {scale: answer(model, inputs) for scale, inputs in prompts.items()}
    vision_calls.clear()
    encoded = encode(model, prompts[1])
    for scale, inputs in prompts.items():
        assert torch.equal(answer(model, without_pixels(inputs), encoded_images=encoded), expected[scale])
    assert len(vision_calls) == 1
    with torch.no_grad():
        for inputs in prompts.values():
            logits = model(**without_pixels(inputs), encoded_images=encoded).logits
            assert torch.equal(logits, model(**inputs).logits)
    assert len({tuple(row[0].tolist()) for row in expected.values()}) > 1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"visual_token_sampling": "spatial"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_every_mode_of_generate_takes_an_encoding(kwargs, vision_calls):
    model = tiny_model()
    prompts = 1 if "prompt_lookup_num_tokens" in kwargs else 2
    inputs = tiny_inputs(model, scales=(9, 36), prompts=prompts)
    kwargs = {**kwargs, "eos_token_id": None}
    expected = answer(model, inputs, **kwargs)
    encoded = encode(model, inputs)
    vision_calls.clear()
    assert torch.equal(answer(model, without_pixels(inputs), encoded_images=encoded, **kwargs), expected)
    assert not vision_calls


def test_a_batch_with_a_budget_for_each_image():
    model = tiny_model()
    batch = left_padded([tiny_inputs(model, scales=(scale,)) for scale in (1, 144, 9)])
    encoded = encode(model, batch)
    assert torch.equal(answer(model, without_pixels(batch), encoded_images=encoded), answer(model, batch))


def test_tiles_of_another_grid():
    model = tiny_model(**ANYRES)
    pixels, sizes = torch.randn(1, 10, 3, 24, 24), torch.tensor([[50, 60]])
    with torch.no_grad():
        encoded = model.encode_images(pixels, sizes, image_grid_pinpoints=[[72, 72]])
    tokens = len(model.get_visual_tokens(encoded, 9)[0])
    inputs = {"input_ids": torch.tensor([[1] + [98] * tokens + [4, 5]]), "num_visual_tokens": torch.tensor([9])}
    expected = answer(model, {**inputs, "pixel_values": pixels, "image_sizes": sizes}, image_grid_pinpoints=[[72, 72]])
    assert torch.equal(answer(model, inputs, encoded_images=encoded), expected)


def test_the_objective_takes_an_encoding(vision_calls):
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(144,))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 98, -100)
    expected = model(**inputs, matryoshka_scales=[1, 144])
    encoded = encode(model, inputs)
    vision_calls.clear()
    output = model(**without_pixels(inputs), encoded_images=encoded, matryoshka_scales=[1, 144])
    torch.testing.assert_close(output.loss, expected.loss)
    assert not vision_calls
    with pytest.raises(ValueError, match="only one of pixel_values, encoded_images"):
        model(**inputs, encoded_images=encoded, matryoshka_scales=[1, 144])


def test_what_does_not_fit_is_refused():
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(9,))
    encoded = encode(model, inputs)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="only one of pixel_values, encoded_images"):
            call(**inputs, encoded_images=encoded)
    wrong = {**without_pixels(inputs), "encoded_images": encoded, "num_visual_tokens": torch.tensor([36])}
    with pytest.raises(ValueError, match="9 placeholders for 36 visual tokens"):
        model(**wrong)
    with pytest.raises(ValueError, match="9 placeholders for 36 visual tokens"):
        model.generate(**wrong, **GREEDY)
    with pytest.raises(ValueError, match=r"100.*\[1, 9, 36, 144\]"):
        model.generate(**{**wrong, "num_visual_tokens": 100}, **GREEDY)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_compare_encodes_once(name, converted, vision_calls):
    """And once more to warm up."""
    picture = GOLDENS / "images" / "photo_400x266.png"
    arguments = [str(picture), "What is this?", "--model", str(converted[name]), "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, [*arguments, "--compare"])
    assert result.exit_code == 0, result.output
    assert re.match(r"encoded once in \d+\.\d{3} s\n", result.stdout)
    assert len(vision_calls) == 2
