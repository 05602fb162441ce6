"""Chats that go on from their cache, prompts whose images are missing, and assistants that see the images."""

import copy

import pytest
import torch
from test_generation import GREEDY, answer
from test_modeling import ANYRES, tiny_inputs, tiny_model

from modeling_m3.outputs_m3 import CACHE_NAME


def with_prompt(model, length_of_text, scales, **facts):
    """A turn: `length_of_text` tokens of text after each image, and the images by themselves."""
    generator = torch.Generator().manual_seed(len(scales) + length_of_text)
    tiles = (4,) if "image_tile_grids" in facts else ()
    images = {"pixel_values": torch.randn(len(scales), *tiles, 3, 24, 24, generator=generator), **facts}
    images["num_visual_tokens"] = torch.tensor(scales)
    counts = [len(tokens) for tokens in model.get_image_features(**images).pooler_output] if scales else []
    row = [1]
    for count in counts:
        row += [model.config.image_token_id] * count
        row += torch.randint(3, 90, (length_of_text,), generator=generator).tolist()
    return torch.tensor([row + [5, 6]]), images


FLAT = ({}, {}, {})
TILED = (
    {"image_sizes": torch.tensor([[24, 48]]), "image_tile_grids": torch.tensor([[1, 2]])},
    {"image_sizes": torch.tensor([[50, 20], [30, 30]]), "image_tile_grids": torch.tensor([[2, 1], [0, 0]])},
    {},
)


@pytest.fixture(params=["flat", "anyres"])
def chat(request):
    """(model, ids of the first turn, its images, its output, ids of both turns, images of the second)."""
    model = tiny_model(**(ANYRES if request.param == "anyres" else {}))
    facts = TILED if request.param == "anyres" else FLAT
    with torch.no_grad():
        ids, images = with_prompt(model, 4, [9], **facts[0])
        more, new_images = with_prompt(model, 3, [36, 1], **facts[1])
    output = model.generate(
        input_ids=ids, **images, **GREEDY, eos_token_id=None, suppress_tokens=[98], return_dict_in_generate=True
    )
    return model, ids, images, output, torch.cat([output.sequences, more], dim=1), new_images


def together(*images):
    return {name: torch.cat([each[name] for each in images]) for name in images[0]}


def both(chat, images, cached_images, cache_name="past_key_values", **kwargs):
    """Answers without the cache, and with it."""
    model, _, _, output, ids, _ = chat
    kwargs = {**GREEDY, "eos_token_id": None, "suppress_tokens": [98], **kwargs}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = copy.deepcopy(output.past_key_values)
    repeats = max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
    expected = model.generate(**inputs, **images, **kwargs)
    return expected, model.generate(**inputs, **cached_images, **{cache_name: cache}, **kwargs)


@pytest.mark.parametrize("cache_name", ["past_key_values", "cache"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}], ids=str
)
@pytest.mark.parametrize("given", ["all", "the new ones", "all encoded", "the new ones encoded", "a list of all"])
def test_a_second_turn_with_new_pictures(given, kwargs, cache_name, chat):
    model, _, images, _, _, new = chat
    everything = together(images, new)
    chosen = new if "new" in given else everything
    if "encoded" in given:
        with torch.no_grad():
            encoded = model.encode_images(**{name: chosen[name] for name in chosen if name != "num_visual_tokens"})
        chosen = {"encoded_images": encoded, "num_visual_tokens": chosen["num_visual_tokens"]}
    elif "list" in given:
        chosen = {**chosen, "pixel_values": list(chosen["pixel_values"])}
        chosen |= {name: chosen[name].tolist() for name in chosen if name != "pixel_values"}
    calls = []
    expected, cached = both(chat, everything, chosen, cache_name, **kwargs)
    assert torch.equal(cached, expected)
    if kwargs == {} and given == "all":
        model.model.vision_tower.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        both(chat, {**everything}, chosen)
        assert calls[1] < calls[0], "pictures in the cache are not encoded again"


@pytest.mark.parametrize("given", ["all", "none"])
def test_a_second_turn_without_a_picture(given, chat):
    model, ids, images, output, _, _ = chat
    text = torch.cat([output.sequences, torch.tensor([[1, 7, 8, 9]])], dim=1)
    turn = (model, ids, images, output, text, None)
    expected, cached = both(turn, images, images if given == "all" else {})
    assert torch.equal(cached, expected)


def test_the_tokens_after_the_cache_alone(chat):
    model, _, images, output, ids, new = chat
    expected, _ = both(chat, together(images, new), new)
    length = output.past_key_values.get_seq_length()
    cached = model.generate(
        input_ids=ids[:, length:],
        attention_mask=torch.ones_like(ids),
        **new,
        past_key_values=copy.deepcopy(output.past_key_values),
        **GREEDY,
        eos_token_id=None,
        suppress_tokens=[98],
    )
    assert torch.equal(cached[:, -8:], expected[:, -8:])


def test_a_batch_of_chats():
    model = tiny_model()
    first = tiny_inputs(model, scales=(9,), prompts=2)
    kwargs = {**GREEDY, "eos_token_id": None, "suppress_tokens": [98]}
    output = model.generate(**first, **kwargs, return_dict_in_generate=True)
    second = tiny_inputs(model, scales=(1, 36), prompts=2)
    pixels = [torch.cat([first["pixel_values"][row, None], second["pixel_values"][2 * row :][:2]]) for row in (0, 1)]
    ids = torch.cat([output.sequences, second["input_ids"]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = {"pixel_values": torch.cat(pixels), "num_visual_tokens": torch.tensor([9, 1, 36] * 2)}
    expected = model.generate(**inputs, **images, **kwargs)
    for given in (images, {name: second[name] for name in images}):
        cache = copy.deepcopy(output.past_key_values)
        assert torch.equal(model.generate(**inputs, **given, past_key_values=cache, **kwargs), expected)


def test_what_the_cache_and_the_pictures_do_not_agree_on(chat):
    model, _, images, output, ids, new = chat
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}

    def go_on(images, cache=None):
        model.generate(**inputs, **images, past_key_values=cache or copy.deepcopy(output.past_key_values))

    first = {name: value[:1] for name, value in new.items()}
    for wrong in ({}, first, together(images, first), together(images, images, new)):
        with pytest.raises(ValueError, match=r"placeholders after the cache and .* in it"):
            go_on(wrong)
    cut = copy.deepcopy(output.past_key_values)
    cut.crop(4 - cut.get_seq_length())
    with pytest.raises(ValueError, match="The cache ends inside an image"):
        go_on(together(images, new), cut)


@pytest.mark.parametrize("call", ["forward", "headless", "generate", "beams", "no cache", "static cache", "one token"])
def test_a_prompt_whose_images_are_missing_is_refused(call):
    model = tiny_model()
    ids = torch.tensor([[98]]) if call == "one token" else tiny_inputs(model)["input_ids"]
    calls = {
        "forward": lambda: model(input_ids=ids),
        "headless": lambda: model.model(input_ids=ids),
        "one token": lambda: model(input_ids=ids),
        "generate": lambda: model.generate(input_ids=ids, **GREEDY),
        "beams": lambda: model.generate(input_ids=ids, **GREEDY, num_beams=2),
        "no cache": lambda: model.generate(input_ids=ids, **GREEDY, use_cache=False),
        "static cache": lambda: model.generate(
            input_ids=ids, **GREEDY, cache_implementation="static", disable_compile=True
        ),
    }
    with pytest.raises(ValueError, match="placeholders but there are no images"), torch.no_grad():
        calls[call]()


def test_embeddings_and_decoding_steps_need_no_images():
    model = tiny_model()
    ids = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        assert model(inputs_embeds=embeds).logits.isfinite().all()
        cache = model(input_ids=torch.tensor([[1, 5]]), use_cache=True)[CACHE_NAME]
        assert model(input_ids=torch.tensor([[98]]), past_key_values=cache).logits.shape[1] == 1  # it may write one
        assert model(input_ids=torch.tensor([[98, 98]]), past_key_values=cache).logits.shape[1] == 2  # or draft some


def test_text_alone_is_compiled_whole():
    model = tiny_model()
    ids = torch.tensor([[1, 5, 6, 7]])
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("hidden_size", [32, 64])
def test_an_assistant_sees_the_images(hidden_size):
    """Through its own vision tower and projector: the same model as assistant has every draft accepted."""
    model = tiny_model()
    assistant = tiny_model(text_config={"hidden_size": hidden_size})
    inputs = tiny_inputs(model)
    expected = answer(model, inputs, eos_token_id=None)
    seen = []
    assistant.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    assert torch.equal(answer(model, inputs, eos_token_id=None, assistant_model=assistant), expected)
    with torch.no_grad():
        images = {name: inputs[name] for name in ("pixel_values", "num_visual_tokens")}
        features = torch.cat(assistant.get_image_features(**images).pooler_output)
    assert torch.equal(seen[0][inputs["input_ids"] == 98], features)


def test_an_assistant_of_another_size_cannot_see_what_was_encoded():
    model, assistant = tiny_model(), tiny_model(text_config={"hidden_size": 64})
    inputs = tiny_inputs(model)
    with torch.no_grad():
        inputs["encoded_images"] = model.encode_images(inputs.pop("pixel_values"))
    with pytest.raises(ValueError, match="pass pixel_values"):
        answer(model, inputs, assistant_model=assistant)
    assert torch.equal(
        answer(model, inputs, eos_token_id=None, assistant_model=tiny_model()), answer(model, inputs, eos_token_id=None)
    )
