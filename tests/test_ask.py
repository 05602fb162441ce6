"""m3-ask: answers, compares, and says what is wrong in one line."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import GOLDENS, picture
from typer.testing import CliRunner

from modeling_m3.__main__ import app


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
    ([__file__, "?"], "Cannot read .*test_ask.py as a picture"),
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
    (GOLDENS / "llava15-m3", "original LLaVA checkpoint; convert it first: m3-convert"),
    (GOLDENS / "images", "no config.json"),
    (GOLDENS / "openai" / "clip-vit-tiny-patch14-336", "its model_type is 'clip'"),
    ("./nothing", "There is no folder ./nothing"),
])  # fmt: skip
def test_a_folder_that_is_no_m3_checkpoint(model, message):
    result = run(PICTURE, "?", "--model", model)
    assert result.exit_code == 1
    assert re.fullmatch(rf"m3-ask: .*{re.escape(message)}.*\n", result.stderr)


def test_a_truncated_picture(converted, tmp_path):
    half = tmp_path / "half.png"
    half.write_bytes((GOLDENS / "images" / "img1_640x480.png").read_bytes()[:50_000])
    result = run(half, "?", "--model", converted["llava15-m3"])
    assert result.exit_code == 1 and "half.png" in result.stderr


def test_wrong_usage_is_status_2():
    assert run(PICTURE).exit_code == 2
    assert run(PICTURE, "?", "--model", "m3-demo", "--compare", "--num-visual-tokens", 36).exit_code == 2


def test_a_truncated_weight_file(converted, tmp_path):
    broken = shutil.copytree(converted["llava15-m3"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:5000])
    result = run(PICTURE, "?", "--model", broken)
    assert result.exit_code == 1 and re.fullmatch(r"m3-ask: .*\n", result.stderr)
