"""What is not done over and over: waiting for the device, encoding pictures, tokenizing prompts."""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from PIL import Image
from test_objective import before_each_call
from test_processing import PROMPT, tiny_processor
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_m3
from benchmarks import peers
from benchmarks.random_checkpoint import prompt
from modeling_m3 import M3LlavaForConditionalGeneration
from modeling_m3.outputs_m3 import CACHE_NAME


KINDS = ("flat", "anyres")
PACKAGE = Path(modeling_m3.__file__).parent
DATA_DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")


class Waits(TorchDispatchMode):
    """Notes the operations that wait for the device, as their outcome depends on its data: by the function of this package
    from which they are called, directly or not."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in DATA_DEPENDENT:
            frames = [frame.name for frame in traceback.extract_stack() if Path(frame.filename).parent == PACKAGE]
            self.found.append(frames[-1] if frames else "elsewhere")
        return operation(*args, **(kwargs or {}))


def waits(call):
    with Waits() as noted, torch.no_grad():
        call()
    return noted.found


@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_are_counted_once_and_only_in_the_prefill(kind):
    # transformers' own class is the reference for what the language model waits for by itself.
    model = peers.build(peers.as_kind(tiny_config(), kind), torch.float32, "cpu")
    inputs = peers.make_inputs(model, batch=2)
    found = {}
    for name, each in zip(peers.CLASSES, (model, peers.twin(model))):
        prefill = waits(lambda each=each: each(**inputs))
        with torch.no_grad():
            decoder = peers.Decoder(each, inputs, new_tokens=3)
        found[name] = prefill, waits(decoder.forward), waits(decoder.generate)
    (prefill, *decoding), theirs = found["M3"], found["transformers"]
    assert prefill.count("get_placeholder_mask") == 1
    assert all(len(part) <= len(other) for part, other in zip((prefill, *decoding), theirs))
    assert not any("get_placeholder_mask" in part for part in decoding)


VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "as_strided",
    "alias",
    "split",
}
VIEWS |= {"split_with_sizes", "detach"}


class Launches(TorchDispatchMode):
    """Counts the operations that a device has to run: all but views."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.counts[name] += name not in VIEWS
        return operation(*args, **(kwargs or {}))


def launches(model, inputs):
    with Launches() as noted, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    return noted.counts.total()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_prefill_launches_no_more_than_that_of_transformers_own_class(kind, batch):
    # At the vision tower's last layer, as otherwise theirs computes layers that it does not use.
    config = peers.as_kind(tiny_config(), kind)
    config.vision_feature_layer = -1
    model = peers.build(config, torch.float32, "cpu")
    inputs = peers.make_inputs(model, batch)
    ours, theirs = launches(model, inputs), launches(peers.twin(model), inputs)
    assert 100 < ours <= theirs


def test_pooling_is_one_launch_for_all_pictures_at_one_budget():
    model = peers.build(tiny_config(), torch.float32, "cpu")
    two, eight = (launches(model, prompt(model, 9, text=4, images=images)) for images in (2, 8))
    assert two == eight


def test_a_decoding_step_needs_no_data():
    with torch.device("meta"):  # tensors without data: to ask for any raises
        model = M3LlavaForConditionalGeneration(tiny_config()).eval()
        prompt, token = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)
    cache = getattr(model(input_ids=prompt, use_cache=True), CACHE_NAME)
    logits = model(input_ids=token, **{CACHE_NAME: cache}, use_cache=True).logits
    assert logits.shape == (2, 1, model.config.text_config.vocab_size)
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_numbers_are_fetched_once_before_the_vision_tower_has_work(kind, monkeypatch):
    model, events = peers.build(peers.as_kind(tiny_config(), kind), torch.float32, "cpu"), []
    inputs = peers.make_inputs(model, batch=2) | {"num_visual_tokens": torch.tensor([144, 144])}

    def note(name):
        plain = getattr(torch.Tensor, name)

        def noting(*args, **kwargs):
            events.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, noting)

    note("cpu")
    note("tolist")
    model.model.vision_tower.register_forward_pre_hook(lambda *_: events.append("vision tower"))
    with torch.no_grad():
        model(**inputs)
    assert events.count("cpu") == 1
    assert set(events[:-1]) == {"cpu", "tolist"}
    assert events[-1] == "vision tower"


def test_training_prompts_are_cut_before_the_language_model_runs():
    model = peers.build(tiny_config(), torch.float32, "cpu").train()
    inputs = peers.make_inputs(model, batch=2)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    with Waits() as noted:
        before_each_call(model.model.language_model, lambda: noted.found.append("language model"))
        model(**inputs, labels=labels, matryoshka_scales=[1, 9, 36]).loss.backward()
    start = noted.found.index("language model")
    before, after = noted.found[:start], noted.found[start:]
    assert {"_cut", "_targets"} <= set(before)
    assert after.count("language model") == 3
    assert not {"_cut", "_targets", "_next_token_loss", "matryoshka_loss"} & set(after)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_an_answer_encodes_its_pictures_once(settings):
    model, calls = peers.build(tiny_config(), torch.float32, "cpu"), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    inputs = peers.make_inputs(model, batch=2)
    answers = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **({"do_sample": False} | settings))
    assert answers.shape[1] == inputs["input_ids"].shape[1] + 4
    assert len(calls) == 1


def test_a_call_tokenizes_its_prompts_and_prepares_its_pictures_once(monkeypatch):
    processor, calls = tiny_processor(), []

    def count(owner, name):
        plain = getattr(owner, name)

        def counting(*args, **kwargs):
            calls.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for name in ("encode", "tokenize", "__call__"):
        count(type(processor.tokenizer), name)
    count(type(processor.image_processor), "__call__")
    count(type(processor.image_processor), "process_image")
    for _ in range(2):
        calls.clear()
        processor(images=[Image.new("RGB", (30, 20))] * 2, text=[PROMPT, PROMPT], padding=True, return_tensors="pt")
        assert sorted(calls) == ["__call__", "__call__", "process_image", "process_image"]
