"""The pages under docs/ are followed as written, each in a process of its own that has only what the page installs."""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, commands_on_path

from modeling_m3.processing_m3 import MAKES_TEXT_PLAIN


REPOSITORY = Path(__file__).parent.parent
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
DEMOS = dict(zip(CHECKPOINTS, ("m3-demo", "m3-next-demo")))


@pytest.mark.pages
@pytest.mark.skipif(
    not MAKES_TEXT_PLAIN, reason="the pages are followed on the newest release, which installing brings"
)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, converted, tmp_path):
    """In a clone whose README has been followed. `text` blocks are not run: they need what a test does not have."""
    for name, demo in DEMOS.items():
        shutil.copytree(converted[name], tmp_path / demo)
    for folder in ("tests", "benchmarks"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    environment = {**os.environ, "PATH": commands_on_path(), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).with_name("follow_page.py")), str(page)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_begins_with_what_to_install(page):
    first = re.search(r"```(python|bash)\n(.*?)\n", page.read_text(encoding="utf-8"))
    assert first and first[1] == "bash" and first[2].startswith("pip install ")


def test_pages_write_into_folders_of_their_own():
    """So that they work in any order, one after the other in one folder."""
    writers = defaultdict(set)
    for page in PAGES:
        for block in re.findall(r"```(?:python|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for pattern in (
                r"--output(?:_dir)? (\S+)",
                r'save_pretrained\("([^"]+)"',
                r"m3-convert \S+ (\S+)",
                r'open\("([^"]+)", "w"',
            ):
                for written in re.findall(pattern, block):
                    writers[written].add(page.stem)
    assert len(writers) > 5
    assert {name: pages for name, pages in writers.items() if len(pages) > 1} == {}
