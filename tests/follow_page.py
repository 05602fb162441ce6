"""Follows a page of the documentation to its end: `python tests/follow_page.py PAGE`, in a folder where the README was followed.

Runs its Python blocks and its commands in their order, with no more of the optional packages than its own install commands
bring: what a page forgets to install is missing here as it would be for its reader.
"""

import re
import runpy
import shlex
import sys
from collections import defaultdict
from importlib.machinery import PathFinder
from importlib.metadata import requires
from pathlib import Path


EXTRAS: dict[str, list[str]] = defaultdict(list)
for requirement, extra in re.findall(r'^(.+?) *; extra == "(\w+)"$', "\n".join(requires("m3-hf")), re.MULTILINE):
    EXTRAS[extra].append(requirement)
ALWAYS_THERE = {"sentencepiece", "filelock", "fsspec", "psutil"}  # ours, or of what is


def modules_of(requirements: list[str]) -> set[str]:
    """What the packages are imported as."""
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}
    return {name.replace("-", "_") for name in names} - ALWAYS_THERE


def installed_by(page: str) -> set[str]:
    """The optional packages that the page's `pip install` commands bring, by the names they are imported as."""
    modules = set()
    for command in re.findall(
        r"^pip install (.*)$", "".join(re.findall(r"```bash\n.*?```", page, re.DOTALL)), re.MULTILINE
    ):
        for requirement in shlex.split(command):
            extras = re.fullmatch(r"\.\[(.*)\]", requirement)
            modules |= modules_of(
                [r for extra in extras[1].split(",") for r in EXTRAS[extra]] if extras else [requirement]
            )
    return modules


class _Installed(PathFinder):
    """Finds modules on the path, but for packages that are not to be there."""

    missing: set[str] = set()

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> object:
        return None if name.partition(".")[0] in cls.missing else super().find_spec(name, path, target)


def run(command: str) -> None:
    """A command of a page, in this process."""
    from m3_conversion.__main__ import main as convert
    from m3_training.finetune import main as train

    program, *arguments = shlex.split(command)
    if program == "pip":
        assert arguments[0] == "install", command
    elif program in ("m3-convert", "m3-train"):
        assert {"m3-convert": convert, "m3-train": train}[program](arguments) == 0, command
    elif program == "python":
        assert arguments[0] == "-m", command
        sys.argv = arguments[1:]
        try:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        except SystemExit as done:
            assert not done.code, f"{command}: {done.code}"
    else:
        assert not app_of(program)(arguments, standalone_mode=False), command  # its exit status


def app_of(program: str):
    if program == "m3-ask":
        from modeling_m3.__main__ import app
    elif program == "m3-eval":
        from m3_evaluation.eval_command import app
    elif program == "m3-analyze":
        from m3_evaluation.analyze_command import app
    elif program == "m3-export":
        from m3_conversion.export_command import app
    elif program == "m3-batch":
        from m3_serving.batch_command import app
    elif program == "m3-create":
        from m3_conversion.create_command import app
    else:
        raise AssertionError(f"{program} is no command of a page")
    return app


def main(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    optional = set().union(*map(modules_of, EXTRAS.values()))
    _Installed.missing = optional - installed_by(text)
    sys.meta_path[sys.meta_path.index(PathFinder)] = _Installed
    names = {"__name__": page.stem}  # blocks go on from the ones before
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(compile(block, str(page), "exec"), names)
        else:
            for command in re.split(r" && |\n", block.strip()):
                run(command)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
