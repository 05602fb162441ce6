"""transformers' own LLaVA and LLaVA-NeXT folders: what upstream's classes and processors answer, M3 answers at its finest scale."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, picture
from conversion_checkpoints import edit_json, read_weights, run, store
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature

from m3_conversion.convert import convert
from m3_conversion.original import ConversionError
from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration


STORED = GOLDENS.parent / "transformers_llava"
sys.path.insert(0, str(STORED))
from make import PINPOINTS, make  # noqa: E402


PROMPT = "USER: <image>\nWhat is this, then?  A photo? ASSISTANT:"
TALL = [[112, 56], [56, 112], [112, 112]]


def rename_keys(change):
    def apply(folder):
        store(folder, {change(key): value for key, value in read_weights(folder).items()})

    return apply


def as_new_names(key):
    """As the classes of 4.52 and later call their parameters."""
    if key.startswith("language_model.model."):
        return "model." + key.replace("language_model.model.", "language_model.", 1)
    return key.removeprefix("language_model.") if "lm_head" in key else f"model.{key}"


def as_bin(folder):
    store(folder, read_weights(folder), "pytorch_model.bin.index.json")


def only(*names):
    """Removes files, so that what is left has to do."""
    return lambda folder: [(folder / name).unlink() for name in names if (folder / name).exists()]


def template_in_the_tokenizer(folder):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=template)


# Folders that differ from a plain one in one thing each: arguments of `make`, and what is done to the folder.
MADE = {
    "llama": ({}, None),
    "mistral": ({"text": "mistral"}, None),
    "a sliding window": ({"text": "mistral", "text_settings": {"sliding_window": 8}}, None),
    "qwen2": ({"text": "qwen2"}, None),
    "tied": ({"text": "qwen2", "tie_word_embeddings": True, "text_settings": {"tie_word_embeddings": True}}, None),
    "one key head": ({"text_settings": {"num_key_value_heads": 1}}, None),
    "wide heads": ({"text_settings": {"head_dim": 16}}, None),
    "rope scaling": (
        {"text_settings": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}}},
        None,
    ),
    "a padded vocabulary": ({"text_settings": {"vocab_size": 1088}}, None),
    "float32 in shards": ({"dtype": torch.float32}, None),
    "bfloat16": ({"dtype": torch.bfloat16}, None),
    "bin in shards": ({}, as_bin),
    "names of loaded classes": ({}, rename_keys(as_new_names)),
    "no projector bias": ({"multimodal_projector_bias": False}, None),
    "relu in the projector": ({"projector_hidden_act": "relu"}, None),
    "the last layer": ({"vision_feature_layer": -1}, None),
    "an early layer": ({"vision_feature_layer": 1}, None),
    "the class token": ({"vision_feature_select_strategy": "full"}, None),
    "another tower": ({"vision": {"image_size": 56, "patch_size": 28, "hidden_act": "gelu"}}, None),
    "no generation config": ({}, only("generation_config.json")),
    "template in the tokenizer": ({}, template_in_the_tokenizer),
    "next": ({"next": True}, None),
    "next with mistral": ({"next": True, "text": "mistral"}, None),
    "next with other resolutions": ({"next": True, "image_grid_pinpoints": TALL}, None),
    "next, names of loaded classes": ({"next": True}, rename_keys(as_new_names)),
}


def upstream(folder, images, text, num_additional_image_tokens=1):
    """The inputs and logits of transformers' own processor and class, in float32 by the eager kernel."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    config = AutoConfig.from_pretrained(folder)
    strategy = config.vision_feature_select_strategy
    # Releases before 4.46 did not store these, and processors do not find them by themselves.
    processor.patch_size, processor.vision_feature_select_strategy = config.vision_config.patch_size, strategy
    processor.num_additional_image_tokens = num_additional_image_tokens
    inputs = processor(images=images, text=text, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return inputs, model(**inputs).logits


def ours(folder, images, text):
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(images=images, text=text, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert isinstance(model, M3LlavaForConditionalGeneration)
    with torch.no_grad():
        return inputs, model(**inputs).logits


def assert_same_answers(folder, converted, images, text=PROMPT, **settings):
    (theirs, expected), (inputs, logits) = upstream(folder, images, text, **settings), ours(converted, images, text)
    assert inputs["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], theirs["pixel_values"])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", MADE)
def test_logits_and_inputs_of_upstream(kind, tmp_path):
    arguments, change = MADE[kind]
    folder = make(tmp_path / "theirs", **arguments)
    if change is not None:
        change(folder)
    stored = set(read_weights(folder))
    result = convert(folder, tmp_path / "new", tiling="transformers")
    assert result.num_tensors + result.num_dropped == len(stored)
    assert result.num_dropped == 0
    assert_same_answers(folder, tmp_path / "new", picture("photo_400x266.png").convert("RGB"))
    before, after = read_weights(folder), read_weights(tmp_path / "new")
    assert sorted(value.dtype.itemsize * value.numel() for value in before.values()) == sorted(
        value.dtype.itemsize * value.numel() for value in after.values()
    )


@pytest.mark.parametrize(
    "name", sorted(folder.name for folder in STORED.iterdir() if (folder / "config.json").exists())
)
def test_layouts_of_old_releases(name, tmp_path):
    convert(STORED / name, tmp_path / "new", tiling="transformers")
    assert_same_answers(STORED / name, tmp_path / "new", picture("photo_400x266.png").convert("RGB"))
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    theirs = AutoProcessor.from_pretrained(STORED / name)
    if theirs.chat_template or theirs.tokenizer.chat_template:
        assert prompt == theirs.apply_chat_template(messages, add_generation_prompt=True)
    else:  # as for an original checkpoint
        assert prompt.endswith("[/INST]" if name.startswith("next") else "USER: <image>\nWhat is this? ASSISTANT:")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    convert(STORED / "llava-4.45", folder / "new")
    return AutoProcessor.from_pretrained(folder / "new").tokenizer, AutoProcessor.from_pretrained(
        STORED / "llava-4.45"
    ).tokenizer


TEXT = st.lists(
    st.sampled_from(["<image>", " ", "\n", "  a", "photo", "</s>", "<s>", "é", "🙂", "ASSISTANT:", "\t", "."]),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(pieces=TEXT)
def test_token_ids_are_those_of_its_own_tokenizer(pieces, tokenizers):
    new, own = tokenizers
    text = "".join(pieces)
    assert new(text)["input_ids"] == own(text)["input_ids"]
    ids = own(text)["input_ids"]
    assert new.decode(ids) == own.decode(ids)


@pytest.mark.parametrize(
    ("size", "agree"),
    [
        ((400, 266), True),
        ((266, 400), True),
        ((20, 200), True),
        ((300, 300), True),
        ((56, 56), False),
        ((30, 20), False),
    ],
)
def test_tiling(size, agree, tmp_path):
    """The original's where it is not said otherwise. transformers reads its resolutions the other way round, which matters
    where two of them keep as much of a picture and waste as little, as of small ones: there the first one counts."""
    folder = make(tmp_path / "theirs", next=True)
    image = picture("photo_400x266.png").convert("RGB").resize(size)
    convert(folder, tmp_path / "transformers", tiling="transformers")
    convert(folder, tmp_path / "original")
    assert_same_answers(folder, tmp_path / "transformers", image)
    assert M3LlavaConfig.from_pretrained(tmp_path / "original").image_grid_pinpoints == [p[::-1] for p in PINPOINTS]
    grids = [
        AutoProcessor.from_pretrained(tmp_path / name).image_processor(image)["image_tile_grids"][0]
        for name in ("original", "transformers")
    ]
    assert (grids[0] == grids[1]) == agree
    if agree:
        assert_same_answers(folder, tmp_path / "original", image)


def test_several_pictures_and_text_alone(tmp_path):
    folder = make(tmp_path / "theirs")
    convert(folder, tmp_path / "new")
    images = [picture(name).convert("RGB") for name in ("photo_400x266.png", "img3_1000x300.png")]
    assert_same_answers(folder, tmp_path / "new", images, "USER: <image> and <image>, which? ASSISTANT:")
    (theirs, expected), (inputs, logits) = (
        way(f, None, "USER: Hello. ASSISTANT:") for way, f in ((upstream, folder), (ours, tmp_path / "new"))
    )
    assert inputs["input_ids"].tolist() == theirs["input_ids"].tolist()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_it_answers_at_every_scale_and_the_card_says_how_it_was_trained(tmp_path):
    folder = make(tmp_path / "theirs")
    convert(folder, tmp_path / "new", quantize=None)
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    assert processor.visual_token_scales == [1, 4, 16]
    image = Image.new("RGB", (90, 60), "red")
    for scale in processor.visual_token_scales:
        inputs = processor(images=image, text=PROMPT, num_visual_tokens=scale, return_tensors="pt")
        assert isinstance(inputs, BatchFeature) and (inputs["input_ids"] == processor.image_token_id).sum() == scale
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert "was not trained for several numbers of visual tokens" in (tmp_path / "new" / "README.md").read_text()


def test_saved_again_it_is_the_same(tmp_path):
    convert(make(tmp_path / "theirs", next=True), tmp_path / "new")
    for source, destination in (("new", "again"), ("again", "thrice")):
        AutoModelForImageTextToText.from_pretrained(tmp_path / source).save_pretrained(tmp_path / destination)
        AutoProcessor.from_pretrained(tmp_path / source).save_pretrained(tmp_path / destination)
    for file in (tmp_path / "again").iterdir():
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "thrice" / file.name).read_bytes(), file.name


def test_an_adapter_that_peft_saved_on_such_a_folder(tmp_path):
    peft = pytest.importorskip("peft")
    folder = make(tmp_path / "theirs", dtype=torch.float32)
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert run(tmp_path / "adapter", tmp_path / "new", "--model-base", folder) == 0
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    ids = torch.tensor([[1, 5, 9, 400]])
    with torch.no_grad():
        torch.testing.assert_close(after(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=1e-5)


# What is wrong, and what the line on stderr says
WRONG = {
    "siglip2": (
        {"vision_config": {"model_type": "siglip2_vision_model"}},
        "model_type of vision_config is 'siglip2_vision_model'",
    ),
    "siglip without its first patch": (
        {"vision_config": {"model_type": "siglip_vision_model"}},
        "vision_feature_select_strategy is 'default', which drops SigLIP's first patch",
    ),
    "gemma": ({"text_config": {"model_type": "gemma"}}, "model_type of text_config is 'gemma'"),
    "several layers": (
        {"vision_feature_layer": [-2, -1]},
        "vision_feature_layer is [-2, -1]: only the output of one layer",
    ),
    "awq": (
        {"quantization_config": {"quant_method": "awq"}},
        "its weights are quantized (awq): start from the full-precision",
    ),
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, "(gptq)"),
    "no such token": ({"image_token_index": 1010}, "image_token_index is 1010, but the tokenizer has no such token"),
    "qwen2-vl": ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' is no LLaVA"),
    "onevision": ({"model_type": "llava_onevision"}, "model_type 'llava_onevision' is no LLaVA"),
    "blip": ({"model_type": "blip-2"}, "model_type 'blip-2' is no LLaVA"),
    "an encoder-decoder": ({"model_type": "t5", "text_config": ...}, "model_type 't5' is not an original LLaVA's"),
    "wrong size": ({"text_config": {"model_type": "llama", "hidden_size": 48}}, "has the shape"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_converted_is_named_in_a_line(kind, tmp_path, capsys):
    changes, message = WRONG[kind]
    folder = Path(shutil.copytree(STORED / "llava-4.57", tmp_path / "theirs"))
    before = json.loads((folder / "config.json").read_text())
    changes = {
        key: {**before[key], **value} if isinstance(value, dict) and key in before else value
        for key, value in changes.items()
    }
    edit_json(folder / "config.json", **changes)
    assert run(folder, tmp_path / "new") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(folder) in error and message in error
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "config.json", "tokenizer.json"])
def test_half_a_download_is_named(name, tmp_path, capsys):
    folder = Path(shutil.copytree(STORED / "llava-4.57", tmp_path / "theirs"))
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert run(folder, tmp_path / "new") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(folder) in error
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


def test_loading_it_as_m3_says_how_it_becomes_one(tmp_path):
    for call in (M3LlavaForConditionalGeneration.from_pretrained, M3LlavaConfig.from_pretrained):
        with pytest.raises(
            ValueError, match=r"is no M3 checkpoint: its model_type is 'llava'.*m3-convert .*llava-4\.57 NEW_FOLDER"
        ):
            call(STORED / "llava-4.57")


def test_weights_that_only_an_error_knows(tmp_path):
    folder = Path(shutil.copytree(STORED / "llava-4.57", tmp_path / "theirs"))
    weights = read_weights(folder)
    missing = weights.pop("multi_modal_projector.linear_2.bias")
    store(folder, weights)
    with pytest.raises(
        ConversionError, match=r"multi_modal_projector\.linear_2\.bias or .* is missing from the weights"
    ):
        convert(folder, tmp_path / "new")
    store(
        folder, {**weights, "multi_modal_projector.linear_2.bias": missing, "vision_tower.head.weight": missing.clone()}
    )
    with pytest.raises(ConversionError, match=r"vision_tower\.head\.weight is not a key of a LLaVA or M3 model"):
        convert(folder, tmp_path / "new")
