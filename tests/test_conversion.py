"""Conversion of good checkpoints: tensors, settings and files of the new folder, for every variant of the original."""

import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS, GOLDENS, golden, golden_tensors
from conversion_checkpoints import (
    CLIP,
    NEW_VISION,
    VISION,
    change_weights,
    copy_golden,
    edit_json,
    read_weights,
    run,
    store,
)
from original_model import OriginalModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, GenerationConfig

from benchmarks.measure import memory
from m3_conversion.convert import convert
from m3_conversion.mapping import CHECKPOINT_KEYS, CLIP_KEYS, original_keys, remap_key, translate_config
from m3_conversion.original import ConversionError, file_tensors
from m3_conversion.vision import BUILT_IN_CONFIG, find_vision_tower
from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration


ROWS = 1000  # of the goldens' vocabulary
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def renamed(key: str) -> str:
    """The name of an original key here, by a second, shorter rule than the table's."""
    for old, new in (
        (VISION, NEW_VISION),
        ("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
        ("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
        ("model.image_newline", "model.image_newline"),
        ("lm_head", "lm_head"),
        ("model.", "model.language_model."),
    ):
        if key.startswith(old):
            return new + key.removeprefix(old)
    raise AssertionError(key)


def assert_same(new: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> None:
    """Bit for bit the same tensors under the new names, the vocabulary's old rows included, nothing else."""
    assert sorted(new) == sorted(renamed(key) for key in old)
    for key, tensor in old.items():
        converted = new[renamed(key)]
        assert converted.dtype == tensor.dtype, key
        assert torch.equal(converted[: len(tensor)] if key in VOCABULARY else converted, tensor), key


def load(folder: Path) -> M3LlavaForConditionalGeneration:
    """The model, if the folder holds exactly what it needs."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("name", CHECKPOINTS)
class TestGoldens:
    def test_weights_are_the_original_s_bit_for_bit(self, name, converted):
        new, old = read_weights(converted[name]), read_weights(GOLDENS / name)
        assert_same(new, old)
        for key in VOCABULARY:
            padded = new[renamed(key)]
            assert padded.shape[0] == 1024  # 1000 rows and <image>, in a multiple of 64
            expected = old[key].double().mean(0).float().expand(24, -1)
            assert torch.equal(padded[ROWS:], expected)

    def test_loads_strictly(self, name, converted):
        model = load(converted[name])
        assert set(model.state_dict()) == set(read_weights(converted[name]))

    def test_configuration(self, name, converted):
        config = json.loads((converted[name] / "config.json").read_text())
        assert config["model_type"] == "m3_llava"
        assert config["architectures"] == ["M3LlavaForConditionalGeneration"]
        models = {f"AutoModel{suffix}" for suffix in ("", "ForImageTextToText", "ForMultimodalLM")}
        assert set(config["auto_map"]) == {"AutoConfig", *models}
        assert config["dtype"] == "float32"
        assert config["image_token_id"] == ROWS
        assert config["visual_token_scales"] == [1, 9, 36, 144, 576]
        assert config["text_config"]["vocab_size"] == 1024
        assert config["text_config"]["max_position_embeddings"] == 4096
        assert not any("mm_" in key for key in (*config, *config["text_config"]))
        tiled = name == "llava-next-m3"
        assert config["patch_merge_type"] == ("spatial_unpad" if tiled else "flat")
        pinpoints = [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]  # (height, width), order kept
        assert config["image_grid_pinpoints"] == (pinpoints if tiled else None)

    def test_processor(self, name, converted):
        processor = AutoProcessor.from_pretrained(converted[name], backend="pil")
        assert processor.visual_token_scales == [1, 9, 36, 144, 576]
        assert processor.image_processor.do_pad == (name == "llava15-m3")
        assert processor.tokenizer.convert_tokens_to_ids("<image>") == processor.image_token_id == ROWS
        assert processor.chat_template.strip()

    def test_generation_settings_are_greedy_and_valid(self, name, converted, tmp_path):
        settings = GenerationConfig.from_pretrained(converted[name])
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 0)
        assert settings.do_sample is False, "said, not left open: a pipeline samples where it is left open"
        assert not {"temperature", "top_p", "max_length"} & set(
            json.loads((converted[name] / "generation_config.json").read_text())
        )
        settings.save_pretrained(tmp_path)

    def test_twice_gives_the_same_bytes(self, name, converted, tmp_path):
        convert(GOLDENS / name, tmp_path / name)
        for file in converted[name].iterdir():
            assert file.read_bytes() == (tmp_path / name / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "layout",
    [
        "pytorch_model.bin",
        "legacy.bin",
        "pytorch_model.bin.index.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_every_storage_format(layout, tmp_path):
    source = copy_golden("llava15-m3", tmp_path)
    weights = read_weights(source)
    store(source, weights, layout)
    convert(source, tmp_path / "new")
    assert_same(read_weights(tmp_path / "new"), weights)


def test_tensors_that_are_views_of_others(tmp_path):
    """A `.bin` may store slices and transposed tensors."""
    source = copy_golden("llava15-m3", tmp_path)
    weights = read_weights(source)
    both = torch.cat([weights[key] for key in VOCABULARY])
    weights |= {VOCABULARY[0]: both[:ROWS], VOCABULARY[1]: both[ROWS:]}
    down = "model.layers.0.mlp.down_proj.weight"
    weights[down] = weights[down].T.contiguous().T
    store(source, weights, "pytorch_model.bin")
    convert(source, tmp_path / "new")
    assert_same(read_weights(tmp_path / "new"), weights)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_maps_are_closed_after_each_tensor(tmp_path):
    """Where torch does not tell where in a file a tensor lies, the file is mapped, which counts as memory."""
    torch.save({str(i): torch.full((1 << 21,), i, dtype=torch.float32) for i in range(8)}, tmp_path / "weights.bin")
    before = memory("RssFile")
    for key, tensor in file_tensors(tmp_path / "weights.bin").items():
        assert all((chunk == int(key)).all() for chunk in replace(tensor, offset=None).chunks())
        assert memory("RssFile") - before < 2.5 * tensor.nbytes


def test_shards(tmp_path):
    convert(GOLDENS / "llava-next-m3", tmp_path / "new", max_shard_size="200KB")
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert len(files) > 4
    assert all(file.stat().st_size < 220_000 for file in files)
    assert set(index["weight_map"].values()) == {file.name for file in files}
    weights = read_weights(tmp_path / "new")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert_same(weights, read_weights(GOLDENS / "llava-next-m3"))
    load(tmp_path / "new")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype, tmp_path):
    assert run(GOLDENS / "llava15-m3", tmp_path / "new", "--dtype", dtype) == 0
    wanted = getattr(torch, dtype)
    old = {key: tensor.to(wanted) for key, tensor in read_weights(GOLDENS / "llava15-m3").items()}
    assert_same(read_weights(tmp_path / "new"), old)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == dtype


def test_default_dtype_is_as_stored(tmp_path):
    source = copy_golden("llava15-m3", tmp_path)
    stored = {
        key: tensor if key.startswith(VISION) else tensor.bfloat16() for key, tensor in read_weights(source).items()
    }
    store(source, stored)
    convert(source, tmp_path / "new")
    assert_same(read_weights(tmp_path / "new"), stored)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


class TestVisionTower:
    """The original's rule: a checkpoint's own vision weights count only with `unfreeze_mm_vision_tower: true`."""

    def vision(self, weights, prefix):
        return {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}

    def assert_vision(self, new, of, prefix):
        new, old = self.vision(read_weights(new), NEW_VISION), self.vision(read_weights(of), prefix)
        assert new.keys() == old.keys()
        assert all(torch.equal(new[key], old[key]) for key in old)

    @pytest.mark.parametrize("setting", [..., False, None])
    def test_frozen(self, setting, tmp_path, caplog):
        source = copy_golden("llava15-m3", tmp_path)
        edit_json(source / "config.json", unfreeze_mm_vision_tower=setting)
        logging.getLogger("m3_conversion").propagate = True
        with caplog.at_level(logging.INFO):
            convert(source, tmp_path / "new")
        self.assert_vision(tmp_path / "new", tmp_path / CLIP, "vision_model.")
        assert "do not count" in caplog.text
        load(tmp_path / "new")

    def test_not_in_the_checkpoint(self, tmp_path):
        source = copy_golden("llava15-m3", tmp_path)
        edit_json(source / "config.json", unfreeze_mm_vision_tower=False)
        store(source, {key: tensor for key, tensor in read_weights(source).items() if not key.startswith(VISION)})
        convert(source, tmp_path / "new")
        self.assert_vision(tmp_path / "new", tmp_path / CLIP, "vision_model.")

    def test_option_does_not_override_trained_weights(self, tmp_path, capsys):
        source = copy_golden("llava15-m3", tmp_path)
        other = (tmp_path / CLIP).rename(tmp_path / "clip")
        assert run(source, tmp_path / "new", "--vision-tower", str(other)) == 0
        self.assert_vision(tmp_path / "new", source, VISION)
        assert "unfreeze_mm_vision_tower" in capsys.readouterr().err

    def test_trained_but_left_out_of_the_checkpoint(self, tmp_path):
        source = copy_golden("llava15-m3", tmp_path)
        store(source, {key: tensor for key, tensor in read_weights(source).items() if not key.startswith(VISION)})
        with pytest.raises(ConversionError, match="--vision-tower"):
            convert(source, tmp_path / "new")
        convert(source, tmp_path / "new", vision_tower=str(tmp_path / CLIP))
        self.assert_vision(tmp_path / "new", tmp_path / CLIP, "vision_model.")

    @pytest.mark.parametrize("prefix", ["vision_model.", ""])
    @pytest.mark.parametrize("layout", ["pytorch_model.bin.index.json", "model.safetensors"])
    def test_folder_of_a_vision_model_alone(self, prefix, layout, tmp_path):
        source = copy_golden("llava15-m3", tmp_path)
        edit_json(source / "config.json", unfreeze_mm_vision_tower=...)
        clip = tmp_path / CLIP
        vision = self.vision(read_weights(clip), "vision_model.")
        config = json.loads((clip / "config.json").read_text())["vision_config"]
        (clip / "config.json").write_text(json.dumps(config))
        old = {prefix + key: tensor for key, tensor in vision.items()}
        store(clip, old | {f"{prefix}embeddings.position_ids": torch.arange(577)[None]}, layout)
        convert(source, tmp_path / "new")
        new = self.vision(read_weights(tmp_path / "new"), NEW_VISION)
        assert new.keys() == vision.keys()
        assert all(torch.equal(new[key], vision[key]) for key in vision)

    def test_preprocessing_of_either_age(self, tmp_path):
        source = copy_golden("llava15-m3", tmp_path)
        changes = {
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
            "image_mean": [0.1, 0.2, 0.3],
        }
        edit_json(tmp_path / CLIP / "preprocessor_config.json", **changes)
        convert(source, tmp_path / "new")
        image_processor = AutoProcessor.from_pretrained(tmp_path / "new", backend="pil").image_processor
        assert list(image_processor.image_mean) == [0.1, 0.2, 0.3]
        assert image_processor.crop_size["height"] == image_processor.size["shortest_edge"] == 336

    def test_built_in(self, tmp_path):
        """The tower of the released checkpoints needs no folder and no network where its weights are inside."""
        config = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "unfreeze_mm_vision_tower": True}
        tower = find_vision_tower(config, tmp_path, {f"{VISION}post_layernorm.bias": None}, None)
        assert tower.tensors is None
        assert (
            M3LlavaConfig(vision_config=BUILT_IN_CONFIG).vision_config.to_dict()
            == M3LlavaConfig().vision_config.to_dict()
        )
        assert CLIPVisionConfig(**BUILT_IN_CONFIG).num_attention_heads == 16
        with pytest.raises(ConversionError, match="--vision-tower"):
            find_vision_tower({**config, "unfreeze_mm_vision_tower": False}, tmp_path, {}, None)


def assert_answers_as_the_original(model: M3LlavaForConditionalGeneration, folder: Path, source: Path) -> None:
    """The same ids and, within 1e-4, the same logits as the original's arithmetic, at the finest scale and a coarse one."""
    original = OriginalModel(source, source.parent / CLIP)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    picture, prompt = (
        Image.open(GOLDENS / "images" / "img5_97x53.png").convert("RGB"),
        "USER: <image>\nWhat? ASSISTANT:",
    )
    image_token_id = model.config.image_token_id
    for scale in {max(processor.visual_token_scales), min(processor.visual_token_scales)}:
        inputs = processor(images=picture, text=prompt, num_visual_tokens=scale, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        first, count = ids.index(image_token_id), ids.count(image_token_id)
        pooled = None if len(processor.visual_token_scales) == 1 else scale
        expected = original.logits(ids[: first + 1] + ids[first + count :], image_token_id, picture, pooled)
        with torch.no_grad():
            logits = model.eval()(**inputs).logits[0, :, :ROWS]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "case", [case for case in golden("llava15-m3")["cases"] if case["id"] in ("img5-s9", "img5-s576")]
)
def test_the_reference_equals_the_goldens(case):
    """Else the variants would be compared with nothing."""
    original = OriginalModel(GOLDENS / "llava15-m3", GOLDENS / CLIP)
    picture = Image.open(GOLDENS / "images" / "img5_97x53.png").convert("RGB")
    logits = original.logits(case["input_ids"][0], -200, picture, case["scale"])[case["positions"], ::16]
    stored = golden_tensors("llava15-m3")[f"{case['id']}/logits_sub"][0]
    torch.testing.assert_close(logits, stored, atol=1e-4, rtol=0)


def linear(weights):
    return {
        "model.mm_projector.weight": weights["model.mm_projector.0.weight"],
        "model.mm_projector.bias": weights["model.mm_projector.0.bias"],
        **{f"model.mm_projector.{i}.{kind}": None for i in (0, 2) for kind in ("weight", "bias")},
    }


def three_layers(weights):
    return {f"model.mm_projector.4.{kind}": weights[f"model.mm_projector.2.{kind}"] for kind in ("weight", "bias")}


def grouped_queries(weights):
    return {key: tensor[:24] for key, tensor in weights.items() if re.search(r"model\.layers.*\.[kv]_proj", key)}


def biases(weights):
    keys = [key for key in weights if re.fullmatch(r"model\.layers\.\d\.self_attn\.[qkvo]_proj\.weight", key)]
    return {key.replace("weight", "bias"): torch.full((48,), 0.5) for key in keys}


def old_buffers(weights):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)}
    return buffers | {f"{VISION}embeddings.position_ids": torch.arange(577)[None]}


VARIANTS = {
    "linear projector": (linear, {"mm_projector_type": "linear"}, {"multimodal_projector_depth": 1}),
    "three-layer projector": (three_layers, {"mm_projector_type": "mlp3x_gelu"}, {"multimodal_projector_depth": 3}),
    "mistral": (grouped_queries, {"model_type": "llava_mistral", "num_key_value_heads": 2, "sliding_window": None}, {}),
    "mistral with a window": (
        grouped_queries,
        {"model_type": "llava_mistral", "num_key_value_heads": 2, "sliding_window": 20},
        {},
    ),
    "square pictures": (lambda _: {}, {"image_aspect_ratio": "square"}, {}),
    "first layer": (lambda _: {}, {"mm_vision_select_layer": 1}, {"vision_feature_layer": 1}),
    "another rope": (lambda _: {}, {"rope_theta": 500000.0}, {}),
    "settings that are null": (
        lambda _: {},
        {"tie_word_embeddings": None, "matryoshka_vis_token_scale": [], "mm_vision_select_layer": -2},
        {"visual_token_scales": [1, 9, 36, 144, 576]},
    ),
    "attention biases": (biases, {"attention_bias": True}, {}),
    "tied embeddings": (
        lambda _: {"lm_head.weight": None},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True},
    ),
    "tied embeddings stored twice": (lambda _: {}, {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "buffers of old releases": (old_buffers, {"model_type": "llava"}, {}),
    "unused newline": (lambda _: {"model.image_newline": torch.ones(48)}, {}, {"image_grid_pinpoints": None}),
    "plain LLaVA-1.5": (
        lambda _: {},
        {"matryoshka_vis_token_scale": ..., "mm_patch_merge_type": ...},
        {"visual_token_scales": [1, 9, 36, 144, 576]},
    ),
    "scales as text": (
        lambda _: {},
        {"matryoshka_vis_token_scale": "576, 144, 1"},
        {"visual_token_scales": [1, 144, 576]},
    ),
    "class token": (
        lambda _: {},
        {"mm_vision_select_feature": "cls_patch"},
        {"visual_token_scales": [576], "vision_feature_select_strategy": "full"},
    ),
    "last layer": (lambda _: {}, {"mm_vision_select_layer": -1}, {"vision_feature_layer": -1}),
    "pinpoints as text": (
        lambda _: {},
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(336, 672), (1008, 336)]"},
        {"image_grid_pinpoints": [[672, 336], [336, 1008]], "patch_merge_type": "flat"},
    ),
    "spatial": (
        lambda _: {},
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[672, 672]], "mm_patch_merge_type": "spatial"},
        {"patch_merge_type": "spatial"},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, tmp_path):
    change, settings, expected = VARIANTS[variant]
    source = copy_golden("llava15-m3", tmp_path)
    change_weights(source, change(read_weights(source)))
    edit_json(source / "config.json", **settings)
    convert(source, tmp_path / "new")
    model = load(tmp_path / "new")
    config = model.config.to_dict()
    assert {key: config[key] for key in expected} == expected
    assert config["text_config"]["model_type"] == ("mistral" if "mistral" in variant else "llama")
    assert_answers_as_the_original(model, tmp_path / "new", source)


def test_identity_projector(tmp_path):
    source = copy_golden("llava15-m3", tmp_path)
    weights = read_weights(source)
    language = {key: tensor for key, tensor in weights.items() if ".layers." in key and not key.startswith(VISION)}
    small = {
        key: tensor[tuple(slice(32) if n == 48 else slice(None) for n in tensor.shape)]
        for key, tensor in language.items()
    }
    small |= {key: weights[key][..., :32] for key in (*VOCABULARY, "model.norm.weight")}
    small |= {f"model.mm_projector.{i}.{kind}": None for i in (0, 2) for kind in ("weight", "bias")}
    change_weights(source, small)
    edit_json(source / "config.json", hidden_size=32, mm_projector_type="identity")
    convert(source, tmp_path / "new")
    model = load(tmp_path / "new")
    assert model.config.multimodal_projector_depth == 0
    assert_answers_as_the_original(model, tmp_path / "new", source)


def test_start_and_end_marks(tmp_path):
    """`mm_use_im_start_end`: the two tokens are the vocabulary's last, and prompts wrap every image in them."""
    source = copy_golden("llava15-m3", tmp_path)
    more = {key: torch.cat([read_weights(source)[key], torch.ones(2, 48)]) for key in VOCABULARY}
    change_weights(source, more)
    edit_json(source / "config.json", mm_use_im_start_end=True, vocab_size=ROWS + 2)
    convert(source, tmp_path / "new")
    processor = AutoProcessor.from_pretrained(tmp_path / "new", backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    assert "USER: <im_start><image><im_end>\nWhat is it?" in prompt
    ids = processor.tokenizer("<im_start><image><im_end>", add_special_tokens=False)["input_ids"]
    assert ids == [ROWS, ROWS + 2, ROWS + 1]
    assert torch.equal(load(tmp_path / "new").lm_head.weight[ROWS : ROWS + 2], torch.ones(2, 48))


def test_start_and_end_marks_without_rows_are_refused(tmp_path):
    source = copy_golden("llava15-m3", tmp_path)
    edit_json(source / "config.json", mm_use_im_start_end=True)
    with pytest.raises(ConversionError, match="mm_use_im_start_end"):
        convert(source, tmp_path / "new")


def test_sampling_settings_survive_where_the_original_samples(tmp_path):
    source = copy_golden("llava15-m3", tmp_path)
    edit_json(source / "generation_config.json", do_sample=True)
    convert(source, tmp_path / "new")
    settings = GenerationConfig.from_pretrained(tmp_path / "new")
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 0.9, 0.6)


def test_defaults_of_the_original_s_transformers():
    """A setting that a config leaves out has the value it had for the original, not today's."""
    text = translate_config({"model_type": "llava_mistral"}, "config.json")["text_config"]
    assert (text["sliding_window"], text["rope_theta"], text["num_key_value_heads"]) == (4096, 10000.0, 8)


def test_table_is_one_to_one():
    """Every row is reachable by its own key, and its name leads back to it."""
    for table in (CHECKPOINT_KEYS, CLIP_KEYS):
        for template, name in table.items():
            key = template.format(i=2, rest="x")
            new = remap_key(key, table)
            if name is None:
                assert new is None
            else:
                assert new == name.format(i=2, n=2)
                assert key in original_keys(new, table) or "{i}" not in template
    for key in ("model.mm_projector.1.weight", "model.layers.x.mlp.up_proj.weight", "lm_head.bias"):
        with pytest.raises(KeyError):
            remap_key(key, CHECKPOINT_KEYS)
