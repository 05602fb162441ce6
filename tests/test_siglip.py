"""SigLIP vision towers: against transformers' own, in the model, and in LLaVA checkpoints of both formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import picture, tiny_config
from conversion_checkpoints import VISION, change_weights, copy_golden, edit_json, read_weights, run
from new_models import make_tower, reference_tokens, tokenizer
from test_conversion_transformers import assert_same_answers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionModel,
)
from transformers.models.siglip import SiglipImageProcessorPil

from m3_conversion.convert import convert
from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration


SIGLIP = {"model_type": "siglip_vision_model"}


def siglip_model(**overrides):
    """A tiny M3 with a SigLIP tower, and transformers' own class with the same weights."""
    torch.manual_seed(0)
    model = M3LlavaForConditionalGeneration(tiny_config(vision_config=SIGLIP, **overrides)).eval()
    for parameter in model.model.vision_tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tower = SiglipVisionModel(model.config.vision_config).eval()
    tower.load_state_dict(model.model.vision_tower.state_dict())
    return model, tower


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_features_are_hidden_states_before_the_last_norm(layer):
    model, tower = siglip_model(vision_feature_layer=layer)
    pixels = torch.randn(2, 3, 24, 24)
    encoded, expected = model.encode_images(pixels), tower(pixels, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(encoded.last_hidden_state, expected)
    weights = model.model.multi_modal_projector.state_dict()
    for scale in model.config.visual_token_scales:
        tokens = reference_tokens(tower, layer, 0, weights, pixels, scale)
        torch.testing.assert_close(torch.stack(model.get_visual_tokens(encoded, scale)), tokens, rtol=0, atol=1e-6)
        video = model.encode_video(pixels, num_visual_tokens=scale)
        torch.testing.assert_close(video.tile_features, tokens, rtol=0, atol=1e-6)


def test_layers_that_are_not_used_are_not_computed_but_kept():
    model, tower = siglip_model(vision_feature_layer=-2)
    called = []
    for index, layer in enumerate(model.model.vision_tower.encoder.layers[:]):
        layer.register_forward_hook(lambda *_, index=index: called.append(index))
    model.encode_images(torch.randn(1, 3, 24, 24))
    assert called == [0, 1]
    assert model.model.vision_tower.state_dict().keys() == tower.state_dict().keys()
    assert not [name for name in tower.state_dict() if name.startswith("head.")]


def test_the_grid_of_384_pixels_has_four_scales():
    config = M3LlavaConfig(vision_config={**SIGLIP, "image_size": 384, "patch_size": 14})
    assert config.visual_token_scales == [1, 9, 81, 729] and config.vision_config.vision_use_head is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"vision_config": {"model_type": "siglip2_vision_model"}},
            "model_type 'siglip2_vision_model' is not supported",
        ),
        ({"vision_config": {"model_type": "dinov2"}}, "model_type 'dinov2' is not supported"),
        ({"vision_config": SIGLIP, "vision_feature_select_strategy": "full"}, "which a siglip_vision_model has not"),
        ({"vision_config": {**SIGLIP, "image_size": [384, 512]}}, r"image_size=\[384, 512\].*must be one number"),
    ],
)
def test_what_has_no_grid_of_patches_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        M3LlavaConfig(**settings)


def transformers_llava(folder, layer, **settings):
    known = tokenizer(False, None)
    known.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tower = SiglipVisionModel.from_pretrained(make_tower(folder / "tower", "siglip")).config
    text = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=known.convert_tokens_to_ids("<image>"),
        vision_feature_layer=layer,
        **{"vision_feature_select_strategy": "full", **settings},
    )
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "theirs")
    images = SiglipImageProcessorPil.from_pretrained(folder / "tower")
    processor = LlavaProcessor(
        images, known, patch_size=4, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )
    processor.save_pretrained(folder / "theirs")
    edit_json(folder / "theirs" / "processor_config.json", num_additional_image_tokens=0)
    return folder / "theirs"


@pytest.mark.parametrize("layer", [-1, -2])
def test_transformers_llava_with_siglip_answers_the_same(layer, tmp_path):
    folder = transformers_llava(tmp_path, layer)
    convert(folder, tmp_path / "new")
    assert_same_answers(
        folder, tmp_path / "new", picture("photo_400x266.png").convert("RGB"), num_additional_image_tokens=0
    )


@torch.no_grad()
@pytest.mark.parametrize("inside", [False, True])
def test_an_original_llava_with_siglip(inside, tmp_path):
    """Whether its weights are those of the folder, or in the checkpoint without the last layer, as LLaVA's code leaves them."""
    folder = copy_golden("llava15-m3", tmp_path)
    tower = SiglipVisionModel.from_pretrained(make_tower(tmp_path / "siglip", "siglip")).eval()
    changes = {key: None for key in read_weights(folder) if key.startswith(VISION)}
    if inside:
        held = {
            key: value
            for key, value in tower.state_dict().items()
            if not key.startswith(("head.", "encoder.layers.2."))
        }
        changes |= {VISION + key: value for key, value in held.items()}
    change_weights(folder, changes)
    edit_json(
        folder / "config.json",
        mm_vision_tower=str(tmp_path / "siglip"),
        unfreeze_mm_vision_tower=inside,
        matryoshka_vis_token_scale=[1, 9, 81],
        mm_vision_select_feature="cls_patch" if inside else "patch",
    )
    assert run(folder, tmp_path / "new") == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "new", backend="pil")
    assert model.config.vision_config.num_hidden_layers == 3 - inside
    image = picture("photo_400x266.png").convert("RGB")
    pixels = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    weights = {
        key.removeprefix("model.mm_projector."): value
        for key, value in read_weights(folder).items()
        if key.startswith("model.mm_projector.")
    }
    weights = {key.replace("0.", "linear_1.").replace("2.", "linear_2."): value for key, value in weights.items()}
    for scale in (1, 9, 81):
        tokens = reference_tokens(tower, -2, 0, weights, pixels, scale)
        found = model.get_image_features(pixels, num_visual_tokens=[scale], return_dict=True).pooler_output
        torch.testing.assert_close(torch.stack(found), tokens, rtol=0, atol=1e-5)


def test_pictures_are_prepared_as_siglip_does(tmp_path):
    folder = transformers_llava(tmp_path, -2)
    convert(folder, tmp_path / "new")
    processor = AutoProcessor.from_pretrained(tmp_path / "new", backend="pil")
    theirs = SiglipImageProcessorPil.from_pretrained(tmp_path / "tower")
    image = picture("photo_400x266.png").convert("RGB")
    pixels = processor(images=image, text="<image>", return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels, theirs(image, return_tensors="np")["pixel_values"])
    assert processor.image_processor.resample == 2 and not processor.image_processor.do_center_crop
