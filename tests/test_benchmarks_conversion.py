"""The benchmark of conversion: the checkpoints it writes, what it measures, and that it would notice a wrong conversion."""

import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import typer
from conftest import GOLDENS
from conversion_checkpoints import CLIP, VISION, read_weights
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks import conversion, page_cache
from benchmarks.original_checkpoint import (
    LAYOUTS,
    check_converted,
    original_shapes,
    vision_shapes,
    weight_bytes,
    write_original,
)
from benchmarks.random_checkpoint import SHAPES, random_config


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")


def command(*arguments):
    app = typer.Typer()
    app.command()(conversion.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The command's folder, its result and its tables, at the smallest size; loading is done in this process."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "in_a_fresh_process", lambda function, *arguments: function(*arguments))
        options = ("--size", "tiny", "--layout", "bin", "--repeats", 1, "--output", folder / "result.json")
        outcome = command(folder, *options)
    assert outcome.exit_code == 0, outcome.output
    return folder, json.loads((folder / "result.json").read_text()), outcome.stdout


def patterns(weights):
    return {re.sub(r"\.\d+\.", ".{i}.", key) for key in weights}


def test_checkpoints_are_like_the_original(tmp_path):
    weights = {}
    for name in LAYOUTS:
        original = write_original("tiny", name, tmp_path, shard_bytes=17_000_000)
        weights[name] = read_weights(original.checkpoint)
        files = sorted(path.name for path in original.checkpoint.glob(f"*-of-*.{name}"))
        index = json.loads(next(original.checkpoint.glob("*.index.json")).read_text())
        assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
        assert index["weight_map"].keys() == weights[name].keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights[name].values())
        config = json.loads((original.checkpoint / "config.json").read_text())
        assert config["hidden_size"] == SHAPES["tiny"]["hidden_size"] and config["torch_dtype"] == "float16"
    assert (original.checkpoint / "tokenizer.model").stat().st_size == 493443
    outside = {key for key in read_weights(GOLDENS / "llava15-m3") if not key.startswith(VISION)}
    assert patterns(weights["bin"]) == patterns(outside)
    assert patterns(weights["safetensors"]) == patterns(read_weights(GOLDENS / "llava-next-m3"))
    clip = {key for key in read_weights(GOLDENS / CLIP) if key.startswith("vision_model.")}
    assert patterns(read_weights(original.tower)) == patterns(clip)
    for key, tensor in weights["bin"].items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, weights["safetensors"][key])
    largest = weights["bin"]["lm_head.weight"].float()
    assert largest.mean().abs() < 1e-3 and largest.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(weights["bin"]["lm_head.weight"], weights["bin"]["model.embed_tokens.weight"])
    before = {path: path.stat().st_mtime_ns for path in page_cache.files_in([tmp_path])}
    write_original("tiny", "bin", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in page_cache.files_in([tmp_path])} == before


@pytest.mark.parametrize("size", ["1b", "7b"])
def test_shapes_are_those_of_llama_and_clip(size):
    vision = random_config(size).vision_config
    with torch.device("meta"):
        language = LlamaForCausalLM(LlamaConfig(**SHAPES[size], vocab_size=32000)).state_dict()
        clip = CLIPVisionModel(vision).state_dict()
    shapes = original_shapes(size, LAYOUTS["bin"])
    assert {key: tuple(tensor.shape) for key, tensor in language.items()} == {
        key: shape for key, shape in shapes.items() if ".mm_projector." not in key
    }
    assert {key.removeprefix("vision_model."): tuple(tensor.shape) for key, tensor in clip.items()} == vision_shapes(
        vision
    )
    if size == "7b":  # 6738415616 parameters of LLaMA-7B, 20979712 of LLaVA-1.5's projector
        assert weight_bytes(shapes) == 2 * (6738415616 + 20979712)


@pytest.mark.slow
def test_what_is_measured(measured):
    folder, result, printed = measured
    (copied,), (converted,) = (result["conversion"]["bin"][way] for way in ("cp -r", "conversion"))
    sources = [folder / "tiny-bin", folder / "tiny-vision-tower"]
    total = sum(path.stat().st_size for source in sources for path in source.iterdir())
    assert copied["bytes_read"] == converted["bytes_read"] == copied["bytes_written"] == total > 40e6
    assert converted["bytes_written"] == sum(path.stat().st_size for path in (folder / "tiny-converted").iterdir())
    for run in (copied, converted):
        assert 0 < run["seconds"] <= run["seconds_to_disk"]
    assert 1e8 < converted["anonymous"] < converted["resident"] < 1e9
    summary = result["summary"]["bin"]
    assert summary["seconds / cp -r"] == converted["seconds"] / copied["seconds"]
    assert summary["seconds to disk / cp -r"] == converted["seconds_to_disk"] / copied["seconds_to_disk"]
    assert summary["GB resident"] == converted["resident"] / 1e9
    assert result["machine"]["cores"] and "coreutils" in result["environment"]["cp"]
    stored = sum(tensor.nbytes for tensor in read_weights(folder / "tiny-converted").values())
    (whole,), (quantized,) = (result["loading"][name] for name in ("bfloat16", "nf4"))
    assert whole["bytes_loaded"] == pytest.approx(stored, rel=0.01)
    assert 0.8 * stored < quantized["bytes_loaded"] < 0.95 * stored  # most of so small a model is its vocabulary
    assert whole["seconds"] > 0 and whole["resident"] > whole["anonymous"] > stored
    for row in ("cp -r", "conversion", "conversion / cp -r of the same round", "bfloat16", "nf4"):
        assert f"| {row} | " in printed
    assert not list(folder.glob("*-copy"))


@pytest.mark.slow
def test_a_wrong_conversion_is_noticed(measured, tmp_path):
    folder, result, _ = measured
    weights = load_file(folder / "tiny-converted" / "model.safetensors")
    source = read_weights(folder / "tiny-bin")
    assert torch.equal(weights["lm_head.weight"][:32000], source["lm_head.weight"])
    assert result["checked_tensors"] == {"bin": len(weights)}
    changed = weights["model.language_model.layers.1.mlp.up_proj.weight"].clone()
    changed[-1, 3] += 1
    for change, named in (
        ({"model.language_model.layers.1.mlp.up_proj.weight": changed}, "layers.1.mlp.up_proj"),
        ({"model.language_model.norm.weight": None}, "model.language_model.norm.weight"),
        ({"model.surprise": torch.ones(1)}, "model.surprise"),
    ):
        wrong = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match=named):
            check_converted(tmp_path, "tiny", "bin")


def test_a_conversion_that_fails_says_why(tmp_path):
    wrong = SimpleNamespace(checkpoint="--no-such-option", tower=tmp_path)
    with pytest.raises(RuntimeError, match="--no-such-option was not converted: (?s:.)*No such option"):
        conversion.convert(wrong, tmp_path / "new")


def test_options(tmp_path, monkeypatch):
    for name in ("tiny-bin", "tiny-converted", "tiny-vision-tower", "1b-bin"):
        (tmp_path / name).mkdir()
    outcome = command(tmp_path, "--size", "tiny", "--no-conversion")
    assert outcome.exit_code == 2 and "tiny-converted is not there" in re.sub(r"[\s│]+", " ", outcome.output)
    outcome = command(tmp_path, "--size", "tiny", "--no-conversion", "--no-loading", "--clean")
    assert outcome.exit_code == 0, outcome.output
    assert [path.name for path in tmp_path.iterdir()] == ["1b-bin"]
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50e9))
    conversion.check_room(tmp_path, "7b", ["bin"])
    with pytest.raises(OSError, match="59 GB are needed .* but 50 GB are free"):
        conversion.check_room(tmp_path, "7b", ["bin", "safetensors"])


def test_peak_memory_of_another_process(tmp_path):
    file = tmp_path / "mapped"
    file.write_bytes(bytes(60_000_000))
    script = """
import mmap, sys
held = bytearray(b"x") * 100_000_000
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sum(mapped[i] for i in range(0, len(mapped), 4096))
print("ready", flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, file], **pipes) as process:
        with conversion.peak_memory(process.pid) as peaks:
            assert process.stdout.readline() == b"ready\n"
            peaks.update(anonymous=0, resident=0)
            while not all(peaks.values()):  # until it is read again
                time.sleep(0.05)
            process.communicate()
    assert 100e6 < peaks["anonymous"] < 130e6
    assert 160e6 < peaks["resident"] < 190e6


def test_page_cache(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(8_000_000))
    (tmp_path / "empty").touch()
    page_cache.flush(tmp_path)
    assert page_cache.size_of(tmp_path) == 8_000_000
    assert page_cache.cached_share(tmp_path) == 1
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], stdout=subprocess.PIPE, text=True, check=True).stdout
    if kind.strip() in ("tmpfs", "ramfs", "overlayfs"):
        pytest.skip("these files lie in memory, or in a layer that keeps its own pages")
    page_cache.forget(tmp_path)
    assert page_cache.cached_share(tmp_path) == 0
