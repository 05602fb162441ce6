"""The pages under docs/ are run as written, in their order: Python blocks and commands, but for those that install."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import CHECKPOINTS

import modeling_m3.__main__
from m3_conversion.__main__ import main as convert
from m3_evaluation.analyze_command import app as analyze
from m3_evaluation.eval_command import app as evaluate
from m3_serving.batch_command import app as batch
from m3_training.finetune import main as train


REPOSITORY = Path(__file__).parent.parent
DEMOS = dict(zip(CHECKPOINTS, ("m3-demo", "m3-next-demo")))


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, converted, tmp_path, monkeypatch):
    """In a clone whose README has been followed. `text` blocks are not run: they need what a test does not have."""
    for name, demo in DEMOS.items():
        shutil.copytree(converted[name], tmp_path / demo)
    for folder in ("tests", "benchmarks"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names = {"__name__": page.stem}  # blocks go on from the ones before
    for language, block in blocks:
        if language == "python":
            exec(compile(block, str(page), "exec"), names)
            continue
        for command in block.strip().split(" && "):
            program, *arguments = shlex.split(command)
            if program == "m3-convert":
                assert convert(arguments) == 0, command
            elif program == "m3-train":
                assert train(arguments) == 0, command
            elif program in ("m3-eval", "m3-analyze"):
                {"m3-eval": evaluate, "m3-analyze": analyze}[program](arguments, standalone_mode=False)
            elif program == "m3-batch":
                batch(arguments, standalone_mode=False)
            elif program == "m3-ask":
                modeling_m3.__main__.app(arguments, standalone_mode=False)
            elif program == "python":
                assert arguments[0] == "-m", command
                monkeypatch.setattr(sys, "argv", arguments[1:])
                with pytest.raises(SystemExit, match="^(0|None)$"):
                    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                assert (program, arguments[:1]) == ("pip", ["install"]), command
