"""Where the commands start: Ctrl-C and SIGTERM end them in one line, also while torch and transformers are being imported.

Imports nothing of theirs before that is seen to. A command that has to clean up handles signals by itself from then on.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from m3_conversion.signals import handling_signals


def analyze() -> int | None:
    return _run("m3-analyze", "m3_evaluation.analyze_command")


def ask() -> int | None:
    return _run("m3-ask", "modeling_m3.__main__")


def batch() -> int | None:
    return _run("m3-batch", "m3_serving.batch_command", "serve", ("pyarrow", "fsspec"))


def budget() -> int | None:
    return _run("m3-budget", "m3_training.budget")


def cache() -> int | None:
    return _run("m3-cache", "modeling_m3.cache_command")


def convert() -> int | None:
    return _run("m3-convert", "m3_conversion.__main__")


def create() -> int | None:
    return _run("m3-create", "m3_conversion.create_command")


def demo() -> int | None:
    return _run("m3-demo", "m3_serving.demo.command")  # which has its extra looked for when the page is asked for


def evaluate() -> int | None:
    return _run("m3-eval", "m3_evaluation.eval_command")


def export() -> int | None:
    return _run("m3-export", "m3_conversion.export_command", "export", ("onnx", "onnxscript", "onnxruntime"))


def serve() -> int | None:
    return _run("m3-serve", "m3_serving.serve_command", "serve", ("prometheus_client",))


def train() -> int | None:
    return _run("m3-train", "m3_training.finetune")


def train_tiny() -> int | None:
    return _run("m3-train-tiny", "m3_training.m3_tiny.__main__")


def has(name: str, extra: str, needs: Sequence[str]) -> bool:
    """Whether the modules that a command needs are installed; says which are not, and the extra that brings them."""
    missing = [needed for needed in needs if find_spec(needed) is None]
    if missing:
        print(f"{name}: needs {', '.join(missing)}: pip install '.[{extra}]' in the clone", file=sys.stderr)
    return not missing


def _run(name: str, module: str, extra: str = "", needs: Sequence[str] = ()) -> int | None:
    """Runs `main()` of a module. Returns its exit status; 128 and the signal's number where one ended it.

    Args:
        extra, needs: modules without which it cannot run, and the extra that brings them.
    """
    if not has(name, extra, needs):
        return 1
    process = os.getpid()

    def stop(signum: int, frame: object) -> None:
        # Not by an exception: modules that are being imported turn it into others.
        if os.getpid() == process:
            os.write(2, f"\n{name}: stopped\n".encode())
        os._exit(128 + signum)

    with handling_signals(stop):
        return importlib.import_module(module).main()
