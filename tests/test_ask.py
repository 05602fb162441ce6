"""m3-ask: answers, compares, and says what is wrong in one line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDENS, picture
from hub_server import running_hub
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import modeling_m3
from modeling_m3.__main__ import app
from modeling_m3.processing_m3 import MAKES_TEXT_PLAIN
from modeling_m3.questions import check_question


PICTURE = str(GOLDENS / "images" / "photo_400x266.png")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def expected_answer(model, processor, scale):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=picture("photo_400x266.png"), text=text, num_visual_tokens=scale, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(generated, skip_special_tokens=True)


def test_the_answer_is_that_of_generate(converted, loaded):
    result = run(
        PICTURE, "What is this?", "--model", converted["llava15-m3"], "--num-visual-tokens", 36, "--max-new-tokens", 6
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == expected_answer(*loaded["llava15-m3"], 36).strip()


def test_compare_answers_at_every_scale(converted, loaded):
    result = run(PICTURE, "What is this?", "--model", converted["llava-next-m3"], "--compare", "--max-new-tokens", 6)
    assert result.exit_code == 0, result.output
    rows = [re.match(r" +(\d+) +([\d.]+) s +([\d.]+) s  (.*)", line) for line in result.stdout.splitlines()[1:]]
    tokens = {int(row[1]): row[4] for row in rows if row}
    assert list(tokens) == [4, 24, 102, 372, 1464]  # of 1, 9, 36, 144, 576 per tile; 102 and 1464 stand in the goldens
    assert tokens[1464] == " ".join(expected_answer(*loaded["llava-next-m3"], 576).split())
    assert all(0 < float(row[2]) <= float(row[3]) for row in rows if row)


def test_it_streams_as_a_command(converted):
    command = [sys.executable, "-m", "modeling_m3", PICTURE, "What is this?", "--model", str(converted["llava15-m3"])]
    result = subprocess.run([*command, "--max-new-tokens", "4"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["nothing.png", "?"], "There is no picture at nothing.png"),
    ([__file__, "?"], ".*test_ask.py is not a picture that PIL can open"),
    (["file:///nothing.png", "?"], "There is no picture at file:///nothing.png"),
    (["http://127.0.0.1:9/a.png", "?"], "Cannot load http://127.0.0.1:9/a.png: "),
    (["https://[", "?"], r"Cannot load https://\[: "),
    *(([PICTURE, question], "There is no question yet: write one first") for question in ("", " \n\t", "\u3000\u200b")),
    (["nothing.mp4", ""], "There is no question yet"),
    ([PICTURE, "Qu\udce9?"], r"The question holds U\+DCE9, half of a character"),  # as of a shell that is not in UTF-8
    ([PICTURE, "?", "--num-visual-tokens", "100"], r"100.*\[1, 9, 36, 144, 576\]"),
    ([PICTURE, "?", "--device", "abacus"], "abacus"),
    ([PICTURE, "?", "--device", "cuda:99"], "cannot use 'cuda:99' here"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(arguments, message, converted):
    result = run(*arguments, "--model", converted["llava15-m3"])
    assert result.exit_code == 1
    assert re.fullmatch(rf"m3-ask: .*{message}.*\n", result.stderr)
    assert not result.stdout


@pytest.mark.parametrize(("model", "message"), [
    (GOLDENS / "images", "no config.json"),
    (GOLDENS / "openai" / "clip-vit-tiny-patch14-336", "model_type 'clip' is no LLaVA"),
    ("./nothing", "There is no folder ./nothing"),
])  # fmt: skip
def test_a_folder_that_is_no_checkpoint(model, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    result = run(PICTURE, "?", "--model", model)
    assert result.exit_code == 1
    assert re.fullmatch(rf"m3-ask: .*{re.escape(message)}.*\n", result.stderr)


def test_a_truncated_picture(converted, tmp_path):
    half = tmp_path / "half.png"
    half.write_bytes((GOLDENS / "images" / "img1_640x480.png").read_bytes()[:50_000])
    result = run(half, "?", "--model", converted["llava15-m3"])
    assert result.exit_code == 1 and "half.png" in result.stderr


def test_a_picture_on_the_web(converted):
    options = ("What is this?", "--model", converted["llava15-m3"], "--max-new-tokens", 6)
    with running_hub() as hub:
        files = {"photo.png": Path(PICTURE).read_bytes(), "page.html": b"<html></html>"}
        hub.commits["someone/pictures"] = [files]
        folder = f"{hub.endpoint}/someone/pictures/resolve/main"
        answer = run(f"{folder}/photo.png", *options)
        assert answer.exit_code == 0, answer.output
        assert answer.stdout == run(PICTURE, *options).stdout
        for name in ("page.html", "missing.png"):
            result = run(f"{folder}/{name}", *options)
            assert result.exit_code == 1
            assert re.fullmatch(rf"m3-ask: What {folder}/{name} leads to is not a picture .*\n", result.stderr)


@pytest.mark.parametrize("question", ["What does <image> mean?", "Is this </s> a cat?"])
def test_a_question_is_text(question, converted, loaded):
    model, processor = loaded["llava15-m3"]
    result = run(PICTURE, question, "--model", converted["llava15-m3"], "--num-visual-tokens", 9, "--max-new-tokens", 6)
    if not MAKES_TEXT_PLAIN:
        assert result.exit_code == 1 and not result.stdout
        assert re.fullmatch(r"m3-ask: The question holds (<image>|</s>), .* transformers 5\.24 .*\n", result.stderr)
        return
    assert result.exit_code == 0, result.output
    content = [{"type": "image", "image": picture("photo_400x266.png")}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": 9},
        sanitize_control_tokens=True,  # tests/test_whole_prompts.py shows what that makes of the question
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 9
    generated = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert result.stdout.strip() == processor.decode(generated, skip_special_tokens=True).strip()


def test_m3_tiny_says_what_it_was_trained_on():
    scene, question = str(Path(__file__).parent / "fixtures" / "scene.png"), "What color is the large circle?"
    asked = run(scene, question, "--compare", "--max-new-tokens", 4)
    assert asked.exit_code == 0 and "orange" in asked.stdout
    assert re.fullmatch(r"m3-ask: this is m3-tiny, .* photographs .* --model\.\n", asked.stderr)
    for options in (("--quiet",), ("--model", modeling_m3.default_checkpoint())):
        asked = run(scene, question, "--max-new-tokens", 4, *options)
        assert asked.stdout.strip() == "orange" and not asked.stderr


BLANKS = " \t\n\r\x0b\x1f\x00\x85\xa0\u00ad\u115f\u1680\u180e\u2003\u200b\u200d\u200e\u2028\u2060\u2800\u3000\u3164\ufe0f\ufeff"


@given(
    blank=st.text(BLANKS),
    shown=st.characters(categories=["L", "N", "P", "S"], exclude_characters=BLANKS + "\u1160\uffa0\u17b4\u17b5"),
)
def test_a_question_is_what_can_be_seen(blank, shown):
    with pytest.raises(ValueError, match="no question"):
        check_question(blank)
    assert check_question(blank + shown + blank) == blank + shown + blank
    with pytest.raises(ValueError, match="no question"):
        check_question(None)


def test_wrong_usage_is_status_2():
    assert run(PICTURE).exit_code == 2
    assert run(PICTURE, "?", "--model", "m3-demo", "--compare", "--num-visual-tokens", 36).exit_code == 2


def test_a_truncated_weight_file(converted, tmp_path):
    broken = shutil.copytree(converted["llava15-m3"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:5000])
    result = run(PICTURE, "?", "--model", broken)
    assert result.exit_code == 1 and re.fullmatch(r"m3-ask: .*\n", result.stderr)
