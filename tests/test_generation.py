"""`generate` in all its modes: mixed budgets, left padding, beams, several answers, caches, streaming, encoded images."""

from threading import Thread

import pytest
import torch
from conftest import picture
from test_modeling import ANYRES, tiny_inputs, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer


GREEDY = {"max_new_tokens": 8, "do_sample": False}


def left_padded(batch):
    """One batch of several single prompts, padded on the left."""
    longest = max(inputs["input_ids"].shape[1] for inputs in batch)

    def pad(name):
        rows = [torch.nn.functional.pad(inputs[name], (longest - inputs[name].shape[1], 0)) for inputs in batch]
        return torch.cat(rows)

    return {
        "input_ids": pad("input_ids"),
        "attention_mask": pad("attention_mask"),
        "pixel_values": torch.cat([inputs["pixel_values"] for inputs in batch]),
        "num_visual_tokens": torch.cat([inputs["num_visual_tokens"] for inputs in batch]),
    }


def answer(model, inputs, **kwargs):
    return model.generate(**inputs, **{**GREEDY, **kwargs})[:, inputs["input_ids"].shape[1] :]


def test_a_left_padded_batch_of_all_budgets_answers_as_single_calls():
    model = tiny_model()
    batch = [tiny_inputs(model, scales=(scale,)) for scale in (1, 9, 36, 144)]
    single = torch.cat([answer(model, inputs) for inputs in batch])
    assert torch.equal(answer(model, left_padded(batch)), single)
    assert len({tuple(row) for row in single.tolist()}) > 1, "the budgets must matter for this to show anything"


def test_the_converted_checkpoint_answers_a_batch_of_five_budgets_as_five_calls(loaded):
    model, processor = loaded["llava15-m3"]
    prompt, images = "USER: <image>\nWhat is this? ASSISTANT:", [picture("img1_640x480.png").convert("RGB")] * 5
    budgets = [1, 9, 36, 144, 576]
    single = []
    for image, budget in zip(images, budgets):
        inputs = processor(images=image, text=prompt, num_visual_tokens=budget, return_tensors="pt")
        single.append(answer(model, inputs).tolist()[0])
    inputs = processor(images=images, text=[prompt] * 5, num_visual_tokens=budgets, padding=True, return_tensors="pt")
    assert answer(model, inputs).tolist() == single


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_a_loop_of_forward_calls(use_cache):
    model = tiny_model()
    inputs = tiny_inputs(model)
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            mask = torch.ones_like(ids)
            ids = torch.cat(
                [ids, model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, -1:].argmax(-1)], 1
            )
    expected = ids[:, inputs["input_ids"].shape[1] :]
    generated = answer(model, inputs, use_cache=use_cache, eos_token_id=None)
    assert torch.equal(generated, expected)


def test_images_enter_in_the_first_step_only():
    model = tiny_model()
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    answer(model, tiny_inputs(model), eos_token_id=None)
    assert len(calls) == 1


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_of_a_batch_with_two_images_per_prompt_equal_single_calls(kwargs):
    model = tiny_model()
    together = tiny_inputs(model, scales=(9, 36), prompts=2)
    kwargs = {**kwargs, "eos_token_id": None}
    single = []
    for row in range(2):
        images = slice(2 * row, 2 * row + 2)
        inputs = {name: together[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        inputs |= {name: together[name][images] for name in ("pixel_values", "num_visual_tokens")}
        single.append(answer(model, inputs, **kwargs))
    assert torch.equal(answer(model, together, **kwargs), torch.cat(single))


def test_several_answers_see_the_images_in_their_order():
    # Sampling with one token to choose from is greedy: every answer must equal the greedy one.
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(9, 36), prompts=2)
    greedy = answer(model, inputs, eos_token_id=None)
    several = answer(model, inputs, eos_token_id=None, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(several, greedy.repeat_interleave(3, dim=0))


def test_a_batch_with_a_prompt_without_image_and_several_answers():
    model = tiny_model()
    with_images = tiny_inputs(model, scales=(9, 36))
    text = torch.tensor([[1, 5, 6, 7]])
    text_alone = answer(model, {"input_ids": text, "attention_mask": torch.ones_like(text)}, eos_token_id=None)
    longest = with_images["input_ids"].shape[1]
    inputs = {
        **with_images,
        "input_ids": torch.cat([torch.nn.functional.pad(text, (longest - 4, 0)), with_images["input_ids"]]),
        "attention_mask": torch.cat(
            [torch.nn.functional.pad(torch.ones_like(text), (longest - 4, 0)), with_images["attention_mask"]]
        ),
    }
    several = answer(model, inputs, eos_token_id=None, do_sample=True, top_k=1, num_return_sequences=2)
    expected = torch.cat([text_alone, answer(model, with_images, eos_token_id=None)]).repeat_interleave(2, dim=0)
    assert torch.equal(several, expected)


def test_embeddings_in_place_of_ids():
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = answer(model, inputs, eos_token_id=None)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    for kwargs in ({}, {"num_beams": 1, "num_return_sequences": 2, "do_sample": True, "top_k": 1}):
        generated = model.generate(**inputs, inputs_embeds=embeds, **{**GREEDY, "eos_token_id": None, **kwargs})
        assert torch.equal(generated, expected.expand(len(generated), -1))


def test_tiles_of_another_grid():
    model = tiny_model(**ANYRES)
    pixels = {"pixel_values": torch.randn(1, 10, 3, 24, 24), "image_sizes": torch.tensor([[50, 60]])}
    for chosen in ({"image_grid_pinpoints": [[72, 72]]}, {"image_tile_grids": torch.tensor([[3, 3]])}):
        tokens = len(model.get_image_features(**pixels, **chosen, num_visual_tokens=9).pooler_output[0])
        ids = torch.tensor([[1] + [98] * tokens + [4, 5]])
        inputs = {"input_ids": ids, **pixels, **chosen, "num_visual_tokens": torch.tensor([9])}
        assert answer(model, inputs, eos_token_id=None).shape == (1, 8)
        assert answer(model, inputs, eos_token_id=None, num_beams=2).shape == (1, 8)


def test_the_sampling_can_be_chosen_per_call():
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(9,))
    spatial = answer(model, inputs, eos_token_id=None, visual_token_sampling="spatial", output_logits=True)
    assert not torch.equal(spatial, answer(model, inputs, eos_token_id=None, visual_token_sampling="sequential"))


def test_a_prompt_without_a_budget_is_answered_at_the_finest_scale():
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(144,))
    expected = answer(model, inputs)
    inputs.pop("num_visual_tokens")
    assert torch.equal(answer(model, inputs), expected)


def test_a_static_cache_changes_nothing():
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = answer(model, inputs, eos_token_id=None)
    assert torch.equal(
        answer(model, inputs, eos_token_id=None, cache_implementation="static", disable_compile=True), expected
    )


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_chat_goes_on_from_its_cache(name):
    """By either of the names that releases of transformers have for it."""
    model = tiny_model()
    first = tiny_inputs(model, scales=(9,))
    output = model.generate(**first, **GREEDY, eos_token_id=None, return_dict_in_generate=True)
    second = torch.cat([output.sequences, torch.tensor([[1] + [98] * 36 + [7, 8]])], dim=1)
    picture = {"pixel_values": torch.randn(1, 3, 24, 24), "num_visual_tokens": torch.tensor([36])}
    everything = {name: torch.cat([first[name], picture[name]]) for name in picture}
    mask = torch.ones_like(second)
    expected = model.generate(input_ids=second, attention_mask=mask, **everything, **GREEDY, eos_token_id=None)
    cached = model.generate(
        input_ids=second,
        attention_mask=mask,
        **picture,
        **{name: output.past_key_values},
        **GREEDY,
        eos_token_id=None,
    )
    assert torch.equal(cached, expected)


def test_tokens_are_streamed():
    class Seen(BaseStreamer):
        tokens: list = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = model.generate(**inputs, **GREEDY)[0].tolist()
    model.generate(**inputs, **GREEDY, streamer=Seen())
    assert Seen.tokens == [*expected, "end"]


def test_a_smaller_model_may_assist():
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = answer(model, inputs, eos_token_id=None)
    assert torch.equal(answer(model, inputs, eos_token_id=None, assistant_model=tiny_model()), expected)


def test_a_generation_configuration_is_taken():
    model = tiny_model()
    inputs = tiny_inputs(model)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.generate(**inputs, generation_config=config).shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_budget_that_does_not_fit_the_prompt_is_refused_with_beams_too():
    model = tiny_model()
    inputs = {**tiny_inputs(model, scales=(36,)), "num_visual_tokens": torch.tensor([9])}
    for num_beams in (1, 2):
        with pytest.raises(ValueError, match="36 placeholders for 9 visual tokens"):
            answer(model, inputs, num_beams=num_beams)


def test_prefilling_in_chunks_sees_the_images_or_is_refused():
    model = tiny_model()
    inputs = tiny_inputs(model)
    try:
        generated = answer(model, inputs, eos_token_id=None, prefill_chunk_size=16)
    except ValueError as error:
        assert "prefill_chunk_size" in str(error)
    else:
        assert torch.equal(generated, answer(model, inputs, eos_token_id=None))


def test_text_is_streamed_to_another_thread(loaded):
    model, processor = loaded["llava15-m3"]
    inputs = processor(
        images=picture("photo_400x266.png"),
        text="USER: <image>\nWhat is this? ASSISTANT:",
        num_visual_tokens=36,
        return_tensors="pt",
    )
    expected = processor.decode(answer(model, inputs)[0], skip_special_tokens=True)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected and len(pieces) > 1


def test_a_chat_with_several_pictures_at_budgets_of_their_own(loaded):
    model, processor = loaded["llava15-m3"]
    pictures = [picture("photo_400x266.png").convert("RGB"), picture("img2_480x640.png").convert("RGB")]
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "What is this?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "image", "image": pictures[1]}, {"type": "text", "text": "And this?"}]},
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": [9, 144]},
    )
    assert inputs["num_visual_tokens"].tolist() == [9, 144]
    runs = torch.unique_consecutive(inputs["input_ids"][0] == processor.image_token_id, return_counts=True)
    assert runs[1][runs[0]].tolist() == [9, 144]
    ids = inputs["input_ids"]
    with torch.no_grad():
        features = [
            model.get_image_features(inputs["pixel_values"][index : index + 1], num_visual_tokens=scale).pooler_output[
                0
            ]
            for index, scale in enumerate((9, 144))
        ]
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == processor.image_token_id] = torch.cat(features)
        expected = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(answer(model, inputs), expected)


def test_a_static_cache_is_compiled_whole_and_not_again_for_every_budget(monkeypatch):
    """The eager backend: what is traced is the same for every one, and quickly made."""
    model = tiny_model()
    torch._dynamo.reset()
    counters.clear()
    compiled = CompileConfig(backend="eager", fullgraph=True)
    compiled._compile_all_devices = True
    graphs = []
    for scale in (9, 36, 144, 1, 36):
        inputs = tiny_inputs(model, scales=(scale,))
        expected = answer(model, inputs, eos_token_id=None)
        kwargs = {"cache_implementation": "static", "compile_config": compiled, "eos_token_id": None}
        assert torch.equal(answer(model, inputs, **kwargs), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert 1 <= graphs[0] and graphs[-1] == graphs[1] <= 2 * graphs[0], graphs


def language_model(rows):
    """A smaller one that sees no images."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("encoded", [False, True])
def test_a_language_model_may_assist(encoded):
    """Once it has as many tokens: the last one here stands for images."""
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = answer(model, inputs, eos_token_id=None)
    assistant = language_model(98)
    assistant.resize_token_embeddings(model.config.text_config.vocab_size)
    if encoded:
        with torch.no_grad():
            inputs["encoded_images"] = model.encode_images(inputs.pop("pixel_values"))
    assert torch.equal(answer(model, inputs, eos_token_id=None, assistant_model=assistant), expected)


def test_flex_attention_computes_what_the_others_do():
    """Without compiling it: what is shown is that masks, caches and shapes are such that it can be used."""
    model = tiny_model(text_config={"hidden_size": 64}, vision_config={"hidden_size": 32})
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("flex_attention")
        assert model.model.language_model.config._attn_implementation == "flex_attention"
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_flash_attention_needs_nothing_but_its_package():
    model = tiny_model()
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="flash_attn|flash-attn|Flash Attention|FlashAttention"):
            model.set_attn_implementation("flash_attention_2")
    else:
        model.set_attn_implementation("flash_attention_2")
        assert model.config._attn_implementation == "flash_attention_2"
