"""What a folder stores does not depend on how it was loaded: load, save, load, save, and compare every file."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CHECKPOINTS
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.utils import is_torchvision_available

from modeling_m3 import M3LlavaConfig, M3LlavaImageProcessorPil, M3LlavaProcessor, default_checkpoint
from modeling_m3.visual_tokens import possible_scales


M3_TINY = AutoProcessor.from_pretrained(default_checkpoint())
FOLDERS = (*CHECKPOINTS, "m3-tiny", "trained")
WAYS = [
    {},
    {"trust_remote_code": True},
    {"local_files_only": True},
    {"revision": "main", "token": "hf_none", "force_download": False, "cache_dir": "cache"},
    {"code_revision": "main", "trust_remote_code": True},
]
PROCESSOR_WAYS = [*WAYS, {"backend": "pil"}, {"backend": "torchvision"}, {"use_fast": False}, {"use_fast": True}]
NAMED_BY_RELEASE = ("transformers_version", "text_config", "vision_config")
MODEL_WAYS = [*WAYS, {"dtype": torch.float32}, {"attn_implementation": "eager"}, {"device_map": "cpu"}]


@pytest.fixture(scope="module")
def folders(converted, tmp_path_factory):
    from test_training_finetune import arguments, records

    from m3_training.arguments import parse
    from m3_training.finetune import finetune

    output = tmp_path_factory.mktemp("trained") / "run"
    trained = finetune(*parse(arguments(converted["llava15-m3"], output, max_steps=1)), records=records(1))
    return {**converted, "m3-tiny": default_checkpoint(), "trained": trained}


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("way", PROCESSOR_WAYS, ids=str)
@pytest.mark.parametrize("name", FOLDERS)
def test_processors(name, way, folders, tmp_path):
    plain = AutoProcessor.from_pretrained(folders[name])
    plain.save_pretrained(tmp_path / "plain")
    loaded = AutoProcessor.from_pretrained(folders[name], **way)
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved", **way)
    again.save_pretrained(tmp_path / "again")
    assert loaded.to_dict() == again.to_dict() == plain.to_dict()
    assert contents(tmp_path / "saved") == contents(tmp_path / "again") == contents(tmp_path / "plain")
    for file, content in contents(tmp_path / "saved").items():
        assert content == (folders[name] / file).read_bytes(), file


@pytest.mark.parametrize("way", MODEL_WAYS, ids=str)
@pytest.mark.parametrize("name", FOLDERS)
def test_models(name, way, folders, tmp_path):
    for source, destination in ((folders[name], "saved"), (tmp_path / "saved", "again")):
        AutoModelForImageTextToText.from_pretrained(source, **way).save_pretrained(tmp_path / destination)
    saved = contents(tmp_path / "saved")
    assert saved == contents(tmp_path / "again")
    for file in saved.keys() - {"model.safetensors"}:
        content, stored = saved[file], (folders[name] / file).read_bytes()
        if file.endswith(
            ".json"
        ):  # which name the release, and sub-configurations have more settings from one to the next
            content, stored = (
                {key: value for key, value in json.loads(text).items() if key not in NAMED_BY_RELEASE}
                for text in (content, stored)
            )
        assert content == stored, file


def test_scales_are_ascending_in_whatever_order_they_are_stored(folders, tmp_path):
    shutil.copytree(folders["llava15-m3"], tmp_path / "stored")
    for name in ("config.json", "processor_config.json"):
        file = tmp_path / "stored" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "visual_token_scales": [576, 1, 36, 9, 144]}))
    for source, destination in (("stored", "saved"), ("saved", "again")):
        for loader in (AutoModelForImageTextToText, AutoProcessor):
            loader.from_pretrained(tmp_path / source).save_pretrained(tmp_path / destination)
    for name in ("config.json", "processor_config.json"):
        assert json.loads((tmp_path / "saved" / name).read_text())["visual_token_scales"] == [1, 9, 36, 144, 576]
    assert contents(tmp_path / "saved") == contents(tmp_path / "again")


@given(
    scales=st.lists(st.sampled_from(possible_scales(24)), min_size=1, unique=True),
    kind=st.sampled_from([list, tuple, np.array, torch.tensor, lambda scales: [np.int64(scale) for scale in scales]]),
)
def test_scales_given_in_any_order_and_kind_are_ascending(scales, kind):
    default = M3_TINY
    config = M3LlavaConfig(visual_token_scales=kind(scales))
    processor = M3LlavaProcessor(default.image_processor, default.tokenizer, visual_token_scales=kind(scales))
    for holder in (config, processor):
        assert holder.visual_token_scales == sorted(scales)
        assert {type(scale) for scale in json.loads(json.dumps(holder.to_dict()))["visual_token_scales"]} == {int}
        holder.visual_token_scales = kind(scales[::-1])
        assert holder.visual_token_scales == sorted(scales)
    with pytest.raises(ValueError, match="must be distinct scales"):
        M3LlavaConfig(visual_token_scales=kind([*scales, scales[0]]))


@pytest.mark.parametrize("scales", [[], 9, "9", [9.0], [True], [None], {1, 9}, [[9]], [9, 7]], ids=str)
def test_what_are_no_scales_is_refused_by_its_value(scales):
    default = M3_TINY
    for make in (M3LlavaConfig, lambda **given: M3LlavaProcessor(default.image_processor, default.tokenizer, **given)):
        with pytest.raises(ValueError, match="visual_token_scales=.* must be distinct scales of the 24x24 grid"):
            make(visual_token_scales=scales)


def test_a_pipelines_processor(folders, tmp_path):
    pipe = pipeline("image-text-to-text", model=str(folders["llava15-m3"]), trust_remote_code=True)
    pipe.processor.save_pretrained(tmp_path)
    for file, content in contents(tmp_path).items():
        assert content == (folders["llava15-m3"] / file).read_bytes(), file


def test_a_folder_that_remembers_how_it_was_loaded_is_read_as_any_other(folders, tmp_path):
    """Folders written before: `backend: pil`, meant for the image processor, kept the tokenizer from marking answers."""
    shutil.copytree(folders["llava15-m3"], tmp_path / "old")
    file = tmp_path / "old" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "backend": "pil", "is_local": True}))
    processor = AutoProcessor.from_pretrained(tmp_path / "old")
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    out = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(out["assistant_masks"][0]) > 1


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
@pytest.mark.parametrize("way", [{"use_fast": True}, {"backend": "torchvision"}], ids=str)
def test_torchvision_asked_for_where_it_is_not(way, folders):
    from PIL import Image

    processor = AutoProcessor.from_pretrained(folders["llava15-m3"], **way)
    assert type(processor.image_processor) is M3LlavaImageProcessorPil
    assert processor(images=Image.new("RGB", (9, 9)), text="<image>", num_visual_tokens=1)["pixel_values"]
