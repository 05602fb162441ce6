"""Any LLaVA, a folder or on the Hub, to an answer: converted once, kept, found again, and freed."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, commands_on_path, picture
from conversion_checkpoints import copy_golden, edit_json
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub import constants
from test_signals import _take_signals
from typer.testing import CliRunner

import modeling_m3
from modeling_m3.__main__ import app
from modeling_m3.any_checkpoint import load
from modeling_m3.cache import cache_folder, cached_checkpoints, clear
from modeling_m3.cache_command import app as cache_app


NAME = "someone/llava-v1.5-7b"
PICTURE = str(GOLDENS / "images" / "photo_400x266.png")
STORED = GOLDENS.parent / "transformers_llava"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home of Hugging Face's caches."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home"


def ask(*arguments):
    return CliRunner().invoke(app, [PICTURE, "What is this?", "--max-new-tokens", "4", *map(str, arguments)])


def folders():
    """What is in the cache but for locks: whole checkpoints and whatever else there is."""
    return [path for path in cache_folder().glob("*/*/*") if path.is_dir()]


@pytest.fixture
def converted_calls(monkeypatch):
    """Of the conversion, while its work is done."""
    import m3_conversion.convert as module

    calls, original = [], module.convert
    monkeypatch.setattr(module, "convert", lambda *a, **k: calls.append((a, k)) or original(*a, **k))
    return calls


@pytest.mark.parametrize("source", [GOLDENS / "llava15-m3", STORED / "llava-4.57"], ids=["original", "transformers"])
def test_a_folder_is_converted_once_and_again_after_a_change(source, home, tmp_path, converted_calls):
    folder = Path(shutil.copytree(source, tmp_path / "mine"))
    shutil.copytree(GOLDENS / "openai", tmp_path / "openai")  # where its config's name is looked for
    first = ask("--model", folder, "--num-visual-tokens", 1)
    again = ask("--model", folder, "--num-visual-tokens", 1)
    assert first.exit_code == again.exit_code == 0, first.output
    assert first.stdout == again.stdout
    assert len(converted_calls) == 1 and [c.name for c in cached_checkpoints()] == ["mine"]
    os.utime(folder / "config.json", (1, 1))
    assert ask("--model", folder).exit_code == 0
    assert len(converted_calls) == 2 and len(cached_checkpoints()) == 2
    assert home in cached_checkpoints()[0].folder.parents


def test_load_gives_what_loading_the_conversion_gives(home, converted):
    model, processor = load(GOLDENS / "llava15-m3", dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    plain, _ = load(converted["llava15-m3"])
    assert (
        cached_checkpoints()[0].precision.startswith("bfloat16-") and len(cached_checkpoints()) == 1
    )  # no M3 is converted
    assert all(torch.equal(p.bfloat16(), q) for p, q in zip(plain.parameters(), model.parameters()))
    assert modeling_m3.load is load
    inputs = processor(images=picture("photo_400x266.png"), text="<image>", num_visual_tokens=9, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 9


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_precisions_are_kept_apart_and_quantize_alike(quantize, home, converted):
    pytest.importorskip("bitsandbytes")
    from_original, _ = load(GOLDENS / "llava15-m3", quantize=quantize)
    from_m3, _ = load(converted["llava15-m3"], quantize=quantize, dtype="float32")
    load(GOLDENS / "llava15-m3")
    assert sorted(c.precision.split("-0.")[0] for c in cached_checkpoints()) == sorted(["as-stored", quantize])
    quantized = [
        {
            name: value
            for name, value in model.state_dict().items()
            if "language_model.layers" in name and name.endswith("proj.weight")
        }
        for model in (from_original, from_m3)
    ]
    assert quantized[0].keys() == quantized[1].keys()
    assert all(value.dtype in (torch.uint8, torch.int8) for value in quantized[0].values())
    assert all(torch.equal(value, quantized[1][name]) for name, value in quantized[0].items())


@pytest.mark.parametrize("how", [["--quantize", "nf4"], ["--dtype", "bfloat16"]])
def test_commands_convert_once_as_they_load(how, home, tmp_path, converted_calls):
    from m3_evaluation.eval_command import app as eval_app
    from m3_serving.batch_command import app as batch_app

    model, question = str(GOLDENS / "llava15-m3"), {"image": PICTURE, "question": "What?", "answer": "this"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(question))
    rows = ["--max-new-tokens", "2", "--output"]
    for command in (
        [
            batch_app,
            "--model",
            model,
            "--input",
            tmp_path / "rows.jsonl",
            "--engine",
            "generate",
            *rows,
            tmp_path / "a",
        ],
        [eval_app, model, "--data", tmp_path / "rows.jsonl", "--scales", "1", *rows, tmp_path / "b"],
    ):
        ran = CliRunner().invoke(command[0], [*map(str, command[1:]), *how])
        assert ran.exit_code == 0, ran.output
        assert len(converted_calls) == 1 and [c.precision.split("-")[0] for c in cached_checkpoints()] == [how[1]]


def test_the_package_is_imported_without_the_conversion():
    for file in Path(modeling_m3.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            imported = [alias.name for alias in getattr(node, "names", ())] + [getattr(node, "module", None) or ""]
            assert not any(name.startswith("m3_") for name in imported), file


# On the Hub


def connect(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", endpoint is None)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        connect(monkeypatch, hub.endpoint)
        plain = copy_golden("llava15-m3", tmp_path / "upload")
        hub.commits[NAME] = [{file.name: file.read_bytes() for file in plain.iterdir()}]
        edit_json(plain / "config.json", matryoshka_vis_token_scale=...)
        hub.commits["someone/plain"] = [{file.name: file.read_bytes() for file in plain.iterdir()}]
        clip = GOLDENS / "openai" / "clip-vit-tiny-patch14-336"
        hub.commits["openai/clip-vit-tiny-patch14-336"] = [{file.name: file.read_bytes() for file in clip.iterdir()}]
        yield hub


def start(hub: Hub, home: Path, *arguments, **environment):
    return subprocess.Popen(
        ["m3-ask", PICTURE, "What is this?", "--max-new-tokens", "4", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **{"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HOME": str(home)},
            **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"},
            **{"PATH": commands_on_path(), "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment},
        },
        preexec_fn=_take_signals,
    )


@pytest.fixture
def answer(home, caplog):
    """Asks in this process. Returns the status, the answer, and what was said besides."""

    def ask_and_listen(*arguments):
        caplog.clear()
        result = ask(*arguments)
        said = [line.removeprefix("m3-ask: ") for line in result.stderr.splitlines() if line.startswith("m3-ask: ")]
        notices = [
            r.getMessage()
            for r in caplog.records
            if r.name.startswith(("modeling_m3", "m3_conversion")) and r.levelno >= 30
        ]
        return result.exit_code, result.stdout, notices + said

    return ask_and_listen


def test_from_the_hub_to_an_answer_and_a_revision_that_moves(hub, home, answer, monkeypatch):
    status, first, lines = answer("--model", NAME)
    assert status == 0, lines
    assert (
        f"{NAME} is no M3 yet: 0.0 GB are downloaded, then it is converted once, and kept in {home / 'm3'}" in lines[0]
    )
    assert " tensors, " in lines[-1]
    assert answer("--model", NAME) == (0, first, [])

    old = hub.sha(NAME)
    hub.commits[NAME].append({**hub.files(NAME), "README.md": b"a new card"})
    status, _, lines = answer("--model", NAME)
    assert status == 0 and "is no M3 yet" in lines[0]
    assert [c.revision for c in cached_checkpoints()] == sorted([old, hub.sha(NAME)])
    assert {c.name for c in cached_checkpoints()} == {NAME}
    assert answer("--model", NAME, "--revision", old) == (0, first, [])

    connect(monkeypatch, None)  # offline
    assert answer("--model", NAME)[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "empty"))
    status, _, lines = answer("--model", NAME)
    assert status == 1 and len(lines) == 1 and f"{NAME} is neither a folder here nor reachable on the Hub" in lines[0]


def test_room_is_looked_for_before_a_download(hub, home, answer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    status, _, lines = answer("--model", NAME)
    assert status == 1
    assert lines == [f"{NAME} is 0.0 GB to download, but 0.0 GB are free in {home / 'hub'}"]
    assert not list(home.glob("hub/**/*.bin"))


def test_a_plain_llava_says_that_it_was_trained_at_one_number(hub, answer):
    status, _, lines = answer("--model", "someone/plain", "--num-visual-tokens", 9)
    assert status == 0
    assert lines[-1].startswith("this checkpoint was trained at 576 visual tokens alone, and answers worse with fewer.")
    assert answer("--model", "someone/plain", "--num-visual-tokens", 576)[2] == []
    assert answer("--model", "someone/plain", "--num-visual-tokens", 9, "--quiet")[2] == []


@pytest.mark.parametrize(("arguments", "message"), [
    (("--model", "someone/nothing"), "someone/nothing is neither a folder here nor reachable on the Hub"),
    (("--model", NAME, "--revision", "nowhere"), f"{NAME} (revision nowhere) is neither a folder here nor reachable"),
    (("--model", "./nothing"), "There is no folder ./nothing, and an id on the Hub has an owner"),
    (("--model", str(GOLDENS)), "is not a checkpoint: it has no config.json."),
    (("--model", str(GOLDENS / "openai/clip-vit-tiny-patch14-336")), "model_type 'clip"),
    (("--model", str(GOLDENS / "llava15-m3"), "--revision", "main"), "is of a repository on the Hub, but"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_said_in_a_line(arguments, message, hub, answer):
    status, output, lines = answer(*arguments)
    assert (status, output) == (1, "")
    assert message in lines[-1]
    assert not [path for path in folders() if path.name[0] != "."]


# What goes wrong on the way


@pytest.mark.slow
def test_two_processes_convert_once(hub, home):
    both = [start(hub, home, "--model", NAME) for _ in range(2)]
    found = [(*process.communicate(timeout=120), process.returncode) for process in both]
    assert [status for *_, status in found] == [0, 0], found
    assert found[0][0] == found[1][0]
    said = "".join(error for _, error, _ in found)
    assert said.count("is no M3 yet") == 1
    assert len(cached_checkpoints()) == len(folders()) == 1


@pytest.mark.slow
def test_killed_at_any_moment(home, tmp_path):
    """Nothing of a killed conversion is taken for whole, and the next one removes it."""
    source = copy_golden("llava-next-m3", tmp_path)
    script = f"""
import os, random, signal, sys, time
import modeling_m3.any_checkpoint as module
from modeling_m3.cache import cached_checkpoints, clear
import m3_conversion.convert
random.seed(0)
whole = 0
for i in range(11):
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        module.find({str(source)!r})
        os._exit(0)
    if i:
        time.sleep(random.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    whole = whole or time.monotonic() - start
    for checkpoint in cached_checkpoints():
        files = {{file.name for file in checkpoint.folder.iterdir()}}
        assert {{"config.json", "model.safetensors", "tokenizer.json", "README.md"}} <= files, files
    if i % 3 == 0:
        clear()
module.find({str(source)!r})
"""
    environment = {**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(cached_checkpoints()) == len(folders()) == 1


@pytest.mark.slow
def test_stopped_while_it_converts(hub, home, tmp_path):
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import sys\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'm3_conversion.writer':\n"
        "            sys.meta_path.remove(self)\n"
        "            import m3_conversion.writer as w, time\n"
        "            write = w._write_tensor\n"
        "            w._write_tensor = lambda *a: (time.sleep(0.02), write(*a))[1]\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    process = start(
        hub, home, "--model", GOLDENS / "llava15-m3", PYTHONPATH=f"{slow}:{os.environ.get('PYTHONPATH', '')}"
    )
    deadline = time.monotonic() + 60
    while not list(home.glob("m3/*/*/.*.incomplete-*/*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert error.splitlines()[-1] == "m3-ask: stopped, nothing was written"
    assert not folders()


def test_a_full_disk_and_a_cache_that_cannot_be_written(home, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    result = ask("--model", GOLDENS / "llava15-m3")
    assert result.exit_code == 1 and "GB are free on its disk" in result.stderr.splitlines()[-1]
    assert not folders()
    shutil.rmtree(home / "m3")
    (home / "m3").write_text("a file in its place")
    result = ask("--model", GOLDENS / "llava15-m3")
    assert result.exit_code == 1 and str(home / "m3") in result.stderr.splitlines()[-1]


def test_the_cache_is_shown_and_freed(home):
    load(GOLDENS / "llava15-m3")
    load(STORED / "llava-4.57")
    run = CliRunner().invoke
    shown = run(cache_app, ["list"]).stdout
    sizes = [sum(f.stat().st_size for f in c.folder.iterdir() if f.is_file()) for c in cached_checkpoints()]
    assert (
        "llava15-m3  " in shown and "llava-4.57  " in shown and f"2 checkpoint(s), {sum(sizes) / 1e9:.2f} GB" in shown
    )
    leftover = cached_checkpoints()[0].folder.with_name(".as-stored.incomplete-1234")
    leftover.mkdir()
    assert run(cache_app, ["clear", "nothing"]).exit_code == 2
    assert "removed 1 checkpoint(s)" in run(cache_app, ["clear", "llava15-m3"]).stdout
    assert [c.name for c in cached_checkpoints()] == ["llava-4.57"]
    assert clear() and not cached_checkpoints() and not folders()
    assert list(cache_folder().iterdir()) == []


def test_what_is_being_converted_stays(home):
    load(STORED / "llava-4.57")
    (checkpoint,) = cached_checkpoints()
    code = f"from filelock import FileLock; import time; lock = FileLock({str(checkpoint.folder.parent / '.lock')!r}); lock.acquire(); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert clear() == [] and cached_checkpoints() == [checkpoint]
    process.kill()
    process.wait()
    assert clear() == [checkpoint]
