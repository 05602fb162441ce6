"""LoRA: PEFT's adapters on M3, and LLaVA's own LoRA checkpoints converted, with PEFT's merge as the reference."""

import json
import re
import shutil

import pytest
import torch
from conftest import GOLDENS
from conversion_checkpoints import CLIP, copy_golden, edit_json, read_weights, run, store
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training
from safetensors.torch import save_file
from test_modeling import ANYRES, tiny_inputs, tiny_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import logging
from transformers.utils.peft_utils import check_peft_version

from m3_conversion.convert import convert


LANGUAGE_MODEL = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def lora(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": LANGUAGE_MODEL, **settings})


def training_inputs(model):
    inputs = tiny_inputs(model)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == 98, -100)}


def train(model, steps=3, **kwargs):
    """The losses of a few steps, and the names of the parameters that changed."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**training_inputs(model), **kwargs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


# PEFT


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_trains_saves_loads_and_merges(task, tmp_path):
    model = get_peft_model(tiny_model(), lora(task_type=task))
    losses, changed = train(model)
    assert losses[-1] < losses[0]
    assert len(changed) == 2 * 2 * 7 and all(".lora_" in name for name in changed)
    model.eval()
    inputs = tiny_inputs(model)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        expected, answer = model(**inputs).logits, model.generate(**inputs, **greedy)
        assert not torch.allclose(expected, tiny_model()(**inputs).logits, atol=1e-2)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
        assert torch.equal(loaded(**inputs).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected)
        merged.save_pretrained(tmp_path / "merged")
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(whole(**inputs).logits, expected)
        assert torch.equal(whole.generate(**inputs, **greedy), answer)


def test_transformers_own_adapter_methods(tmp_path):
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        pytest.skip(f"this transformers wants PEFT {MIN_PEFT_VERSION}")
    model = tiny_model()
    model.add_adapter(lora(init_lora_weights=False))
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        loaded = tiny_model()
        loaded.load_adapter(str(tmp_path))
        assert torch.equal(loaded(**inputs).logits, expected)
        loaded.disable_adapters()
        assert torch.equal(loaded(**inputs).logits, tiny_model()(**inputs).logits)


@pytest.mark.parametrize("settings", [{}, ANYRES])
def test_every_linear_layer_and_the_projector_in_full(settings):
    """`all-linear` reaches the vision tower too; what is trained in full beside it is the projector."""
    config = lora(target_modules="all-linear", modules_to_save=["multi_modal_projector"])
    model = get_peft_model(tiny_model(**settings), config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("vision_tower" in name for name in trained)
    assert sum("multi_modal_projector.modules_to_save" in name for name in trained) == 4
    assert not any("image_newline" in name for name in trained)
    if not settings:
        losses, changed = train(model)
        assert losses[-1] < losses[0] and changed <= trained


def test_an_adapter_trains_for_several_scales_at_once():
    model = get_peft_model(tiny_model(), lora())
    inputs = tiny_inputs(model, scales=(144,))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 98, -100)
    output = model(**inputs, labels=labels, matryoshka_scales=[1, 36, 144])
    output.loss.backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) == 2 * 2 * 7 and all(".lora_" in name for name in gradients)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(tiny_model(), lora(init_lora_weights=False)).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(**training_inputs(model)).loss.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if ".lora_" in name])
    for left, right in zip(*gradients):
        torch.testing.assert_close(left, right)


def test_an_adapter_trains_on_4_bits(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=nf4)
    model = get_peft_model(prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False), lora())
    losses, changed = train(model)
    assert losses[-1] < losses[0]
    assert len(changed) == 2 * 2 * 7 and all(".lora_" in name for name in changed)


@pytest.mark.parametrize(
    ("targets", "warns"), [(["q_proj", "v_proj"], True), ("all-linear", True), (LANGUAGE_MODEL, False)]
)
def test_adapters_that_reach_the_vision_tower_are_told(targets, warns, caplog):
    logger = logging.get_logger("transformers")
    logger.warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    get_peft_model(tiny_model(), lora(target_modules=targets)).train()
    logger.removeHandler(caplog.handler)
    assert ("layers of the vision tower have adapters, encoder.layers.0" in caplog.text) == warns
    if warns:
        (way,) = re.findall(r'target_modules=r"(.*)"', caplog.text)
        model = get_peft_model(tiny_model(), lora(target_modules=way))
        adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
        assert len(adapted) == 4 and all(".language_model." in name for name in adapted)


# LLaVA's own LoRA checkpoints


@pytest.fixture
def llava(tmp_path):
    """A base, a LoRA checkpoint of it as LLaVA saves one, and the state of the M3 model that PEFT merges them to."""

    def make(layout="adapter_model.bin", dtype=torch.float32, **settings):
        base = copy_golden("llava15-m3", tmp_path / "base")
        weights = {key: value.to(dtype) for key, value in read_weights(base).items()}
        store(base, weights)
        adapter = tmp_path / "llava-lora"
        adapter.mkdir()
        shutil.copy(base / "config.json", adapter)
        shutil.copytree(tmp_path / "base" / CLIP, tmp_path / CLIP)
        convert(base, tmp_path / "plain")
        torch.manual_seed(2)
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", dtype=torch.float32)
        model = get_peft_model(plain, lora(init_lora_weights=False, **settings))
        model.peft_config["default"].save_pretrained(adapter)
        halves = {
            key.replace("model.language_model.", "model."): value.clone()
            for key, value in get_peft_model_state_dict(model).items()
        }
        if layout.endswith(".bin"):
            torch.save(halves, adapter / layout)
        else:
            save_file(halves, adapter / layout)
        expected = dict(model.merge_and_unload().state_dict())
        beside = {}
        for layer, name in ((0, "linear_1"), (2, "linear_2")):
            for kind in ("weight", "bias"):
                value = torch.randn_like(weights[f"model.mm_projector.{layer}.{kind}"])
                beside[f"base_model.model.model.mm_projector.{layer}.{kind}"] = value
                expected[f"model.multi_modal_projector.{name}.{kind}"] = value
        torch.save(beside, adapter / "non_lora_trainables.bin")
        return adapter, base, expected

    return make


@pytest.mark.parametrize(
    ("layout", "settings"),
    [("adapter_model.bin", {}), ("adapter_model.safetensors", {"use_rslora": True})],
)
def test_a_llava_lora_checkpoint_becomes_what_peft_merges(layout, settings, llava, tmp_path):
    adapter, base, expected = llava(layout, **settings)
    assert run(adapter, tmp_path / "new", "--model-base", str(base)) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    written = model.state_dict()
    assert written.keys() == expected.keys()
    plain = read_weights(tmp_path / "plain")
    for name, value in expected.items():
        torch.testing.assert_close(written[name], value, msg=name)
        changed = not torch.equal(written[name], plain[name])
        assert changed == ("proj" in name and "vision_tower" not in name), name
    assert (tmp_path / "new" / "tokenizer.json").read_text() == (tmp_path / "plain" / "tokenizer.json").read_text()
    assert (tmp_path / "new" / "generation_config.json").exists()


def test_a_base_in_half_precision_is_rounded_once(llava, tmp_path):
    adapter, base, expected = llava(dtype=torch.float16)
    convert(adapter, tmp_path / "new", model_base=base)
    for name, value in read_weights(tmp_path / "new").items():
        assert value.dtype == torch.float16
        torch.testing.assert_close(value, expected[name].half(), msg=name)


def test_a_merged_checkpoint_can_be_quantized_at_once(llava, tmp_path):
    adapter, base, _ = llava()
    convert(adapter, tmp_path / "merged", model_base=base)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", quantization_config=nf4).save_pretrained(
        tmp_path / "saved"
    )
    convert(adapter, tmp_path / "new", model_base=base, quantize="nf4")
    expected, written = read_weights(tmp_path / "saved"), read_weights(tmp_path / "new")
    assert written.keys() == expected.keys()
    assert all(torch.equal(value, written[name]) for name, value in expected.items())


def test_the_base_is_asked_for_by_name(llava, tmp_path, capsys):
    adapter, *_ = llava()
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    assert run(adapter, tmp_path / "new") == 1
    assert capsys.readouterr().err.endswith("of 'lmsys/vicuna-7b-v1.5': name that model with --model-base\n")


def test_a_base_for_a_whole_model_is_refused(tmp_path, capsys):
    assert run(GOLDENS / "llava15-m3", tmp_path / "new", "--model-base", str(GOLDENS / "llava15-m3")) == 1
    assert "holds no LoRA adapter" in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "named"), [
    ({"peft_type": "LOHA"}, "'LOHA'"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "'all'"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"r": 0}, "r is 0"),
    ({"r": 8}, r"a rank of 8 need \(8, 48\)"),
])  # fmt: skip
def test_an_adapter_that_cannot_be_merged(changes, named, llava, tmp_path):
    adapter, base, _ = llava()
    edit_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=named) as error:
        convert(adapter, tmp_path / "new", model_base=base)
    assert str(adapter) in str(error.value) and not (tmp_path / "new").exists()


def test_an_adapter_for_other_shapes(llava, tmp_path, capsys):
    adapter, base, _ = llava()
    halves = torch.load(adapter / "adapter_model.bin", weights_only=True)
    wide = {key: torch.zeros(4, 64) if "lora_A" in key else torch.zeros(64, 4) for key in halves}
    torch.save(wide, adapter / "adapter_model.bin")
    capsys.readouterr()
    assert run(adapter, tmp_path / "new", "--model-base", str(base)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "(4, 64)" in error and "(48, 48)" in error and "adapter's own base" in error


@pytest.mark.parametrize(("key", "named"), [
    ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "lora_A is missing"),
    ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "layers.9"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", "not a LoRA weight of a linear layer"),
])  # fmt: skip
def test_keys_that_do_not_fit(key, named, llava, tmp_path):
    adapter, base, _ = llava()
    halves = torch.load(adapter / "adapter_model.bin", weights_only=True)
    if halves.pop(key, None) is None:
        halves[key] = torch.zeros(4, 48)
        if "lora_A" in key:
            halves[key.replace("lora_A", "lora_B")] = torch.zeros(48, 4)
    torch.save(halves, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=named):
        convert(adapter, tmp_path / "new", model_base=base)


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_a_missing_file_is_named(name, llava, tmp_path):
    adapter, base, _ = llava()
    (adapter / name).unlink()
    with pytest.raises(ValueError, match=name):
        convert(adapter, tmp_path / "new", model_base=base)


def test_the_peft_configuration_of_llavas_time_is_read(llava, tmp_path):
    """PEFT 0.4 wrote fewer settings."""
    adapter, base, _ = llava()
    config = json.loads((adapter / "adapter_config.json").read_text())
    kept = ("base_model_name_or_path", "bias", "fan_in_fan_out", "lora_alpha", "modules_to_save", "peft_type", "r")
    (adapter / "adapter_config.json").write_text(json.dumps({key: config[key] for key in kept}))
    assert convert(adapter, tmp_path / "new", model_base=base).num_tensors == 105
