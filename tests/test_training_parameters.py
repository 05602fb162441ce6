"""What is trained, at which rate: the optimizer's groups against the original's, freezing, LoRA."""

import dataclasses

import pytest
import torch
from conftest import golden, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from m3_conversion.mapping import CHECKPOINT_KEYS, remap_key
from m3_training.arguments import M3TrainingArguments, ModelArguments
from m3_training.parameters import add_lora, parameter_groups, part_of, prepare_parameters
from m3_training.trainer import M3Trainer
from modeling_m3 import M3LlavaForConditionalGeneration


RATES = {
    "none_none": (None, None),
    "vt2e-6_projNone": (None, 2e-6),
    "vt2e-6_proj1e-5": (1e-5, 2e-6),
}


def rates(learning_rate=2e-5, projector=None, vision_tower=None):
    return M3TrainingArguments(
        "unused",
        learning_rate=learning_rate,
        projector_learning_rate=projector,
        vision_tower_learning_rate=vision_tower,
        weight_decay=0.1,
        use_cpu=True,
    )


def tiny_model(**overrides):
    return M3LlavaForConditionalGeneration(tiny_config(**overrides))


def groups_by_name(model, arguments):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, M3Trainer.get_decay_parameter_names(None, model), arguments)
    return [{**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in groups]


@pytest.mark.parametrize("setting", RATES)
def test_groups_equal_the_original(setting, loaded):
    expected, found = {}, {}
    for group in golden("train.llava15-m3")["param_groups"][setting]:
        names = {remap_key(name, CHECKPOINT_KEYS) for name in group["names"]}
        expected.setdefault((group["lr"], group["weight_decay"]), set()).update(names)
    for group in groups_by_name(loaded["llava15-m3"][0], rates(2e-5, *RATES[setting])):
        found.setdefault((group["lr"], group["weight_decay"]), set()).update(group["params"])
    assert found == expected


def test_image_newline_goes_with_the_language_model_and_decays(loaded):
    model = loaded["llava-next-m3"][0]
    (group,) = [g for g in groups_by_name(model, rates(1e-5, 2e-5, 3e-5)) if "model.image_newline" in g["params"]]
    assert (group["lr"], group["weight_decay"]) == (1e-5, 0.1)


flags = st.fixed_dictionaries(
    {
        "train": st.sampled_from(["all", "clip"]),
        "lora": st.booleans(),
        **{f"freeze_{part}": st.booleans() for part in ("language_model", "projector", "vision_tower")},
    }
)


@settings(max_examples=15, deadline=None)
@given(flags=flags)
def test_every_trained_parameter_is_in_one_group_and_no_other_in_any(flags):
    try:
        arguments = ModelArguments("unused", lora_r=2, **flags)
    except ValueError:  # nothing to train, or a frozen part by LoRA
        return
    model = tiny_model()
    prepare_parameters(model, arguments)
    grouped = [name for group in groups_by_name(model, rates()) for name in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in ("language_model", "projector", "vision_tower"):
        trained = [name for name in grouped if part_of(name) == part]
        assert bool(trained) != arguments.trains_nothing_of(part)
        if arguments.lora and part == "language_model":
            assert all("lora_" in name for name in trained)


def test_gradients_reach_all_that_is_trained_and_all_of_use_is_trained():
    model = tiny_model()
    prepare_parameters(model, ModelArguments("unused"))
    input_ids = torch.tensor([[1, *[model.config.image_token_id] * 144, 5, 9]])
    labels = torch.tensor([[-100] * 145 + [5, 9]])
    pixel_values = torch.rand(1, 3, 24, 24)
    model(input_ids=input_ids, labels=labels, pixel_values=pixel_values, matryoshka_scales=[9, 144]).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[2] for name in frozen} == {"encoder", "post_layernorm"}
    assert {name.split(".")[4] for name in frozen if ".encoder." in name} == {"2"}  # of three layers, -2 is selected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "clip", "freeze_vision_tower": True}, "all frozen"),
        ({f"freeze_{part}": True for part in ("language_model", "projector", "vision_tower")}, "all frozen"),
        ({"lora": True, "freeze_language_model": True}, "leave out lora, or what freezes it"),
        ({"lora": True, "train": "clip"}, "leave out lora, or what freezes it"),
        ({"train": "CLIP"}, "train='CLIP' must be one of 'all', 'clip'"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments("unused", **options)


def test_lora_targets_are_of_the_language_model():
    arguments = ModelArguments("unused", lora=True, lora_target_modules=["q_proj", "down_proj"])
    model = tiny_model()
    add_lora(model, arguments)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert {name.rsplit(".", 1)[-1] for name in adapted} == {"q_proj", "down_proj"}
    assert all(name.startswith("model.language_model.layers.") for name in adapted) and len(adapted) == 4
    with pytest.raises(ValueError, match=r"lora_target_modules=\['fc1'\]: choose from .*'down_proj'"):
        add_lora(tiny_model(), dataclasses.replace(arguments, lora_target_modules=["fc1"]))


def test_lora_merges_into_what_it_computed():
    arguments = ModelArguments("unused", lora=True, lora_r=2)
    model = tiny_model()
    lora = add_lora(model, arguments)
    model.eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    ids = torch.tensor([[1, 5, 9, 4]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merged = lora.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert merged is model and not any("lora_" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("scales", "offered", "expected"),
    [(None, [1, 9, 36], [1, 9, 36]), ([36, 1], [1, 9, 36], [1, 36])],
)
def test_scales_are_the_checkpoints_or_those_given(scales, offered, expected, tmp_path):
    assert M3TrainingArguments(str(tmp_path), matryoshka_scales=scales, use_cpu=True).scales(offered) == expected


@pytest.mark.parametrize(
    ("scales", "message"), [([2], r"2 is not .* Choose from \[1, 9, 36\]"), ([9, 9], "none twice")]
)
def test_scales_that_are_not_offered_are_refused(scales, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        M3TrainingArguments(str(tmp_path), matryoshka_scales=scales, use_cpu=True).scales([1, 9, 36])
