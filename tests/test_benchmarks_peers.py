"""The comparisons with transformers' own classes: the same work is compared, and what comes out is what was measured."""

import json
import statistics

import numpy as np
import pytest
import torch
import typer
from conftest import tiny_config
from typer.testing import CliRunner

from benchmarks import peers, processors


KINDS = ("flat", "anyres")


def model_and_twin(kind):
    model = peers.build(peers.as_kind(tiny_config(), kind), torch.float32, "cpu")
    return model, peers.twin(model)


@pytest.mark.parametrize("kind", KINDS)
def test_both_classes_hold_the_same_tensors(kind):
    model, twin = model_and_twin(kind)
    assert type(twin).__name__ == {"flat": "Llava", "anyres": "LlavaNext"}[kind] + "ForConditionalGeneration"
    ours = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert ours == {name: tensor.data_ptr() for name, tensor in twin.state_dict().items()}
    assert twin.dtype == model.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_runs_one_layer_more(kind):
    model, twin = model_and_twin(kind)
    inputs, layers = peers.make_inputs(model, 1), []
    for each in (model, twin):
        count = []
        for layer in each.get_submodule("model.vision_tower.encoder.layers").children():
            layer.register_forward_hook(lambda *_, count=count: count.append(1))
        with torch.no_grad():
            each(**inputs)
        layers.append(len(count))
    assert layers == [2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decoding_are_measured(kind):
    result = peers.measure(peers.as_kind(tiny_config(), kind), torch.float32, "cpu", batch=2, new_tokens=3, repeats=2)
    assert result["largest_difference_of_logits"] < 1e-5
    assert list(result["seconds"]) == list(result["ratios"]) == list(peers.BARS)
    for name, seconds in result["seconds"].items():
        assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
        ratio = statistics.median(seconds["M3"]) / statistics.median(seconds["transformers"])
        assert result["ratios"][name] == ratio
    # 144 tokens of a view, or of a base view and two tiles whose 12 rows end with a newline; and the text.
    assert result["tokens"]["prompt"] == {"flat": 144, "anyres": 144 + 12 * (24 + 1)}[kind] + peers.TEXT
    text = peers.table({**result, "size": "small", "kind": kind, "dtype": "float32"})
    assert f"| {result['ratios']['prefill']:.3f} |" in text
    assert text.count("| 1.02 |") == 2


def test_tokens_are_decoded_as_by_generate_from_pixels():
    model, _ = model_and_twin("anyres")
    inputs = peers.make_inputs(model, 2)
    with torch.no_grad():
        decoder = peers.Decoder(model, inputs, new_tokens=5)
        first, again, generated = decoder.forward(), decoder.forward(), decoder.generate()
    expected = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(first, again)
    assert torch.equal(generated, expected[:, length:])
    assert decoder.cache.get_seq_length() == length


def test_different_work_is_not_compared():
    model, twin = model_and_twin("flat")
    with torch.no_grad():
        twin.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1)
        inputs = peers.make_inputs(model, 1)
        decoders = [peers.Decoder(each, inputs, 2) for each in (model, twin)]
    with pytest.raises(RuntimeError, match="same logits"):
        peers.difference(*decoders, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_processors_are_measured_on_the_same_pictures(kind):
    rows = processors.measure(kind, "PIL", [(97, 53)], batch=2, repeats=3)
    assert [row["what"] for row in rows] == ["pixels", "pixels and text"]
    for row in rows:
        for clock, ratio in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
            assert all(len(row[clock][name]) == 3 for name in processors.CLASSES)
            medians = [statistics.median(row[clock][name]) for name in processors.CLASSES]
            assert row[ratio] == medians[0] / medians[1]
    text = processors.table({"rows": rows, "skipped": {}})
    per_second = 2 / statistics.median(rows[0]["seconds"]["M3"])
    assert f"| {kind}, PIL, 97x53, pixels | {per_second:.1f} (" in text
    assert f"largest ratio of times is {max(row['ratio'] for row in rows):.2f}" in text


def test_outputs_that_differ_are_not_compared():
    pair = {
        name: {"input_ids": torch.arange(4), "pixel_values": torch.zeros(1, 3, 2, 2)} for name in processors.CLASSES
    }
    processors.check_agreement(pair, 0)
    pair["M3"] = {**pair["M3"], "pixel_values": torch.full((1, 3, 2, 2), 0.01)}
    processors.check_agreement(pair, 0.02)
    with pytest.raises(RuntimeError, match="Pixels differ by up to 0.01"):
        processors.check_agreement(pair, 0.001)
    pair["M3"] = {**pair["M3"], "input_ids": torch.arange(5)}
    with pytest.raises(RuntimeError, match="input_ids differ in shape"):
        processors.check_agreement(pair, 1)


def test_a_backend_that_is_missing_is_said_to_be_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "SIZES", [(40, 30)])
    monkeypatch.setattr(processors, "why_not", lambda backend: None if backend == "PIL" else "it is not here")
    threads = torch.get_num_threads()
    app = typer.Typer()
    app.command()(processors.main)
    result = CliRunner().invoke(app, ["--repeats", "1", "--output", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "torchvision. it is not here" in result.output
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["skipped"] == {"torchvision": "it is not here"}
    assert {(row["kind"], row["backend"]) for row in saved["rows"]} == {("flat", "PIL"), ("anyres", "PIL")}


def test_pictures_are_the_same_in_every_run():
    assert np.array_equal(np.array(processors.make_picture(97, 53)), np.array(processors.make_picture(97, 53)))
    assert processors.make_picture(97, 53).size == (97, 53)
