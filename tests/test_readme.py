"""The README is run as written: its Python blocks, and its commands but for those that install."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import commands_on_path

import modeling_m3
from modeling_m3.generation_m3 import FOREIGN_NAMES
from modeling_m3.processing_m3 import MAKES_TEXT_PLAIN


REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [block for language, block in BLOCKS if language == "python"]
COMMANDS = [part.strip() for language, block in BLOCKS if language == "bash" for part in block.split("&&")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clone in which the README's commands write what they write."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "tests").symlink_to(REPOSITORY / "tests")
    return folder


def run(arguments, folder):
    environment = {**os.environ, "PATH": commands_on_path(), "HF_HOME": str(folder / "cache")}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.pages
def test_commands(folder):
    ran = []
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "pip" or "pytest" in arguments:
            continue  # installs, or runs this
        result = run([program, *arguments], folder)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        ran.append(program)
    assert ran == ["m3-ask", "m3-ask", "m3-ask", "m3-convert", "m3-convert", "m3-train"]
    for written in ("m3-demo", "m3-next-demo", "m3-demo-trained/final"):
        assert (folder / written / "config.json").is_file()


@pytest.mark.pages
@pytest.mark.parametrize("block", PYTHON, ids=["pipeline", "classes"])
def test_python_blocks(block, folder):
    if not (folder / "m3-demo").exists():
        test_commands(folder)
    result = run(["python", "-c", block], folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    said = [line for line in re.split(r"[\r\n]+", result.stderr) if line and not line.startswith("Loading weights")]
    if MAKES_TEXT_PLAIN:  # older releases' pipeline warns of itself
        assert said == [], "no block warns"


def test_what_m3_tiny_is_said_to_answer():
    model, processor = modeling_m3.load(modeling_m3.default_checkpoint())
    rows = re.search(r"\| ask \| it says \|\n.*?\n((?:\|.*\n)+)", README)[1].splitlines()
    assert len(rows) == 3
    for row in rows:
        question, expected = (cell.strip() for cell in row.strip("|").split("|"))
        content = [
            {"type": "image", "path": str(REPOSITORY / "tests/fixtures/scene.png")},
            {"type": "text", "text": question},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs={"num_visual_tokens": 576},
        )  # fmt: skip
        answer = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(answer, skip_special_tokens=True) == expected


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_names_from_elsewhere_are_told_ours(name, loaded):
    model, processor = loaded["llava15-m3"]
    inputs = processor(text="USER: Hello. ASSISTANT:", return_tensors="pt")
    with pytest.raises(
        ValueError, match=f"^{name} is no argument of generate: .*(num_visual_tokens|pixel_values|configuration)"
    ):
        model.generate(**inputs, **{name: 9})
    with pytest.raises(ValueError, match="num_visual_tokens"):
        processor(text="USER: Hello. ASSISTANT:", matryoshka_vis_token_scale=9)


def test_a_prompt_by_hand_begins_once(loaded):
    _, processor = loaded["llava15-m3"]
    for prompt in ("USER: Hello. ASSISTANT:", "<s>USER: Hello. ASSISTANT:", "<s><s>USER: Hello. ASSISTANT:"):
        ids = processor(text=prompt)["input_ids"][0]
        assert ids.count(processor.tokenizer.bos_token_id) == 1 and ids[0] == processor.tokenizer.bos_token_id
