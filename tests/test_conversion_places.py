"""Where parts of a checkpoint lie and what they are: folders as they are called, projectors alone, wrapped and unfetched files."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conversion_checkpoints import CLIP, copy_golden, edit_json, read_weights, run, store

from m3_conversion.convert import convert
from m3_conversion.original import ConversionError


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9976576152\n"


def assert_same_weights(folder, other):
    weights, expected = read_weights(folder), read_weights(other)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.fixture
def with_tower_beside(tmp_path):
    """A checkpoint whose weights come from the CLIP folder beside it, which its config names, and its conversion."""
    source = copy_golden("llava15-m3", tmp_path / "models")
    edit_json(source / "config.json", unfreeze_mm_vision_tower=False)
    convert(source, tmp_path / "expected")
    return source, tmp_path / "expected"


@pytest.mark.parametrize(
    ("inside", "name"),
    [("llava15-m3", "."), ("openai", "../llava15-m3"), ("llava15-m3", "../llava15-m3/"), (".", "./llava15-m3")],
)
def test_a_tower_that_lies_beside_is_found_however_the_folder_is_called(
    inside, name, with_tower_beside, tmp_path, monkeypatch
):
    source, expected = with_tower_beside
    monkeypatch.chdir(source.parent / inside)
    assert run(name, tmp_path / "new") == 0
    assert_same_weights(tmp_path / "new", expected)


def test_through_a_link_it_is_found_beside_the_link_and_beside_the_folder(with_tower_beside, tmp_path):
    source, expected = with_tower_beside
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(source)
    assert run(tmp_path / "elsewhere" / "link", tmp_path / "beside-the-folder") == 0
    assert_same_weights(tmp_path / "beside-the-folder", expected)
    shutil.move(source.parent / "openai", tmp_path / "elsewhere")
    assert run(tmp_path / "elsewhere" / "link", tmp_path / "beside-the-link") == 0
    assert_same_weights(tmp_path / "beside-the-link", expected)


@pytest.fixture
def pretrained(tmp_path):
    """What LLaVA's first stage writes, the language model it was trained on, and the two in one folder."""
    whole = copy_golden("llava15-m3", tmp_path / "whole")
    edit_json(whole / "config.json", unfreeze_mm_vision_tower=False)
    weights = {key: value for key, value in read_weights(whole).items() if "vision_tower" not in key}
    projector = {key: torch.randn_like(value) for key, value in weights.items() if "mm_projector" in key}
    base = tmp_path / "vicuna"
    shutil.copytree(whole, base)
    store(base, {key: value for key, value in weights.items() if "mm_projector" not in key})
    mm = ("mm_", "image_", "unfreeze_", "tune_", "matryoshka_", "freeze_", "use_mm")
    edit_json(base / "config.json", model_type="llama", **{k: ... for k in _keys(base) if k.startswith(mm)})
    store(whole, {**weights, **projector})
    alone = tmp_path / "projector"
    alone.mkdir()
    shutil.copy(whole / "config.json", alone)
    torch.save(projector, alone / "mm_projector.bin")
    shutil.copytree(whole.parent / CLIP, tmp_path / CLIP)
    return alone, base, whole


def _keys(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("beside_weights", [False, True])
def test_a_projector_goes_into_its_language_model(beside_weights, pretrained, tmp_path):
    alone, base, whole = pretrained
    if beside_weights:  # the original reads the base and the projector then, too
        torch.save({"lm_head.weight": torch.zeros(2)}, alone / "pytorch_model.bin")
    assert run(alone, tmp_path / "new", "--model-base", base) == 0
    assert run(whole, tmp_path / "expected") == 0
    assert_same_weights(tmp_path / "new", tmp_path / "expected")
    for name in ("config.json", "tokenizer.json", "processor_config.json", "generation_config.json"):
        assert (tmp_path / "new" / name).read_text() == (tmp_path / "expected" / name).read_text(), name


def test_a_projector_without_its_language_model(pretrained, tmp_path, capsys):
    alone, base, _ = pretrained
    assert run(alone, tmp_path / "new") == 1
    assert capsys.readouterr().err.endswith(
        "is only a projector, mm_projector.bin: name the language model with --model-base\n"
    )
    edit_json(alone / "config.json", hidden_size=32)
    assert run(alone, tmp_path / "new", "--model-base", base) == 1
    assert "has the shape" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "llava."])
@pytest.mark.parametrize("tower", [False, True])
def test_keys_that_a_wrapper_has_prefixed(prefix, tower, with_tower_beside, tmp_path):
    source, _ = with_tower_beside
    wrapped = source.parent / CLIP if tower else source
    store(wrapped, {prefix + key: value for key, value in read_weights(wrapped).items()})
    with pytest.raises(ConversionError) as error:
        convert(source, tmp_path / "new")
    assert f"{wrapped}: keys of its weights begin with {prefix!r}" in str(error.value)


def test_weights_of_another_model(with_tower_beside, tmp_path):
    source, _ = with_tower_beside
    store(source, {"transformer.h.0.attn.weight": torch.zeros(2)})
    with pytest.raises(
        ConversionError, match=r"model\.embed_tokens\.weight is missing .* as transformer\.h\.0\.attn\.weight"
    ):
        convert(source, tmp_path / "new")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "llava15-m3/config.json",
            "llava15-m3/pytorch_model.bin.index.json",
            "llava15-m3/pytorch_model-00002-of-00003.bin",
        ),
        *("llava15-m3/tokenizer.model", "llava15-m3/tokenizer_config.json", "llava15-m3/generation_config.json"),
        *(f"{CLIP}/config.json", f"{CLIP}/preprocessor_config.json", f"{CLIP}/model.safetensors"),
    ],
)
def test_files_that_git_has_not_fetched(name, with_tower_beside, tmp_path, capsys):
    source, _ = with_tower_beside
    file = source.parent / name
    assert file.is_file()
    file.write_bytes(POINTER)
    assert run(source, tmp_path / "new") == 1
    error = capsys.readouterr().err
    assert f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}\n" in error
    assert error.count("\n") == 1 + error.count("no unfreeze_mm_vision_tower")
    assert not (tmp_path / "new").exists()


def test_a_projector_and_an_adapter_that_git_has_not_fetched(pretrained, tmp_path, capsys):
    alone, base, _ = pretrained
    (alone / "mm_projector.bin").write_bytes(POINTER)
    assert run(alone, tmp_path / "new", "--model-base", base) == 1
    assert "mm_projector.bin is a Git LFS pointer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["with a space", "ünïcode-模型", "-dash", "a.b.c"])
def test_folders_of_any_name(name, with_tower_beside, tmp_path, monkeypatch):
    source, expected = with_tower_beside
    renamed = source.rename(source.parent / name)
    monkeypatch.chdir(tmp_path)
    assert run(renamed, f"./new {name}") == 0
    assert_same_weights(Path(f"new {name}"), expected)
    assert os.listdir(tmp_path).count(f"new {name}") == 1
