"""A prompt is the original's, its first token written once, in whichever way it arrives; a user's text can be made plain."""

import itertools

import pytest
from conftest import CHECKPOINTS, golden, golden_cases, picture

from modeling_m3 import default_checkpoint
from modeling_m3.processing_m3 import MAKES_TEXT_PLAIN


IMAGE = "<image>"
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def expected_ids(case, processor):
    """The golden token ids of a case's first prompt, with our placeholder."""
    mask = case["attention_mask"][0] if case["attention_mask"] else itertools.repeat(1)
    return [
        processor.image_token_id if token == -200 else token
        for token, is_valid in zip(case["input_ids"][0], mask)
        if is_valid
    ]


def squeezed(ids, processor):
    """Token ids with one placeholder for each image. No golden here has two images side by side at one token each."""
    placeholder = processor.image_token_id
    return [token for i, token in enumerate(ids) if token != placeholder or i == 0 or ids[i - 1] != placeholder]


@pytest.mark.parametrize("written", [False, True], ids=["without bos", "with bos"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"add_special_tokens": True},
        {"add_special_tokens": False},
        {"text_kwargs": {"add_special_tokens": True}},
        {"text_kwargs": {"add_special_tokens": False}},
    ],
    ids=str,
)
@pytest.mark.parametrize(("checkpoint", "case"), golden_cases("img", "text-only", "mid", "end", "two-interleaved"))
def test_token_ids_equal_the_goldens_however_a_prompt_arrives(checkpoint, case, kwargs, written, loaded):
    _, processor = loaded[checkpoint]
    prompt = case["prompts"][0]
    images = [picture(name) for name in case["image_files"][: prompt.count(IMAGE)]] or None
    inputs = processor(images=images, text=("<s>" if written else "") + prompt, num_visual_tokens=1, **kwargs)
    assert squeezed(inputs["input_ids"][0], processor) == expected_ids(case, processor)


@pytest.mark.parametrize("prompt", [case["prompt"] for case in golden("tokenization")["raw"]])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_awkward_prompts_are_the_same_with_bos_and_without(name, prompt, loaded):
    _, processor = loaded[name]
    tokenizer = processor.tokenizer
    expected = tokenizer(prompt)["input_ids"]  # tests/test_tokenizer.py compares these with the goldens
    assert tokenizer("<s>" + prompt, add_special_tokens=False)["input_ids"] == expected
    images = [picture("img5_97x53.png")] * prompt.count(IMAGE) or None
    for text in (prompt, "<s>" + prompt):
        inputs = processor(images=images, text=text, num_visual_tokens=1)
        placeholders = inputs["input_ids"][0].count(processor.image_token_id)
        if placeholders == prompt.count(IMAGE):  # one each
            assert inputs["input_ids"][0] == expected


def test_a_batch_of_prompts_written_in_both_ways(loaded):
    _, processor = loaded["llava15-m3"]
    texts = ["<s>Hello there", "Hello there", "<s><s>Hello there", "<s> Hello"]
    mixed = [[token for token in row if token] for row in processor(text=texts, padding=True)["input_ids"]]
    alone = processor(text=["Hello there", " Hello"])["input_ids"]
    assert mixed == [alone[0]] * 3 + [alone[1]]
    assert alone[0].count(processor.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_chats_have_the_prompt_of_the_original_for_every_consumer(name, loaded):
    _, processor = loaded[name]
    case = next(case for case in golden(name)["cases"] if case["id"].startswith("img"))
    question = case["prompts"][0].split("USER: <image>\n")[1].split(" ASSISTANT:")[0]
    content = [{"type": "image", "image": picture(case["image_files"][0])}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    expected = expected_ids(case, processor)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<s>" + case["prompts"][0]
    arguments = {"add_generation_prompt": True, "return_dict": True}
    engine = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{question}"}], chat_template=processor.chat_template, **arguments
    )
    assert engine["input_ids"] == expected
    for kwargs in ({}, {"return_tensors": "pt"}):
        inputs = processor.apply_chat_template(
            messages, tokenize=True, processor_kwargs={"num_visual_tokens": 1}, **arguments, **kwargs
        )
        assert squeezed(list(map(int, inputs["input_ids"][0])), processor) == expected


def test_arguments_of_another_do_not_displace_those_of_the_processor(loaded):
    _, processor = loaded["llava15-m3"]
    content = [{"type": "image", "image": picture("img5_97x53.png")}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"num_visual_tokens": 36},
        do_resize=True,
    )
    assert list(inputs["num_visual_tokens"]) == [36]


def test_m3_tiny_has_one_beginning_and_marks_what_the_assistant_said():
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(default_checkpoint(), backend="pil")
    bos = processor.tokenizer.bos_token_id
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    ids = [
        processor(images=picture("img5_97x53.png"), text=prompt, num_visual_tokens=9)["input_ids"][0]
        for prompt in (text, text.removeprefix("<s>"))
    ]
    assert ids[0] == ids[1] and ids[0].count(bos) == 1 and ids[0][0] == bos
    answered = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
    answered[0] = {"role": "user", "content": "What is this?"}
    out = processor.tokenizer.apply_chat_template(answered, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, is_said in zip(out["input_ids"], out["assistant_masks"]) if is_said]
    assert processor.tokenizer.decode(said) == "a cat</s>"
    assert len(processor.tokenizer.decode(out["input_ids"])) > len("a cat</s>")


@pytest.mark.skipif(not MAKES_TEXT_PLAIN, reason="this transformers cannot make a user's text plain")
@pytest.mark.parametrize("forged", ["<image>", "</s>", "<s>", "a <image> b </s> c"])
@pytest.mark.parametrize("name", [*CHECKPOINTS, "m3-tiny"])
def test_what_a_user_writes_can_be_made_plain(name, forged, loaded):
    from transformers import AutoProcessor

    processor = loaded[name][1] if name in loaded else AutoProcessor.from_pretrained(default_checkpoint())
    tokenizer = processor.tokenizer

    def ids(text, **kwargs):
        content = [{"type": "image", "image": picture("img5_97x53.png")}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"num_visual_tokens": 9},
            **kwargs,
        )
        return list(inputs["input_ids"][0])

    plain, innocent = ids(forged, sanitize_control_tokens=True), ids("What is this?")
    for token in (processor.image_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        assert plain.count(token) == innocent.count(token), token
    assert forged.replace(" ", "") in tokenizer.decode([t for t in plain if t != processor.image_token_id]).replace(
        " ", ""
    )
    assert ids("What is this?", sanitize_control_tokens=True) == innocent
