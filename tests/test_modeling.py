"""M3 as a transformers model: the conventions its own models are tested for, and parity with its own LLaVA."""

import copy

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration, M3LlavaModel
from modeling_m3.modeling_m3 import M3LlavaMultiModalProjector


ANYRES = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]], "patch_merge_type": "spatial_unpad"}


def tiny_model(**overrides):
    torch.manual_seed(0)
    return M3LlavaForConditionalGeneration(tiny_config(**overrides)).eval()


def tiny_inputs(model, scales=(9, 36), prompts=1, text=6):
    """Prompts of `text` random ids and one run of placeholders per scale, with random pictures."""
    generator = torch.Generator().manual_seed(1)
    image, rows, pixels = model.config.image_token_id, [], []
    for _ in range(prompts):
        row = [1]
        for scale in scales:
            row += [image] * scale + torch.randint(3, 90, (text,), generator=generator).tolist()
            pixels.append(torch.randn(3, 24, 24, generator=generator))
        rows.append(row)
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.stack(pixels),
        "num_visual_tokens": torch.tensor(scales * prompts),
    }


# Configuration


def test_the_default_configuration_is_llava_15_7b():
    config = M3LlavaConfig()
    assert config.visual_token_scales == [1, 9, 36, 144, 576]
    assert (config.grid_side, config.num_vision_layers) == (24, 23)
    assert config.image_token_id == config.image_token_index == 32000 < config.text_config.vocab_size
    assert M3LlavaConfig(image_token_index=7).image_token_id == 7


def test_a_configuration_survives_saving(tmp_path):
    config = tiny_config(visual_token_scales=[1, 16, 144], visual_token_sampling="spatial", **ANYRES)
    config.save_pretrained(tmp_path)
    reloaded = M3LlavaConfig.from_pretrained(tmp_path)
    left, right = config.to_dict(), reloaded.to_dict()
    for settings in (left, right):
        settings.pop("_name_or_path", None), settings.pop("transformers_version")
    assert left == right


def test_scales_follow_the_grid():
    assert tiny_config().visual_token_scales == [1, 9, 36, 144]
    assert tiny_config(visual_token_scales=[1, 4, 16, 144]).visual_token_scales == [1, 4, 16, 144]
    assert tiny_config(vision_feature_select_strategy="full").visual_token_scales == [144]


@pytest.mark.parametrize(("settings", "named"), [
    ({"visual_token_scales": [1, 100]}, "100"),
    ({"vision_feature_select_strategy": "full", "visual_token_scales": [1, 144]}, "class token"),
    ({"vision_feature_select_strategy": "full", "patch_merge_type": "spatial"}, "class token"),
    ({"vision_feature_select_strategy": "cls"}, "'cls'"),
    ({"visual_token_sampling": "maximum"}, "'maximum'"),
    ({"patch_merge_type": "zigzag"}, "'zigzag'"),
    ({"image_grid_pinpoints": [[24, 25]]}, r"\[24, 25\]"),
    ({"image_grid_pinpoints": []}, "at least one"),
    ({"vision_feature_layer": -5}, "-5"),
    ({"multimodal_projector_depth": 0}, "16 and 32"),
])  # fmt: skip
def test_a_configuration_that_no_model_fits_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        tiny_config(**settings)


# The model's parts


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_projectors_of_any_depth_alternate_layers_and_activations(depth):
    projector = M3LlavaMultiModalProjector(tiny_config(multimodal_projector_depth=depth))
    layers = [projector.get_submodule(f"linear_{i}") for i in range(1, depth + 1)]
    assert [layer.in_features for layer in layers] == [16] + [32] * (depth - 1)
    hidden = features = torch.randn(2, 5, 16)
    for i, layer in enumerate(layers):
        hidden = layer(torch.nn.functional.gelu(hidden) if i else hidden)
    torch.testing.assert_close(projector(features), hidden)


def test_an_identity_projector_has_no_weights():
    config = tiny_config(multimodal_projector_depth=0, vision_config={"hidden_size": 32})
    projector = M3LlavaMultiModalProjector(config)
    features = torch.randn(2, 5, 32)
    assert torch.equal(projector(features), features)
    assert not list(projector.parameters())


@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 2])
def test_the_vision_tower_stops_at_the_selected_layer(layer):
    model = tiny_model(vision_feature_layer=layer).model
    reference = AutoModel.from_config(model.config.vision_config)
    assert set(reference.state_dict()) == set(model.vision_tower.state_dict()), "its weights stay whole"
    reference.load_state_dict(model.vision_tower.state_dict())
    pixel_values = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = reference.eval()(pixel_values, output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(model.vision_tower(pixel_values).last_hidden_state, expected)

    computed = []
    for index in range(model.config.vision_config.num_hidden_layers):
        model.vision_tower.encoder.layers[index].register_forward_hook(
            lambda *args, index=index: computed.append(index)
        )
    model.get_image_features(pixel_values)
    assert computed == list(range(model.config.num_vision_layers))


def test_the_newline_exists_only_where_it_is_used():
    names = dict(tiny_model(**ANYRES).named_parameters())
    assert names["model.image_newline"].shape == (32,)
    for settings in ({}, {"patch_merge_type": "spatial_unpad"}, {**ANYRES, "patch_merge_type": "flat"}):
        assert "model.image_newline" not in dict(tiny_model(**settings).named_parameters())


# Image features


def test_image_features_are_a_list_with_one_tensor_per_image():
    for model in (tiny_model(), tiny_model().model):
        pixel_values = torch.randn(4, 3, 24, 24)
        output = model.get_image_features(pixel_values, num_visual_tokens=torch.tensor([1, 9, 36, 144]))
        assert isinstance(output, BaseModelOutputWithPooling)
        assert [tuple(image.shape) for image in output.pooler_output] == [(1, 32), (9, 32), (36, 32), (144, 32)]
        assert output.last_hidden_state.shape == (4, 145, 16)
        as_tuple = model.get_image_features(pixel_values, num_visual_tokens=9, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.last_hidden_state)
        model.set_attn_implementation("eager")  # the one that returns attentions
        shown = model.get_image_features(pixel_values, output_hidden_states=True, output_attentions=True)
        assert len(shown.hidden_states) == 3 and len(shown.attentions) == 2, "of the two layers that are computed"


def test_a_mixed_call_equals_single_calls():
    model = tiny_model(**ANYRES)
    generator = torch.Generator().manual_seed(0)
    sizes, counts = [[20, 40], [40, 40], [40, 20]], [3, 5, 3]
    tiles = [torch.randn(count, 3, 24, 24, generator=generator) for count in counts]
    padded = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
    with torch.no_grad():
        scales = torch.tensor([1, 36, 144])
        mixed = model.get_image_features(padded, torch.tensor(sizes), num_visual_tokens=scales).pooler_output
        as_list = model.get_image_features(tiles, sizes, num_visual_tokens=scales.tolist()).pooler_output
        for index, scale in enumerate((1, 36, 144)):
            alone = tiles[index][None], [sizes[index]]
            [single] = model.get_image_features(*alone, num_visual_tokens=scale).pooler_output
            torch.testing.assert_close(mixed[index], single)
            torch.testing.assert_close(as_list[index], single)


def test_outputs_carry_what_was_made_of_the_images():
    model = tiny_model()
    inputs = tiny_inputs(model)
    images = {name: inputs[name] for name in ("pixel_values", "num_visual_tokens")}
    with torch.no_grad():
        expected = model.get_image_features(**images, output_hidden_states=True)
        encoded = model.encode_images(inputs["pixel_values"])
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask", "num_visual_tokens")}
        for part, given in ((model, inputs), (model.model, inputs), (model, {**ids, "encoded_images": encoded})):
            found = part(**given)
            assert type(found.image_outputs) is type(expected)
            torch.testing.assert_close(found.image_outputs.pooler_output, expected.pooler_output)
            torch.testing.assert_close(found.image_outputs.last_hidden_state, expected.last_hidden_state)
            torch.testing.assert_close(found.image_hidden_states, torch.cat(expected.pooler_output))
            as_tuple = part(**given, return_dict=False)
            assert isinstance(as_tuple, tuple) and not any(isinstance(value, ModelOutput) for value in as_tuple)
            assert [type(value) for value in as_tuple].count(tuple) == 1
        assert model(input_ids=torch.tensor([[1, 5, 6]])).image_outputs is None


def test_the_sampling_can_be_chosen_per_call():
    model, pixel_values = tiny_model(), torch.randn(1, 3, 24, 24)

    def features(**kwargs):
        with torch.no_grad():
            return model.get_image_features(pixel_values, num_visual_tokens=9, **kwargs).pooler_output[0]

    spatial = features(visual_token_sampling="spatial")
    assert not torch.equal(features(), spatial)
    model.config.visual_token_sampling = "spatial"
    assert torch.equal(features(), spatial)
    with pytest.raises(ValueError, match="'maximum'"):
        features(visual_token_sampling="maximum")


def test_a_kept_class_token_counts_and_cannot_be_pooled():
    model = tiny_model(vision_feature_select_strategy="full")
    pixel_values = torch.randn(2, 3, 24, 24)
    assert [len(image) for image in model.get_image_features(pixel_values).pooler_output] == [145, 145]
    with pytest.raises(ValueError, match="9"):
        model.get_image_features(pixel_values, num_visual_tokens=9)


@pytest.mark.parametrize(("kwargs", "named"), [
    ({"image_sizes": None}, "image_sizes"),
    ({"image_sizes": [[48, 48]], "image_grid_pinpoints": [[72, 72]]}, "10"),
    ({"image_sizes": [[48, 48]] * 2}, r"\[5, 5\]"),
    ({"image_sizes": [[48, 48]], "num_visual_tokens": 100}, "100"),
    ({"image_sizes": [[48, 48]], "num_visual_tokens": [1, 9]}, r"2 entries for 1 image"),
])  # fmt: skip
def test_image_inputs_that_do_not_fit_are_refused(kwargs, named):
    with pytest.raises(ValueError, match=named):
        tiny_model(**ANYRES).get_image_features(torch.zeros(1, 5, 3, 24, 24), **kwargs)


# Forward


def test_forward():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        output = model(**inputs)
        assert output.logits.shape == (1, inputs["input_ids"].shape[1], 99)
        assert output.image_hidden_states.shape == (45, 32)
        kept = model(**inputs, logits_to_keep=3)
        torch.testing.assert_close(kept.logits, output.logits[:, -3:])
        as_tuple = model(**inputs, return_dict=False)
        torch.testing.assert_close(as_tuple[0], output.logits)
        model.set_attn_implementation("eager")  # the one that returns attentions
        shown = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert len(shown.hidden_states) == 3 and len(shown.attentions) == 2


def test_text_alone():
    model = tiny_model()
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, model.lm_head(model.model.language_model(ids).last_hidden_state))


def test_without_a_budget_it_is_the_finest_scale():
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(144,))
    with torch.no_grad():
        expected = model(**inputs).logits
        inputs.pop("num_visual_tokens")
        assert torch.equal(model(**inputs).logits, expected)


def test_a_count_of_placeholders_that_differs_is_refused():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with pytest.raises(ValueError, match="45 placeholders for 288 visual tokens"):
        model(**{**inputs, "num_visual_tokens": None})


def test_embeddings_in_place_of_ids():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(model(**inputs, inputs_embeds=embeds).logits, expected)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=torch.tensor([[1]]), inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_encoded_images_in_place_of_pixels():
    model = tiny_model()
    inputs = tiny_inputs(model)
    images = {name: inputs[name] for name in ("pixel_values", "num_visual_tokens")}
    with torch.no_grad():
        expected = model(**inputs).logits
        encoded = {"image": model.get_image_features(**images)}
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(model(**text, mm_encoder_outputs=encoded).logits, expected)
    with pytest.raises(ValueError, match="only one of pixel_values"):
        model(**inputs, mm_encoder_outputs=encoded)


def test_the_loss_is_that_of_the_next_token():
    model = tiny_model()
    inputs = tiny_inputs(model)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    output = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:], ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("settings", [{}, ANYRES])
def test_gradients_reach_every_parameter_that_is_used(settings):
    model = tiny_model(**settings).train()
    if settings:
        pixels = {"pixel_values": torch.randn(1, 3, 3, 24, 24), "image_sizes": [[24, 40]]}
        tokens = len(model.get_image_features(**pixels, num_visual_tokens=9).pooler_output[0])
    else:
        pixels, tokens = {"pixel_values": torch.randn(1, 3, 24, 24)}, 9
    ids = torch.tensor([[1] + [98] * tokens + [4, 5, 6]])
    model(ids, **pixels, num_visual_tokens=9, labels=ids.masked_fill(ids == 98, -100)).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # With select layer -2 the original's last CLIP layer gets none either.
    assert all("encoder.layers.2." in name or "post_layernorm" in name for name in without)
    assert len(without) == 16 + 2


def test_gradient_checkpointing_changes_no_gradient():
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        inputs = tiny_inputs(model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for (name, left), right in zip(plain.named_parameters(), checkpointed.parameters()):
        if left.grad is not None:
            torch.testing.assert_close(left.grad, right.grad, msg=name)


def test_attention_implementations_agree():
    model = tiny_model()
    inputs = tiny_inputs(model)
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(**inputs).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"])


# Weights


def test_weight_names():
    prefixes = {".".join(name.split(".")[:2]) for name in tiny_model(**ANYRES).state_dict()}
    assert prefixes == {
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model",
        "model.image_newline",
        "lm_head.weight",
    }


@pytest.mark.parametrize("settings", [{}, ANYRES, {"tie_word_embeddings": True}])
def test_saving_and_loading_changes_no_logit(settings, tmp_path):
    model = tiny_model(**settings)
    model.save_pretrained(tmp_path)
    reloaded, report = M3LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits)
    for name, value in model.state_dict().items():
        assert torch.equal(value, reloaded.state_dict()[name]), name


def test_loading_on_a_device_map_leaves_no_buffer_uninitialised(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs(model)
    reloaded = M3LlavaForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"})
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, reloaded(**inputs).logits)


def test_tied_weights_are_one():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert tiny_model(text_config={"tie_word_embeddings": True}).lm_head.weight.shape == (99, 32)


def test_embeddings_can_be_resized():
    model = tiny_model()
    before = model.get_input_embeddings().weight[:99].clone()
    model.resize_token_embeddings(128)
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == 128
    assert model.config.text_config.vocab_size == 128
    assert torch.equal(model.get_input_embeddings().weight[:99], before)
    inputs = tiny_inputs(model)
    assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()


def test_initialisation_follows_the_configuration():
    newline = tiny_model(text_config={"hidden_size": 512}, **ANYRES).model.image_newline
    assert newline.std().item() == pytest.approx(512**-0.5, rel=0.2)


def test_a_headless_model_loads_from_the_same_folder(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    headless = AutoModel.from_pretrained(tmp_path)
    assert isinstance(headless, M3LlavaModel)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(headless(**inputs).last_hidden_state), model(**inputs).logits)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_language_models_of_the_originals(model_type):
    model = tiny_model(text_config={"model_type": model_type})
    assert model.model.language_model.config.model_type == model_type
    inputs = tiny_inputs(model)
    assert model(**inputs).logits.isfinite().all()


def test_a_copy_is_independent():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


# Parity with transformers' own LLaVA


def test_logits_equal_transformers_llava_at_the_finest_scale():
    ours = tiny_model()
    config = ours.config
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=copy.deepcopy(config.vision_config),
            text_config=copy.deepcopy(config.text_config),
            image_token_index=config.image_token_id,
        )
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = tiny_inputs(ours, scales=(144, 144))
    with torch.no_grad():
        expected = theirs(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
        torch.testing.assert_close(ours(**inputs).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("language_model", ["llama", "mistral"])
def test_layers_that_stay_whole_are_those_it_has(language_model):
    """Whoever wraps or places them by name looks for each: FSDP fails where one is not found."""
    config = tiny_config().to_dict()
    config["text_config"]["model_type"] = language_model
    model = M3LlavaForConditionalGeneration(type(tiny_config())(**config))
    held = {type(module).__name__ for module in model.modules()}
    decoder_layer = {"llama": "LlamaDecoderLayer", "mistral": "MistralDecoderLayer"}[language_model]
    for part in (model, model.model):
        assert {"CLIPEncoderLayer", decoder_layer} <= part._no_split_modules <= held
