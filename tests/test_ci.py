"""CI's frame of stages: what fails, is skipped or takes too long is told at the end, and only a skip is forgiven."""

import re
import subprocess
from pathlib import Path

import pytest


STAGES = Path(__file__).parent.parent / ".ci" / "stages.sh"


def run(stages, tmp_path):
    script = f"""
    set -euo pipefail
    work={tmp_path}; export work
    source {STAGES}
    minute=1
    good() {{ echo fine; }}
    bad() {{ false; echo never; }}
    slow() {{ sleep 20; }}
    lacking() {{ needs ls /no/such/package; echo never; }}
    export -f good bad slow lacking
    {stages}
    summary
    """
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("stages", "status", "counts", "notice"),
    [
        ("stage a good; stage b good 5", 0, "2 passed, 0 failed, 0 skipped", ""),
        ("stage a bad; stage b good", 1, "1 passed, 1 failed, 0 skipped", "FAILED a: status 1"),
        ("stage a good; stage b slow 1", 1, "1 passed, 1 failed, 0 skipped", "FAILED b: not done after 1 minutes"),
        ("stage a good; stage b good 46", 0, "1 passed, 0 failed, 1 skipped", "SKIPPED b: . of 45 minutes are over, and it may take 46"),
        ("stage a lacking 1; stage b good", 0, "1 passed, 0 failed, 1 skipped", "SKIPPED a: .* `ls /no/such/package`"),
    ],
)  # fmt: skip
def test_what_is_told(stages, status, counts, notice, tmp_path):
    result = run(stages, tmp_path)
    assert result.returncode == status, result.stderr
    assert "never" not in result.stdout
    *_, told, closing = result.stdout.splitlines()
    assert closing == f"stages: {counts}"
    assert re.match(notice, told)


def test_each_stage_is_the_first_of_some_sources(tmp_path, monkeypatch):
    """All of them in their order, from that one on, and the same one for the same sources."""
    monkeypatch.chdir(tmp_path)
    slots, seen = {"good": "3", "bad": "4", "lacking": "5"}, set()
    for number in range(20):
        (tmp_path / "module.py").write_text(f"{number}")
        found = [run(f"in_turn {' '.join(sum(slots.items(), ()))}", tmp_path).stdout for _ in range(2)]
        started = [tuple(re.findall(r"^== (\w+) \((\d) minutes", output, re.MULTILINE)) for output in found]
        assert started[0] == started[1] and dict(started[0]) == slots
        seen.add(started[0])
    order = [*slots.items()] * 2
    assert seen == {tuple(order[first : first + 3]) for first in range(3)}
