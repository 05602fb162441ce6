"""The conversion's command line and the model card it writes."""

import re
import shutil
import subprocess
import sys
from importlib.resources import files

import pytest
from conftest import GOLDENS
from conversion_checkpoints import CLIP, copy_golden, edit_json, read_weights, run, store
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from m3_conversion.convert import convert
from m3_conversion.original import ConversionError


class TestCommand:
    def test_summary(self, tmp_path, capsys):
        assert run(GOLDENS / "llava15-m3", tmp_path / "new") == 0
        output = capsys.readouterr()
        assert re.fullmatch(r"wrote .*new: 105 tensors, .* 1 file\(s\), 0 left out on purpose, \d+ s\n", output.out)
        assert not output.err

    def test_unknown_setting_is_told(self, tmp_path, capsys):
        source = copy_golden("llava15-m3", tmp_path)
        edit_json(source / "config.json", mm_new_idea=3)
        assert run(source, tmp_path / "new") == 0
        assert "mm_new_idea" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "options",
        [["--dtype", "int8"], ["--max-shard-size", "many"], ["--max-shard-size", "0"], ["--chat-template", "x"]],
    )
    def test_usage(self, options, tmp_path):
        assert run(GOLDENS / "llava15-m3", tmp_path / "new", *options) == 2

    def test_debug_shows_the_traceback(self, tmp_path):
        with pytest.raises(ConversionError):
            run(tmp_path, tmp_path / "new", "--debug")

    def test_overwrite(self, tmp_path, capsys):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "mine.txt").write_text("mine")
        assert run(GOLDENS / "llava15-m3", tmp_path / "new") == 1
        assert "--overwrite" in capsys.readouterr().err
        assert run(GOLDENS / "llava15-m3", tmp_path / "new", "--overwrite") == 0
        assert not (tmp_path / "new" / "mine.txt").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["new"]
        AutoModelForImageTextToText.from_pretrained(tmp_path / "new")

    @pytest.mark.parametrize("layout", ["model.safetensors.index.json", "pytorch_model.bin"])
    def test_hub_id(self, layout, tmp_path, monkeypatch):
        """A repository that holds its weights in both formats is downloaded in one of them."""
        hub = copy_golden("llava15-m3", tmp_path)
        store(hub, read_weights(hub), layout)
        local = tmp_path / "cache"
        local.mkdir()

        def download(name, revision, allow_patterns):
            for file in (file for pattern in allow_patterns for file in hub.glob(pattern)):
                shutil.copy(file, local)
            return str(local)

        monkeypatch.setattr("m3_conversion.original.snapshot_download", download)
        monkeypatch.chdir(tmp_path)
        assert run("someone/some-llava", tmp_path / "new", "--vision-tower", str(tmp_path / CLIP)) == 0
        assert ModelCard.load(tmp_path / "new" / "README.md").data.base_model == "someone/some-llava"
        if "index" in layout:
            assert not list(local.glob("*.bin"))

    def test_help_is_quick(self):
        """It needs neither torch nor transformers."""
        code = """
import sys
from m3_conversion.__main__ import main
main(["--help"])
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert output.stdout.endswith("[]\n")


class TestCard:
    def test_unknown_checkpoint(self, converted):
        card = ModelCard.load(converted["llava15-m3"] / "README.md")
        assert card.data.library_name == "transformers"
        assert card.data.pipeline_tag == "image-text-to-text"
        assert card.data.license == "other"
        assert card.data.eval_results is None
        assert "num_visual_tokens" in card.text
        assert "{{" not in card.text and "{%" not in card.text

    @pytest.mark.parametrize(
        ("model_id", "numbers", "examples"),
        [
            ("mucai/llava-v1.5-7b-m3", 25, {("MMBench", 576): 65.9, ("POPE", 9): 83.4, ("SEEDBench", 1): 50.1}),
            (
                "mucai/llava-next-vicuna-7b-m3",
                70,
                {("DocVQA", 144): 66.48, ("MMMU", 36): 36.8, ("EgoSchema", 9): 38.8, ("POPE", 576): 87.2},
            ),
        ],
    )
    def test_published_numbers_of_a_known_checkpoint(self, model_id, numbers, examples, tmp_path):
        convert(GOLDENS / "llava15-m3", tmp_path / "new", model_id=model_id)
        data = ModelCard.load(tmp_path / "new" / "README.md").data
        assert (data.base_model, data.license) == (model_id, "llama2")
        stored = ModelCard.load(files("m3_model_cards").joinpath(f"{model_id.split('/')[1]}.md")).data
        for eval_results in (data.eval_results, stored.eval_results):
            results = {(r.dataset_name, r.metric_args["num_visual_tokens"]): r.metric_value for r in eval_results}
            assert len(eval_results) == len(results) == numbers
            assert {key: results[key] for key in examples} == examples

    def test_license_of_the_source_and_of_the_user(self, tmp_path):
        source = copy_golden("llava15-m3", tmp_path)
        (source / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
        convert(source, tmp_path / "a")
        convert(source, tmp_path / "b", license="apache-2.0")
        licenses = [ModelCard.load(tmp_path / name / "README.md").data.license for name in "ab"]
        assert licenses == ["mit", "apache-2.0"]

    def test_checkpoint_not_trained_for_it(self, tmp_path):
        source = copy_golden("llava15-m3", tmp_path)
        edit_json(source / "config.json", matryoshka_vis_token_scale=...)
        convert(source, tmp_path / "new")
        assert "training-free baseline" in (tmp_path / "new" / "README.md").read_text()

    @pytest.mark.pages
    def test_its_code_runs(self, converted, tmp_path):
        """As a user has it: the folder alone, in a directory without this project."""
        name = "llava15-m3"
        blocks = re.findall(r"```python\n(.*?)```", (converted[name] / "README.md").read_text(), re.DOTALL)
        (tmp_path / name).symlink_to(converted[name])
        (tmp_path / "photo.jpg").symlink_to(GOLDENS / "images" / "photo_400x266.png")
        code = "\n".join(blocks).replace("max_new_tokens=64", "max_new_tokens=2")
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        command = [sys.executable, "-I", "-c", code]
        output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert output.returncode == 0, output.stderr
        assert len(blocks) == 2
        assert re.match(r"9 .*\n(.*\n)*36 .*\n(.*\n)*576 ", output.stdout)
