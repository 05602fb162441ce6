"""A choice of visual tokens is bound to the weights that it was fitted on, by a print of what a folder stores."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_automatic_budget import random_choice
from transformers import AutoConfig, AutoModelForImageTextToText

import modeling_m3
from modeling_m3 import M3LlavaForConditionalGeneration
from modeling_m3.automatic_budget_m3 import AUTOMATIC_BUDGET_FILE, AutomaticBudget, UnfittedBudget
from modeling_m3.weights_print_m3 import BLOCKS, WHOLE, print_of_folder, print_of_tensors


SCALES = [1, 9, 36, 144]
INPUTS = {
    "input_ids": torch.tensor([[1, *[98] * 144, 5]]),
    "pixel_values": torch.ones(1, 3, 24, 24),
    "num_visual_tokens": torch.tensor([0]),
}


@pytest.fixture(scope="module")
def bound(tmp_path_factory):
    """A model of two shards with a choice that is bound to it; read-only by agreement."""
    folder = tmp_path_factory.mktemp("bound") / "model"
    torch.manual_seed(0)
    M3LlavaForConditionalGeneration(tiny_config()).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return bind(folder)


def bind(folder, print=None):
    choice = random_choice(scales=tuple(SCALES), width=64)
    choice.print = print or print_of_folder(folder)
    (folder / AUTOMATIC_BUDGET_FILE).write_bytes(choice.to_bytes())
    return folder


def load(folder, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


def numbers_of(folder):
    """Of a folder's choice, what was fitted, as it is written."""
    content = (folder / AUTOMATIC_BUDGET_FILE).read_bytes()
    return json.loads(content[8:])["__metadata__"]["choice"]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def written(folder, tensors, **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", **kwargs)
    return print_of_folder(folder)


def random_tensors():
    torch.manual_seed(0)
    large = torch.randn(2 * WHOLE // 64, 64)
    codes = torch.randint(0, 255, (4 * WHOLE, 1), dtype=torch.uint8)
    return {"large": large, "codes": codes, "small": torch.randn(3, 5), "one": torch.tensor(2.5), "none": torch.ones(0)}


def test_prints_are_equal_for_equal_weights(tmp_path):
    tensors = random_tensors()
    first = written(tmp_path / "a", tensors)
    assert len(first) == 64 and int(first, 16)
    rounded = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    exact = {name: t.float() if t.is_floating_point() else t for name, t in rounded.items()}
    assert written(tmp_path / "b", rounded) == written(tmp_path / "c", exact) == first
    assert written(tmp_path / "d", dict(reversed(tensors.items())), metadata={"format": "pt", "by": "me"}) == first
    (tmp_path / "e").mkdir()
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / "e" / f"{name}.part")
    index = {"weight_map": {name: f"{name}.part" for name in tensors}}
    (tmp_path / "e" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert print_of_folder(tmp_path / "e") == first
    save_file({"other": torch.ones(3)}, tmp_path / "e" / "adapter_model.safetensors")  # is not loaded with them
    assert print_of_folder(tmp_path / "e") == first
    assert print_of_folder(tmp_path) is None


def test_prints_of_other_weights_differ(tmp_path):
    tensors, found = random_tensors(), {}
    found["as they are"] = written(tmp_path, tensors)
    for name in ("small", "one"):
        found[f"{name} one value"] = written(tmp_path, {**tensors, name: tensors[name] + torch.eye(3, 5)[:1, :1] / 9})
    for name in ("large", "codes"):
        found[f"{name} all"] = written(tmp_path, {**tensors, name: tensors[name] + 1})
    found["shape"] = written(tmp_path, {**tensors, "small": tensors["small"].view(5, 3)})
    found["kind"] = written(tmp_path, {**tensors, "codes": tensors["codes"].view(torch.int8)})
    large = tensors.pop("large")
    found["name"] = written(tmp_path, {**tensors, "big": large})
    found["fewer"] = written(tmp_path, tensors)
    assert len(set(found.values())) == len(found) == 9


TENSORS = random_tensors()


@given(begin=st.floats(0, 1 - 1 / (BLOCKS - 1)), name=st.sampled_from(["large", "codes"]))
def test_no_change_of_a_fifteenth_is_overlooked(begin, name):
    changed, rows = TENSORS[name].clone(), len(TENSORS[name])
    changed[int(begin * rows) : int(begin * rows) + rows // (BLOCKS - 1) + 1] += 1
    assert print_of_tensors({name: changed}) != print_of_tensors({name: TENSORS[name]})


def test_what_is_not_all_in_memory_has_no_print():
    assert print_of_tensors({"a": torch.ones(3, device="meta")}) is None
    assert print_of_tensors({"a": torch.ones(3), "_extra_state": {"no": "tensor"}}) is None


@pytest.mark.parametrize("way", [
    {}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"quantize": "nf4"}, {"quantize": "int8"}, {"device_map": "cpu"},
], ids=str)  # fmt: skip
def test_it_goes_on_with_what_is_saved_as_it_was_loaded(way, bound, tmp_path):
    kept = {name: way[name] for name in way if name == "dtype"}
    if "quantize" in way:
        way = {"quantization_config": modeling_m3.any_checkpoint._quantization(way["quantize"], None)}
    model = load(bound, **way)
    assert model.automatic_budget is not None
    model.generate(**{**INPUTS, "pixel_values": INPUTS["pixel_values"].to(model.dtype)}, max_new_tokens=2)
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved", **kept)
    assert saved.automatic_budget.print == print_of_folder(tmp_path / "saved")
    saved.save_pretrained(tmp_path / "again", save_original_format=False)  # which transformers cannot do of stored bits
    assert contents(tmp_path / "saved") == contents(tmp_path / "again")
    assert numbers_of(tmp_path / "saved") == numbers_of(bound)
    if "dtype" not in way or way["dtype"] == torch.bfloat16:
        same = (tmp_path / "saved" / AUTOMATIC_BUDGET_FILE).read_bytes() == (bound / AUTOMATIC_BUDGET_FILE).read_bytes()
        assert same == ("quantization_config" not in way)


def train(model):
    """A step that quantized weights do not take part in."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data += 1e-2 * parameter.data.abs().mean()


def merge(model):
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    )
    assert adapted.merge_and_unload() is model


@pytest.mark.parametrize("change", [train, merge])
@pytest.mark.parametrize("way", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"quantize": "nf4"}], ids=str)
def test_trained_weights_have_another_print(change, way, bound, tmp_path):
    if "quantize" in way:
        way = {"quantization_config": modeling_m3.any_checkpoint._quantization("nf4", None)}
    model = load(bound, **way)
    change(model)
    model.save_pretrained(tmp_path / "trained")
    assert contents(tmp_path / "trained")[AUTOMATIC_BUDGET_FILE] == contents(bound)[AUTOMATIC_BUDGET_FILE]
    trained = load(tmp_path / "trained")
    assert trained.automatic_budget is None
    trained.save_pretrained(
        tmp_path / "again", save_original_format=False
    )  # nor does it become theirs by being saved again
    assert contents(tmp_path / "trained") == contents(tmp_path / "again")


def test_weights_that_are_given_to_be_saved_count(bound, tmp_path):
    model = load(bound, dtype=torch.float16)
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=weights)
    assert load(tmp_path / "given").automatic_budget is None
    model.save_pretrained(tmp_path / "own", state_dict=model.state_dict())
    assert load(tmp_path / "own").automatic_budget is not None


def test_it_is_told_by_the_weights_that_were_loaded(bound, tmp_path):
    folder = shutil.copytree(bound, tmp_path / "model")
    model, late, gone = load(folder), load(folder), load(folder)
    model.save_pretrained(folder)  # whose files it has, under other names
    assert model.automatic_budget is not None
    train(model)
    model.save_pretrained(folder)
    assert load(folder).automatic_budget is None
    assert late.automatic_budget is None  # cannot be told any more
    shutil.rmtree(folder)
    assert gone.automatic_budget is None


def test_a_file_without_a_print_and_a_choice_that_is_set_are_used_as_they_are(bound, tmp_path):
    folder = shutil.copytree(bound, tmp_path / "model")
    choice = random_choice(scales=tuple(SCALES), width=64)
    (folder / AUTOMATIC_BUDGET_FILE).write_bytes(choice.to_bytes())
    assert b'"print"' not in choice.to_bytes()
    model = load(folder)
    train(model)
    model.save_pretrained(tmp_path / "trained")
    again = load(tmp_path / "trained", quantization_config=modeling_m3.any_checkpoint._quantization("nf4", None))
    again.save_pretrained(tmp_path / "nf4")
    assert contents(tmp_path / "nf4")[AUTOMATIC_BUDGET_FILE] == choice.to_bytes()
    assert load(tmp_path / "nf4").automatic_budget.print is None
    fitted_elsewhere = load(bound).automatic_budget
    model.automatic_budget = fitted_elsewhere
    assert model.automatic_budget is fitted_elsewhere


def test_an_adapter_of_the_model_is_other_weights(bound, tmp_path):
    adapted = get_peft_model(load(bound), LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    adapted.save_pretrained(tmp_path / "adapter")
    model = load(bound)
    model.load_adapter(str(tmp_path / "adapter"))
    assert model.automatic_budget is None and load(tmp_path / "adapter").automatic_budget is None


def test_weights_from_nowhere_are_looked_up_nowhere(bound, monkeypatch):
    def asked(name, file, **_):
        raise AssertionError(f"asked {name} for {file}")

    monkeypatch.setattr("modeling_m3.automatic_budget_m3.cached_file", asked)
    config, weights = AutoConfig.from_pretrained(bound), load_weights(bound)
    model = M3LlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights)
    assert model.automatic_budget is None


def load_weights(folder):
    return {name: tensor for file in folder.glob("model-*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def said():
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("modeling_m3.automatic_generation_m3")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def answer(model):
    return model.generate(**INPUTS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)


def test_a_fine_tuned_copy_says_so_once_and_answers_without_it(bound, tmp_path, said):
    model = load(bound)
    fitted = answer(model)
    assert not said
    train(model)
    model.save_pretrained(tmp_path)
    tuned = load(tmp_path)
    found = [answer(tuned), answer(tuned)]
    [line] = said
    assert str(tmp_path / AUTOMATIC_BUDGET_FILE) in line and "fitted on other weights" in line and "m3-budget" in line
    tuned.automatic_budget = UnfittedBudget(tuned.config.visual_token_scales)
    rule = answer(tuned)
    assert rule.visual_tokens_spent.tolist() != fitted.visual_tokens_spent.tolist()
    for output in found:
        assert torch.equal(output.sequences, rule.sequences)
        assert output.visual_tokens_spent.tolist() == rule.visual_tokens_spent.tolist()


STORED = random_choice()
STORED.print = "0" * 64
CONTENT = STORED.to_bytes()
WRONG = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just({}))


@given(length=st.integers(0, len(CONTENT) - 9))
def test_a_cut_file_is_refused_by_its_name(length):
    with pytest.raises(
        ValueError, match=r"^dir/file is no choice that m3-budget stored: .*Fit it anew, or remove it\.$"
    ):
        AutomaticBudget.from_bytes(CONTENT[:length], "dir/file")


@given(data=st.data())
def test_wrong_types_are_refused_by_the_files_name(data):
    header = json.loads(CONTENT[8:])["__metadata__"]
    choice = json.loads(header["choice"])
    holder = data.draw(st.sampled_from([header, choice, choice["before"], choice["after"], choice["after"]["36"]]))
    key = data.draw(st.sampled_from(sorted(holder)))
    old, holder[key] = holder[key], data.draw(WRONG)
    header["choice"] = json.dumps(choice) if holder is not header or key != "choice" else header["choice"]
    content = json.dumps({"__metadata__": header}).encode()
    try:
        loaded = AutomaticBudget.from_bytes(len(content).to_bytes(8, "little") + content, "dir/file")
    except ValueError as error:
        assert str(error).startswith("dir/file is no choice that m3-budget stored: ")
    else:  # another number where there was one
        assert type(holder[key]) is type(old) or holder[key] is None and key == "print" or isinstance(old, (int, float))
        assert loaded.first_choice(torch.zeros(2, 384), 0.99)[1].shape == (2,)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'"a"', b"[" * 99_999, b'{"__metadata__": []}', b"\xff\xfe"], ids=repr
)
def test_what_is_no_header_is_refused_by_the_files_name(content):
    with pytest.raises(ValueError, match="^dir/file is no choice that m3-budget stored"):
        AutomaticBudget.from_bytes(len(content).to_bytes(8, "little") + content, "dir/file")


def test_what_is_stored_comes_back():
    assert AutomaticBudget.from_bytes(CONTENT, "").to_bytes() == CONTENT
    assert AutomaticBudget.from_bytes(CONTENT, "").print == "0" * 64
    before = Path(modeling_m3.default_checkpoint(), AUTOMATIC_BUDGET_FILE).read_bytes()
    assert AutomaticBudget.from_bytes(before, "").to_bytes() == before
