"""The commands that measure prefill, and the operations they count, against closed formulas."""

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import prefill, scaling
from benchmarks.random_checkpoint import SHAPES, prompt, random_model


@pytest.fixture(scope="module")
def model():
    return random_model("tiny")


def formula(config, tokens: int, tiles: int, batch: int = 1) -> dict[str, int]:
    """Two operations per weight and token, four times the width per pair of tokens; one position's logits."""
    vision, text = config.vision_config, config.text_config
    d, f, v, w = text.hidden_size, text.intermediate_size, vision.hidden_size, vision.intermediate_size
    patches = config.grid_side**2
    between = tiles * config.num_vision_layers * 4 * v * (patches + 1) ** 2
    between += batch * text.num_hidden_layers * 4 * d * tokens**2
    linear = tiles * (patches + 1) * config.num_vision_layers * 2 * (4 * v * v + 2 * v * w)
    linear += tiles * patches * 2 * (3 * vision.patch_size**2 * v + v * d + d * d)
    linear += batch * tokens * text.num_hidden_layers * 2 * (4 * d * d + 3 * d * f)
    linear += batch * 2 * d * text.vocab_size
    return {"total": linear + between, "attention": between}


@pytest.mark.parametrize("scale", [1, 36, 576])
def test_flops_are_those_of_the_formula(model, scale):
    inputs = prompt(model, scale, text=30, batch=2)
    counted = prefill.prefill_flops(model.config, inputs)
    expected = formula(model.config, 31 + scale, tiles=2, batch=2)
    assert counted["total"] == pytest.approx(expected["total"], rel=0.01)
    assert counted["attention"] == pytest.approx(expected["attention"], rel=0.01)


def test_flops_of_tiles():
    model = random_model("tiny", cut_into_tiles=True)
    inputs = prompt(model, 36, text=30, image_size=(672, 672))
    length = inputs["input_ids"].shape[1]
    assert length == 31 + 36 + 12 * (12 + 1)  # the base view, and rows of two tiles that end with a newline
    counted = prefill.prefill_flops(model.config, inputs)["total"]
    assert counted == pytest.approx(formula(model.config, length, tiles=5)["total"], rel=0.01)


def run(command, *arguments):
    app = Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_prefill_measures_every_scale(tmp_path):
    small = ["--size", "tiny", "--dtype", "float32", "--batch", 1, "--repeats", 2]
    result = run(prefill.main, *small, "--output", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    assert result.exit_code == 0, result.output
    (case,) = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert [row["visual_tokens"] for row in case["scales"]] == [576, 144, 36, 9, 1]
    assert all(len(row[kind]) == 2 for row in case["scales"] for kind in ("prefill", "first_token"))
    assert case["parameters"] == sum(p.numel() for p in random_model("tiny").parameters())
    assert (tmp_path / "r.png").read_bytes()[1:4] == b"PNG"
    assert result.output.count("\n|") == 7


def test_ratios_are_those_of_medians():
    scales = [
        {"visual_tokens": 576, "flops": 100, "prefill": [2.0, 10.0, 1.0], "first_token": [1.0]},
        {"visual_tokens": 1, "flops": 20, "prefill": [0.5, 0.4, 0.6], "first_token": [1.0]},
    ]
    case = {"scales": scales, "size": "tiny", "parameters": 1, "dtype": "float32", "batch": 1, "text_tokens": 31}
    assert prefill.relative(case) == [(1.0, 1.0), (0.25, 0.2)]
    assert "| 1 | 0.00 | 500 (400 to 600) | 0.250 | 0.200 | 1.25 |" in prefill.table({"cases": [case]})


@pytest.mark.slow
def test_scaling_grows_one_thing_at_a_time(tmp_path):
    small = ["--size", "tiny", "--dtype", "float32", "--repeats", 1, "--most", 3, "--num-visual-tokens", 9]
    result = run(scaling.main, *small, "--output", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    sweeps = {sweep["sweep"]: sweep["rows"] for sweep in json.loads((tmp_path / "r.json").read_text())["sweeps"]}
    assert [(row["units"], row["sequence"]) for row in sweeps["images"]] == [(1, 41), (2, 50)]
    assert [(row["units"], row["sequence"]) for row in sweeps["batch"]] == [(1, 41), (2, 41)]
    assert [row["units"] for row in sweeps["tiles"]] == [3]
    assert [row["sequence"] for row in sweeps["text"]] == [41, 137, 521, 1033]
    one, two = (row["flops"]["total"] for row in sweeps["batch"])
    assert two == pytest.approx(2 * one, rel=1e-5)  # transformers 5.16 has a product for rotary angles, once for all


@pytest.mark.parametrize(
    ("command", "arguments", "named"),
    [
        (prefill.main, ["--dtype", "int3"], "float32, bfloat16 or float16"),
        (prefill.main, ["--size", "2b"], "2b"),
        (scaling.main, ["--sweep", "colours"], ", ".join(scaling.SWEEPS)),
    ],
)
def test_what_is_not_there_is_named(command, arguments, named):
    result = run(command, *arguments)
    assert result.exit_code == 2
    assert named in " ".join(result.output.replace("│", " ").split())


def test_the_shape_at_real_size_is_at_least_a_billion_parameters():
    shape = SHAPES["1b"]
    d, layers = shape["hidden_size"], shape["num_hidden_layers"]
    kv = d * shape["num_key_value_heads"] // shape["num_attention_heads"]
    assert layers * (2 * d * d + 2 * d * kv + 3 * d * shape["intermediate_size"]) + 2 * 32000 * d > 1e9
