"""`python kill_points.py FOLDER CHECKPOINT COMMANDS`: is a command that was killed the same in the end, wherever that was?

COMMANDS is a JSON list of [module, arguments], which run one after the other; "OUTPUT" in arguments is the folder they write to.
They run in a child process that ends without a word before its first step in that folder (a file is opened to be written, renamed
or removed; a folder is made), then in one that ends before its second, and so on; where a file is about to be called whole, only
half of what is new in it is there. After each, a child that is left alone goes on. Prints the steps, and what differs from a run
that was never killed, as JSON.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modeling_m3
from modeling_m3.any_checkpoint import M3Checkpoint


STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree"}
KILLED, FAILED = 9, 1


class Killer:
    """Ends this process at a step. As an audit hook, it sees what Python does with files; `fsync` takes the place of `os.fsync`."""

    def __init__(self, folder: Path, at: int, report: Path):
        self.folder, self.left, self.report, self.sizes = str(folder), at, report, {}

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in STEPS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        file = os.fspath(arguments[0])
        if not os.path.abspath(file).startswith(self.folder):
            return
        if event == "open":
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            self.sizes[os.path.abspath(file)] = os.path.getsize(file) if os.path.exists(file) else 0
        self.step(event, file)

    def fsync(self, opened: int) -> None:
        file = os.readlink(f"/proc/self/fd/{opened}")
        self.step("os.fsync", file, lambda: self.halve(opened, file))

    def halve(self, opened: int, file: str) -> None:
        old = self.sizes.get(file, 0)
        size = os.fstat(opened).st_size
        os.ftruncate(opened, old + (size - old) // 2)

    def step(self, event: str, file: str, before: Callable[[], object] = lambda: None) -> None:
        self.left -= 1
        if self.left == 0:
            before()
            self.left = -1
            self.report.write_text(f"{event} {os.path.relpath(file, self.folder)}")
            os._exit(KILLED)


def run(commands: list, output: Path, at: int, report: Path) -> int:
    """Runs the commands in a child; returns its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = FAILED
    try:
        killer = Killer(output, at, report)
        os.fsync = killer.fsync
        sys.addaudithook(killer)
        for module, arguments in commands:
            app = importlib.import_module(module).app
            app([word.replace("OUTPUT", str(output)) for word in arguments], standalone_mode=False)
        status = 0
    finally:
        os._exit(status)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def main(folder: Path, checkpoint: str, commands: list) -> dict[str, Any]:
    loaded = modeling_m3.load(checkpoint)
    M3Checkpoint.load = lambda *args, **kwargs: loaded
    for module, _ in commands:
        importlib.import_module(module)
    report, steps, differing = folder / "report", [], {}
    output = folder / "output"
    assert run(commands, output, 0, report) == 0
    expected = content(output)
    while True:
        output.rename(folder / f"output-{len(steps)}")
        status = run(commands, output, len(steps) + 1, report)
        if status == 0:
            return {"files": sorted(expected), "steps": steps, "differing": differing}
        assert status == KILLED
        steps.append(report.read_text())
        status = run(commands, output, 0, report)
        found = content(output) if output.exists() else {}
        differs = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        if status or differs:
            differing[steps[-1]] = [f"status {status}", *differs]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))))
