"""Where the weights go: device maps with offload, types, memory while loading, tensor parallelism."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from conftest import GOLDENS, tiny_config
from test_modeling import ANYRES, tiny_model
from transformers import AutoModel, AutoModelForImageTextToText

from modeling_m3 import M3LlavaForConditionalGeneration


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def anyres_inputs(model):
    """One picture of three tiles, at 9 tokens each."""
    pixels = torch.randn(1, 3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[24, 40]]), "num_visual_tokens": torch.tensor([9])}
    with torch.no_grad():
        tokens = len(model.get_image_features(**inputs).pooler_output[0])
    ids = torch.tensor([[1] + [98] * tokens + [4, 5, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, its folder, inputs) with an `image_newline`, a parameter that belongs to no layer."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model(**ANYRES)
    model.save_pretrained(folder)
    return model, folder, anyres_inputs(model)


def assert_same_answers(model, saved):
    reference, _, inputs = saved
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), reference.generate(**inputs, **GREEDY))


# Device maps


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_auto_spreads_whole_layers_over_cpu_and_disk(share, saved, tmp_path):
    model, folder, _ = saved
    nbytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    spread = AutoModelForImageTextToText.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(share * nbytes)}, offload_folder=tmp_path
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    inside_a_layer = [name for name in spread.hf_device_map if re.search(r"layers\.\d+\.", name)]
    assert not inside_a_layer
    assert_same_answers(spread, saved)


@pytest.mark.parametrize(
    "on_disk", ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head", "model"]
)
def test_any_part_may_lie_on_disk(on_disk, saved, tmp_path):
    parts = ("vision_tower", "multi_modal_projector", "language_model", "image_newline")
    device_map = dict.fromkeys([*(f"model.{part}" for part in parts), "lm_head"], "cpu")
    for name in device_map:
        if name.startswith(on_disk):
            device_map[name] = "disk"
    model = AutoModelForImageTextToText.from_pretrained(saved[1], device_map=device_map, offload_folder=tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert_same_answers(model, saved)


def test_accelerates_own_loading(saved):
    with init_empty_weights():
        model = M3LlavaForConditionalGeneration(tiny_config(**ANYRES))
    assert_same_answers(load_checkpoint_and_dispatch(model.eval(), saved[1], device_map="auto"), saved)


@pytest.mark.parametrize("cls", [AutoModelForImageTextToText, AutoModel])
@pytest.mark.parametrize("kwargs", [{}, {"device_map": "auto"}, {"dtype": torch.bfloat16, "device_map": "cpu"}])
def test_loading_leaves_no_tensor_on_meta_and_no_buffer_uninitialised(cls, kwargs, saved):
    """A model made without `from_pretrained` computes its buffers itself: positions, rotary frequencies."""
    loaded = cls.from_pretrained(saved[1], **kwargs)
    made = saved[0] if cls is AutoModelForImageTextToText else saved[0].model
    expected = dict(made.named_buffers())
    assert {name for name, _ in loaded.named_buffers()} == expected.keys() and len(expected) >= 2
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize(("device_map", "named"), [
    ("cuda:93", "cannot use 'cuda:93' here"),
    ({"": 91}, "cannot use 91 here"),
    ({"model": "cpu", "lm_head": torch.device("cuda", 92)}, r"cannot use device\(type='cuda', index=92\) here"),
])  # fmt: skip
def test_a_gpu_that_is_not_there(device_map, named, saved):
    with pytest.raises(ValueError, match=named) as error:
        AutoModelForImageTextToText.from_pretrained(saved[1], device_map=device_map)
    assert 'device_map="auto"' in str(error.value)


def test_an_offload_folder_that_cannot_be_written_to(saved, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=re.escape(f"offload_folder='{folder}' cannot be written to")):
            AutoModelForImageTextToText.from_pretrained(saved[1], device_map="auto", offload_folder=folder)


# Types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_same_on_loading_and_after(dtype, saved, tmp_path):
    reference, folder, inputs = saved
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    cast = copy.deepcopy(reference)
    for parameter in cast.parameters():  # and no buffer: rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        logits = loaded(**inputs).logits
        assert logits.dtype == dtype
        assert torch.equal(logits, cast(**inputs).logits)
        # What halving the bits costs; that nothing else differs, the line above says to the bit.
        torch.testing.assert_close(logits.float(), reference(**inputs).logits, atol=0.1, rtol=0.1)
    assert loaded.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4
    loaded.save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto").dtype == dtype


# Memory


def sparse_checkpoint(folder: Path) -> int:
    """A model of 300 MB of zeros that take no room on the disk. Returns the bytes of its weights."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 16000}
    config = tiny_config(text_config=text, image_token_id=15999)
    config.architectures, config.dtype = ["M3LlavaForConditionalGeneration"], torch.float32
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = M3LlavaForConditionalGeneration(config).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        output.truncate(8 + len(encoded) + end)
    return end


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_little_more_than_the_weights(saved, tmp_path):
    """In the type they are stored in, weights are mapped from the file. In another one, the file's pages are the system's
    to drop at any time: what counts is the memory that is not a file's."""
    nbytes = sparse_checkpoint(tmp_path)
    assert nbytes > 3e8
    script = """
import re, sys, threading, torch, modeling_m3
from transformers import AutoModelForImageTextToText

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def watch():
    global own
    while not done.wait(0.002):
        own = max(own, memory("RssAnon"))

small, large = sys.argv[1:]
for kwargs in ({}, {"device_map": "auto"}, {"dtype": torch.bfloat16}):
    AutoModelForImageTextToText.from_pretrained(small, **kwargs)  # what is imported on the way
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
    all_before, own_before, own, done = memory("VmRSS"), memory("RssAnon"), 0, threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModelForImageTextToText.from_pretrained(large, **kwargs)
    done.set()
    watcher.join()
    print(memory("VmHWM") - all_before, max(own, memory("RssAnon")) - own_before)
    del model
"""
    command = [sys.executable, "-c", script, saved[1], tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    as_stored, mapped, cast = [[int(number) for number in line.split()] for line in result.stdout.splitlines()]
    assert max(*as_stored, *mapped) < 1.15 * nbytes
    assert cast[1] < 1.15 * nbytes / 2


# Several devices


def test_the_tensor_parallel_plan_covers_every_layer_of_the_language_model():
    model = tiny_model()
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    for layer, kind in {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "colwise"),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "colwise"),
        **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), "rowwise"),
    }.items():
        assert model.tp_plan[f"model.language_model.layers.*.{layer}"] == kind
    planned = {name.replace("*", "0") for name in model.tp_plan}
    assert all(name == "lm_head" or model.get_submodule(name) for name in planned if "vision" not in name)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_answers_as_the_cpu(dtype, saved):
    reference, folder, inputs = saved
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, device_map="cuda")
    with torch.no_grad():
        logits = model(**{name: value.cuda() for name, value in inputs.items()}).logits
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits.float().cpu(), reference(**inputs).logits, atol=tolerance, rtol=tolerance)


@needs_gpu
def test_auto_spreads_over_gpu_cpu_and_disk(saved, tmp_path):
    reference, folder, inputs = saved
    nbytes = sum(tensor.nbytes for tensor in reference.state_dict().values())
    model = AutoModelForImageTextToText.from_pretrained(
        folder, device_map="auto", max_memory={0: nbytes // 3, "cpu": nbytes // 3}, offload_folder=tmp_path
    )
    assert {0, "cpu", "disk"} <= set(model.hf_device_map.values())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits.cpu(), reference(**inputs).logits, atol=1e-3, rtol=1e-3)


@needs_gpu
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_other_attentions_on_a_gpu(implementation, tmp_path):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    heads_of_16 = {  # flex attention has no kernels for smaller ones
        "vision_config": {"num_attention_heads": 1},
        "text_config": {"num_attention_heads": 2, "num_key_value_heads": 1},
    }
    reference = tiny_model(**ANYRES, **heads_of_16)
    reference.save_pretrained(tmp_path)
    inputs = anyres_inputs(reference)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="cuda", attn_implementation=implementation
    )
    with torch.no_grad():
        logits = model(**{name: value.cuda() for name, value in inputs.items()}).logits
    # What bfloat16 costs: flash attention has no float32.
    torch.testing.assert_close(logits.float().cpu(), reference(**inputs).logits, atol=0.1, rtol=0.1)


def test_m3_ask_on_devices(tmp_path):
    """It takes `auto` as it takes `cpu`, and says in one line where it cannot run."""
    from typer.testing import CliRunner

    from m3_conversion.convert import convert
    from modeling_m3.__main__ import app

    convert(GOLDENS / "llava15-m3", tmp_path / "new")
    question = [str(GOLDENS / "images" / "photo_400x266.png"), "?", "--model", str(tmp_path / "new")]
    answers = [
        CliRunner().invoke(app, [*question, "--max-new-tokens", "3", "--device", device]).stdout
        for device in ("cpu", "auto")
    ]
    assert answers[0].strip() and answers[0] == answers[1]
    if not torch.cuda.is_available():
        result = CliRunner().invoke(app, [*question, "--device", "cuda"])
        assert result.exit_code == 1
        assert re.fullmatch(r"m3-ask: .*cannot use 'cuda' here .*\n", result.stderr)
