"""What most users run: torchvision is installed, so transformers picks the image processor that uses it."""

import pytest
import torch
from conftest import CHECKPOINTS, GOLDENS, golden, picture
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline
from transformers.utils import is_torchvision_available

from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaImageProcessor, M3LlavaImageProcessorPil


pytestmark = [
    pytest.mark.torchvision,
    pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed"),
]


@pytest.fixture(scope="module")
def processors(converted):
    """(what transformers picks, PIL's) of every checkpoint."""
    return {
        name: (AutoProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder, backend="pil"))
        for name, folder in converted.items()
    }


@pytest.mark.parametrize("scale", [1, 36, 576])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_inputs_equal_those_by_pil_but_for_rounded_pixels(name, scale, processors):
    picked, by_pil = processors[name]
    assert type(picked.image_processor) is M3LlavaImageProcessor
    assert type(by_pil.image_processor) is M3LlavaImageProcessorPil
    names = sorted({case["image_file"] for case in golden(f"{name}.pixels")["cases"]})
    prompt = "USER: " + "<image>\n" * len(names) + "Which is it? ASSISTANT:"
    inputs, expected = (
        processor(images=list(map(picture, names)), text=prompt, num_visual_tokens=scale, return_tensors="pt")
        for processor in (picked, by_pil)
    )
    assert inputs.keys() == expected.keys()
    for key in inputs.keys() - {"pixel_values"}:
        assert torch.equal(inputs[key], expected[key]), key
    of_255 = 255 * torch.tensor(picked.image_processor.image_std)[:, None, None]
    assert ((inputs["pixel_values"] - expected["pixel_values"]) * of_255).abs().max() < 2.001


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_it_is_a_multimodal_language_model_too(name, converted):
    """As transformers calls any of them; its pipeline needs torchvision."""
    assert type(AutoModelForMultimodalLM.from_pretrained(converted[name])) is M3LlavaForConditionalGeneration
    content = [{"type": "image", "image": picture("img5_97x53.png")}, {"type": "text", "text": "What is it?"}]
    answers = []
    for task in ("image-text-to-text", "any-to-any"):
        pipe = pipeline(task, model=str(converted[name]), trust_remote_code=True)
        messages = [{"role": "user", "content": list(content)}]
        answer = pipe(text=messages, processor_kwargs={"num_visual_tokens": 36}, max_new_tokens=6)
        answers.append(answer[0]["generated_text"][-1]["content"])
    assert answers[0] == answers[1] and answers[0]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_pipeline_answers_as_generate_does(name, converted, loaded, processors):
    model, processor = loaded[name][0], processors[name][0]
    path = str(GOLDENS / "images" / "photo_400x266.png")
    messages = [{"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": "What is it?"}]}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    answer = pipe(text=messages, processor_kwargs={"num_visual_tokens": 36}, max_new_tokens=6)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=picture("photo_400x266.png"), text=prompt, num_visual_tokens=36, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert answer[0]["generated_text"][-1]["content"] == processor.decode(expected, skip_special_tokens=True)
