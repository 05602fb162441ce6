"""The README is run as written: its Python blocks, and its commands but for those that install."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import commands_on_path


REPOSITORY = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
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


@pytest.mark.parametrize("block", PYTHON, ids=["pipeline", "classes"])
def test_python_blocks(block, folder):
    if not (folder / "m3-demo").exists():
        test_commands(folder)
    result = run(["python", "-c", block], folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
