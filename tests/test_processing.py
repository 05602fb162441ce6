"""The processor: placeholders, budgets that do not leak, bad input refused before it reaches a model."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import picture, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaImageProcessorPil, M3LlavaModel, M3LlavaProcessor
from modeling_m3.processing_m3 import MAKES_TEXT_PLAIN
from modeling_m3.visual_tokens import MERGE_TYPES


PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
OFFERED = r"\[1, 9, 36, 144, 576\]"


def count(inputs, processor):
    return (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()


def word_tokenizer():
    vocabulary = {"<pad>": 0, "<image>": 98, "look": 1, ".": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token=".")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def tiny_processor(patch_merge_type="flat", pinpoints=None):
    image_processor = M3LlavaImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=pinpoints
    )
    return M3LlavaProcessor(image_processor, word_tokenizer(), patch_size=2, patch_merge_type=patch_merge_type)


PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72], [72, 24], [72, 72]]
MODELS = {
    merge_type: M3LlavaModel(tiny_config(patch_merge_type=merge_type, image_grid_pinpoints=PINPOINTS)).eval()
    for merge_type in MERGE_TYPES
}
MODELS["one view"] = M3LlavaModel(tiny_config()).eval()
PROCESSORS = {merge_type: tiny_processor(merge_type, PINPOINTS) for merge_type in MERGE_TYPES}
PROCESSORS["one view"] = tiny_processor()


@pytest.mark.parametrize("examples", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_placeholders_equal_features_for_every_picture(examples):
    settings(max_examples=examples, deadline=None)(placeholders_equal_features)()


@given(
    size=st.one_of(
        st.tuples(st.integers(1, 200), st.integers(1, 200)),
        st.sampled_from([(1, 1000), (1000, 1), (5000, 7), (7, 5000)]),
    ),
    scale=st.sampled_from([1, 9, 36, 144]),
    kind=st.sampled_from(list(MODELS)),
    pinpoints=st.one_of(st.none(), st.lists(st.sampled_from(PINPOINTS), min_size=1, unique_by=tuple)),
)
def placeholders_equal_features(size, scale, kind, pinpoints):
    processor = PROCESSORS[kind]
    inputs = processor(
        images=Image.new("RGB", size[::-1]),
        text="look <image> .",
        num_visual_tokens=scale,
        image_grid_pinpoints=pinpoints,
        return_tensors="pt",
    )
    [placeholders] = count(inputs, processor)
    assert processor._get_num_multimodal_tokens([size], num_visual_tokens=scale, image_grid_pinpoints=pinpoints)[
        "num_image_tokens"
    ] == [placeholders]
    inputs.pop("input_ids"), inputs.pop("attention_mask")
    if "token_type_ids" in inputs:
        inputs.pop("token_type_ids")
    with torch.no_grad():
        [features] = MODELS[kind].get_image_features(**inputs).pooler_output
    assert len(features) == placeholders


def test_outputs(loaded):
    _, processor = loaded["llava15-m3"]
    image = picture("photo_400x266.png")
    inputs = processor(images=image, text=PROMPT, num_visual_tokens=36, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_tile_grids", "num_visual_tokens"}
    assert inputs["image_tile_grids"].tolist() == [[0, 0]]
    assert inputs["num_visual_tokens"].dtype == torch.int64
    assert inputs["num_visual_tokens"].tolist() == [36]
    assert count(inputs, processor) == [36]

    _, processor = loaded["llava-next-m3"]
    inputs = processor(
        images=[image, image], text=[PROMPT, PROMPT], num_visual_tokens=[1, 9], return_tensors="pt", padding=True
    )
    assert set(inputs) == {
        *("input_ids", "attention_mask", "pixel_values", "image_sizes", "image_tile_grids", "num_visual_tokens")
    }
    assert inputs["num_visual_tokens"].tolist() == [1, 9]
    assert inputs["image_sizes"].tolist() == [[266, 400]] * 2


def test_text_alone_and_images_alone(loaded):
    _, processor = loaded["llava15-m3"]
    assert set(processor(text="USER: Hello ASSISTANT:", return_tensors="pt")) == {"input_ids", "attention_mask"}
    only_images = processor(images=picture("photo_400x266.png"), num_visual_tokens=9, return_tensors="pt")
    assert set(only_images) == {"pixel_values", "image_tile_grids", "num_visual_tokens"}


def test_the_budget_of_one_call_leaves_the_next_alone(loaded):
    _, processor = loaded["llava15-m3"]
    image = picture("photo_400x266.png")

    def placeholders(**kwargs):
        return count(processor(images=image, text=PROMPT, return_tensors="pt", **kwargs), processor)

    assert placeholders(num_visual_tokens=9) == [9]
    assert placeholders() == [576]
    images_kwargs = {"num_visual_tokens": 36}
    assert placeholders(images_kwargs=images_kwargs) == [36]
    assert images_kwargs == {"num_visual_tokens": 36}, "the caller's dict is the caller's"
    assert placeholders(images_kwargs=images_kwargs) == [36]
    assert placeholders() == [576]


def test_threads_get_their_own_budgets(loaded):
    _, processor = loaded["llava15-m3"]
    image = picture("img5_97x53.png").convert("RGB")  # loaded: PIL's lazy loading is not for threads
    budgets = [1, 9, 36, 144] * 8

    def placeholders(budget):
        inputs = processor(images=image, text=PROMPT, num_visual_tokens=budget, return_tensors="pt")
        return count(inputs, processor)[0], inputs["num_visual_tokens"].item()

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(placeholders, budgets)) == [(budget, budget) for budget in budgets]


def test_the_default_budget_is_the_checkpoints(loaded, tmp_path):
    _, processor = loaded["llava15-m3"]
    thrifty = copy.copy(processor)
    thrifty.num_visual_tokens = 36
    thrifty.save_pretrained(tmp_path)
    reloaded = M3LlavaProcessor.from_pretrained(tmp_path)
    inputs = reloaded(images=picture("img5_97x53.png"), text=PROMPT, return_tensors="pt")
    assert inputs["num_visual_tokens"].tolist() == [36]
    assert reloaded.chat_template == processor.chat_template
    assert reloaded.visual_token_scales == processor.visual_token_scales


WRONG = [np.bool_(True), np.float64(36), torch.tensor(36.0), torch.tensor(True), np.array(["36"]), torch.tensor([[36]])]
WHOLE_NUMBERS = [
    np.int64(36),
    np.uint8(36),
    torch.tensor(36),
    np.array(36),
    (36, 9),
    np.array([36, 9]),
    torch.tensor([36, 9]),
]


@pytest.mark.parametrize("budget", [*WHOLE_NUMBERS, [np.int32(36), torch.tensor(9)]], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_whole_numbers_of_numpy_and_torch_are_budgets(budget, nested, loaded):
    model, processor = loaded["llava15-m3"]
    images, text = [picture("img5_97x53.png")] * 2, "USER: <image> <image> Which? ASSISTANT:"
    plain = [36, 36] if np.ndim(budget) == 0 else [36, 9]
    kwargs = {"num_visual_tokens": budget}
    inputs = processor(
        images=images, text=text, return_tensors="pt", **({"images_kwargs": kwargs} if nested else kwargs)
    )
    assert inputs["num_visual_tokens"].tolist() == plain
    again = processor(images=images, text=text, num_visual_tokens=inputs["num_visual_tokens"], return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert processor._get_num_multimodal_tokens([(336, 336)] * 2, **kwargs)["num_image_tokens"] == plain
    with torch.no_grad():
        expected = model(**{**inputs, "num_visual_tokens": plain}).logits
        assert torch.equal(model(**{**inputs, **kwargs}).logits, expected)
        tokens = model.get_visual_tokens(model.encode_images(inputs["pixel_values"]), budget)
    assert list(map(len, tokens)) == plain
    answers = [model.generate(**{**inputs, "num_visual_tokens": each}, max_new_tokens=2) for each in (budget, plain)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("default", [np.int64(36), torch.tensor(36)])
def test_a_default_budget_is_stored_as_a_plain_number(default, loaded, tmp_path):
    _, processor = loaded["llava15-m3"]
    given = M3LlavaProcessor(processor.image_processor, processor.tokenizer, num_visual_tokens=default)
    assigned = copy.copy(processor)
    assigned.num_visual_tokens = default
    for each in (given, assigned):
        each.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
        assert stored["num_visual_tokens"] == 36


@pytest.mark.parametrize("budget", [100, 0, -1, "abc", "36", 36.5, 36.0, True, [36, 36], [], [[36]], *WRONG])
@pytest.mark.parametrize("nested", [False, True])
def test_a_wrong_budget_is_refused(budget, nested, loaded):
    _, processor = loaded["llava15-m3"]
    kwargs = {"num_visual_tokens": budget}
    with pytest.raises(ValueError, match=rf"num_visual_tokens=.*({OFFERED}|reading order)"):
        processor(
            images=picture("img5_97x53.png"),
            text=PROMPT,
            return_tensors="pt",
            **({"images_kwargs": kwargs} if nested else kwargs),
        )


def test_serving_engines_are_refused_a_wrong_budget_too(loaded):
    _, processor = loaded["llava15-m3"]
    with pytest.raises(ValueError, match=OFFERED):
        processor._get_num_multimodal_tokens([(336, 336)], num_visual_tokens=100)


@pytest.mark.parametrize("text", [3, [3], [], [["<image>"]], {"a": 1}], ids=str)
def test_what_is_no_text_is_refused(text, loaded):
    _, processor = loaded["llava15-m3"]
    with pytest.raises(ValueError, match="give one prompt, or a list with at least one"):
        processor(images=picture("img5_97x53.png"), text=text)


@pytest.mark.parametrize(("images", "text", "message"), [
    (1, "USER: <image><image> ASSISTANT:", "2 <image> tokens and 1 images"),
    (2, PROMPT, "1 <image> tokens and 2 images"),
    (1, "USER: no mark ASSISTANT:", "0 <image> tokens and 1 images"),
    (0, PROMPT, "1 <image> tokens and 0 images"),
])  # fmt: skip
def test_marks_and_images_must_agree(images, text, message, loaded):
    """In transformers' own words, and with advice: that of making a user's text plain where there are too many marks."""
    _, processor = loaded["llava15-m3"]
    phrase = "tokens in the prompts should be the same as the number of images"
    with pytest.raises(ValueError, match=f"{phrase}.*{message}.*Write one <image>") as error:
        processor(images=[picture("img5_97x53.png")] * images or None, text=text, return_tensors="pt")
    has_advice = text.count("<image>") > images and MAKES_TEXT_PLAIN
    assert ("sanitize_control_tokens=True" in str(error.value)) == has_advice


def test_every_prompt_of_a_batch_must_have_its_own_images(loaded):
    _, processor = loaded["llava15-m3"]
    image, texts = picture("img5_97x53.png"), ["<image><image> a", "<image> b"]
    with pytest.raises(ValueError, match=r"\[2, 1\].*\[1, 2\]"):
        processor(images=[[image], [image, image]], text=texts, padding=True)
    assert processor(images=[[image, image], [image]], text=texts, padding=True, num_visual_tokens=1)


def test_truncation_may_cut_text_but_no_image(loaded):
    _, processor = loaded["llava15-m3"]
    inputs = {"images": picture("img5_97x53.png"), "text": "<image>" + "word " * 50, "truncation": True}
    assert len(processor(**inputs, max_length=600)["input_ids"][0]) == 600
    for max_length in (10, 576):
        with pytest.raises(ValueError, match="max_length"):
            processor(**inputs, max_length=max_length)


def test_pinpoints_can_be_given_per_call(loaded):
    # Paper table 5: a model trained on 2x2 grids answers on a 3x3 grid at 144 tokens per tile.
    model, processor = loaded["llava-next-m3"]
    inputs = processor(
        images=Image.new("RGB", (900, 900)),
        text=PROMPT,
        num_visual_tokens=144,
        image_grid_pinpoints=[[1008, 1008]],
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape[1] == 10
    assert count(inputs, processor) == [144 + 36 * 37]
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    inputs.pop("image_tile_grids")
    with torch.no_grad():
        model(**inputs, image_grid_pinpoints=[[1008, 1008]])
        with pytest.raises(ValueError, match="image_tile_grids"):
            model(**inputs)


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
def test_the_grid_travels_from_the_image_processor_to_the_model(merge_type):
    """The model's own pinpoints, which would cut the picture the other way, have no say."""
    processor = tiny_processor(merge_type, [[24, 48]])
    inputs = processor(
        images=Image.new("RGB", (40, 40)), text="look <image> .", num_visual_tokens=36, return_tensors="pt"
    )
    assert inputs["image_tile_grids"].tolist() == [[1, 2]] and inputs["image_tile_grids"].dtype == torch.long
    inputs.pop("token_type_ids", None)
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    logits = []
    for pinpoints in ([[24, 48]], [[48, 24]]):
        torch.manual_seed(0)
        config = tiny_config(
            patch_merge_type=merge_type, image_grid_pinpoints=pinpoints, image_token_id=processor.image_token_id
        )
        with torch.no_grad():
            logits.append(M3LlavaForConditionalGeneration(config).eval()(**inputs).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(("change", "message"), [
    ({"image_tile_grids": torch.tensor([[2, 2]])}, r"hold \[3\] tiles, but .* should be \[5\]"),
    ({"image_tile_grids": torch.tensor([[1, 2], [1, 2]])}, r"should be \[3, 3\]"),
    ({"image_tile_grids": torch.tensor([[-1, -2]])}, r"image_tile_grids=\[\(-1, -2\)\]"),
    ({"image_tile_grids": torch.tensor([[1.0, 2.0]])}, r"image_tile_grids=\[\(1.0, 2.0\)\]"),
    ({"image_tile_grids": [[1, 2, 3]]}, r"image_tile_grids=\[\(1, 2, 3\)\]"),
    ({"image_tile_grids": None, "image_sizes": None}, "image_tile_grids"),
    ({"image_sizes": None}, "image_sizes"),
    ({"image_sizes": [[24, 48], [24, 48]]}, "image_sizes has 2 rows for 1 image"),
    ({"pixel_values": torch.zeros(1, 3, 24, 24)}, r"hold \[1\] tiles"),
    ({"pixel_values": torch.zeros(0, 3, 3, 24, 24)}, "pixel_values hold no image"),
    ({"pixel_values": np.zeros((1, 3, 3, 24, 24), np.float32)}, "pixel_values hold a ndarray: pass tensors"),
])  # fmt: skip
def test_a_picture_whose_facts_contradict_each_other_is_refused(change, message):
    inputs = PROCESSORS["spatial_unpad"](images=Image.new("RGB", (48, 24)), return_tensors="pt")
    assert inputs["image_tile_grids"].tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=message):
        MODELS["spatial_unpad"].get_image_features(**{**inputs, **change})


@pytest.mark.parametrize(
    "override",
    [{"crop_size": 168}, {"do_resize": False, "do_center_crop": False}, {"do_pad": False, "do_center_crop": False}],
)
def test_views_of_a_size_that_the_model_does_not_take_are_refused(override, loaded):
    _, processor = loaded["llava15-m3"]
    with pytest.raises(ValueError, match=r"\(336, 336\)"):
        processor(images=picture("img5_97x53.png"), text=PROMPT, **override)


def test_the_facts_of_pictures_may_be_arrays():
    processor, model = PROCESSORS["spatial_unpad"], MODELS["spatial_unpad"]
    inputs = processor(images=Image.new("RGB", (48, 24), "red"), num_visual_tokens=9, return_tensors="pt")
    arrays = {name: value.numpy() for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        expected, actual = (model.get_image_features(**{**inputs, **each}).pooler_output[0] for each in ({}, arrays))
    assert torch.equal(expected, actual)


@pytest.mark.parametrize("pinpoints", [np.array([[24, 48]]), ((np.int64(24), 48),)], ids=str)
def test_pinpoints_may_be_arrays(pinpoints):
    inputs = PROCESSORS["flat"](images=Image.new("RGB", (9, 9)), image_grid_pinpoints=pinpoints, return_tensors="pt")
    assert inputs["image_tile_grids"].tolist() == [[1, 2]]


def test_a_saved_processor_without_a_patch_size_is_refused():
    with pytest.raises(ValueError, match="patch_size=None"):
        M3LlavaProcessor(M3LlavaImageProcessorPil(), word_tokenizer(), patch_size=None)


def test_a_tile_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match="0 patches along its side"):
        M3LlavaProcessor(M3LlavaImageProcessorPil(crop_size={"height": 7, "width": 7}), word_tokenizer())
    with pytest.raises(ValueError, match="0 patches along its side"):
        tiny_config(vision_config={"image_size": 2, "patch_size": 4})


def test_chat(loaded):
    _, processor = loaded["llava15-m3"]
    image = picture("img5_97x53.png")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A shape."}]},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "And this?"}]},
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": [144, 1]},
    )
    assert inputs["num_visual_tokens"].tolist() == [144, 1]
    assert count(inputs, processor) == [145]
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1


def test_an_engine_can_ask_for_the_offsets_of_replacements(loaded):
    _, processor = loaded["llava15-m3"]
    inputs = processor(
        images=picture("img5_97x53.png"), text=PROMPT, num_visual_tokens=9, return_text_replacement_offsets=True
    )
    [[offsets]] = inputs["text_replacement_offsets"]
    assert offsets["replacement"] == "<image>" * 9


def test_transformers_own_image_processors_will_do():
    clip = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = M3LlavaProcessor(clip, word_tokenizer(), patch_size=2)
    inputs = processor(
        images=Image.new("RGB", (30, 40)), text="look <image>", num_visual_tokens=36, return_tensors="pt"
    )
    assert count(inputs, processor) == [36]


@pytest.mark.parametrize("images", [[], [[]], [[], []]])
@pytest.mark.parametrize("name", ["llava15-m3", "llava-next-m3"])
def test_no_image_for_any_prompt_is_text_alone(images, name, loaded):
    model, processor = loaded[name]
    text = ["USER: Hello ASSISTANT:"] * max(1, len(images))
    inputs = processor(images=images, text=text, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == len(text)


@pytest.mark.parametrize("pinpoints", [[672, 672], [[672.0, 672.0]], [["672", "672"]], [], "672x672", [[500, 500]]])
def test_wrong_pinpoints_are_refused(pinpoints, loaded):
    _, processor = loaded["llava-next-m3"]
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        processor(images=picture("img5_97x53.png"), text=PROMPT, image_grid_pinpoints=pinpoints)


@pytest.mark.parametrize("default", [[36], 100, "36"])
def test_a_default_budget_must_be_one_number(default):
    with pytest.raises(ValueError, match="num_visual_tokens"):
        M3LlavaProcessor(M3LlavaImageProcessorPil(), word_tokenizer(), num_visual_tokens=default)
