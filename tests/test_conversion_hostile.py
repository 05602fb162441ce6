"""Checkpoints whose parts do not agree, or are stored as other tools store them: made right where it is known how, else refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, tiny_config
from conversion_checkpoints import CLIP, change_weights, copy_golden, edit_json, read_weights, run
from hypothesis import given, settings
from hypothesis import strategies as st
from new_models import make_language_model, make_tower
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from m3_conversion.convert import convert
from m3_conversion.create import create
from m3_conversion.generation_settings import SAMPLING, sampling, storable
from m3_conversion.original import ConversionError, local_folder
from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration, M3LlavaProcessor, default_checkpoint, load
from modeling_m3.any_checkpoint import find


STORED = GOLDENS.parent / "transformers_llava"
STORED_NAMES = {folder.name for folder in STORED.iterdir()}


def copied(name: str, folder: Path) -> Path:
    """A checkpoint that may be changed: an original one, or one of transformers'."""
    if (GOLDENS / name).exists():
        return copy_golden(name, folder)
    return Path(shutil.copytree(STORED / name, folder / name))


def tower_in(folder: Path) -> Path:
    make_tower(folder / "tower", "clip")
    return folder / "tower"


def language_in(folder: Path) -> Path:
    """A language model whose head is its own."""
    make_language_model(folder / "language", "olmo2")
    return folder / "language"


def refusal(capsys, source: Path, *options: str) -> str:
    """The one line that the command ends with, having written nothing."""
    before = sorted(source.parent.iterdir())
    capsys.readouterr()
    assert run(source, source.parent / "new", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("m3-convert: ") and sorted(source.parent.iterdir()) == before
    return error.splitlines()[-1]


# Heads


SOURCES = ("llava15-m3", "llava-4.36", "next-4.52")


def head_and_embedding(folder: Path) -> tuple[str, str]:
    return tuple(
        next(k for k in read_weights(folder) if k.endswith(f"{n}.weight")) for n in ("lm_head", "embed_tokens")
    )


def tie(folder: Path, where: str) -> None:
    file = folder / "config.json"
    if where == "text_config" and "text_config" in json.loads(file.read_text()):
        edit_json(file, text_config={**json.loads(file.read_text())["text_config"], "tie_word_embeddings": True})
    else:
        edit_json(file, tie_word_embeddings=True)


@pytest.mark.parametrize("options", [(), ("--quantize", "int8")], ids=["as stored", "int8"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_head_that_is_missing_is_not_the_embedding(name, options, tmp_path, capsys):
    source = copied(name, tmp_path)
    head, _ = head_and_embedding(source)
    change_weights(source, {head: None})
    line = refusal(capsys, source, *options)
    assert head in line and "missing" in line and "tie_word_embeddings" in line


@pytest.mark.parametrize("where", ["text_config", "config"])
@pytest.mark.parametrize("stored", ["missing", "equal", "other"])
@pytest.mark.parametrize("name", SOURCES)
def test_tied_checkpoints_have_the_head_that_their_source_has(name, stored, where, tmp_path):
    """What transformers answers; the original's loader ties after it has read the weights."""
    source = copied(name, tmp_path)
    tie(source, where)
    head, embedding = head_and_embedding(source)
    weights = read_weights(source)
    change_weights(
        source, {head: {"missing": None, "equal": weights[embedding].clone(), "other": weights[head]}[stored]}
    )
    convert(source, tmp_path / "new")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    found, rows = model.lm_head.weight, weights[embedding].shape[0]
    if stored != "missing" and name in STORED_NAMES:
        theirs = AutoModelForImageTextToText.from_pretrained(source).get_output_embeddings().weight
        assert torch.equal(found, theirs)
    is_own = stored == "other" and name in STORED_NAMES
    assert torch.equal(found[:rows], weights[head if is_own else embedding])
    assert model.config.tie_word_embeddings is not is_own
    assert (found is model.get_input_embeddings().weight) is not is_own


def test_a_new_model_has_the_head_that_its_language_model_has(tmp_path):
    tower = tower_in(tmp_path)
    for stored in ("missing", "other"):
        language = language_in(tmp_path / stored)
        edit_json(language / "config.json", tie_word_embeddings=stored == "other")
        weights = read_weights(language)
        if stored == "missing":
            change_weights(language, {"lm_head.weight": None})
            with pytest.raises(ConversionError, match=r"lm_head\.weight is missing"):
                create(tower, language, tmp_path / "new")
            assert not (tmp_path / "new").exists()
            continue
        create(tower, language, tmp_path / "new")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
        rows = weights["lm_head.weight"].shape[0]
        assert not model.config.tie_word_embeddings
        assert torch.equal(model.lm_head.weight[:rows], weights["lm_head.weight"])


# The image token, and other ids


def without_image_token(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={k: v for k, v in added.items() if k != "1000"})
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").unlink()


def fewer_rows(folder: Path) -> None:
    for key in head_and_embedding(folder):
        change_weights(folder, {key: read_weights(folder)[key][:1000].clone()})
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config={**config["text_config"], "vocab_size": 1000, "pad_token_id": 0})


IDS = {
    "of a word": (lambda f: edit_json(f / "config.json", image_token_index=5), ["is 5", "'<image>'", "1000"]),
    "of the padding": (lambda f: edit_json(f / "config.json", image_token_index=1001), ["is 1001", "1000"]),
    "not said": (lambda f: edit_json(f / "config.json", image_token_index=...), ["32000", "no such token"]),
    "below zero": (lambda f: edit_json(f / "config.json", image_token_index=-200), ["-200"]),
    "not the processor's": (
        lambda f: edit_json(f / "processor_config.json", image_token="<pad>"),
        ["is 1000", "'<pad>'", "1001"],
    ),
    "of a processor's word": (
        lambda f: edit_json(f / "processor_config.json", image_token="<im>"),
        ["'<im>'", "no token"],
    ),
    "of the tokenizer's word": (
        lambda f: edit_json(f / "tokenizer_config.json", image_token="<pad>"),
        ["'<pad>'", "1001"],
    ),
    "not in the tokenizer": (without_image_token, ["'<image>'", "no token"]),
    "beyond the rows": (fewer_rows, ["1000", "1000 rows"]),
}


@pytest.mark.parametrize("kind", IDS)
def test_an_image_token_that_is_not_the_processors_is_refused(kind, tmp_path, capsys):
    change, names = IDS[kind]
    source = copied("llava-4.57", tmp_path)
    change(source)
    line = refusal(capsys, source)
    assert all(name in line for name in names), line


def test_padding_beyond_the_rows_is_refused(tmp_path, capsys):
    source = copied("llava-4.57", tmp_path)
    for key in head_and_embedding(source):
        change_weights(source, {key: read_weights(source)[key][:1001].clone()})
    config = json.loads((source / "config.json").read_text())
    edit_json(source / "config.json", text_config={**config["text_config"], "vocab_size": 1001, "pad_token_id": 0})
    assert "'<pad>' as 1001, but the embedding has 1001 rows" in refusal(capsys, source)


def test_a_tokenizer_without_padding_pads(tmp_path):
    source = copied("llava-4.57", tmp_path)
    edit_json(source / "tokenizer_config.json", pad_token=...)
    edit_json(source / "special_tokens_map.json", pad_token=...)
    convert(source, tmp_path / "new")
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    assert processor.tokenizer.pad_token == "<unk>"
    assert processor(text=["a", "a longer text"], padding=True)["attention_mask"][0][0] == 0


MARK = "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
TEMPLATES = {  # what a template makes of messages, and whether pictures go through it as parts, as marks or not at all
    "{% for m in messages %}" + MARK + "{% endfor %}": "parts",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}": "marks",
    "{% for m in messages %}{{ '<image>' + m.content }}{% endfor %}": None,
    "{% for m in messages %}{{ '<image>' }}{% endfor %}": None,
    "{% for m in messages %}{{ m.role }}{% endfor %}": None,
    "{{ raise_exception('no') }}": None,
    "{{ 1 / 0 }}": None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_no_picture_comes_through_is_refused(template, tmp_path, capsys):
    source = copied("llava-4.57", tmp_path)
    (source / "chat_template.jinja").write_text(template)
    if TEMPLATES[template] is None:
        line = refusal(capsys, source)
        assert "chat template takes no picture" in line and "--chat-template" in line
        assert run(source, tmp_path / "new", "--chat-template", "vicuna_v1") == 0
    else:
        assert run(source, tmp_path / "new") == 0
        assert ("--chat-template" in capsys.readouterr().err) == (TEMPLATES[template] == "marks")


def test_what_is_written_is_held_against_the_configuration(tmp_path, monkeypatch):
    """By reading it back: here a writer loses a tensor, or what belongs to one in 4 bits."""
    from m3_conversion import convert as module

    def losing(lost):
        write = module.write_weights
        return lambda folder, tensors, *rest: write(folder, [t for t in tensors if not t.name.endswith(lost)], *rest)

    for lost, quantize in (
        ("layers.1.mlp.up_proj.weight", None),
        ("q_proj.weight.absmax", "nf4"),
        ("q_proj.SCB", "int8"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, "write_weights", losing(lost))
            with pytest.raises(ConversionError, match=r"(up|q)_proj.weight.* not written"):
                convert(GOLDENS / "llava15-m3", tmp_path / "new", quantize=quantize)
    assert not list(tmp_path.iterdir())


# JSON as other tools write it


TEXTS = ("*.json", "*.jinja")
ENCODINGS = ("utf-8-sig", "utf-16", "utf-32")


def encode(folder: Path, encoding: str) -> None:
    for file in (file for pattern in TEXTS for file in folder.rglob(pattern)):
        file.write_bytes(file.read_text(encoding="utf-8").encode(encoding))


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["llava-next-m3", "next-4.52"])
def test_the_encoding_of_a_checkpoints_texts_changes_nothing(name, encoding, tmp_path):
    made = []
    for changed in (False, True):
        source = copied(name, tmp_path / str(changed))
        if changed:
            encode(tmp_path / "True", encoding)
        convert(source, tmp_path / str(changed) / "new", model_id="a/b")
        made.append(files(tmp_path / str(changed) / "new"))
    assert made[0] == made[1]


def test_nor_of_a_language_models(tmp_path):
    tower, language = tower_in(tmp_path), language_in(tmp_path)
    create(tower, language, tmp_path / "1" / "new")
    encode(tower, "utf-8-sig")
    encode(language, "utf-16")
    create(tower, language, tmp_path / "2" / "new")
    assert files(tmp_path / "1" / "new") == files(tmp_path / "2" / "new")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_file_that_is_no_part_of_a_checkpoint_may_hold_anything(encoding, tmp_path):
    source = copied("llava-4.57", tmp_path)
    encode(source, encoding)
    for name in ("notes.txt", "other.json"):
        (source / name).write_bytes(b"\xff\xfeabc")  # a mark of UTF-16, and half of a character
    convert(source, tmp_path / "new")


def test_a_checkpoint_is_found_whatever_its_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    source = copied("llava15-m3", tmp_path)
    encode(tmp_path, "utf-8-sig")
    model, _ = load(source)
    assert isinstance(model, M3LlavaForConditionalGeneration)


JSON_FILES = {
    "llava-next-m3": ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer_config.json"],
    "llava-4.57": ["config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"],
}


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "", "\ufeff"])
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in JSON_FILES.items() for file in files])
def test_what_is_no_object_is_named(name, file, text, tmp_path, capsys):
    source = copied(name, tmp_path)
    (source / file).write_text(text, encoding="utf-8")
    line = refusal(capsys, source)
    assert file in line or str(source) in line


# How it generates


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 60),
    st.floats(-1, 3),
    st.sampled_from([0, 0.0, 1, float("nan"), float("inf"), "0.7", [0.5]]),
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(SAMPLING, VALUES)
    | {"do_sample": st.sampled_from([None, False, True, True, True, "yes", 2])},
)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return M3LlavaForConditionalGeneration(tiny_config()).eval()


@settings(max_examples=60, deadline=None)
@given(given=SETTINGS)
def test_what_is_stored_generates(given, tiny, tmp_path_factory):
    try:
        kept = sampling(given, Path("generation_config.json"))
    except ConversionError as error:
        assert given.get("do_sample") not in (None, False)
        assert any(name in str(error) and repr(value) in str(error) for name, value in given.items())
        return
    assert kept["do_sample"] == (
        bool(given.get("do_sample")) and given.get("temperature") != 0 and given.get("top_p") != 0
    )
    folder = tmp_path_factory.mktemp("generation")
    GenerationConfig(**kept).save_pretrained(folder)
    stored = GenerationConfig.from_pretrained(folder)
    assert {name: getattr(stored, name) for name in kept} == kept
    tiny.generate(torch.tensor([[1, 5]]), generation_config=stored, max_new_tokens=1, pad_token_id=0)


@pytest.mark.parametrize("name", ["llava15-m3", "llava-4.57"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"do_sample": True, "temperature": 0}, {"do_sample": False}),
        ({"do_sample": False, "temperature": 0.0, "top_p": None}, {"do_sample": False}),
        ({"temperature": 0.2, "top_p": 0.7, "top_k": 3}, {"do_sample": False}),
        ({"do_sample": True, "temperature": 1, "top_k": -1, "top_p": 1}, {"do_sample": True, "top_k": 0}),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0}, {"do_sample": False}),
        (
            {"eos_token_id": [2, 99999, None, "</s>", -1], "bos_token_id": 99999},
            {"eos_token_id": [2], "bos_token_id": 1},
        ),
        ({"eos_token_id": 99999, "pad_token_id": 99999}, {"eos_token_id": 2}),
        ({"eos_token_id": None}, {"eos_token_id": 2}),
    ],
)
def test_a_conversion_generates_as_its_source_meant_to(name, given, kept, tmp_path):
    source = copied(name, tmp_path)
    (source / "generation_config.json").write_text(json.dumps(given))
    convert(source, tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert {key: stored[key] for key in kept} == kept
    assert stored["pad_token_id"] < 1024
    if not kept.get("do_sample"):
        assert not {"temperature", "top_p", "top_k"} & stored.keys()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    model.generate(torch.tensor([[1, 5]]), max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_p", 1.5), ("top_k", 2.5), ("typical_p", 0), ("top_h", 0.0), ("do_sample", "yes")],
)
def test_a_setting_that_nothing_generates_with_is_named(name, value, tmp_path, capsys):
    source = copied("llava15-m3", tmp_path)
    edit_json(source / "generation_config.json", **{"do_sample": True, name: value})
    line = refusal(capsys, source)
    assert "generation_config.json" in line and f"{name} is {value!r}" in line


def test_settings_without_effect_are_not_stored(tmp_path, caplog):
    given = {
        "do_sample": False,
        "length_penalty": 2.0,
        "num_beams": 3,
        "output_scores": True,
        "repetition_penalty": 1.1,
    }
    storable(given, Path("of.json")).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert (stored["num_beams"], stored["length_penalty"], stored["repetition_penalty"]) == (3, 2.0, 1.1)
    assert "output_scores" not in stored and "output_scores" in caplog.text


def test_a_new_model_generates_as_its_language_model_meant_to(tmp_path):
    language = language_in(tmp_path)
    (language / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.0, "top_p": 0.9}))
    create(tower_in(tmp_path), language, tmp_path / "new")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    assert model.generation_config.do_sample is False and model.generation_config.top_p in (None, 1.0)
    model.generate(torch.tensor([[1, 5]]), max_new_tokens=1)


# Names of nothing


@pytest.mark.parametrize("name", [None, "", " ", 5, b"folder", True])
def test_what_names_nothing_is_refused_before_the_hub_is_asked(name, tmp_path, monkeypatch):
    def asked(*arguments, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", asked)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", asked)
    folder = GOLDENS / "llava15-m3"
    for call in (
        load,
        local_folder,
        lambda name: convert(name, tmp_path / "new"),
        lambda name: convert(folder, name),
        lambda name: create(folder.parent / CLIP, name, tmp_path / "new"),
        lambda name: create(name, folder, tmp_path / "new"),
        M3LlavaConfig.from_pretrained,
        M3LlavaProcessor.from_pretrained,
        M3LlavaForConditionalGeneration.from_pretrained,
    ):
        with pytest.raises(ValueError) as error:
            call(name)
        assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_the_commands_refuse_an_empty_name(tmp_path, capsys):
    from typer.testing import CliRunner

    from modeling_m3.__main__ import app

    assert run("", tmp_path / "new") == run(GOLDENS / "llava15-m3", "") == 1
    assert capsys.readouterr().err.count("'' is no name: give") == 2
    asked = CliRunner().invoke(app, [str(GOLDENS / "images" / "photo_400x266.png"), "What?", "--model", ""])
    assert asked.exit_code == 1 and "'' is no name" in asked.output


def test_a_folder_may_be_named_by_any_path():
    folder = default_checkpoint()
    with os.scandir(folder.parent) as entries:
        entry = next(entry for entry in entries if entry.name == folder.name)
    assert find(entry).folder == folder


def test_weights_in_memory_need_no_folder(monkeypatch):
    model, _ = load(default_checkpoint())

    def asked(*arguments, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("modeling_m3.automatic_budget_m3.cached_file", asked)
    again = M3LlavaForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
