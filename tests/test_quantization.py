"""4 and 8 bits by bitsandbytes: what is quantized, what is kept, and that folders made either way are the same."""

import copy
import json
import logging
import sys

import bitsandbytes as bnb
import pytest
import torch
from conftest import CHECKPOINTS, GOLDENS, picture
from conversion_checkpoints import copy_golden, edit_json, read_weights, run
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_modeling import ANYRES, tiny_inputs, tiny_model
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from m3_conversion.convert import convert


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}
KINDS = {"nf4": (NF4, bnb.nn.Linear4bit), "int8": (INT8, bnb.nn.Linear8bitLt)}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantized_layers(model):
    return {
        name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    }


def language_model_layers(prefix="model."):
    """Of the tiny model, by name."""
    parts = {layer: "self_attn" if layer in LAYERS[:4] else "mlp" for layer in LAYERS}
    return {f"{prefix}language_model.layers.{i}.{part}.{layer}" for i in range(2) for layer, part in parts.items()}


def load(folder, cls=AutoModelForImageTextToText, **settings):
    quantization = {"quantization_config": BitsAndBytesConfig(**settings)} if settings else {}
    return cls.from_pretrained(folder, **quantization)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small model in full precision, with every kind of weight, and its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(**ANYRES)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cls", "prefix"), [(AutoModelForImageTextToText, "model."), (AutoModel, "")])
def test_all_of_the_language_models_layers_are_quantized_and_nothing_else(kind, cls, prefix, tiny):
    full, folder = tiny
    settings, layer = KINDS[kind]
    model = load(folder, cls, **settings)
    assert quantized_layers(model) == language_model_layers(prefix)
    assert all(isinstance(model.get_submodule(name), layer) for name in quantized_layers(model))
    kept = {f"{name}.weight" for name in language_model_layers(prefix)}
    expected = (full if prefix else full.model).state_dict()
    for name, value in model.state_dict().items():
        if name in expected and name not in kept:
            assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name


def test_a_dict_is_taken_as_a_configuration(tiny):
    model = AutoModelForImageTextToText.from_pretrained(tiny[1], quantization_config=dict(NF4))
    assert quantized_layers(model) == language_model_layers()


def test_a_configuration_is_not_changed_by_loading(tiny):
    config = BitsAndBytesConfig(**NF4)
    AutoModelForImageTextToText.from_pretrained(tiny[1], quantization_config=config)
    assert config.llm_int8_skip_modules is None


@pytest.mark.parametrize(("skip", "extra", "warned"), [
    (["model.language_model.layers.0", "model.vision_tower", "model.multi_modal_projector"], {"lm_head"}, None),
    (["lm_head", "model.multi_modal_projector", "vision_tower"], None, "'vision_tower'"),
])  # fmt: skip
def test_a_list_of_the_users_own_is_respected_and_warned_about(skip, extra, warned, tiny, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    layers = quantized_layers(load(tiny[1], **NF4, llm_int8_skip_modules=skip))
    if extra:
        assert layers == {name for name in language_model_layers() if ".layers.1." in name} | extra
    else:
        assert language_model_layers() < layers
        assert any(name.startswith("model.vision_tower") for name in layers)
    assert [record for record in caplog.records if "llm_int8_skip_modules" in record.message] == [
        record for record in caplog.records if warned and warned in record.message
    ]
    assert ("llm_int8_skip_modules has" in caplog.text) == bool(warned)


def test_4_bits_compute_with_the_weights_as_bitsandbytes_rounds_them(converted, loaded):
    model = load(converted["llava15-m3"], **NF4)
    full, processor = loaded["llava15-m3"]
    rounded = full.state_dict()
    for name in quantized_layers(model):
        packed, state = bnb.functional.quantize_4bit(rounded[f"{name}.weight"], quant_type="nf4")
        rounded[f"{name}.weight"] = bnb.functional.dequantize_4bit(packed, state)
    reference = copy.deepcopy(full)
    reference.load_state_dict(rounded)
    model.set_attn_implementation("eager")  # as the reference has it
    for scale in (1, 36, 576):
        inputs = processor(
            images=picture("photo_400x266.png"), text="<image>", num_visual_tokens=scale, return_tensors="pt"
        )
        with torch.no_grad():
            logits, expected = model(**inputs).logits, reference(**inputs).logits
            torch.testing.assert_close(logits, expected)
            assert not torch.allclose(logits, full(**inputs).logits, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_after_an_answer_and_loading_changes_no_logit(kind, tmp_path):
    """Rows of a multiple of 32, which bitsandbytes would repack on some CPUs."""
    full = tiny_model(text_config={"hidden_size": 64, "intermediate_size": 128})
    full.save_pretrained(tmp_path / "full")
    model = load(tmp_path / "full", **KINDS[kind][0])
    inputs = tiny_inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
        model.save_pretrained(tmp_path / "saved")
        reloaded = load(tmp_path / "saved")
        assert quantized_layers(reloaded) == language_model_layers()
        assert torch.equal(reloaded(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)
    assert quantized_layers(load(tmp_path / "saved", AutoModel)) == language_model_layers("")


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_conversion_is_what_loading_and_saving_would_write(kind, name, converted, tmp_path):
    """Also where the parts of a layer come into different files."""
    load(converted[name], **KINDS[kind][0]).save_pretrained(tmp_path / "saved")
    convert(GOLDENS / name, tmp_path / "new", quantize=kind, max_shard_size="100KB")
    expected, written = read_weights(tmp_path / "saved"), read_weights(tmp_path / "new")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        assert value.dtype == written[key].dtype and torch.equal(value, written[key]), key
    old, new = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("saved", "new"))
    differing = {key for key in new["quantization_config"] if new["quantization_config"][key] != old["quantization_config"][key]}  # fmt: skip
    assert not differing


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_folder_answers_at_every_budget(kind, tmp_path):
    assert run(GOLDENS / "llava15-m3", tmp_path / "new", "--quantize", kind) == 0
    model, processor = load(tmp_path / "new"), AutoProcessor.from_pretrained(tmp_path / "new")
    assert len(quantized_layers(model)) == 3 * 7
    answers = set()
    for scale in processor.visual_token_scales:
        inputs = processor(
            images=picture("photo_400x266.png"), text="<image>", num_visual_tokens=scale, return_tensors="pt"
        )
        answers.add(tuple(model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :].tolist()))
    assert len(answers) > 1, "the budgets must matter for this to show anything"


def test_4_bits_of_a_type_chosen_by_the_user(tmp_path):
    convert(GOLDENS / "llava15-m3", tmp_path / "new", quantize="nf4", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    state = load_file(tmp_path / "new" / "model.safetensors")[
        "model.language_model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    ]
    assert json.loads(bytes(state.tolist()))["dtype"] == "bfloat16"


@pytest.mark.parametrize(("kind", "tag", "words"), [("nf4", "4-bit", "4 bits (nf4)"), ("int8", "8-bit", "8 bits (int8)")])  # fmt: skip
def test_the_card_says_what_the_folder_is(kind, tag, words, tmp_path):
    convert(GOLDENS / "llava15-m3", tmp_path / "new", quantize=kind, model_id="mucai/llava-v1.5-7b-m3")
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert words in card.text and {tag, "bitsandbytes"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.base_model_relation) == ("mucai/llava-v1.5-7b-m3", "quantized")
    convert(GOLDENS / "llava15-m3", tmp_path / "plain")
    assert "bitsandbytes" not in (tmp_path / "plain" / "README.md").read_text()


def test_an_unknown_kind_of_4_bits_is_refused(tiny):
    with pytest.raises(ValueError, match="bnb_4bit_quant_type='nf5' must be 'nf4' or 'fp4'"):
        load(tiny[1], load_in_4bit=True, bnb_4bit_quant_type="nf5")


def test_an_unknown_quantization_is_a_usage_error_that_names_the_known(tmp_path, capsys):
    assert run(GOLDENS / "llava15-m3", tmp_path / "new", "--quantize", "int3") == 2
    error = capsys.readouterr().err
    assert "int3" in error and "nf4" in error and "int8" in error
    assert not (tmp_path / "new").exists()


def test_a_missing_bitsandbytes_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert run(GOLDENS / "llava15-m3", tmp_path / "new", "--quantize", "nf4") == 1
    assert capsys.readouterr().err == "m3-convert: --quantize nf4 needs bitsandbytes: pip install bitsandbytes\n"
    assert not (tmp_path / "new").exists()


def test_quantized_weights_are_not_converted_again(tmp_path, capsys):
    source = copy_golden("llava15-m3", tmp_path)
    edit_json(source / "config.json", quantization_config={"load_in_4bit": True})
    assert run(source, tmp_path / "new", "--quantize", "nf4") == 1
    assert "start from the full-precision checkpoint" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_on_a_gpu(kind, converted, tmp_path):
    """Quantized there, saved and loaded again there."""
    model = AutoModelForImageTextToText.from_pretrained(
        converted["llava15-m3"],
        quantization_config=BitsAndBytesConfig(**KINDS[kind][0]),
        dtype=torch.float16,
        device_map="cuda",
    )
    ids = torch.arange(3, 40, device="cuda")[None]
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path / "saved")
        reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", device_map="cuda")
        assert torch.equal(reloaded(ids).logits, logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_folder_quantized_on_the_cpu_answers_as_well_on_a_gpu(tmp_path):
    """The same 4-bit codes in float32; a GPU that quantizes the weights itself picks another code for a few of them."""
    convert(GOLDENS / "llava15-m3", tmp_path / "new", quantize="nf4", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        on_cpu, on_gpu = (
            AutoModelForImageTextToText.from_pretrained(tmp_path / "new", device_map=device)(ids.to(device)).logits
            for device in ("cpu", "cuda")
        )
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-3, rtol=1e-3)
