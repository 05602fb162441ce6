"""m3-demo without its page: a checkpoint in this process, chats and their caches, files, URLs, and what is drawn as HTML."""

import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import torch
from conftest import CHECKPOINTS
from hypothesis import given, settings, strategies
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

import modeling_m3
from benchmarks.roofline import analyze
from m3_evaluation import operations
from m3_serving.demo import local_model, people, rendering
from m3_serving.demo.asking import AUTO, Answer, Compared, Cost, Message, Person, Picture, Settings
from m3_serving.demo.chat_cache import ChatCache
from m3_serving.demo.loading import Loading
from m3_serving.demo.local_model import CHATS_AT_MOST, LocalModel
from m3_serving.demo.people import People, private_folder
from m3_serving.demo.stepwise import StepwiseAnswer
from modeling_m3 import visual_tokens
from modeling_m3.processing_m3 import MAKES_TEXT_PLAIN


pytestmark = pytest.mark.demo
SCENE = Path(__file__).parent / "fixtures" / "scene.png"
QUESTION = "What is in the picture?\nSay it 'briefly'."
SHORT = Settings(max_new_tokens=4)


def picture(number, key="scene", image=None):
    return Picture(Image.open(SCENE).convert("RGB") if image is None else image, f"{key}.png", number, key)


def last(answers):
    *_, answer = answers
    return answer


@pytest.fixture(scope="module")
def models(converted):
    """By name, (LocalModel, the same checkpoint loaded by transformers and its processor)."""
    held = {}
    for name in ("m3-tiny", *CHECKPOINTS):
        folder = modeling_m3.default_checkpoint() if name == "m3-tiny" else converted[name]
        model = LocalModel(None if name == "m3-tiny" else str(folder), dtype="float32")
        model.load(lambda words, share: None)
        reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        held[name] = model, reference, AutoProcessor.from_pretrained(folder)
    return held


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """m3-tiny, whose answers never end by themselves."""
    model = LocalModel()
    model.load(lambda words, share: None)
    model.model.generation_config.eos_token_id = None
    return model


def inputs_of(processor, messages, system=""):
    chat = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for message in messages:
        media = [{"type": "image", "image": held.image} for held in message.pictures]
        chat.append({"role": message.role, "content": [*media, {"type": "text", "text": message.text}]})
    numbers = [held.num_visual_tokens for message in messages for held in message.pictures]
    return processor.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": numbers} if numbers else {},
    )


def generated(model, processor, messages, how):
    inputs = inputs_of(processor, messages, how.system)
    ids = model.generate(**inputs, do_sample=False, num_beams=how.num_beams, max_new_tokens=how.max_new_tokens)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_auto_is_the_checkpoints_word():
    assert AUTO == visual_tokens.AUTO


def test_settings_that_cannot_be_are_refused_by_name():
    for name, value in {"max_new_tokens": 0, "num_beams": 0, "temperature": -0.5}.items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Settings(**{name: value})
    with pytest.raises(ValueError, match="2 beams"):
        Settings(num_beams=2, temperature=1.0)


@pytest.mark.parametrize("name", ["m3-tiny", *CHECKPOINTS])
def test_answers_are_those_of_generate(name, models):
    ours, model, processor = models[name]
    how = Settings(max_new_tokens=5)
    for number in [*ours.scales, AUTO]:
        messages = [Message("user", QUESTION, (picture(number),))]
        answers = list(ours.answer(messages, how, Person()))
        assert answers[-1].text == generated(model, processor, messages, how)
        assert all(answers[-1].text.startswith(answer.text) for answer in answers)
        assert answers[-1].finished in ("stop", "length") and not any(answer.finished for answer in answers[:-1])
    two = (picture(9), picture(36, "other", Image.new("RGB", (90, 40), "red")))
    for messages, each in (
        ([Message("user", "Hello?")], how),
        ([Message("user", QUESTION, two)], replace(how, system="Answer in one word.")),
        ([Message("user", QUESTION, two[:1])], replace(how, num_beams=3)),
        ([Message("user", QUESTION, (picture(AUTO),))], replace(how, num_beams=2)),
    ):
        answer = last(ours.answer(messages, each, Person()))
        assert answer.text == generated(model, processor, messages, each)


@pytest.mark.parametrize(("quantize", "bits"), [("nf4", 4), ("int8", 8)])
def test_fewer_bits_answer_as_transformers_own(quantize, bits):
    pytest.importorskip("bitsandbytes")
    ours, how = LocalModel(quantize=quantize), Settings(max_new_tokens=5)
    ours.load(lambda words, share: None)
    assert f"float32 with a language model in {bits} bits" in ours.facts and ours.facts.startswith("2.8 million")
    folder = modeling_m3.default_checkpoint()
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    as_stored = {4: four, 8: {"load_in_8bit": True}}[bits]
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**as_stored))
    for number in (1, 36):  # bfloat16, in which nf4 computes, is slow on a CPU
        messages = [Message("user", "What does the code say?", (picture(number),))]
        answer = last(ours.answer(messages, how, Person()))
        assert answer.text == generated(model, ours.processor, messages, how)


@pytest.mark.parametrize("name", ["m3-tiny", *CHECKPOINTS])
def test_prefill_flops_are_the_analysis(name, models):
    ours, _, processor = models[name]
    image = picture(1).image
    flops = {}
    for number in ours.scales:
        answer = last(ours.answer([Message("user", QUESTION, (picture(number),))], SHORT, Person()))
        ids = inputs_of(processor, [Message("user", QUESTION, (picture(number),))])["input_ids"][0]
        visual = int((ids == processor.image_token_id).sum())
        assert (answer.cost.visual_tokens, answer.cost.prompt_tokens) == (visual, len(ids))
        shape = {"image_size": image.size[::-1]} if name == "llava-next-m3" else {}
        expected = analyze(ours.config, "A100", [number], prompt_tokens=len(ids) - visual, new_tokens=1, **shape)
        expected = expected["precisions"]["fp16"]
        flops[number] = expected["vision"]["flops"] + expected["scales"][0]["prefill"]["flops"]
        assert answer.cost.prefill_flops == flops[number]
    auto = last(ours.answer([Message("user", QUESTION, (picture(AUTO),))], SHORT, Person()))
    assert auto.cost.prefill_flops >= flops[auto.num_visual_tokens[0]]
    beams = last(ours.answer([Message("user", QUESTION, (picture(9),))], replace(SHORT, num_beams=2), Person()))
    tiles = flops[9] - sum(o.times * o.flops for o in operations.language_model(ours.config, 1, *_lengths(processor)))
    text = sum(o.times * o.flops for o in operations.language_model(ours.config, 2, *_lengths(processor)))
    assert beams.cost.prefill_flops == tiles + text, "the prompt for every beam, and nothing of the tokens after it"


def _lengths(processor):
    length = inputs_of(processor, [Message("user", QUESTION, (picture(9),))])["input_ids"].shape[1]
    return length, length


def chats(seed, scales):
    """A chat's prompts, as its page would ask them: turns, other words, other pictures, and steps back."""
    chance = random.Random(seed)
    scene = picture(1).image
    images = {
        "scene": scene,
        "same pixels": scene.copy(),
        "red": Image.new("RGB", (64, 64), "red"),
        "wide": scene.resize((120, 50)),
    }

    def message():
        keys = chance.choices(list(images), k=chance.choice((0, 1, 1, 2)))
        held = tuple(picture(chance.choice(scales), key, images[key]) for key in keys)
        return Message("user", chance.choice(("What is it?", "And the colour?", "Is it red", "Where")), held)

    said = [message()]
    while True:
        yield list(said), (answered := [])
        kind = chance.choice(("next", "next", "next", "again", "swap", "back"))
        with_pictures = [i for i, each in enumerate(said) if each.pictures]
        if kind == "again":
            said[-1] = message()
        elif kind == "swap" and with_pictures:
            at = chance.choice(with_pictures)
            other = chance.choice([key for key in images if key != said[at].pictures[0].key])
            swapped = replace(said[at].pictures[0], key=other, image=images[other], name=other)
            said[at] = replace(said[at], pictures=(swapped, *said[at].pictures[1:]))
        elif kind == "back" and len(said) >= 3:
            del said[chance.randrange(0, len(said) - 1, 2) + 1 :]
        else:
            said += [Message("assistant", answered[0].text), message()]
        if len(said) > 7:
            del said[1:]


@pytest.mark.parametrize("name", ["m3-tiny", *CHECKPOINTS])
def test_chats_that_go_on_answer_as_chats_anew(name, models):
    ours, _, _ = models[name]
    computed = []

    def vision(tiles):
        return sum(o.times * o.flops for o in operations.vision(ours.config, tiles))

    hook = ours.model.model.vision_tower.register_forward_pre_hook(lambda _, args: computed.append(len(args[0])))
    asked, fewer, how = 0, 0, Settings(max_new_tokens=3)
    try:
        for seed in range(2):
            person, before = Person(), []
            for (messages, answered), _ in zip(chats(seed, ours.scales[:3]), range(7)):
                computed.clear()
                answer = last(ours.answer(messages, how, person))
                tiles = sum(computed)
                anew = last(ours.answer(messages, how, Person()))
                numbers = tuple(held.num_visual_tokens for message in messages for held in message.pictures)
                assert (answer.text, answer.finished) == (anew.text, anew.finished)
                assert answer.num_visual_tokens == anew.num_visual_tokens == numbers
                assert answer.cost.visual_tokens == anew.cost.visual_tokens
                assert answer.cost.prompt_tokens == anew.cost.prompt_tokens
                labels = labels_of(ours.processor, messages)
                held = shared(before, labels)
                before = labels + person.kept.ids[len(labels) :]
                new = operations.language_model(ours.config, 1, len(labels) - held, len(labels))
                expected = sum(o.times * o.flops for o in new) + (vision(tiles) if tiles else 0)
                assert answer.cost.prefill_flops == expected
                assert (answer.cost.prefill_flops < anew.cost.prefill_flops) == (held > 0)
                asked, fewer = asked + 1, fewer + (held > 0)
                answered.append(answer)
    finally:
        hook.remove()
    assert asked == 14 and fewer > 7


def labels_of(processor, messages):
    """Every token of a prompt; those of a picture by the picture, and which of its tokens they are."""
    inputs = inputs_of(processor, messages)
    pictures = [(held.key, held.num_visual_tokens) for message in messages for held in message.pictures]
    counts = [processor.image_layout(inputs, i).count(number) for i, (_, number) in enumerate(pictures)]
    return labelled(inputs["input_ids"][0].tolist(), pictures, counts, processor.image_token_id)


def labelled(ids, pictures, counts, image):
    of_pictures = iter([(held, part, count) for held, count in zip(pictures, counts) for part in range(count)])
    return [next(of_pictures) if token == image else token for token in ids]


def shared(held, asked):
    """The longest beginning of `asked` but for its last token that `held` begins with, and that cuts no picture."""
    for length in range(min(len(held), len(asked) - 1), -1, -1):
        cuts = isinstance(asked[length], tuple) and asked[length][1] > 0
        if held[:length] == asked[:length] and not cuts:
            return length
    raise AssertionError("nothing at all is always shared")


def test_caches_of_so_many_people_are_kept(models):
    ours = models["m3-tiny"][0]
    everybody = [Person() for _ in range(CHATS_AT_MOST + 3)]
    for person in everybody:
        last(ours.answer([Message("user", "Hello")], SHORT, person))
    assert [person.kept is not None for person in everybody] == [False] * 3 + [True] * CHATS_AT_MOST
    last(ours.answer([Message("user", "Hello")], SHORT, everybody[3]))
    last(ours.answer([Message("user", "Hello")], SHORT, Person()))
    assert everybody[3].kept is not None and everybody[4].kept is None, "the one who asked longest ago is forgotten"
    leaving = Person()
    for _ in ours.answer([Message("user", "Hello")], SHORT, leaving):
        leaving.is_gone = True
    assert leaving.kept is None, "nothing is kept of who left while the answer came"


@pytest.mark.parametrize("name", ["m3-tiny", *CHECKPOINTS])
def test_a_comparison_is_the_answers_by_themselves_and_they_come_together(name, models):
    ours, _, _ = models[name]
    how = Settings(max_new_tokens=5)
    seen = list(ours.compare(picture(1), QUESTION, how, Person()))
    assert list(seen[-1].answers) == [*ours.scales, AUTO]
    for number, answer in seen[-1].answers.items():
        alone = last(ours.answer([Message("user", QUESTION, (picture(number),))], how, Person()))
        assert (answer.text, answer.finished, answer.num_visual_tokens) == (
            alone.text,
            alone.finished,
            alone.num_visual_tokens,
        )
        assert answer.cost.visual_tokens == alone.cost.visual_tokens
        assert answer.cost.prefill_flops + seen[-1].encoding_flops == alone.cost.prefill_flops
    for before, after in zip(seen[len(ours.scales) + 1 :], seen[len(ours.scales) + 2 :]):
        for number in before.answers:
            assert after.answers[number].cost.answer_tokens - before.answers[number].cost.answer_tokens <= 1


def test_a_row_beyond_the_context_has_its_sentence(models, monkeypatch):
    ours = models["m3-tiny"][0]
    monkeypatch.setattr(ours.config.text_config, "max_position_embeddings", 200)
    answers = last(ours.compare(picture(1), QUESTION, SHORT, Person())).answers
    assert answers[576].finished == "error" and "200" in answers[576].error
    assert all(answers[number].text and not answers[number].error for number in (1, 9, 36, 144))
    shown = rendering.compared_html(Compared(answers))
    assert "200" in shown and "Marked" not in shown, "there is nothing to compare with"
    with pytest.raises(ValueError, match="200"):
        last(ours.answer([Message("user", QUESTION, (picture(576),))], SHORT, Person()))
    assert last(ours.answer([Message("user", QUESTION, (picture(1),))], SHORT, Person())).text


def test_who_closes_a_comparison_leaves_nothing_behind(endless):
    before, long = set(threading.enumerate()), Settings(max_new_tokens=200)
    for rounds in (1, 3, 9):
        comparing = endless.compare(picture(1), QUESTION, long, Person())
        for _ in range(rounds):
            next(comparing)
        comparing.close()
        assert set(threading.enumerate()) == before
    answering = endless.answer([Message("user", QUESTION, (picture(1),))], long, Person())
    next(answering)
    answering.close()
    assert set(threading.enumerate()) == before
    begin = time.monotonic()
    next(endless.answer([Message("user", QUESTION, (picture(1),))], SHORT, Person()))
    assert time.monotonic() - begin < 5


def test_who_stops_has_what_came_so_far(endless):
    long, person = Settings(max_new_tokens=300), Person()
    whole = last(endless.answer([Message("user", QUESTION, (picture(9),))], replace(long, max_new_tokens=20), Person()))
    seen = []
    for seen_now in endless.answer([Message("user", QUESTION, (picture(9),))], long, person):
        seen.append(seen_now)
        if len(seen) == 5:
            person.stop.set()
    assert seen[-1].finished == "stopped" and 5 <= seen[-1].cost.answer_tokens <= 6
    assert whole.finished == "length" and whole.text.startswith(seen[-1].text)
    person.stop.clear()
    comparing = endless.compare(picture(1), QUESTION, long, person)
    next(comparing)
    person.stop.set()
    assert {answer.finished for answer in last(comparing).answers.values()} == {"stopped"}


def test_stepwise_time_is_that_of_steps_and_errors_come_out_of_them(endless):
    model, tokenizer = endless.model, endless.processor.tokenizer
    inputs = dict(inputs_of(endless.processor, [Message("user", QUESTION, (picture(9),))]))
    call = {**inputs, "do_sample": False, "max_new_tokens": 5}
    begin, paused = time.perf_counter(), 0.0
    step = StepwiseAnswer(model, tokenizer, threading.Event(), **call)
    tokens = []
    while step.step():
        tokens.append(step.tokens)
        time.sleep(0.1)
        paused += 0.1
    assert tokens == [1, 2, 3, 4, 5] and not step.step(), "a step after the end is none"
    assert 0 < step.first_token_seconds < step.seconds <= time.perf_counter() - begin - paused
    wrong = StepwiseAnswer(model, tokenizer, threading.Event(), **call, no_such_argument=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="no_such_argument"):
            wrong.step()
    wrong.close()
    closed = StepwiseAnswer(model, tokenizer, threading.Event(), **call)
    assert closed.step()
    closed.close()
    assert not closed.step()


class Scripted:
    """`generate` of tokens that are given."""

    def __init__(self, ids):
        self.ids = ids

    def generate(self, input_ids, streamer, stopping_criteria, **_):
        streamer.put(input_ids)
        for token in self.ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return SimpleNamespace(sequences=torch.cat([input_ids, torch.tensor([self.ids])], dim=1))


@pytest.mark.parametrize("text", ["one\n two\n  three four", " a , b .\n\n c", "中文 字\n x", "tab\tand 🙂 end"])
@pytest.mark.parametrize("name", ["m3-tiny", "llava15-m3"])
def test_text_comes_word_by_word_with_its_spaces(name, text, models):
    tokenizer = models[name][2].tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = StepwiseAnswer(Scripted(ids), tokenizer, threading.Event(), input_ids=torch.tensor([[1, 5]]))
    whole, seen = tokenizer.decode(ids), []
    while step.step():
        seen.append(step.text)
    assert step.text == whole and all(whole.startswith(part) for part in seen) and seen != [""] * len(seen)


IMAGE = 99
PARTS = strategies.lists(
    strategies.one_of(
        strategies.integers(1, 3), strategies.tuples(strategies.sampled_from("ab"), strategies.integers(1, 3))
    ),
    max_size=7,
)


def flat(parts):
    ids, pictures, counts = [], [], []
    for part in parts:
        if isinstance(part, tuple):
            pictures.append(part)
            counts.append(part[1])
            ids += [IMAGE] * part[1]
        else:
            ids.append(part)
    return ids, pictures, counts


@settings(deadline=None, max_examples=200)
@given(PARTS, PARTS, strategies.integers(0, 7), strategies.integers(0, 3))
def test_what_a_cache_shares_with_a_prompt(first, second, common, answer):
    kept, pictures, of_kept = flat(first)
    ids, asked, counts = flat([*first[:common], *second, 1])
    cache = ChatCache(kept + [2] * answer, pictures, None)
    length, seen = cache.shared_with(ids, asked, counts, IMAGE)
    labels = labelled(ids, asked, counts, IMAGE)
    assert length == shared([*labelled(kept, pictures, of_kept, IMAGE), *[2] * answer], labels)
    assert seen == len([label for label in labels[:length] if isinstance(label, tuple) and label[1] == 0])


ODD = [
    """Is it "red"\nor 'blue'? \\n and \\\\, {braces} and %s, \'\'\'\\ """,
    *(["What is <image> and </s>?"] if MAKES_TEXT_PLAIN else []),
]


@pytest.mark.parametrize("name", ["m3-tiny", "llava-next-m3"])
def test_the_python_lines_print_the_answers(name, models, converted, tmp_path, monkeypatch, capsys):
    ours = models[name][0]
    Image.open(SCENE).save(tmp_path / "the 'scene'.png")
    if name != "m3-tiny":
        (tmp_path / name).symlink_to(converted[name])
    monkeypatch.chdir(tmp_path)
    held = replace(picture(9), name="the 'scene'.png")
    how = Settings(max_new_tokens=6)
    hows = [how, replace(how, system='Answer "briefly".\nAlways.', num_beams=2)]
    odd = ODD if name == "m3-tiny" else []
    for question, each in [*((question, how) for question in odd), *((QUESTION, each) for each in hows[1:])]:
        numbers = [1, AUTO] if question == QUESTION else [9]
        lines = ours.as_python(held, question, each, numbers)
        assert not re.search(r"""["'](/|[A-Z]:)""", lines) and str(tmp_path) not in lines
        exec(compile(lines, "lines", "exec"), {})
        expected = ""
        for number in numbers:
            message = Message("user", question, (replace(held, num_visual_tokens=number),))
            expected += f"{number} {last(ours.answer([message], each, Person())).text}\n"
        assert capsys.readouterr().out == expected
        assert ("sanitize" in lines) == ("<image>" in question)


def test_marks_in_a_question_are_text_or_refused(models):
    ours = models["m3-tiny"][0]
    messages = [Message("user", "What is <image>?", (picture(9),))]
    if MAKES_TEXT_PLAIN:
        assert last(ours.answer(messages, SHORT, Person())).cost.visual_tokens == 9
    else:
        with pytest.raises(ValueError, match="<image>.*5.24"):
            last(ours.answer(messages, SHORT, Person()))


SCRIPT = "<script>alert(1)</script>"


def test_what_is_shown_is_escaped():
    answer = Answer(SCRIPT, Cost(9, 30, 2e9, 0.5, 1.0, 5), (9,), "stop")
    wrong = replace(answer, error=SCRIPT, finished="error")
    shown = [
        rendering.answer_html(answer),
        rendering.problem_html(SCRIPT),
        rendering.notes_html(SCRIPT),
        rendering.cost_html(answer),
        rendering.compared_html(Compared({1: answer, 9: wrong, AUTO: answer})),
        rendering.compared_html(Compared({1: answer, 9: replace(answer, text="other")})),
        *(
            rendering.status_html(SCRIPT, share, ready, error)
            for share, ready, error in [(None, False, ""), (0.5, True, ""), (0.5, False, SCRIPT)]
        ),
    ]
    assert not any("<script" in html for html in shown)
    assert "&lt;script&gt;" in shown[0] and "&lt;script&gt;" in shown[4]


def test_what_differs_is_marked_word_by_word():
    answers = {
        1: Answer("a red bird", finished="stop"),
        9: Answer("a blue bird & sky", finished="length"),
        36: Answer("a red bird", finished="stop"),
        144: Answer("", finished="stop"),
        576: Answer("a blue bird", finished="stop"),
    }
    shown = rendering.compared_html(Compared(answers))
    assert re.findall(r"<mark>(.*?)</mark>", shown) == ["red", " &amp; sky", "red"]
    assert "from the answer at 576" in shown and "(the same)" not in shown
    assert rendering.compared_html(Compared({9: answers[576], 576: answers[576]})).count("(the same)") == 1
    assert "<mark>" not in rendering.compared_html(Compared({**answers, AUTO: Answer("a")})), "not before all are there"


def test_the_plot_names_every_number():
    pytest.importorskip("matplotlib")
    numbers = [1, 9, 36, 144, 576]
    answers = {n: Answer("x", Cost(n * 5, 99, 1e9, n / 100, n / 10, 4), (n,), "stop") for n in numbers}
    shown = rendering.plot_svg(Compared({**answers, AUTO: answers[9]}))
    for number in numbers:
        assert f">{number * 5}</text>" in shown
        assert f"{number * 5} visual tokens: {number / 100:.3g} s, {number / 10:.3g} s" in shown
    assert shown.startswith("<svg") and "currentColor" in shown and "#010203" not in shown


def test_units():
    flops = [0, 4e5, 2.2e9, 999.6e9, 1e12, 1.234e15, None]
    assert [rendering._flops(value) for value in flops] == [
        "0 MFLOPs",
        "0.4 MFLOPs",
        "2.2 GFLOPs",
        "1,000 GFLOPs",
        "1 TFLOPs",
        "1,230 TFLOPs",
        "–",
    ]
    assert [rendering._seconds(value) for value in (0.0012, 0.0999, 0.1, 75, None)] == [
        "1 ms",
        "100 ms",
        "0.10 s",
        "75.00 s",
        "–",
    ]


def test_nothing_known_is_shown_as_that():
    unknown = Cost(None, None, None, None, 0.0, None)
    for answer in (
        Answer(),
        Answer(cost=unknown),
        Answer(cost=unknown, finished="stop"),
        Answer(finished="error"),
        None,
    ):
        assert "–" in rendering.cost_html(answer) and rendering.answer_html(answer)
        if answer is not None:
            for number in (9, AUTO):
                assert rendering.compared_html(Compared({number: answer, 576: answer}))
    assert rendering.compared_html(Compared({})) and rendering.compared_html(None)
    assert rendering.plot_svg(Compared({9: Answer(cost=unknown)})) == ""
    assert unknown.tokens_per_second is None and Cost(answer_tokens=1, first_token_seconds=1).tokens_per_second is None
    assert Cost(first_token_seconds=1.0, seconds=3.0, answer_tokens=5).tokens_per_second == 2


def session(name):
    return SimpleNamespace(session_hash=name)


def test_files_go_with_the_last_who_has_them(tmp_path):
    folder, outside = tmp_path / "files", tmp_path / "of somebody"
    for place in ("examples", "upload"):
        (folder / place).mkdir(parents=True)
    own, shared, alone = folder / "examples/own.png", folder / "upload/shared.png", folder / "upload/alone.png"
    for file in (own, outside):
        file.write_text("")
    everybody = People(folder)
    everybody.keep_what_is_there()
    for file in (shared, alone):
        file.write_text("")
    one, two = session("1"), session("2")
    roundabout = folder / "upload" / ".." / "examples" / "own.png"
    person = everybody.of(one, str(own), str(shared), str(alone), str(outside), str(roundabout), None)
    assert everybody.of(one) is person and everybody.of(two, str(shared)) is not person
    drawn = everybody.new_file(one, "drawing.png")
    drawn.write_text("")
    everybody.discard(one, str(drawn))
    assert not drawn.parent.exists()
    for file in (own, outside, shared):
        everybody.discard(session("3"), str(file))
    assert own.exists() and outside.exists() and shared.exists()
    person.kept = person.chat = object()
    everybody.forget(one)
    assert person.is_gone and person.stop.is_set() and person.kept is None and person.chat is None
    assert shared.exists() and not alone.exists() and own.exists() and outside.exists()
    everybody.forget(session("nobody"))
    everybody.forget(two)
    assert not shared.parent.exists() and own.exists() and folder.exists()
    everybody.forget(two)


def in_a_private_folder(temporary):
    code = (
        "from m3_serving.demo.people import private_folder; import time\n"
        "with private_folder() as folder: open(folder / 'x', 'w').close(); print(folder, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(temporary)}
    )
    return process, Path(process.stdout.readline().strip())


def test_private_folders_go_and_those_of_the_killed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    others = [tmp_path / name for name in ("m3-demo-", f"x{people.PREFIX}y", f"{people.PREFIX}making")]
    for other in others:
        other.mkdir()
    (others[0] / "lock").touch()
    (others[1] / "lock").touch()
    (killed, left), (living, theirs) = in_a_private_folder(tmp_path), in_a_private_folder(tmp_path)
    try:
        assert (left / "x").exists() and (theirs / "x").exists()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with private_folder() as folder:
            assert not left.parent.exists(), "what the killed one left"
            assert (theirs / "x").exists() and all(other.exists() for other in others)
            assert tempfile.gettempdir() == str(folder) and folder.parent.stat().st_mode & 0o777 == 0o700
            with open(tempfile.mkstemp()[1], "w"):
                pass
        assert tempfile.tempdir == str(tmp_path) and not folder.parent.exists()
        with pytest.raises(KeyError), private_folder() as folder:
            raise KeyError
        assert tempfile.tempdir == str(tmp_path) and not folder.parent.exists()
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()
            process.stdout.close()


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        kind, _, rest = self.path[1:].partition("/")
        self.send_response({"to": 302, "missing": 404}.get(kind, 200))
        if kind == "to":
            self.send_header("Location", rest)
        body = b"x" * 2000 if kind == "large" else b"content"
        self.send_header("Content-Length", str(0 if kind == "to" else len(body)))
        self.end_headers()
        if kind != "to":
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.asked, server.daemon_threads = [], True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def fetching(monkeypatch):
    pytest.importorskip("httpx")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    from m3_serving.demo import fetching

    return fetching


@pytest.fixture
def names(monkeypatch):
    """Names that resolve as a test says; every other is looked up, which for addresses needs no network."""
    known, looked_up, resolve = {}, [], socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        host = host.decode() if isinstance(host, bytes) else host
        looked_up.append(host)
        if host.endswith(".test"):
            if host not in known:
                raise socket.gaierror(socket.EAI_NONAME, "unknown")
            return [entry for address in known[host] for entry in resolve(address, *args, **kwargs)]
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return SimpleNamespace(known=known, looked_up=looked_up)


def test_urls_are_fetched(fetching, site):
    url = f"http://127.0.0.1:{site.server_port}"
    assert fetching.fetch(f" {url}/a/dog.png?size=2 ", 100, False) == (b"content", "dog.png")
    assert fetching.fetch(f"{url}/to//a/cat.png", 100, False)[0] == b"content"
    assert fetching.fetch(url, 100, False) == (b"content", "picture")
    for path, sentence in {"/missing": "answered 404", "/large": "more than 0.0001 MB"}.items():
        with pytest.raises(ValueError, match=sentence):
            fetching.fetch(url + path, 100, False)
    wrong = ["", "dog.png", "file:///etc/passwd", "ftp://x/y", "http://", "http://[::1", "data:,x", "//127.0.0.1/x"]
    for text in wrong:
        with pytest.raises(ValueError, match="is no URL of a picture"):
            fetching.fetch(text, 100, False)
    for public_only in (False, True):
        with pytest.raises(ValueError, match="cannot be had"):
            fetching.fetch(f"http://{'a' * 70}.test/", 100, public_only)
    for text in ("http://127.0.0.1:1/", "http://127.0.0.1:99999/", f"{url}/to/file:///etc/passwd", f"{url}/to/ftp://x"):
        with pytest.raises(ValueError, match="cannot be had"):
            fetching.fetch(text, 100, False)


PRIVATE = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1", "::"]
PRIVATE += [
    "::ffff:127.0.0.1",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "fe80::1",
    "fc00::1",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_page_for_others_fetches_nothing_from_here(address, fetching, site, names):
    names.known["inside.test"] = [address]
    names.known["both.test"] = ["8.8.8.8", address]
    for host in ("inside.test", "both.test", f"[{address}]" if ":" in address else address):
        with pytest.raises(ValueError, match="not a public address"):
            fetching.fetch(f"http://{host}:{site.server_port}/", 100, True)
    assert site.asked == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "localhost", "[::ffff:7f00:1]"])
def test_other_spellings_of_here_are_here(host, fetching, site):
    with pytest.raises(ValueError, match="cannot be had"):
        fetching.fetch(f"http://{host}:{site.server_port}/", 100, True)
    assert site.asked == []


def test_redirects_are_looked_at_too(fetching, site, names, monkeypatch):
    monkeypatch.setattr(fetching, "is_public", lambda address: address in ("127.0.0.1", "127.0.0.9"))
    names.known |= {"outside.test": ["127.0.0.9", "127.0.0.1"], "inside.test": ["::1"], "other.test": ["127.0.0.1"]}
    port = site.server_port
    # The first address has nobody that listens; the redirect is relative.
    assert fetching.fetch(f"http://outside.test:{port}/to//a/b.png", 100, True) == (b"content", "b.png")
    assert site.asked == [(f"outside.test:{port}", "/to//a/b.png"), (f"outside.test:{port}", "/a/b.png")]
    assert names.looked_up.count("outside.test") == 2, "by its name, which TLS needs"
    site.asked.clear()
    assert fetching.fetch(f"http://outside.test:{port}/to/http://other.test:{port}/x", 100, True)[0] == b"content"
    assert site.asked[-1] == (f"other.test:{port}", "/x")
    for target in (f"http://inside.test:{port}/x", f"http://10.0.0.1:{port}/x", f"http://[::1]:{port}/x"):
        site.asked.clear()
        with pytest.raises(ValueError, match="not a public address"):
            fetching.fetch(f"http://outside.test:{port}/to/{target}", 100, True)
        assert len(site.asked) == 1
    with pytest.raises(ValueError, match="there is no host nowhere.test"):
        fetching.fetch("http://nowhere.test/", 100, True)


@pytest.fixture
def guarded():
    """What a raw path, as a client writes it, or a WebSocket is answered, and the paths that reached the application."""
    pytest.importorskip("starlette")
    from m3_serving.demo.guard import Guard

    reached = []

    async def app(scope, receive, send):
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"of the page"})

    def answered(path, kind="http"):
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": f"{kind}.request"}

        scope = {"type": kind, "method": "GET", "path": unquote(path), "raw_path": path.encode(), "headers": []}
        asyncio.run(Guard(app, "/files")(scope, receive, send))
        return sent

    return answered, reached


FILE = "/gradio_api/file="


@pytest.mark.parametrize(
    "path, is_there",
    [
        *((path, True) for path in ("/", "/config", "/theme.css", "/assets/a.js", "/static/x/y.png")),
        *((f"/gradio_api/{path}", True) for path in ("queue/join", "queue/data", "upload", "heartbeat/abc1", "cancel")),
        (f"{FILE}/files/a/b.png", True),
        (f"{FILE}/files/a%20b.png", True),
        (f"{FILE}/files/a/holiday..png", True),
        *(
            (path, False)
            for path in ("/info", "/docs", "/openapi.json", "/login", "/monitoring", "/config/x", "//config")
        ),
        *((f"/gradio_api/{path}", False) for path in ("info", "call/x", "proxy=http://x", "stream/a", "heartbeat/a/b")),
        *(
            (f"{FILE}{path}", False)
            for path in ("/etc/passwd", "/files", "/files2/a", "files/a", "/files.png", "http://x")
        ),
        (f"{FILE}/files/../etc/passwd", False),
        (f"{FILE}/files/%2e%2e/etc/passwd", False),
        (f"{FILE}/files/%2E./etc/passwd", False),
        (f"{FILE}/files/..%2fetc/passwd", False),
        (f"{FILE}/files%2f..%2f..%2fetc/passwd", False),
        (f"{FILE}/files/%252e%252e/etc/passwd", False),
        ("/static/%2e%2e/%2e%2e/etc/passwd", False),
        ("/assets/..%2f..%2fetc/passwd", False),
        ("/static/%252e%252e/etc/passwd", False),
    ],
)
def test_the_server_answers_what_the_page_needs(path, is_there, guarded):
    answered, reached = guarded
    start = answered(path)[0]
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert start["status"] == (200 if is_there else 404) and bool(reached) == is_there
    assert "default-src 'self'" in headers["content-security-policy"]
    assert (headers["referrer-policy"], headers["x-content-type-options"]) == ("no-referrer", "nosniff")


def test_the_server_opens_no_websocket_and_may_start(guarded):
    answered, reached = guarded
    assert answered("/", "websocket") == [{"type": "websocket.close"}] and reached == []
    answered("/", "lifespan")
    assert len(reached) == 1


def test_loading_tells_how_far_it_is(models):
    go, ended, seen = threading.Event(), threading.Event(), []

    class Slow:
        name, scales, default = "slow", [1, 9], 9

        def load(self, tell):
            tell("half", 0.5)
            go.wait(20)

    loading = Loading(Slow, ended.set)
    assert not loading.is_ready
    loading.start()
    for _ in loading.changes(0.01):
        seen.append((loading.words, loading.share))
        if seen[-1] == ("half", 0.5):
            go.set()
    assert ended.wait(20) and loading.is_ready and isinstance(loading.model, Slow) and ("half", 0.5) in seen
    assert len(list(loading.changes())) == 1, "once, where it is done"


def test_a_checkpoint_that_cannot_be_had_is_an_error_that_stays(tmp_path):
    ended = threading.Event()
    loading = Loading(lambda: LocalModel(str(tmp_path / "nowhere")), ended.set)
    loading.start()
    assert len(list(loading.changes(0.01))) >= 1 and ended.wait(20)
    assert not loading.is_ready and loading.error is not None
    assert "nowhere" in loading.sentence and "\n" not in loading.sentence


def test_loading_a_checkpoint_says_so(converted, monkeypatch):
    class Bar(local_model._Bar):
        """Draws every step, where tqdm leaves out those that are quick."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "mininterval": 0})

    monkeypatch.setattr(local_model, "_Bar", Bar)
    told = []
    model = LocalModel(str(converted["llava15-m3"]))
    model.load(lambda words, share: told.append((words, share)))
    assert told[0] == ("Looking for llava15-m3", None) and told[-1][0] == "Warming up"
    assert any(share == 1 for _, share in told), "the bar of its weights"
    assert str(converted["llava15-m3"].parent) not in f"{told}{model.facts}{model.name}"
    assert local_model.transformers_logging.set_tqdm_hook(None) is None, "transformers' bars are its own again"
