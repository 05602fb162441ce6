"""Exported graphs answer as the model does, and as the original did: torch.export's and ONNX's, at every number of visual tokens."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CHECKPOINTS, GOLDENS, golden_cases, golden_tensors, picture, tiny_config
from safetensors.torch import save_file
from test_modeling import tiny_model
from test_parity_original import TOLERANCE, prepare
from transformers import AutoProcessor
from typer.testing import CliRunner

from modeling_m3 import M3LlavaForConditionalGeneration, default_checkpoint


for needed in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed, reason=f"exporting needs {needed}: pip install '.[export]'")

from m3_conversion import exported_graphs  # noqa: E402 - which needs them
from m3_conversion.export import ConversionError, export  # noqa: E402
from m3_conversion.export_command import app  # noqa: E402
from m3_conversion.exported_graphs import check_exportable, export_language, export_vision, write_language  # noqa: E402
from m3_conversion.onnx_answers import OnnxM3  # noqa: E402


# An export takes 20 s of one core: by --dist=loadgroup one process makes each, for all tests.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("export")]
SCALES = (1, 9, 36, 144, 576)
FLAT, ANYRES = CHECKPOINTS
GOLDEN_CASES = [
    case for case in golden_cases() if case.values[1]["image_files"] and "<image>" in "".join(case.values[1]["prompts"])
]
PICTURES = ("img5_97x53.png", "img4_200x700.png", "img1_640x480.png")  # cut into tiles, three grids
PROMPTS = ("USER: <image>\nWhat is this? ASSISTANT:", "Hello <image>", "<image> Is anything written there, and what?")


@pytest.fixture(scope="module")
def exported(loaded, converted, tmp_path_factory):
    """By checkpoint: the folder, and the programs of torch.export that it was made of. Made when first asked for."""

    @functools.cache
    def make(name):
        programs = {}
        with pytest.MonkeyPatch.context() as patch:
            for function in (export_vision, export_language):

                def keeping(model, function=function):
                    return programs.setdefault(function.__name__, function(model))

                patch.setattr(exported_graphs, function.__name__, keeping)
            source = default_checkpoint() if name == "m3-tiny" else converted[name]
            folder = export(source, tmp_path_factory.mktemp("exported") / name, check=False).destination
        return folder, programs["export_vision"].module(), programs["export_language"].module()

    return make


@pytest.fixture(scope="module")
def graphs(exported):
    return functools.cache(lambda name: OnnxM3.from_folder(exported(name)[0]))


def prepared(processor, numbers, prompts=PROMPTS):
    """Several prompts in one batch, of different lengths, each with a picture."""
    prompts = prompts[:2] if numbers == 576 else prompts  # which are long enough
    images = [picture(name).convert("RGB") for name in PICTURES[: len(prompts)]]
    return processor(images=images, text=list(prompts), num_visual_tokens=numbers, padding=True, return_tensors="pt")


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def expected_logits(model, inputs):
    """The model's, where there is no padding."""
    with torch.no_grad():
        return model(**inputs, position_ids=positions_of(inputs["attention_mask"])).logits


def onnx_logits(graphs, inputs):
    visual_tokens = np.concatenate(graphs.get_visual_tokens(inputs))
    logits, _ = graphs.forward(inputs["input_ids"].numpy(), inputs["attention_mask"].numpy(), visual_tokens)
    return torch.from_numpy(logits)


def assert_equal_where_shown(logits, expected, inputs):
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[shown], expected[shown], atol=TOLERANCE, rtol=0)


# torch.export


@pytest.mark.parametrize("numbers", [*SCALES, [144, 36, 1]], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_programs_of_torch_equal_the_model(name, numbers, loaded, exported):
    model, processor = loaded[name]
    _, vision, language = exported(name)
    inputs = prepared(processor, numbers)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    tiles, layouts = model.config.image_tiles(
        inputs["pixel_values"],
        *(inputs[k].tolist() if k in inputs else None for k in ("image_sizes", "image_tile_grids")),
    )
    pooled = dict(zip(SCALES, vision(torch.cat(tiles))))
    parts = zip(*(pooled[scale].split([layout.num_tiles for layout in layouts]) for scale in SCALES))
    visual_tokens = torch.cat(
        [
            layout.merge(dict(zip(SCALES, of_image))[scale], model.model.image_newline)
            for layout, of_image, scale in zip(layouts, parts, inputs["num_visual_tokens"].tolist())
        ]
    )
    text = model.config.text_config
    empty = torch.zeros(len(ids), text.num_key_value_heads, 0, text.head_dim)
    past = [(empty, empty)] * text.num_hidden_layers
    logits, present = language(ids, visual_tokens, mask, positions_of(mask), torch.arange(ids.shape[1]), past)
    assert_equal_where_shown(logits, expected_logits(model, inputs), inputs)
    assert present[0][0].shape[2] == ids.shape[1]


# ONNX


@pytest.mark.parametrize("numbers", [*SCALES, [144, 36, 1]], ids=str)
@pytest.mark.parametrize("name", [*CHECKPOINTS, "m3-tiny"])
def test_graphs_equal_the_model(name, numbers, loaded, graphs):
    model, processor = m3_tiny() if name == "m3-tiny" else loaded[name]
    inputs = prepared(processor, numbers)
    logits, expected = onnx_logits(graphs(name), inputs), expected_logits(model, inputs)
    if (
        name == "m3-tiny"
    ):  # whose visual tokens are large: in float64, float32 is 1.5e-4 off there, and 4e-5 in the text
        inputs["attention_mask"][inputs["input_ids"] == model.config.image_token_id] = 0
    assert_equal_where_shown(logits, expected, inputs)


@pytest.mark.parametrize("numbers", [*SCALES, [144, 36, 1]], ids=str)
@pytest.mark.parametrize("name", [*CHECKPOINTS, "m3-tiny"])
def test_answers_equal_generate(name, numbers, loaded, graphs):
    model, processor = m3_tiny() if name == "m3-tiny" else loaded[name]
    inputs = prepared(processor, numbers)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = graphs(name).generate(inputs, max_new_tokens=8)
    assert answers.dtype == np.int64 and answers.tolist() == expected.tolist()


@functools.cache
def m3_tiny():
    folder = default_checkpoint()
    return M3LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize(("name", "case"), GOLDEN_CASES)
def test_logits_equal_the_originals(name, case, loaded, graphs):
    _, processor = loaded[name]
    if case["merged_len"] == processor.tokenizer.model_max_length:
        pytest.skip("the original cut the prompt")
    inputs = prepare(processor, case, padding_side="right")
    logits = onnx_logits(graphs(name), inputs)
    stored = golden_tensors(name)[f"{case['id']}/logits_sub"]
    for row, valid in enumerate(case["valid_len"]):
        kept = [i for i, position in enumerate(case["positions"]) if position < valid]
        positions = [case["positions"][i] for i in kept]
        subset = logits[row, positions][:, : 16 * 63][:, ::16]
        torch.testing.assert_close(subset, stored[row][kept], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "case"), [case for case in GOLDEN_CASES if "left_padded_new_ids" in case.values[1]])
def test_a_left_padded_batch_answers_as_the_original(name, case, loaded, graphs):
    inputs = prepare(loaded[name][1], case, padding_side="left")
    answers = graphs(name).generate(inputs, max_new_tokens=12)
    assert answers[:, inputs["input_ids"].shape[1] :].tolist() == case["left_padded_new_ids"]


def test_an_answer_that_ends_is_padded_as_by_generate(loaded, graphs, exported):
    model, processor = loaded[FLAT]
    inputs = prepared(processor, 9)
    answers = graphs(FLAT).generate(inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    ends = [int(answers[0, 2]), int(answers[1, 4])]
    runner = OnnxM3.from_folder(exported(FLAT)[0])  # one of its own, to be changed
    runner.generation_config.eos_token_id = ends
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=ends)
    assert runner.generate(inputs, max_new_tokens=8).tolist() == expected.tolist()


def test_a_text_without_a_picture_and_one_picture_given_as_arrays(loaded, graphs):
    model, processor = loaded[FLAT]
    text = processor(text="Hello", return_tensors="pt")
    expected = model.generate(**text, max_new_tokens=4, do_sample=False)
    assert graphs(FLAT).generate(text, max_new_tokens=4).tolist() == expected.tolist()
    inputs = prepared(processor, 36, PROMPTS[:1])
    arrays = {name: value.numpy() for name, value in inputs.items()}
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert graphs(FLAT).generate(arrays, max_new_tokens=4).tolist() == expected.tolist()


def test_many_tiles_go_through_in_parts(loaded, graphs, monkeypatch):
    model, processor = loaded[FLAT]
    inputs = prepared(processor, [144, 36, 9])
    monkeypatch.setattr("m3_conversion.onnx_answers.TILES_AT_ONCE", 2)
    images = {name: inputs[name] for name in ("pixel_values", "image_tile_grids", "num_visual_tokens")}
    with torch.no_grad():
        expected = model.get_image_features(**images).pooler_output
    for tokens, of_model in zip(graphs(FLAT).get_visual_tokens(inputs), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(tokens), of_model, atol=TOLERANCE, rtol=0)


# The folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_folder_has_the_processor_and_names_its_axes(name, loaded, exported):
    import onnx

    folder, _, _ = exported(name)
    assert (folder / "image_newline.npy").exists() == (name == ANYRES)
    assert not list(folder.glob("*.safetensors"))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = prepared(processor, 36)
    assert inputs["input_ids"].tolist() == prepared(loaded[name][1], 36)["input_ids"].tolist()
    axes = {}
    for file in ("vision.onnx", "language.onnx"):
        graph = onnx.load(folder / file, load_external_data=False).graph
        for value in (*graph.input, *graph.output):
            axes[value.name] = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
    side = loaded[name][0].config.vision_config.image_size
    assert axes["pixel_values"] == ["tiles", 3, side, side]
    assert [axes[f"visual_tokens_{scale}"] for scale in SCALES] == [["tiles", scale, 48] for scale in SCALES]
    assert axes["input_ids"] == axes["position_ids"] == ["batch", "sequence"]
    assert axes["attention_mask"] == ["batch", "total"]
    assert axes["visual_tokens"] == ["visual", 48]
    assert axes["logits"] == ["batch", "kept", loaded[name][0].config.text_config.vocab_size]
    assert axes["past_key_values.2.value"] == ["batch", 4, "past", 12]
    assert axes["present.2.value"] == ["batch", 4, "total", 12]


def test_the_command_checks_and_says_so(converted, exported, monkeypatch, tmp_path):
    """Without exporting again: the check is of a folder that is there."""
    folder = exported(FLAT)[0]
    monkeypatch.setattr("m3_conversion.export.write_vision", lambda model, file: shutil.copy(folder / file.name, file))
    monkeypatch.setattr(
        "m3_conversion.export.write_language", lambda model, file: shutil.copy(folder / file.name, file)
    )
    result = CliRunner().invoke(app, [str(converted[FLAT]), str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    *rows, last = result.stdout.splitlines()
    assert [row.split(" visual")[0] for row in rows] == [*map(str, SCALES), "1 and 576"]
    assert all(0 < float(row.split()[-1]) < TOLERANCE for row in rows)
    assert last.startswith(f"wrote {tmp_path / 'out'}: ") and "of the model's" in last
    assert "llava15-m3 as ONNX graphs" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("weight", ["lm_head.weight", "model.multi_modal_projector.linear_2.bias"])
def test_graphs_that_answer_otherwise_are_not_left(weight, converted, exported, monkeypatch, tmp_path):
    """The weights of a folder are changed after its graphs were made: a little, in one number."""
    folder, changed = exported(FLAT)[0], tmp_path / "changed"
    model = M3LlavaForConditionalGeneration.from_pretrained(converted[FLAT])
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[0] += 1.0
    shutil.copytree(converted[FLAT], changed)
    model.save_pretrained(changed)
    monkeypatch.setattr("m3_conversion.export.write_vision", lambda model, file: shutil.copy(folder / file.name, file))
    monkeypatch.setattr(
        "m3_conversion.export.write_language", lambda model, file: shutil.copy(folder / file.name, file)
    )
    assert "At 1 visual tokens the graphs' logits differ" in in_a_line([changed, tmp_path / "out"])
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


# Other models


@pytest.mark.parametrize(
    "overrides",
    [
        {"text_config": {"model_type": "mistral", "sliding_window": None}},
        {"text_config": {"model_type": "qwen2"}},
        {"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}},
        {
            "text_config": {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "rope_theta": 10000.0,
                }
            }
        },
    ],
    ids=["mistral", "qwen2", "linear", "llama3"],
)
def test_other_language_models(overrides, tmp_path):
    import onnxruntime

    model = tiny_model(**overrides)
    write_language(model, tmp_path / "language.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "language.onnx")
    ids = torch.randint(3, 90, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    past = [given for given in session.get_inputs() if given.name.startswith("past_key_values")]
    cache = [np.zeros((2, given.shape[1], 0, given.shape[3]), np.float32) for given in past]
    outputs = []
    for part in (slice(0, 130), slice(130, 131), slice(131, 200)):  # a prompt, a token, and several after a cache
        values = {
            "input_ids": ids[:, part].numpy(),
            "visual_tokens": np.zeros((0, 32), np.float32),
            "attention_mask": np.ones((2, part.stop), np.int64),
            "position_ids": np.arange(part.start, part.stop)[None].repeat(2, 0),
            "logits_to_keep": np.arange(part.stop - part.start),
        }
        logits, *cache = session.run(None, values | {given.name: value for given, value in zip(past, cache)})
        outputs.append(torch.from_numpy(logits))
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"visual_token_sampling": "spatial"},
        {"visual_token_sampling": "sequential"},
        {"vision_feature_select_strategy": "full", "visual_token_scales": [144]},
        {"visual_token_scales": [36, 4, 144]},
    ],
    ids=str,
)
def test_other_ways_from_tiles_to_visual_tokens(overrides):
    model = tiny_model(**overrides)
    vision = export_vision(model).module()
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    for scale, tokens in zip(model.config.visual_token_scales, vision(pixels), strict=True):
        with torch.no_grad():
            expected = model.get_image_features(pixels, num_visual_tokens=scale).pooler_output
        torch.testing.assert_close(list(tokens), list(expected), atol=TOLERANCE, rtol=0)


# What is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text_config": {"model_type": "gemma"}}, "'gemma': llama, mistral, qwen2"),
        ({"text_config": {"model_type": "mistral", "sliding_window": 64}}, "sliding_window=64"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        (
            {"text_config": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}},
            "rope_type is 'dynamic'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_not_known_to_be_exported_rightly(overrides, message):
    with pytest.raises(ConversionError, match="cannot be exported.*") as error:
        check_exportable(tiny_config(**overrides))
    assert message in str(error.value)


def in_a_line(arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    *progress, line = result.stderr.splitlines()
    assert all(not part or part.startswith("Loading weights") for part in progress), result.stderr
    return line


def test_checkpoints_that_are_refused(converted, tmp_path):
    source, out = converted[FLAT], tmp_path / "out"
    assert "There is no folder nothing" in in_a_line(["nothing", out])
    assert "m3-convert" in in_a_line([GOLDENS / FLAT, out])
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    config = json.loads((changed / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (changed / "config.json").write_text(json.dumps(quantized))
    assert "its weights are quantized" in in_a_line([changed, out])
    (changed / "config.json").write_text(json.dumps(config))
    weights = M3LlavaForConditionalGeneration.from_pretrained(source).state_dict()
    del weights["model.multi_modal_projector.linear_1.bias"]
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    assert "has no weights for model.multi_modal_projector.linear_1.bias" in in_a_line([changed, out])
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_what_is_there_stays(converted, tmp_path):
    (tmp_path / "file").write_text("mine")
    for there in (tmp_path, tmp_path / "file"):
        assert f"{there} exists: name a folder that is new" in in_a_line([converted[FLAT], there])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_a_failure_while_writing_leaves_nothing(debug, converted, monkeypatch, tmp_path):
    def fail(model, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("m3_conversion.export.write_vision", fail)
    result = CliRunner().invoke(app, [str(converted[FLAT]), str(tmp_path / "out"), *debug])
    assert result.exit_code == 1
    assert isinstance(result.exception, OSError) if debug else "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_visual_tokens": torch.tensor([0, 9, 9])}, "auto"),
        ({"num_visual_tokens": torch.tensor([7, 9, 9])}, "7 is not a number of visual tokens"),
        ({"num_visual_tokens": torch.tensor([36, 9, 9])}, "placeholders for"),
        ({"pixel_values": None}, "placeholders for 0 visual tokens"),
        ({"input_ids": None}, "There are no input_ids"),
        ({"visual_token_sampling": "spatial"}, "visual_token_sampling is no input"),
        ({"attention_mask": torch.ones(3, 4)}, "should be (prompts, tokens)"),
    ],
    ids=str,
)
def test_inputs_that_are_refused(change, message, loaded, graphs):
    inputs = {**prepared(loaded[FLAT][1], 9), **change}
    with pytest.raises(ValueError) as error:
        graphs(FLAT).generate(inputs)
    assert message in str(error.value)


def test_prompts_that_are_refused(loaded, graphs, monkeypatch):
    runner, (_, processor) = graphs(FLAT), loaded[FLAT]
    inputs = processor(text=["Hello", "Hello there, you"], padding=True, padding_side="right", return_tensors="pt")
    with pytest.raises(ValueError, match="padded on the right"):
        runner.generate(inputs)
    long = {"input_ids": torch.full((1, 5000), 5)}
    with pytest.raises(ValueError, match="5000 tokens, more than the language model's context of 4096"):
        runner.generate(long)
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"max_new_tokens={wrong}"):
            runner.generate(long, max_new_tokens=wrong)
    monkeypatch.setattr(runner.generation_config, "repetition_penalty", 1.2)
    with pytest.raises(ValueError, match="sets repetition_penalty"):
        runner.generate(long)


def test_a_folder_that_is_no_export(converted, tmp_path):
    for folder in (converted[FLAT], tmp_path):
        with pytest.raises(ValueError, match="has no vision.onnx: name a folder that m3-export wrote"):
            OnnxM3.from_folder(folder)
