"""Conversion of what is damaged, unsupported, refused or cut short: one line that helps, and nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from conversion_checkpoints import (
    CLIP,
    VISION,
    change_weights,
    copy_golden,
    edit_json,
    read_weights,
    run,
    store,
)
from safetensors.torch import save_file

from m3_conversion.convert import convert
from m3_conversion.original import ConversionError


SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
SHARD = "model-00001-of-00003.safetensors"
BIN_SHARD = "pytorch_model-00002-of-00003.bin"


class CallsCode:
    """Unpickling this makes a folder `touched`."""

    def __reduce__(self):
        return os.mkdir, ("touched",)


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name, share=0.7):
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def weights(**changes):
    return lambda folder: change_weights(folder, {key.replace("__", "."): value for key, value in changes.items()})


def clip(action):
    return lambda folder: (
        edit_json(folder / "config.json", unfreeze_mm_vision_tower=False),
        action(folder.parent / CLIP),
    )


def index(change, name=SAFETENSORS_INDEX):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content["weight_map"])
        (folder / name).write_text(json.dumps(content))

    return apply


def as_bin(change, layout="pytorch_model.bin"):
    """The weights as one `.bin` file, which `change` may damage."""

    def apply(folder):
        store(folder, read_weights(folder), layout)
        change(folder)

    return apply


def with_code(folder):
    change_weights(folder, {"lm_head.weight": CallsCode()}, "pytorch_model.bin")


def eight_bit(layout):
    head = torch.zeros(1000, 48, dtype=torch.int8)
    return lambda folder: change_weights(folder, {"lm_head.weight": head}, layout)


def in_a_dict(folder):
    torch.save({"state_dict": read_weights(folder)}, folder / "pytorch_model.bin")
    (folder / SAFETENSORS_INDEX).unlink()


# What is done to a copy of the golden LLaVA-NeXT checkpoint, and what the line on stderr must name.
DAMAGES = {
    "no config": (remove("config.json"), ["config.json", "missing"]),
    "config cut off": (truncate("config.json"), ["config.json", "JSON"]),
    "config is a list": (write("config.json", b"[1]"), ["config.json", "list"]),
    "config is not text": (write("config.json", b"\xff\xfe\x00"), ["config.json", "JSON"]),
    "index is not JSON": (write(SAFETENSORS_INDEX, b"{"), [SAFETENSORS_INDEX, "JSON"]),
    "index without a map": (write(SAFETENSORS_INDEX, b"{}"), [SAFETENSORS_INDEX, "weight_map"]),
    "index leads elsewhere": (
        index(lambda keys: keys.update({"lm_head.weight": "../model.safetensors"})),
        [SAFETENSORS_INDEX, "lm_head.weight", "../model.safetensors"],
    ),
    "index moves a key": (index(lambda keys: keys.update({"lm_head.weight": SHARD})), [SHARD, "lm_head.weight"]),
    "index misses a key": (index(lambda keys: keys.pop("model.norm.weight")), ["model.norm.weight", "does not list"]),
    "index has one more key": (index(lambda keys: keys.update({"model.x": SHARD})), ["model.x", SHARD]),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], ["no model weights"]),
    "projector only": (
        lambda f: [p.unlink() for p in f.glob("model*")] + [(f / "mm_projector.bin").touch()],
        ["mm_projector.bin", "name the language model with --model-base"],
    ),
    "shard missing": (remove(SHARD), [SHARD, "missing"]),
    "shard truncated": (truncate(SHARD), [SHARD, "truncated"]),
    "shard's header truncated": (truncate(SHARD, 0.001), [SHARD, "truncated"]),
    "shard empty": (write(SHARD, b""), [SHARD, "truncated"]),
    "shard is a web page": (write(SHARD, b"<html>not found</html>"), [SHARD, "damaged"]),
    "shard is a folder": (lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), [SHARD]),
    "bin truncated": (as_bin(truncate("pytorch_model.bin")), ["pytorch_model.bin", "truncated"]),
    "old bin truncated": (as_bin(truncate("pytorch_model.bin"), "legacy.bin"), ["pytorch_model.bin", "truncated"]),
    "bin empty": (as_bin(write("pytorch_model.bin", b"")), ["pytorch_model.bin", "truncated"]),
    "bin is a web page": (as_bin(write("pytorch_model.bin", b"<html>")), ["pytorch_model.bin", "damaged"]),
    "bin is a Git LFS pointer": (
        as_bin(write("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\n")),
        ["pytorch_model.bin", "Git LFS pointer", "git lfs pull"],
    ),
    "bin calls code": (with_code, ["pytorch_model.bin", "refused", "mkdir"]),
    "bin in a dict": (in_a_dict, ["pytorch_model.bin", "state_dict"]),
    "bin is a tensor": (
        as_bin(lambda f: torch.save(torch.zeros(1), f / "pytorch_model.bin")),
        ["pytorch_model.bin", "Tensor"],
    ),
    "bin shard missing": (as_bin(remove("pytorch_model-00002-of-00002.bin"), BIN_INDEX), ["pytorch_model-00002"]),
    "unknown key": (weights(model__surprise__weight=torch.ones(2)), ["model.surprise.weight"]),
    "unknown part of a known name": (weights(lm_head__bias=torch.ones(2)), ["lm_head.bias"]),
    "a layer too many": (
        weights(model__layers__3__input_layernorm__weight=torch.ones(48)),
        ["model.layers.3.input_layernorm.weight", "config.json"],
    ),
    "a bias too many": (
        weights(model__layers__0__self_attn__q_proj__bias=torch.ones(48)),
        ["model.layers.0.self_attn.q_proj.bias", "config.json"],
    ),
    "a key missing": (weights(model__layers__1__mlp__up_proj__weight=None), ["model.layers.1.mlp.up_proj.weight"]),
    "head missing": (weights(lm_head__weight=None), ["lm_head.weight", "missing"]),
    "embedding missing": (weights(model__embed_tokens__weight=None), ["model.embed_tokens.weight", "missing"]),
    "newline missing": (weights(model__image_newline=None), ["model.image_newline", "missing"]),
    "a vision key missing": (
        lambda f: change_weights(f, {f"{VISION}pre_layrnorm.weight": None}),
        [f"{VISION}pre_layrnorm.weight", "missing"],
    ),
    "wrong shape": (weights(model__norm__weight=torch.ones(47)), ["model.norm.weight", "(47,)", "(48,)"]),
    "head shorter than the embedding": (weights(lm_head__weight=torch.ones(999, 48)), ["lm_head.weight", "999"]),
    "same tensor under two keys": (
        weights(model__mm_projector__weight=torch.ones(48, 32)),
        ["model.mm_projector.weight", "model.mm_projector.0.weight"],
    ),
    "eight-bit weights": (eight_bit("model.safetensors"), ["lm_head.weight", "I8"]),
    "eight-bit weights in a bin": (eight_bit("pytorch_model.bin"), ["lm_head.weight", "int8"]),
    "vocabulary of another size": (config(vocab_size=1001), ["model.embed_tokens.weight", "vocab_size", "1001"]),
    "another model's tokenizer": (
        lambda f: shutil.copy(GOLDENS / "tokenizer_v1" / "tokenizer.model", f / "tokenizer.model"),
        ["tokenizer.model", "32000", "1000"],
    ),
    "more layers than weights": (config(num_hidden_layers=4), ["model.layers.3", "missing", "config.json"]),
    "no tokenizer": (remove("tokenizer.model"), ["tokenizer.model"]),
    "tokenizer cut off": (truncate("tokenizer.model"), ["tokenizer.model"]),
    "tokenizer config is not JSON": (write("tokenizer_config.json", b"{"), ["tokenizer_config.json"]),
    "generation config is not JSON": (write("generation_config.json", b"{"), ["generation_config.json"]),
    "card's metadata is broken": (write("README.md", b"---\nlicense: [\n---\n"), ["README.md"]),
    "MPT": (config(model_type="llava_mpt"), ["llava_mpt", "MPT"]),
    "another model": (config(model_type="qwen2"), ["qwen2", "llava_llama"]),
    "no model type": (config(model_type=...), ["model_type"]),
    "already converted": (config(model_type="m3_llava", text_config={}), ["m3_llava"]),
    "quantized": (config(quantization_config={"bits": 4}), ["quantization_config"]),
    "odd projector": (config(mm_projector_type="cabstract"), ["mm_projector_type", "cabstract"]),
    "projector of another depth": (config(mm_projector_type="linear"), ["model.mm_projector.2", "config.json"]),
    "odd merge type": (config(mm_patch_merge_type="mean"), ["mm_patch_merge_type", "mean"]),
    "odd aspect ratio": (config(image_aspect_ratio="anyres_max_9"), ["image_aspect_ratio", "anyres_max_9"]),
    "odd feature": (config(mm_vision_select_feature="slicefour_patch"), ["mm_vision_select_feature"]),
    "odd layer": (config(mm_vision_select_layer=-9), ["config.json", "-9"]),
    "layer as text": (config(mm_vision_select_layer="-2"), ["config.json", "vision_feature_layer"]),
    "scales are words": (config(matryoshka_vis_token_scale="many"), ["matryoshka_vis_token_scale", "many"]),
    "a scale the grid has not": (config(matryoshka_vis_token_scale=[1, 100]), ["config.json", "100"]),
    "no pinpoints": (config(image_grid_pinpoints=...), ["image_grid_pinpoints"]),
    "pinpoints are words": (config(image_grid_pinpoints="(1x1),(2x2)"), ["image_grid_pinpoints", "(1x1)"]),
    "a width without a height": (config(image_grid_pinpoints=[[336]]), ["image_grid_pinpoints"]),
    "hidden size is a word": (config(hidden_size="big"), ["config.json", "hidden_size"]),
    "no heads": (config(num_attention_heads=0), ["config.json"]),
    "odd activation": (config(hidden_act="swoosh"), ["config.json", "swoosh"]),
    "no vision tower named": (config(mm_vision_tower=...), ["mm_vision_tower", "--vision-tower"]),
    "vision tower not found": (config(mm_vision_tower="./nowhere"), ["./nowhere", "--vision-tower"]),
    "vision tower not on the Hub": (config(mm_vision_tower="some/where"), ["some/where", "--vision-tower"]),
    "vision tower is no CLIP": (
        lambda f: edit_json(f.parent / CLIP / "config.json", model_type="dinov2"),
        ["dinov2", "CLIP"],
    ),
    "vision tower without preprocessing": (
        lambda f: (f.parent / CLIP / "preprocessor_config.json").unlink(),
        ["preprocessor_config.json", "missing"],
    ),
    "vision tower without weights": (clip(remove("model.safetensors")), [CLIP, "no model weights"]),
    "vision tower's weights truncated": (clip(truncate("model.safetensors")), [CLIP, "truncated"]),
    "vision tower lacks a key": (
        clip(lambda f: change_weights(f, {"vision_model.post_layernorm.bias": None})),
        ["vision_model.post_layernorm.bias", CLIP],
    ),
    "vision tower has an unknown key": (
        clip(lambda f: change_weights(f, {"vision_model.head.bias": torch.ones(2)})),
        ["vision_model.head.bias"],
    ),
    "pictures of another size than the vision tower's": (
        lambda f: edit_json(f.parent / CLIP / "preprocessor_config.json", crop_size=224),
        [CLIP, "224"],
    ),
    "vision tower of another size": (
        lambda f: edit_json(
            f.parent / CLIP / "config.json", vision_config={"hidden_size": 96, "image_size": 336, "patch_size": 14}
        ),
        [VISION, "config.json"],
    ),
}


def assert_nothing_written(folder: Path) -> None:
    """Neither the new folder nor a leftover."""
    assert sorted(path.name for path in folder.iterdir()) == ["llava-next-m3", "openai"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_line_that_names_what_is_wrong(damage, tmp_path, capsys, monkeypatch):
    change, names = DAMAGES[damage]
    source = copy_golden("llava-next-m3", tmp_path)
    change(source)
    monkeypatch.chdir(source)
    assert run(source, tmp_path / "new") == 1
    error = capsys.readouterr().err
    *notices, line = error.splitlines()
    assert all(name in line for name in names), line
    assert line.startswith("m3-convert: ")
    assert all("vision weights do not count" in notice for notice in notices)
    assert not (source / "touched").exists()
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("source", "destination", "names"),
    [
        ("nothing", "new", ["nothing", "Hub"]),
        ("./nothing/at/all", "new", ["nothing/at/all", "folder"]),
        ("llava-next-m3/config.json", "new", ["config.json", "folder"]),
        ("llava-next-m3", "llava-next-m3", ["llava-next-m3"]),
        ("llava-next-m3", "llava-next-m3/new", ["overlap"]),
        ("llava-next-m3", "openai/clip-vit-tiny-patch14-336/new", ["overlap"]),
        ("llava-next-m3", "openai", ["openai", "--overwrite"]),
        ("llava-next-m3", "llava-next-m3/config.json", ["config.json", "is a file"]),
        ("llava-next-m3", "llava-next-m3/config.json/new", ["config.json"]),
        ("llava-next-m3", "/proc/new", ["/proc"]),
        ("llava-next-m3", "/", ["/"]),
    ],
)
def test_refused_places(source, destination, names, tmp_path, capsys, monkeypatch):
    copy_golden("llava-next-m3", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(Path(source), Path(destination)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(name in error for name in names), error
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("destination", ["openai", ".", "..", "llava-next-m3"])
def test_overwrite_does_not_remove_what_is_read_or_stood_in(destination, tmp_path, capsys, monkeypatch):
    source = copy_golden("llava-next-m3", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(source, Path(destination), "--overwrite") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert_nothing_written(tmp_path)


def test_values_too_large_for_the_dtype(tmp_path, capsys):
    source = copy_golden("llava-next-m3", tmp_path)
    large = torch.ones(48)
    large[3] = 70000.0
    change_weights(source, {"model.norm.weight": large})
    assert run(source, tmp_path / "new", "--dtype", "float16") == 1
    error = capsys.readouterr().err
    assert all(text in error for text in ("model.norm.weight", "70000", "float16")), error
    assert_nothing_written(tmp_path)


def test_failed_overwrite_keeps_the_old_folder(tmp_path, capsys):
    source = copy_golden("llava-next-m3", tmp_path)
    convert(source, tmp_path / "new")
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    (source / SHARD).unlink()
    assert run(source, tmp_path / "new", "--overwrite") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before


def test_weights_that_shrink_while_they_are_read(tmp_path):
    """A header can be read, but the values that it promises are gone by the time they are copied."""
    from m3_conversion.original import stored_tensors

    save_file({"a": torch.ones(1000, 1000)}, tmp_path / "model.safetensors")
    tensor = stored_tensors(tmp_path)["a"]
    os.truncate(tmp_path / "model.safetensors", 2_000_000)
    with pytest.raises(ConversionError, match="ends inside a"):
        list(tensor.chunks())


def start(script: str, *arguments: object, **options) -> subprocess.Popen:
    """A Python process that can import the code under test and has the command's arguments."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    setup = (
        f"import sys; sys.path[:0] = {paths}\nfrom m3_conversion.__main__ import main\nimport m3_conversion.convert\n"
    )
    command = [sys.executable, "-c", setup + script, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_take_signals, **options
    )


def _take_signals() -> None:
    """As in a shell's foreground: a job in the background ignores SIGINT, and so would what it starts."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.slow
def test_full_disk(tmp_path):
    """A limit on file size stands in for it: the write that goes beyond fails in the middle of a weight file."""
    source = copy_golden("llava-next-m3", tmp_path)
    script = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
sys.exit(main(sys.argv[1:]))
"""
    process = start(script, source, tmp_path / "new")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.count("\n") == 1
    assert "model.safetensors" in error and "File too large" in error
    assert_nothing_written(tmp_path)


def test_too_little_room_is_told_before_writing(tmp_path, monkeypatch, capsys):
    source = copy_golden("llava-next-m3", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    assert run(source, tmp_path / "new") == 1
    assert "free" in capsys.readouterr().err
    assert_nothing_written(tmp_path)


def test_disk_that_fills_up_after_the_weights(tmp_path, monkeypatch, capsys):
    """The tokenizer is written by code that raises a plain Exception."""

    def fail(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    source = copy_golden("llava-next-m3", tmp_path)
    assert run(source, tmp_path / "new") == 1
    assert "No space left" in capsys.readouterr().err
    assert_nothing_written(tmp_path)


# Slow writing, so that a signal finds the command at it.
SLOW = """
import time
import m3_conversion.writer as writer
write = writer._write_tensor
def slow(*arguments):
    time.sleep(0.005)
    return write(*arguments)
writer._write_tensor = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped(number, tmp_path):
    source = copy_golden("llava-next-m3", tmp_path)
    process = start(SLOW + "sys.exit(main(sys.argv[1:]))", source, tmp_path / "new")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".new.incomplete-*/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error == "m3-convert: stopped, nothing was written\n"
    assert_nothing_written(tmp_path)


@pytest.mark.slow
def test_killed_at_any_step_the_same_command_ends_as_if_it_had_not_been(tmp_path):
    """A step is whatever it does in the file system; every file is the same in the end, and nothing else is left."""
    source = copy_golden("llava-next-m3", tmp_path)
    # Children are forked after the imports. The first one tells how many steps there are.
    script = """
import os, signal
source, folder, *_ = sys.argv[1:]
def child(number, stop):
    process = os.fork()
    if process == 0:
        steps = 0
        def watch(event, arguments):
            nonlocal steps
            if event.startswith(("open", "os.", "shutil.")) and folder in str(arguments):
                steps += 1
                if steps == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        status = main([source, f"{folder}/{number}/made"])
        print("steps", steps, flush=True)
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
assert child(0, None) == 0
steps = int(input())
for i in range(1, 9):
    assert child(i, steps * i // 9) == -signal.SIGKILL, i
    print("killed", sorted(os.listdir(f"{folder}/{i}")) if os.path.exists(f"{folder}/{i}") else [], flush=True)
    assert child(i, None) == 0, i
"""
    folder = tmp_path / "many"
    folder.mkdir()
    process = start(script, source, folder, stdin=subprocess.PIPE)
    steps = next(line for line in process.stdout if line.startswith("steps"))
    output, error = process.communicate(steps.split()[1] + "\n", timeout=120)
    assert process.returncode == 0, error
    assert output.count("['.made.incomplete-m3']") > 5
    expected = {file.name: file.read_bytes() for file in (folder / "0" / "made").iterdir()}
    for number in range(9):
        assert [path.name for path in (folder / str(number)).iterdir()] == ["made"]
        assert {file.name: file.read_bytes() for file in (folder / str(number) / "made").iterdir()} == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """574 MB of weights, 262 MB of them in two tensors: no more than 120 MB above what a checkpoint of 1 MB needs.

    Quantizing keeps a layer in 8 bits beside it, 11 MB, and bitsandbytes has a few copies of what it is given.
    """
    source = copy_golden("llava-next-m3", tmp_path)
    shapes = {key: list(tensor.shape) for key, tensor in read_weights(source).items()}
    text = {"hidden_size": 2048, "intermediate_size": 5504, "vocab_size": 32000}
    edit_json(source / "config.json", **text, torch_dtype="float16")
    sizes = {48: 2048, 96: 5504, 1000: 32000}
    header, end = {}, 0
    for key, shape in shapes.items():
        shape = shape if key.startswith(VISION) else [sizes.get(size, size) for size in shape]
        stop = end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, stop]}
        end = stop
    for file in source.glob("model*"):
        file.unlink()
    for file in (GOLDENS / "tokenizer_v1").iterdir():
        shutil.copyfile(file, source / file.name)
    encoded = json.dumps(header).encode()
    with open(source / "model.safetensors", "wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        output.truncate(8 + len(encoded) + end)  # zeros that take no room on the disk
    script = """
import resource
import bitsandbytes
from pathlib import Path
from m3_conversion.tokenizer import build_tokenizer
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small, large, folder = sys.argv[1:]
assert main([small, f"{folder}/small"]) == 0
build_tokenizer(Path(large))
peaks = [peak()]
for name, options in (("large", []), ("cast", ["--dtype", "bfloat16"]), ("int8", ["--quantize", "int8"])):
    assert main([large, f"{folder}/{name}", *options]) == 0
    peaks.append(peak())
print(*((after - before) // 1024 for before, after in zip(peaks, peaks[1:])))
"""
    process = start(script, GOLDENS / "llava-next-m3", source, tmp_path)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert (tmp_path / "int8" / "model.safetensors").stat().st_size > 4e8
    for name in ("large", "cast"):
        assert (tmp_path / name / "model.safetensors").stat().st_size > end > 5e8
        shutil.rmtree(tmp_path / name)
    copied, cast, quantized = map(int, output.splitlines()[-1].split())
    assert copied + cast < 120 and quantized < 120, (copied, cast, quantized)
