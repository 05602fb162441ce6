"""The Hub, a server on 127.0.0.1 that speaks the endpoints needed: uploading, loading what is pinned, offline."""

import json
import os
import subprocess
import sys

import pytest
from conftest import GOLDENS, picture
from hub_server import TOKEN, Hub, running_hub
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load
from test_automatic_budget import random_choice
from transformers import AutoModelForImageTextToText, AutoProcessor

from m3_conversion.__main__ import main
from modeling_m3 import REMOTE_CODE_FILES
from modeling_m3.automatic_budget_m3 import AUTOMATIC_BUDGET_FILE


NAME = "someone/m3-tiny"

# As a user has it: without this package.
SCRIPT = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name, revision, image, again = sys.argv[1:]
pinned = {"revision": revision, "code_revision": revision, "trust_remote_code": True}
processor = AutoProcessor.from_pretrained(name, **pinned)
model = AutoModelForImageTextToText.from_pretrained(name, **pinned)
assert not [module for module in sys.modules if module.startswith(("modeling_m3", "m3_"))]
inputs = processor(images=Image.open(image), text="USER: <image>\\nWhat? ASSISTANT:", num_visual_tokens=9, return_tensors="pt")
print(json.dumps(model.generate(**inputs, max_new_tokens=5).tolist()))
if again:
    model.push_to_hub(again)
    processor.push_to_hub(again)
"""


@pytest.fixture
def hub(monkeypatch):
    """A Hub where this process is logged in as `someone`."""
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("m3_conversion.hub.HfApi", lambda: HfApi(endpoint=hub.endpoint, token=TOKEN))
        yield hub


def use(hub: Hub, home, revision, again="", **environment):
    """What the script prints, run by a user with a cache at `home`."""
    environment = {
        **{"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HOME": str(home)},
        **{"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PATH": os.environ["PATH"]},
        **environment,
    }
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    home.mkdir(exist_ok=True)
    image = str(GOLDENS / "images" / "photo_400x266.png")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, NAME, revision, image, again],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_conversion_goes_to_the_hub_and_comes_back(hub, tmp_path, capsys):
    assert main([str(GOLDENS / "llava15-m3"), str(tmp_path / "new"), "--push-to-hub", NAME]) == 0
    pinned = hub.sha(NAME)
    assert capsys.readouterr().out.splitlines()[-1] == f"uploaded {hub.endpoint}/{NAME}/commit/{pinned}"
    sent = hub.files(NAME)
    assert {name: data for name, data in sent.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()
    }
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json", *REMOTE_CODE_FILES} <= sent.keys()
    assert f'checkpoint = "{NAME}"\n' in ModelCard(sent["README.md"].decode()).text
    assert NAME not in hub.private

    # A choice of visual tokens is fitted later.
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    choice = random_choice(model.config.visual_token_scales, 2 * model.config.text_config.hidden_size).to_bytes()
    hub.commits[NAME].append({**sent, AUTOMATIC_BUDGET_FILE: choice})
    pinned, sent = hub.sha(NAME), hub.files(NAME)

    # Then someone replaces the code: who has pinned a revision goes on with the code they trust.
    hub.commits[NAME].append({**sent, "modeling_m3.py": b"raise SystemExit('replaced')"})
    answer = use(hub, tmp_path / "home", pinned, again="someone/again")
    assert not hub.unknown
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    inputs = processor(
        images=picture("photo_400x266.png"),
        text="USER: <image>\nWhat? ASSISTANT:",
        num_visual_tokens=9,
        return_tensors="pt",
    )
    assert answer == model.generate(**inputs, max_new_tokens=5).tolist()

    # What model and processor of that user sent: all that the next one needs.
    again = hub.files("someone/again")
    assert {"README.md", "tokenizer.json", "processor_config.json", *REMOTE_CODE_FILES} <= again.keys()
    assert all(again[name] == sent[name] for name in (*REMOTE_CODE_FILES, AUTOMATIC_BUDGET_FILE))
    assert load(again["model.safetensors"]).keys() == load(sent["model.safetensors"]).keys()
    assert json.loads(again["config.json"])["auto_map"] == json.loads(sent["config.json"])["auto_map"]

    # Offline, with nothing listening any more.
    hub.endpoint = "http://127.0.0.1:9"
    assert use(hub, tmp_path / "home", pinned, HF_HUB_OFFLINE="1") == answer


def test_a_private_repository(hub, tmp_path):
    assert main([str(GOLDENS / "llava15-m3"), str(tmp_path / "new"), "--push-to-hub", NAME, "--private"]) == 0
    assert hub.private == {NAME}
    assert main([str(GOLDENS / "llava15-m3"), str(tmp_path / "other"), "--private"]) == 2


@pytest.mark.parametrize(("name", "message"), [
    ("m3-tiny", "name the user or organization too, as USER/m3-tiny"),
    ("a/b/c", "Repo id must be in the form"),
])  # fmt: skip
def test_a_name_that_is_none_is_refused_before_anything_is_written(name, message, tmp_path, capsys):
    assert main([str(GOLDENS / "llava15-m3"), str(tmp_path / "new"), "--push-to-hub", name]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"m3-convert: --push-to-hub {name}: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_who_is_not_logged_in_is_told_before_anything_is_written(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("m3_conversion.hub.HfApi", lambda: HfApi(endpoint=hub.endpoint, token="hf_wrong"))
    assert main([str(GOLDENS / "llava15-m3"), str(tmp_path / "new"), "--push-to-hub", NAME]) == 1
    error = capsys.readouterr().err
    assert "run `hf auth login`" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_refused_upload_leaves_the_folder_and_says_how_to_go_on(hub, tmp_path, capsys):
    folder = tmp_path / "new"
    assert main([str(GOLDENS / "llava15-m3"), str(folder), "--push-to-hub", "others/m3"]) == 1
    error = capsys.readouterr().err
    assert "others/m3 did not take it" in error and error.endswith(f"hf upload others/m3 {folder}\n")
    assert (folder / "config.json").exists()
