"""What is supervised under the checkpoint's own chat template, whatever it is: the rule, and what no template may do."""

import json
import logging
import re
import shutil

import pytest
import torch
from chat_template_kinds import CONVERSATION, DROPPING, KINDS, SPECIAL
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_conversations import Prompts, talk
from tokenizers import AddedToken
from transformers import AutoProcessor

from m3_conversion.tokenizer import build_tokenizer
from m3_training.chat_layout import ChatTemplate, ChatTemplateError, Turn
from m3_training.conversations import IGNORE_INDEX, encode
from m3_training.data import BadSampleError, Collator, LlavaDataset
from m3_training.finetune import main
from m3_training.shown import shown


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer(GOLDENS / "tokenizer_v1")
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    return tokenizer


def turns(texts):
    return [
        Turn(("user", "assistant")[i % 2], text.replace("<image>", "").strip(), text.count("<image>"))
        for i, text in enumerate(texts)
    ]


def prompt_of(kind, tokenizer, texts):
    """The prompt of the next answer, as somebody who asks writes it: nothing of ours."""
    messages = []
    for turn in turns(texts):
        parts = [{"type": "image"}] * turn.images + [{"type": "text", "text": turn.text}]
        as_text = "<image>\n" * turn.images + turn.text
        messages.append({"role": turn.role, "content": parts if kind.parts else as_text})
    return tokenizer.apply_chat_template(
        messages, chat_template=kind.template, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("name", KINDS)
def test_what_follows_the_prompt_of_an_answer_is_supervised_to_the_end_of_its_turn(name, tokenizer):
    kind = KINDS[name]
    written = ChatTemplate(tokenizer, kind.template, "<image>").write(turns(CONVERSATION))
    assert [[one.text[r.start : r.stop] for r in one.answers] for one in written] == kind.supervised
    assert {one.adds_end for one in written} == {kind.adds_end}
    prompts = iter([prompt_of(kind, tokenizer, CONVERSATION[:stop]) for stop in (1, 3)])
    for one in written:
        for number, answer in enumerate(one.answers):
            before = one.text[: answer.start]
            if kind.adds_end:  # and the prompt has none of those of earlier answers
                assert before.count("</s>") == number
                before = before.replace("</s>", "")
            assert before == next(prompts)


@pytest.mark.parametrize("name", KINDS)
def test_the_tokens_are_those_of_the_prompt_and_what_is_answered(name, tokenizer):
    kind = KINDS[name]
    encoded = encode(talk(*CONVERSATION), "chat_template", Prompts(tokenizer, kind.template))
    assert len(encoded.lengths or (0,)) == len(kind.supervised)
    for (ids, labels), supervised in zip(encoded.sequences, kind.supervised, strict=True):
        found = [[]]
        for token, label in zip(ids, labels):
            assert label in (IGNORE_INDEX, token)
            if label != IGNORE_INDEX:
                found[-1].append(token)
            elif found[-1]:
                found.append([])
        texts = [tokenizer.decode(run) for run in found if run]
        assert [" ".join(text.split()) for text in texts] == [" ".join(text.split()) for text in supervised]
        first = prompt_of(kind, tokenizer, CONVERSATION[:1]) if len(supervised) > 1 else None
        if first is not None and not first.endswith(
            " "
        ):  # a space at a prompt's end becomes part of the answer's token
            begins_itself = first.startswith(tokenizer.bos_token)
            prompt = tokenizer(first, add_special_tokens=not begins_itself)["input_ids"]
            assert ids[: len(prompt)] == prompt and set(labels[: len(prompt)]) == {IGNORE_INDEX}
            assert labels[len(prompt)] != IGNORE_INDEX


@pytest.mark.parametrize("what", DROPPING)
def test_a_template_that_does_not_write_it_whole_is_refused_by_what_is_missing(what, tokenizer):
    template, message = DROPPING[what]
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(tokenizer, template, "<image>").write(turns(CONVERSATION))


# Any characters, what templates trim and what they look for among them.
TEXTS = st.text(
    st.characters(exclude_categories=("Cs",)) | st.sampled_from(" \n\t<>{}%'\""), max_size=16
) | st.sampled_from(
    [
        "<think>",
        "</think>\n\nYes",
        "text-0001-here",
        "{{ bos_token }}",
        "{% endfor %}",
        "USER: ASSISTANT:",
        "\u2028",
        " a\n",
    ]
)


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(list(KINDS)),
    rounds=st.lists(
        st.tuples(TEXTS.filter(str.strip), TEXTS.filter(str.strip), st.integers(0, 2)), min_size=1, max_size=4
    ),
)
def test_any_conversation_is_written_as_it_would_be_asked(name, rounds, tokenizer):
    kind = KINDS[name]
    texts = [text for question, answer, images in rounds for text in ("<image>" * images + question, answer)]
    written = ChatTemplate(tokenizer, kind.template, "<image>").write(turns(texts))
    answers = [(one, answer) for one in written for answer in one.answers]
    assert len(answers) == len(rounds)
    for number, (one, answer) in enumerate(answers):
        text = one.text[: answer.start]
        prompt = prompt_of(kind, tokenizer, texts[: 2 * number + 1])
        assert (text.replace("</s>", "") if kind.adds_end else text) == prompt
        assert rounds[number][1].strip() in one.text[answer.start : answer.stop]
        if kind.adds_end:
            assert one.text[: answer.stop].endswith("</s>")


@pytest.mark.parametrize("token", ["</s>", "<unk>", "<|im_end|>"])
def test_a_text_with_a_special_token_is_refused_and_others_are_not(token, tokenizer):
    template = ChatTemplate(tokenizer, KINDS["qwen2-vl"].template, "<image>")
    with pytest.raises(ChatTemplateError, match=rf"text of turn 1 \(user\) holds {re.escape(repr(token))}"):
        template.write(turns([f"What is {token}?", "A token."]))
    assert template.write(turns(["What is <b>?", "A tag."]))


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"holds '\\udfff', half of a surrogate pair"):
        encode(talk("Hi", "Yes\udfff"), "chat_template", Prompts(tokenizer, KINDS["qwen2-vl"].template))


def test_what_is_written_otherwise_between_two_texts_is_not_blamed_on_the_first(tokenizer):
    template = (
        "{% for m in messages %}{{ 'Hm. ' if 'so' in m.content else 'Well. ' }}{{ m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(ChatTemplateError, match=r"changes what follows the text of turn 1 \(user\), 'Why\?'"):
        ChatTemplate(tokenizer, template, "<image>").write(turns(["Why?", "Just so."]))


def test_a_template_that_takes_one_question_alone_is_given_what_it_reads(tokenizer):
    template = (
        "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}{{ 'Q: ' + messages[0].content + '\nA:' }}"
        "{% if messages | length > 1 %}{{ ' ' + messages[1].content + eos_token }}{% endif %}"
    )
    (written,) = ChatTemplate(tokenizer, template, "<image>").write(turns(CONVERSATION[:2]))
    assert written.text == "Q: <image>\nWhat is it?\nA: A dog.</s>"
    assert [written.text[r.start : r.stop] for r in written.answers] == [" A dog.</s>"]


def test_a_special_token_that_takes_the_space_after_it_stays_with_the_prompt():
    tokenizer = build_tokenizer(GOLDENS / "tokenizer_v1")
    tokenizer.add_tokens(
        [AddedToken("<|assistant|>", special=True, normalized=False, rstrip=True)], special_tokens=True
    )
    template = (
        "{% for m in messages %}{{ '<|assistant|>\n' if m.role == 'assistant' }}{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    encoded = encode(talk("Hi", "  A dog."), "chat_template", Prompts(tokenizer, template))
    prompt = tokenizer("Hi</s><|assistant|>")["input_ids"]
    assert encoded.input_ids[: len(prompt)] == prompt and set(encoded.labels[: len(prompt)]) == {IGNORE_INDEX}
    assert encoded.labels[len(prompt) :] == tokenizer("Hi</s><|assistant|>\n  A dog.</s>")["input_ids"][len(prompt) :]
    assert tokenizer.decode(encoded.labels[len(prompt) :]) == "A dog.</s>"


def test_of_several_chat_templates_the_default_one_is_used(like):
    one = like(KINDS["llava-1.5"].template)
    several = like({"tool_use": "{{ raise_exception('no tools') }}", "default": KINDS["llava-1.5"].template})
    conversation = talk("Hi", "Yes")
    assert encode(conversation, "chat_template", several) == encode(conversation, "chat_template", one)
    with pytest.raises(ValueError, match="the chat templates tool_use, rag, and none of them is called default"):
        encode(conversation, "chat_template", like({"tool_use": "", "rag": ""}))


def test_answers_without_a_text_are_not_supervised(tokenizer):
    processor = Prompts(tokenizer, KINDS["qwen2-vl"].template)
    encoded = encode(talk("Hi", "", "Ho", "Yes"), "chat_template", processor)
    assert tokenizer.decode([token for token in encoded.labels if token != IGNORE_INDEX]) == "Yes<|im_end|>"
    encoded = encode(talk("Hi", " \n"), "chat_template", processor)
    assert set(encoded.labels) == {IGNORE_INDEX} and encoded.mismatch == "no answer has a text"


def test_a_tokenizer_without_an_end_is_said():
    tokenizer = build_tokenizer(GOLDENS / "tokenizer_v1")
    tokenizer.eos_token = None
    with pytest.raises(ChatTemplateError, match="no end of a turn, and the tokenizer has no end token"):
        ChatTemplate(tokenizer, KINDS["llava-1.5"].template, "<image>").write(turns(CONVERSATION))


@pytest.fixture
def like(loaded):
    """A processor of the golden checkpoint with another template."""

    def like(template):
        processor = AutoProcessor.from_pretrained(loaded["llava15-m3"][0].name_or_path, backend="pil")
        processor.chat_template = template
        return processor

    return like


def record(*texts, **fields):
    return {"conversations": talk(*texts), **fields}


REWRITES = KINDS["counts-turns"].template.replace("<|im_start|>", "[").replace("<|im_end|>", "</s>")


def test_a_record_of_several_sequences_is_one_sample_whose_rows_stay_together(like, loaded):
    model, _ = loaded["llava15-m3"]
    processor = like(REWRITES)
    pictures = ["img0_336x336.png", "img3_1000x300.png"]
    records = [
        record("<image>\nWhat?", "A dog.", "<image> And this?", "A cat.", image=pictures),
        record("Name a fruit.", "Apple."),
    ]
    dataset = LlavaDataset(records, processor, image_folder=GOLDENS / "images")
    assert len(dataset) == 2
    sample = dataset[0]
    # The first answer's prompt has the first picture, the second's both.
    assert sample["lengths"].sum() == len(sample["input_ids"]) == len(sample["labels"])
    assert len(sample["pixel_values"]) == len(sample["num_visual_tokens"]) == 3
    assert torch.equal(sample["pixel_values"][0], sample["pixel_values"][1])
    batch = Collator(processor.tokenizer.pad_token_id)([sample, dataset[1]])
    assert len(batch["input_ids"]) == 3 and len(batch["pixel_values"]) == 3
    # Their loss is that over all answer tokens of the record, whatever the sequence: a closed formula over single rows.
    expected, count = 0.0, 0
    with torch.no_grad():
        together = model(**batch).loss
        images = [slice(0, 1), slice(1, 3), slice(3, 3)]
        for row, own in zip(range(3), images):
            single = {name: batch[name][row : row + 1] for name in ("input_ids", "labels", "attention_mask")}
            if own.stop > own.start:
                single |= {name: batch[name][own] for name in ("pixel_values", "num_visual_tokens")}
            tokens = int((single["labels"][:, 1:] != IGNORE_INDEX).sum())
            expected, count = expected + float(model(**single).loss) * tokens, count + tokens
    assert together.item() == pytest.approx(expected / count, rel=1e-5)


def test_a_picture_in_a_later_question_is_in_the_sequences_from_there_on(like):
    texts = ("Name a fruit.", "Apple.", "<image>\nAnd this?", "A cat.")
    dataset = LlavaDataset([record(*texts, image="img0_336x336.png")], like(REWRITES), image_folder=GOLDENS / "images")
    sample = dataset[0]
    assert len(sample["lengths"]) == 2 and len(sample["pixel_values"]) == 1
    placeholders = (sample["input_ids"] == dataset.processor.image_token_id).split(sample["lengths"].tolist())
    assert [int(row.sum()) for row in placeholders] == [0, 576]


def test_sequences_are_cut_each_and_images_never(like):
    dataset = LlavaDataset(
        [record("<image>\nWhat?", "A dog. " * 99, "And?", "No. " * 99, image="img0_336x336.png")],
        like(REWRITES),
        image_folder=GOLDENS / "images",
        max_length=700,
    )
    assert dataset[0]["lengths"].tolist() == [700, 700]


def test_what_is_shown_is_what_is_supervised(like, loaded):
    model, processor = loaded["llava15-m3"]
    dataset = LlavaDataset(
        [record("<image>\nWhat?", "A dog.", "Its color?", "Brown.", image="img0_336x336.png")],
        processor,
        image_folder=GOLDENS / "images",
    )
    text = shown(dataset[0], processor)
    assert re.search(
        r"USER: <image>\*576 ?\nWhat\? ASSISTANT:⟦ A dog\.</s>⟧USER: Its color\? ASSISTANT:⟦ Brown\.</s>⟧$", text
    )
    dataset.processor = like(REWRITES)
    text = shown(dataset[0], dataset.processor)
    assert re.findall("⟦(.*?)⟧", text) == ["A dog.</s>", "Brown.</s>"] and text.count("\n--\n") == 1


def run(checkpoint, folder, records, *more, template=None):
    copy = folder / "checkpoint"
    if not copy.exists():
        shutil.copytree(checkpoint, copy)
    if template is not None:
        (copy / "chat_template.jinja").write_text(template)
    (folder / "data.json").write_text(json.dumps(records))
    words = ["--model_name_or_path", copy, "--data_path", folder / "data.json", "--output_dir", folder / "out"]
    words += ["--image_folder", GOLDENS / "images", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no"]
    return main(list(map(str, [*words, "--max_steps", 1, "--matryoshka_scales", 1, "--scale_choice", "fixed", *more])))


PICTURED = record("<image>\nWhat?", "A dog.", "Its color?", "Brown.", image="img0_336x336.png", id="a")


def test_a_template_that_drops_answers_ends_the_run_before_the_model_is_loaded(
    converted, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("m3_training.finetune.AutoModelForImageTextToText", None)
    template, message = DROPPING["an answer"]
    assert run(converted["llava15-m3"], tmp_path, [PICTURED] * 3, template=template) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("m3-train: None of the first 3 record(s) can be used. record 0 ('a'): the chat template")
    assert re.search(message, error) and not (tmp_path / "out").exists()


def test_a_command_that_trained_on_nothing_fails(converted, tmp_path, capsys):
    nothing = [record("What follows ASSISTANT: here?", "A dog.")] * 2
    assert run(converted["llava15-m3"], tmp_path, nothing, "--template", "v1") == 1
    assert "m3-train: No token of an answer was trained on in any step" in capsys.readouterr().err
    assert not (tmp_path / "out" / "final").exists()


def test_a_run_says_that_it_adds_an_end_and_shows_a_record(converted, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert run(converted["llava15-m3"], tmp_path, [PICTURED], template=KINDS["llava-1.5"].template) == 0
    assert "the chat template writes no end of a turn: </s> is added after each answer, and supervised" in caplog.text
    assert "⟦ A dog.</s>⟧" in caplog.text


def test_records_are_shown_and_nothing_is_trained(converted, tmp_path, capsys):
    records = [PICTURED, {**PICTURED, "image": "none.png", "id": "b"}, PICTURED]
    assert run(converted["llava15-m3"], tmp_path, records, "--show", 2) == 0
    shown = capsys.readouterr().out
    assert "record 0 ('a'):" in shown and "⟦ A dog.</s>⟧" in shown
    assert "record 1 ('b'): there is no picture" in shown and "record 2" not in shown
    assert not (tmp_path / "out").exists()
    assert run(converted["llava15-m3"], tmp_path, records[1:2], "--show", 2) == 1
    assert run(converted["llava15-m3"], tmp_path, records, "--show", -1) == 1


def test_a_record_whose_text_the_template_changes_is_refused_alone(like):
    template = KINDS["qwen2-vl"].template.replace("{{ m.content }}", "{{ m.content | replace('bad', 'good') }}")
    template = template.replace("<|im_start|>", "[").replace("<|im_end|>", "</s>")
    dataset = LlavaDataset([record("Hi", "a bad word"), record("Ho", "a word")], like(template))
    assert dataset[0]["input_ids"].tolist() == dataset[1]["input_ids"].tolist()
    assert dataset.notes["skipped"] == [0]
    with pytest.raises(BadSampleError, match=r"record 0: the chat template changes the text of turn 2 \(assistant\)"):
        dataset.sample(0)
