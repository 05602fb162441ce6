"""`compile_for`: the prefill as one graph for each budget, equal to the one without, and nothing compiled after it.

What is traced is tested with a backend that runs the traced graph as it is and counts its calls; torch's own compiler, which
takes its time and a C++ compiler, is behind a marker.
"""

import copy
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS, picture
from test_generation import answer, left_padded
from test_modeling import ANYRES, tiny_inputs, tiny_model
from torch._dynamo.utils import counters
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from typer.testing import CliRunner

from modeling_m3 import default_checkpoint
from modeling_m3.__main__ import app
from modeling_m3.outputs_m3 import CACHE_NAME


REPOSITORY = Path(__file__).parent.parent
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
CLOSE = 1e-4  # logits in float32: the bar of parity with the original


class Counting:
    """A backend whose graphs are the traced operations; `calls` is how often any of them ran."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, example_inputs):
        def run(*args):
            self.calls += 1
            return graph(*args)

        return run


@pytest.fixture
def traced():
    """Compiles without a compiler, and forgets what torch knows of earlier tests."""
    torch._dynamo.reset()
    counters.clear()
    backend = Counting()

    def compile_for(model, *args, **kwargs):
        model.compile_for(*args, **{"mode": None, "backend": backend, **kwargs})
        backend.calls = 0
        return backend

    return compile_for


def graphs():
    return counters["stats"]["unique_graphs"]


def scored(model, inputs, **kwargs):
    output = answer_with_logits(model, inputs, **kwargs)
    return output.sequences, torch.stack(output.logits)


def answer_with_logits(model, inputs, **kwargs):
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{**settings, **kwargs})


def check_equal(found, expected):
    (sequences, logits), (expected_sequences, expected_logits) = found, expected
    assert torch.equal(sequences, expected_sequences)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=CLOSE)


def prompts_of(processor, scales, image="photo_400x266.png"):
    return [
        processor(images=picture(image), text=PROMPT, num_visual_tokens=scale, return_tensors="pt") for scale in scales
    ]


@pytest.mark.compile
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_goldens_answer_alike_by_one_graph_for_each_budget_and_length(name, loaded, traced):
    model, processor = loaded[name]
    model, scales = copy.deepcopy(model), processor.visual_token_scales
    scales = [scales[0], scales[-2]]  # all of them are compiled below
    inputs = prompts_of(processor, scales)
    expected = [scored(model, each) for each in inputs]
    backend = traced(model, scales, max_text=64, like=inputs[0])
    lengths = {"llava15-m3": 2}.get(name, 3)  # 32 and 64 tokens of text; or parts of the uncut grid
    assert graphs() == len(scales) * lengths
    found = [scored(model, each) for each in inputs]
    assert backend.calls == len(scales)
    for one, other in zip(found, expected):
        check_equal(one, other)
    assert graphs() == len(scales) * lengths


@pytest.mark.compile
def test_nothing_is_compiled_or_run_without_a_graph_over_200_random_calls(traced):
    model, choose = tiny_model(), random.Random(0)
    scales = [1, 9, 36, 144]
    backend = traced(model, max_text=64)
    assert graphs() == 4 * 2
    for call in range(200):
        inputs = tiny_inputs(model, scales=(choose.choice(scales),), text=choose.randint(1, 63))
        inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape)
        answer(model, inputs, max_new_tokens=1)
        assert backend.calls == call + 1
    assert graphs() == 4 * 2


@pytest.mark.compile
def test_pictures_of_every_grid_use_the_graphs_that_are_made_by_default(traced):
    model = tiny_model(**ANYRES)
    backend = traced(model, 9, max_text=32)
    side, choose, calls = 24, random.Random(0), 0
    for _ in range(12):
        size = choose.randint(12, 80), choose.randint(12, 80)
        grid = choose.choice([(1, 2), (2, 1), (2, 2)])
        layout = model.config.image_layout(grid, size)
        ids = torch.tensor([[1, *[98] * layout.count(9), 5, 6, 7]])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(1, layout.num_tiles, 3, side, side),
            "image_sizes": torch.tensor([size]),
            "image_tile_grids": torch.tensor([grid]),
            "num_visual_tokens": torch.tensor([9]),
        }
        found = scored(model, inputs)
        check_equal(found, scored(copy.deepcopy(model), inputs))  # a copy has no graphs
        calls += 1
        assert backend.calls == calls


def test_a_batch_of_mixed_budgets_of_several_lengths(traced):
    model = tiny_model()
    batch = left_padded(
        [tiny_inputs(model, scales=(scale,), text=text) for scale, text in zip((1, 9, 36, 9), (5, 9, 6, 3))]
    )
    expected = scored(model, batch)
    backend = traced(model, [[1, 9, 36, 9]], max_text=16, like=batch)
    check_equal(scored(model, batch), expected)
    assert backend.calls == 1


@pytest.mark.compile
def test_several_pictures_in_a_prompt_and_a_number_for_all_of_them(traced):
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(9, 9), prompts=2)
    expected = scored(model, inputs)
    backend = traced(model, [9, [36, 9, 9, 9]], max_text=16, like=inputs)
    check_equal(scored(model, inputs), expected)
    assert (backend.calls, graphs()) == (1, 2)


def test_modes_of_generate_begin_with_the_graph_and_see_no_padding(traced):
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(9,), prompts=2)
    plain = copy.deepcopy(model)
    backend = traced(model, 9, max_text=16, like=inputs)
    modes = [
        {"num_beams": 3, "num_return_sequences": 2, "output_scores": True},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "static", "num_beams": 2, "disable_compile": True},
        {"repetition_penalty": 1.3, "max_length": 30, "max_new_tokens": None},
    ]
    for calls, kwargs in enumerate(modes, start=1):
        found, expected = (answer_with_logits(each, inputs, eos_token_id=None, **kwargs) for each in (model, plain))
        check_equal(*((each.sequences, torch.stack(each.logits)) for each in (found, expected)))
        assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
        assert backend.calls == calls, kwargs


def test_a_chat_goes_on_from_the_cache_of_a_graph(traced):
    model = tiny_model()
    both = tiny_inputs(model, scales=(9, 9))
    length = both["input_ids"].shape[1] // 2
    first = {name: each[:, :length] if each.ndim == 2 else each[:1] for name, each in both.items()}
    expected = answer(model, both)
    backend = traced(model, 9, max_text=16)
    cache = model.generate(**first, max_new_tokens=1, do_sample=False, return_dict_in_generate=True).past_key_values
    assert cache.get_seq_length() == length
    assert torch.equal(answer(model, both, **{CACHE_NAME: cache}), expected)
    assert backend.calls == 1


def test_what_was_not_compiled_for_runs_as_without_graphs(traced):
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(9,))
    plain = copy.deepcopy(model)
    backend = traced(model, 9, max_text=16)
    cases = {
        "longer text": (tiny_inputs(model, scales=(9,), text=20), {}),
        "two prompts": (tiny_inputs(model, scales=(9,), prompts=2), {}),
        "another budget": (tiny_inputs(model, scales=(36,)), {}),
        "no picture": (tiny_inputs(model, scales=(9,)) | dict.fromkeys(("pixel_values", "num_visual_tokens")), {}),
        "sampling": (inputs | {"visual_token_sampling": "spatial"}, {}),
        "hidden states": (inputs, {"output_hidden_states": True}),
    }
    cases["no picture"][0]["input_ids"] = torch.tensor([[1, 5, 6]])
    cases["no picture"][0]["attention_mask"] = torch.ones(1, 3, dtype=torch.long)
    if CACHE_NAME == "cache":  # before it, no release had chunks for prompts with pictures
        cases["chunks"] = inputs, {"prefill_chunk_size": 4}
    for name, (case, kwargs) in cases.items():
        found, expected = (answer_with_logits(each, case, **kwargs) for each in (model, plain))
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits)), name
        if name == "hidden states":
            assert len(found.hidden_states[0]) == len(expected.hidden_states[0]) > 1
    assert backend.calls == 0


def test_other_weights_dtype_and_mode_are_never_answered_by_stale_graphs(traced):
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(9,))
    backend = traced(model, 9, max_text=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    check_equal(scored(model, inputs), scored(copy.deepcopy(model), inputs))
    assert backend.calls == 1
    model.double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    check_equal(scored(model, inputs), scored(copy.deepcopy(model), inputs))
    assert (backend.calls, graphs()) == (1, 1)


def test_copies_and_saved_folders_hold_no_graphs(traced, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "before")
    traced(model, 9, max_text=16)
    model.save_pretrained(tmp_path / "after")
    before, after = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("before", "after")
    )
    assert before == after
    assert copy.deepcopy(model)._prefill_graphs is None
    model.compile_for([])
    assert model._prefill_graphs is None


@pytest.mark.compile
def test_a_model_in_four_bits_is_compiled_or_refused_in_a_sentence(traced, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForImageTextToText.from_pretrained(default_checkpoint(), quantization_config=quantization)
    processor = AutoProcessor.from_pretrained(default_checkpoint(), backend="pil")
    [inputs] = prompts_of(processor, [9])
    expected = scored(model, inputs)
    try:
        traced(model, 9, max_text=32)
    except ValueError as error:
        assert "cannot" in str(error)
        assert model._prefill_graphs is None
    check_equal(scored(model, inputs), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": [10]}, r"scales=10: 10 is not a number of visual tokens"),
        ({"scales": [[9, 9]]}, r"2 entries for 1 image"),
        ({"max_text": 0}, "max_text=0 must be a whole number from 1"),
        ({"like": {"input_ids": torch.ones(1, 3, dtype=torch.long)}}, "like has no pixel_values"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().compile_for(**arguments)


def test_models_that_no_graph_can_hold_are_refused_and_left_as_they_were(traced):
    model = tiny_model()
    inputs = tiny_inputs(model, scales=(9,))
    backend = traced(model, 9, max_text=16)
    kept = model._prefill_graphs
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(ValueError, match="cannot be compiled"):
        model.compile_for(9, max_text=16, backend="eager", mode=None)
    assert model._prefill_graphs is kept
    hook.remove()
    answer(model, inputs)
    assert backend.calls == 1
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        model.train().compile_for(9)
    with torch.device("meta"):
        empty = tiny_model()
    with pytest.raises(ValueError, match=r"in parts \(meta\).*load it whole"):
        empty.compile_for(9)


@pytest.mark.compile
def test_budgets_as_python_numbers_can_be_compiled_by_the_caller():
    # torch takes the second int it sees for an unknown; what reaches shapes are the configuration's own numbers.
    torch._dynamo.reset()
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for scale in (1, 9, 36):
            inputs = tiny_inputs(model, scales=(scale,)) | {"num_visual_tokens": [scale]}
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=0, atol=CLOSE)


@pytest.mark.compile
def test_a_second_start_finds_what_the_first_compiled(tmp_path):
    """In processes of their own, by the command line: the same answer, and not one kernel compiled again."""
    command = [
        sys.executable,
        "-m",
        "modeling_m3",
        "tests/fixtures/scene.png",
        "What color is the large circle?",
        "--quiet",
    ]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    kept = []
    for _ in range(2):
        done = subprocess.run(
            [*command, "--num-visual-tokens", "36", "--compile"],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "orange\n"
        kept.append({file.relative_to(tmp_path) for file in tmp_path.rglob("*.so")})
    assert kept[0] and kept[0] == kept[1]
    without = environment | {"CXX": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "other")}
    done = subprocess.run([*command, "--compile"], cwd=REPOSITORY, env=without, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("m3-ask: The prefill cannot be compiled: ") and done.stderr.count("\n") == 1


@pytest.mark.compile
def test_all_budgets_are_compared_by_graphs():
    scene = str(REPOSITORY / "tests" / "fixtures" / "scene.png")
    result = CliRunner().invoke(app, [scene, "What color is the large circle?", "--compare", "--compile", "--quiet"])
    answered = [line.split()[0] for line in result.output.splitlines() if line.endswith("orange")]
    assert answered[:5] == ["1", "9", "36", "144", "576"]


def test_auto_is_not_compiled_for():
    result = CliRunner().invoke(app, ["x.png", "Why?", "--compile", "--num-visual-tokens", "auto"])
    assert result.exit_code == 2 and "auto looks at several" in result.output


@pytest.mark.compile
def test_the_page_runs(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    [block] = re.findall(
        r"```py\n(.*?)```", (REPOSITORY / "docs" / "compile.md").read_text(encoding="utf-8"), re.DOTALL
    )
    exec(compile(block, "docs/compile.md", "exec"), {})
    assert capsys.readouterr().out.count("orange") == 2


@pytest.mark.compile
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_compiled_goldens_answer_alike(name, loaded, traced):
    model, processor = loaded[name]
    model, scales = copy.deepcopy(model), processor.visual_token_scales
    if name != "llava15-m3":
        scales = scales[1:2]  # at three lengths
    inputs = prompts_of(processor, scales)
    expected = [scored(model, each) for each in inputs]
    model.compile_for(scales, max_text=32, like=inputs[0])
    made = graphs()
    for each, other in zip(inputs, expected):
        check_equal(scored(model, each), other)
    if name != "llava15-m3":
        return
    batch = processor(
        images=[picture("photo_400x266.png")] * 4,
        text=[PROMPT] * 4,
        num_visual_tokens=[scales[0], scales[1], scales[1], scales[0]],
        padding=True,
        return_tensors="pt",
    )
    batches = [scored(model, batch, **kwargs) for kwargs in ({}, {"num_beams": 2})]
    model.compile_for([batch["num_visual_tokens"].tolist()], max_text=32, like=batch)
    for kwargs, other in zip(({}, {"num_beams": 2}), batches):
        check_equal(scored(model, batch, **kwargs), other)
    assert graphs() > made
