"""The command `m3-create`: its options, what it refuses in a line, and language models in GGUF files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from conversion_checkpoints import edit_json
from new_models import FAMILIES, TURNS, VOCABULARY, make_language_model, make_tower, tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
)

from m3_conversion.create_command import main
from modeling_m3 import default_checkpoint
from modeling_m3.__main__ import app as ask


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A CLIP, a SigLIP and a language model."""
    folder = tmp_path_factory.mktemp("parts")
    for kind in ("clip", "siglip"):
        make_tower(folder / kind, kind)
    make_language_model(folder / "qwen2", "qwen2")
    return folder


def run(tower, language, destination, *options) -> int:
    return main(["--vision-tower", str(tower), "--language-model", str(language), str(destination), *map(str, options)])


def loaded(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(
        folder, backend="pil"
    )


def test_options(parts, tmp_path):
    options = (
        "--scales",
        "1,81",
        "--dtype",
        "bfloat16",
        "--seed",
        3,
        "--vision-feature-layer",
        -1,
        "--max-shard-size",
        "100KB",
    )
    assert run(parts / "siglip", parts / "qwen2", tmp_path / "new", *options) == 0
    model, processor = loaded(tmp_path / "new")
    assert processor.visual_token_scales == model.config.visual_token_scales == [1, 81]
    assert {parameter.dtype for parameter in model.parameters()} == {
        torch.bfloat16
    } and model.config.dtype == torch.bfloat16
    assert model.config.vision_feature_layer == -1 and model.config.trained_scales == []
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    card = (tmp_path / "new" / "README.md").read_text()
    assert (
        "made of the vision tower of `siglip` and the\nlanguage model `qwen2`" in card
        and "projector between them is random" in card
    )


def test_it_can_be_asked_and_says_that_it_has_learned_nothing(parts, tmp_path, capsys):
    assert run(parts / "siglip", parts / "qwen2", tmp_path / "new") == 0
    question = [
        str(GOLDENS / "images" / "photo_400x266.png"),
        "What?",
        "--model",
        str(tmp_path / "new"),
        "--max-new-tokens",
        "2",
    ]
    for quiet in ([], ["--quiet"]):
        capsys.readouterr()
        ask([*question, *quiet], standalone_mode=False)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m3-ask: ")]
        assert said == [] if quiet else "has learned nothing about pictures yet" in said[-1]


def test_the_same_seed_draws_the_same_projector(parts, tmp_path):
    projectors = []
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        before = torch.random.get_rng_state()
        assert run(parts / "clip", parts / "qwen2", tmp_path / name, "--seed", seed) == 0
        assert torch.equal(torch.random.get_rng_state(), before)
        weights = load_file(tmp_path / name / "model.safetensors")
        projectors.append({key: value for key, value in weights.items() if "projector" in key})
    assert len(projectors[0]) == 4
    assert all(torch.equal(projectors[0][key], projectors[1][key]) for key in projectors[0])
    assert not any(torch.equal(projectors[0][key], projectors[2][key]) for key in projectors[0])


def test_tiles(parts, tmp_path):
    assert run(parts / "siglip", parts / "qwen2", tmp_path / "new", "--anyres") == 0
    model, processor = loaded(tmp_path / "new")
    model.requires_grad_(False)
    assert model.config.image_grid_pinpoints == [[72, 36], [36, 72], [72, 72], [36, 108], [108, 36]]
    assert model.model.image_newline.norm() == pytest.approx(1, abs=0.5)
    inputs = processor(images=Image.new("RGB", (70, 30)), text="<image>", num_visual_tokens=9, return_tensors="pt")
    assert inputs["image_tile_grids"].tolist() == [[1, 2]]
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_a_spare_row_is_used_and_a_full_vocabulary_grows(parts, tmp_path):
    make_language_model(tmp_path / "spare", "olmo2", vocab_size=VOCABULARY + 1)
    make_language_model(tmp_path / "full", "olmo2")
    make_language_model(tmp_path / "tied", "smollm2")
    for language, rows in ((tmp_path / "spare", VOCABULARY + 1), (tmp_path / "full", 320), (tmp_path / "tied", 320)):
        new = tmp_path / f"new-{language.name}"
        assert run(parts / "clip", language, new) == 0
        model, processor = loaded(new)
        assert processor.image_token_id == model.config.image_token_id == VOCABULARY
        before = AutoModelForCausalLM.from_pretrained(language)
        ends = ((m.get_input_embeddings().weight, m.get_output_embeddings().weight) for m in (before, model))
        for old, grown in zip(*ends):
            assert len(grown) == rows and torch.equal(grown[: len(old)], old)
            mean = old.double().mean(0).float().expand(rows - len(old), -1)
            assert torch.equal(grown[len(old) :], mean)


@pytest.mark.parametrize("whole", ["clip", "siglip"])
def test_the_tower_of_a_whole_model(whole, parts, tmp_path):
    vision = {**SIZES, "image_size": 36, "patch_size": 4}
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 8}
    make = {"clip": partial(CLIPConfig, projection_dim=8), "siglip": SiglipConfig}[whole]
    model = {"clip": CLIPModel, "siglip": SiglipModel}[whole](make(vision_config=vision, text_config=text))
    model.save_pretrained(tmp_path / "whole")
    for file in (parts / whole).glob("*processor*.json"):
        (tmp_path / "whole" / file.name).write_bytes(file.read_bytes())
    assert run(tmp_path / "whole", parts / "qwen2", tmp_path / "new") == 0
    new = loaded(tmp_path / "new")[0]
    for key, value in model.vision_model.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(new.model.vision_tower.state_dict()[key], value), key


def test_the_tower_of_an_m3_with_all_that_belongs_to_it(parts, tmp_path):
    assert run(default_checkpoint(), parts / "qwen2", tmp_path / "new") == 0
    (model, processor), (tiny, its) = loaded(tmp_path / "new"), loaded(default_checkpoint())
    assert model.config.vision_feature_layer == tiny.config.vision_feature_layer == -1
    assert model.config.visual_token_scales == [1, 9, 36, 144, 576]
    image = Image.effect_mandelbrot((90, 50), (-2, -1, 1, 1), 50).convert("RGB")
    ours, theirs = (p(images=image, text="<image>", return_tensors="pt")["pixel_values"] for p in (processor, its))
    assert torch.equal(ours, theirs)
    features = [m.model.encode_images(ours).last_hidden_state for m in (model, tiny)]
    assert torch.equal(*features)
    assert run(tmp_path / "new", parts / "qwen2", tmp_path / "newer") == 0


def test_a_language_model_without_a_chat_template(parts, tmp_path, capsys):
    make_language_model(tmp_path / "base", "llama", template=None)
    assert run(parts / "clip", tmp_path / "base", tmp_path / "new") == 0
    assert "has no chat template: vicuna_v1 is taken" in capsys.readouterr().err
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": "So."},
    ]
    text = loaded(tmp_path / "new")[1].apply_chat_template(chat)
    assert text.startswith("<s>A chat between") and text.endswith("USER: <image>\nWhy? ASSISTANT: So.<|end|>")


def test_prompts_begin_as_the_chats_of_the_language_model(parts, tmp_path, capsys):
    language = make_language_model(tmp_path / "olmo", "olmo")
    assert FAMILIES["olmo"]["bos"] and not FAMILIES["olmo"]["template"].startswith("{{ bos_token")
    assert run(parts / "clip", language, tmp_path / "new") == 0
    assert "its chats do not begin with <s>, so prompts do not" in capsys.readouterr().err
    assert loaded(tmp_path / "new")[1](text="a", return_tensors="pt")["input_ids"].shape == (1, 1)


@pytest.mark.parametrize("layout", ["one by one", "a head beside a tied embedding", "in shards", "bin"])
def test_layouts_of_weights(layout, parts, tmp_path):
    language = make_language_model(tmp_path / "language", "qwen3")
    weights = load_file(language / "model.safetensors")
    if layout == "a head beside a tied embedding":
        save_file(
            {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, language / "model.safetensors"
        )
    elif layout == "in shards":
        AutoModelForCausalLM.from_pretrained(language).save_pretrained(language, max_shard_size="50KB")
        (language / "model.safetensors").unlink()
    elif layout == "bin":
        torch.save(weights, language / "pytorch_model.bin")
        (language / "model.safetensors").unlink()
    elif layout == "one by one":  # as releases before 4.32 did, whose files are not of today's names alone
        frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
        save_file({**weights, **frequencies}, language / "model.safetensors", {"format": "pt"})
    assert run(parts / "clip", language, tmp_path / "new") == 0
    found = load_file(tmp_path / "new" / "model.safetensors")
    for key, value in weights.items():
        assert torch.equal(found[key.replace("model.", "model.language_model.", 1)][: len(value)], value)


def saved(model, folder, vocabulary: bool = True):
    model.save_pretrained(folder)
    if vocabulary:
        tokenizer(False, TURNS).save_pretrained(folder)
    return folder


def edited(folder, destination, **changes):
    destination.mkdir()
    for file in folder.iterdir():
        (destination / file.name).write_bytes(file.read_bytes())
    edit_json(destination / "config.json", **changes)
    return destination


# What is given as tower and as language model, and what the line says. None: a part that is right.
WRONG = {
    "a tower that is none": (
        lambda parts, folder: saved(BertModel(BertConfig(**SIZES, vocab_size=50)), folder / "bert"),
        None,
        "model_type 'bert' is not a vision tower that is supported",
    ),
    "siglip 2 of variable resolution": (
        lambda parts, folder: saved(Siglip2VisionModel(Siglip2VisionConfig(**SIZES, patch_size=4)), folder / "siglip2"),
        None,
        "model_type 'siglip2_vision_model' is not a vision tower that is supported",
    ),
    "an encoder-decoder": (
        None,
        lambda parts, folder: saved(
            T5ForConditionalGeneration(
                T5Config(vocab_size=320, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16)
            ),
            folder / "t5",
        ),
        "model_type 't5' is an encoder-decoder",
    ),
    "an encoder": (
        None,
        lambda parts, folder: saved(BertModel(BertConfig(**SIZES, vocab_size=320)), folder / "bert"),
        "model_type 'bert' is not supported as a language model",
    ),
    "folders swapped": (
        lambda parts, folder: parts / "qwen2",
        lambda parts, folder: parts / "siglip",
        "model_type 'qwen2' is not a vision tower that is supported",
    ),
    "a tower twice": (None, lambda parts, folder: parts / "siglip", "were the two folders swapped?"),
    "a grid that is not square": (
        lambda parts, folder: edited(parts / "siglip", folder / "wide", image_size=[36, 72]),
        None,
        "image_size=[36, 72]",
    ),
    "a scale that the grid has not": (
        None,
        None,
        "visual_token_scales=[36] must be distinct scales of the 9x9 grid",
        "--scales",
        "36",
    ),
    "a layer that the tower has not": (
        None,
        None,
        "vision_feature_layer=7 is not a hidden state",
        "--vision-feature-layer",
        "7",
    ),
    "a vocabulary without room": (
        None,
        lambda parts, folder: make_language_model(folder / "small", "qwen2", vocab_size=200),
        "its tokenizer has ids up to 261, but the embedding has 200 rows",
    ),
    "a head with a bias": (
        None,
        lambda parts, folder: saved(PhiForCausalLM(PhiConfig(**SIZES, vocab_size=320)), folder / "phi"),
        "model_type 'phi' is not supported as a language model: its head is not a linear layer without bias",
    ),
    "learned positions": (
        None,
        lambda parts, folder: saved(
            GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2)), folder / "gpt2"
        ),
        "model_type 'gpt2' is not supported as a language model: its embedding is not called embed_tokens",
    ),
    "quantized weights": (
        None,
        lambda parts, folder: edited(parts / "qwen2", folder / "awq", quantization_config={"quant_method": "awq"}),
        "its weights are quantized",
    ),
    "an M3 as a language model": (
        None,
        lambda parts, folder: default_checkpoint(),
        "model_type 'm3_llava' is not a language model alone",
    ),
    "no folder": (None, lambda parts, folder: folder / "nowhere", "There is no folder"),
    "no GGUF file": (None, lambda parts, folder: folder / "no.gguf", "no.gguf is missing"),
    "a GGUF file that is none": (
        None,
        lambda parts, folder: (folder / "text.gguf").write_text("no weights") and folder / "text.gguf",
        "text.gguf",
    ),
    "half the weights": (
        None,
        lambda parts, folder: without_weights(parts / "qwen2", folder / "half", "model.layers.1."),
        "is missing from the weights",
    ),
    "no head": (
        None,
        lambda parts, folder: without_weights(parts / "qwen2", folder / "headless", "lm_head"),
        "lm_head.weight is missing from the weights",
    ),
}


def without_weights(folder, destination, prefix):
    edited(folder, destination)
    weights = load_file(destination / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    save_file(kept, destination / "model.safetensors", {"format": "pt"})
    return destination


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_an_m3_is_named_in_a_line(kind, parts, tmp_path, capsys):
    tower, language, message, *options = WRONG[kind]
    tower = parts / "siglip" if tower is None else tower(parts, tmp_path)
    language = parts / "qwen2" if language is None else language(parts, tmp_path)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert run(tower, language, tmp_path / "new", *options) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("m3-create: ")]
    assert len(error) == 1 and message in error[0], error
    assert sorted(tmp_path.iterdir()) == before


def test_a_family_that_does_more_than_is_known_is_refused(parts, tmp_path, capsys, monkeypatch):
    """Were softcapping unknown here, the language model's own logits would tell."""
    monkeypatch.setattr("modeling_m3.modeling_m3.finished_logits", lambda logits, config: logits)
    language = make_language_model(tmp_path / "language", "gemma2")
    assert run(parts / "siglip", language, tmp_path / "new") == 1
    assert "M3 does not give the logits of the language model itself" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["language"]


def test_usage(parts, tmp_path, capsys):
    assert run(parts / "clip", parts / "qwen2", tmp_path / "new", "--scales", "many") == 2
    assert "'many' is not a list of numbers of visual tokens" in " ".join(
        capsys.readouterr().err.replace("│", " ").split()
    )
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    assert run(parts / "clip", parts / "qwen2", tmp_path / "new") == 1
    assert "pass --overwrite to replace it" in capsys.readouterr().err


def gguf_file(file: Path) -> Path:
    """A tiny Llama as llama.cpp stores it, by its own library: transposed for its own order of rotary dimensions."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    hidden, inner, heads, layers = 64, 96, 4, 2
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    texts = [text for text, _ in sorted(tokenizer(False, TURNS).get_vocab().items(), key=lambda item: item[1])]
    texts[0] = "<|endoftext|>"  # which transformers adds where there is none
    texts += [texts[10] + texts[11], texts[12] + texts[13]]
    writer.add_vocab_size(len(texts))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(texts)
    writer.add_token_types([3 if index < 5 else 1 for index in range(len(texts))])
    writer.add_token_merges([f"{texts[i]} {texts[i + 1]}" for i in (10, 12)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(4)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TURNS)

    def add(name, *shape):
        writer.add_tensor(name, (torch.randn(shape) * 0.2).numpy())

    add("token_embd.weight", len(texts), hidden)
    add("output_norm.weight", hidden)
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", hidden)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", hidden, hidden)
        add(f"blk.{i}.ffn_gate.weight", inner, hidden)
        add(f"blk.{i}.ffn_up.weight", inner, hidden)
        add(f"blk.{i}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@torch.no_grad()
def test_a_gguf_file(parts, tmp_path):
    (tmp_path / "files").mkdir()
    file = gguf_file(tmp_path / "files" / "tiny.gguf")
    assert run(parts / "siglip", file, tmp_path / "new") == 0
    model, processor = loaded(tmp_path / "new")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    own, its = (
        AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(**source),
    )
    assert AutoConfig.from_pretrained(tmp_path / "new").text_config.model_type == "llama"
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    given = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    ours, theirs = processor.apply_chat_template(chat, tokenize=True, **given), its.apply_chat_template(chat, **given)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    torch.testing.assert_close(model(**ours).logits[..., : VOCABULARY + 2], own(**theirs).logits, rtol=0, atol=1e-5)
    answers = [m.generate(**i, max_new_tokens=8, do_sample=False).tolist() for m, i in ((model, ours), (own, theirs))]
    assert answers[0] == answers[1]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "float32"
