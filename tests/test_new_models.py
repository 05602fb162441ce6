"""`m3-create`: every family of language models with a CLIP or SigLIP tower, against transformers' own classes."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from new_models import FAMILIES, make_language_model, make_tower, reference_tokens
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from m3_conversion.create import create
from m3_conversion.language_model import language_tensors, load_reference, read_language_model
from m3_conversion.original import HeldTensor


SCALES = [1, 9, 81]
CORE = "qwen2"
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8)) for seed in (0, 1)
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi! "},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ],
]


@pytest.fixture(
    scope="module",
    params=[name if name == CORE else pytest.param(name, marks=pytest.mark.families) for name in FAMILIES],
)
def made(request, tmp_path_factory) -> SimpleNamespace:
    """A family's two parts by transformers' own classes, and the M3 that was made of them, loaded from its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    kind = FAMILIES[request.param]["tower"]
    tower, language = make_tower(folder / "tower", kind), make_language_model(folder / "language", request.param)
    create(tower, language, folder / "m3")
    return SimpleNamespace(
        family=request.param,
        folder=folder / "m3",
        model=AutoModelForImageTextToText.from_pretrained(folder / "m3").eval(),
        processor=AutoProcessor.from_pretrained(folder / "m3", backend="pil"),
        tower=AutoModel.from_pretrained(tower).eval(),
        leading=int(kind == "clip"),
        language=AutoModelForCausalLM.from_pretrained(language).eval(),
        tokenizer=AutoTokenizer.from_pretrained(language),
        language_folder=language,
    )


def asked(made, scales, pictures=PICTURES[:1], question="What is this?"):
    """Inputs for one prompt with the pictures, or a batch of prompts with one picture each where there are lists of them."""
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
    text = made.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return made.processor(images=pictures, text=text, num_visual_tokens=scales, return_tensors="pt")


def in_double(made: SimpleNamespace) -> SimpleNamespace:
    """The same parts in float64, where a difference of layers is seen, and what machines round differently is not."""
    parts = {name: deepcopy(getattr(made, name)).double() for name in ("model", "tower", "language")}
    return SimpleNamespace(**vars(made) | parts)


def assert_as_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for float32's rounding, of numbers as large as the largest of them."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=32 * torch.finfo().eps * expected.abs().max().item())


@torch.no_grad()
def test_chats_of_text_are_the_language_models_own(made):
    exact = in_double(made)
    for chat in CHATS:
        plain = [
            {
                **message,
                "content": message["content"] if isinstance(message["content"], str) else message["content"][0]["text"],
            }
            for message in chat
        ]
        given = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        theirs = made.tokenizer.apply_chat_template(plain, **given)
        ours = made.processor.apply_chat_template(chat, tokenize=True, **given)
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        expected = exact.language(input_ids=theirs["input_ids"]).logits
        logits = exact.model(**ours).logits[..., : expected.shape[-1]]
        assert_as_close(logits, expected)
        answers = [
            m.generate(**i, max_new_tokens=12, do_sample=False)
            for m, i in ((made.language, theirs), (made.model, ours))
        ]
        assert answers[0].tolist() == answers[1].tolist()


@torch.no_grad()
def test_pictures_are_seen_as_by_plain_layers_at_every_scale(made):
    made = in_double(made)
    weights = made.model.model.multi_modal_projector.state_dict()
    assert made.processor.visual_token_scales == made.model.config.visual_token_scales == SCALES
    for scale in SCALES:
        inputs = asked(made, scale, PICTURES)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        tokens = reference_tokens(made.tower, -2, made.leading, weights, inputs["pixel_values"], scale)
        placeholders = inputs["input_ids"] == made.processor.image_token_id
        assert placeholders.sum() == 2 * scale
        embeds = made.language.get_input_embeddings()(inputs["input_ids"].masked_fill(placeholders, 0))
        embeds[placeholders] = tokens.flatten(0, 1)
        expected = made.language(inputs_embeds=embeds).logits
        logits = made.model(**inputs).logits[..., : expected.shape[-1]]
        assert_as_close(logits, expected)


def test_generate_in_batches_beams_and_caches(made):
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in ("Which?", "What color is it?")
    ]
    texts = [made.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    given = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}

    def answers(pictures, texts, scales, **options):
        inputs = made.processor(
            images=pictures, text=texts, num_visual_tokens=scales, padding=True, return_tensors="pt"
        )
        return made.model.generate(**inputs, **given, **options)[:, inputs["input_ids"].shape[1] :].tolist()

    singly = [answers([picture], [text], scale)[0] for picture, text, scale in zip(PICTURES, texts, (9, 81))]
    assert answers(PICTURES, texts, [9, 81]) == singly
    assert answers(PICTURES, texts, [9, 81], cache_implementation="static") == singly
    assert answers(PICTURES, texts, [9, 81], use_cache=False) == singly
    beams = [
        answers([picture], [text], scale, num_beams=3)[0] for picture, text, scale in zip(PICTURES, texts, (9, 81))
    ]
    assert answers(PICTURES, texts, [9, 81], num_beams=3) == beams


def test_a_matryoshka_step_trains_every_part(made):
    inputs = asked(made, 81)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == made.processor.image_token_id, -100)
    with torch.no_grad():
        losses = []
        for scale in SCALES:
            cut = asked(made, scale)
            cut["labels"] = cut["input_ids"].masked_fill(cut["input_ids"] == made.processor.image_token_id, -100)
            losses.append(made.model(**cut).loss)
    model = AutoModelForImageTextToText.from_pretrained(made.folder)
    output = model(**inputs, labels=labels, matryoshka_scales=SCALES)
    torch.testing.assert_close(output.scale_losses, torch.stack(losses), rtol=0, atol=1e-5)
    output.loss.backward()
    unused = ("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_layernorm.")
    for name, parameter in model.named_parameters():
        if not name.startswith(unused):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_saved_again_it_is_the_same(made, tmp_path):
    AutoModelForImageTextToText.from_pretrained(made.folder).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(made.folder).save_pretrained(tmp_path)
    weights = [load_file(folder / "model.safetensors") for folder in (made.folder, tmp_path)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
    for file in (file for file in tmp_path.iterdir() if file.suffix != ".safetensors"):
        assert file.read_bytes() == (made.folder / file.name).read_bytes(), file.name


def test_weights_are_streamed_and_kept_as_they_were(made):
    with read_language_model(made.language_folder) as language:
        tensors = language_tensors(language, load_reference(language, torch.float32))
    assert not [tensor for tensor in tensors.values() if isinstance(tensor, HeldTensor)]
    kept, rows = made.model.state_dict(), made.language.config.vocab_size
    assert (kept["lm_head.weight"].data_ptr() == kept["model.language_model.embed_tokens.weight"].data_ptr()) == (
        made.language.config.tie_word_embeddings
    )
    for key, value in made.language.state_dict().items():
        name = language.names[key]
        assert torch.equal(
            kept[name][:rows] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else kept[name], value
        )


def test_plans_of_parallel_layers_follow_the_family(made):
    held = {type(module).__name__ for module in made.model.modules()}
    assert set(made.language._no_split_modules) & held <= set(made.model._no_split_modules) <= held
    plan = {f"model.language_model.{key}": value for key, value in made.language.config.base_model_tp_plan.items()}
    assert plan.items() <= made.model._tp_plan.items()


def test_four_bits_are_the_language_models_layers_alone(made):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(made.folder, quantization_config=four_bits)
    linear = {name for name, module in made.model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert quantized == {name for name in linear if name.startswith("model.language_model.")} and quantized
    inputs = asked(made, 9)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.families
def test_it_loads_from_its_folder_alone(made, tmp_path):
    code = """
import sys
from PIL import Image
from transformers import pipeline
pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
question = [{"type": "image", "image": Image.new("RGB", (50, 30), "red")}, {"type": "text", "text": "What?"}]
for scale in pipe.processor.visual_token_scales:
    given = {"processor_kwargs": {"num_visual_tokens": scale}, "max_new_tokens": 3}
    assert pipe(text=[{"role": "user", "content": question}], **given)[0]["generated_text"][-1]["role"] == "assistant"
assert "modeling_m3" not in sys.modules and type(pipe.model).__module__.startswith("transformers_modules")
"""
    arguments = [sys.executable, "-c", code, made.folder]
    subprocess.run(
        arguments, check=True, cwd=tmp_path, env={"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    )
