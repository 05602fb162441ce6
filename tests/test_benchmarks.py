"""The benchmarks' commands, on a model small enough to be run here."""

import statistics
import sys

import pytest

from benchmarks import matryoshka_step


SMALL = {
    "batch": 2,
    "vision": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "text": {
        "vocab_size": 99,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


def test_all_ways_are_timed_and_summed_up(monkeypatch):
    peaks = {
        "five scales": 110,
        "plain way": 400,
        "plain way, logits at labels": 300,
        "576 alone": 100,
        "576 alone, logits at labels": 88,
    }

    def call(function, shape, argument):  # here instead of in a fresh process; there is a test for memory below
        return (peaks[argument], 1.0) if function is matryoshka_step.measure_memory else function(shape, argument)

    monkeypatch.setitem(matryoshka_step.SHAPES, "small", SMALL)
    monkeypatch.setattr(matryoshka_step, "in_a_fresh_process", call)
    monkeypatch.setattr(matryoshka_step.os, "environ", {})
    result = matryoshka_step.measure("small", repeats=2)
    seconds = [statistics.median(result["measured"][way]["seconds"]) for way in ("five scales", "plain way")]
    ratios = result["ratios"]
    assert ratios["time / plain way"] == seconds[0] / seconds[1]
    assert (ratios["memory / plain way"], ratios["memory / 576 alone"]) == (0.275, 1.1)
    assert matryoshka_step.BARS.keys() <= ratios.keys()
    text = matryoshka_step.table(result)
    assert all(f"| {way} |" in text for way in matryoshka_step.WAYS)
    assert "| memory / 576 alone | 1.10 | 1.25 |" in text


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_is_that_of_a_step(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    (peak, loss), (plain_peak, plain_loss) = (
        matryoshka_step.in_a_fresh_process(matryoshka_step.measure_memory, SMALL, way)
        for way in ("five scales", "plain way")
    )
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert 0 < peak < 0.6 * plain_peak


def test_shapes_are_what_they_are_called():
    config = matryoshka_step.build(matryoshka_step.SHAPES["m3-tiny"]).config
    assert (config.grid_side, config.num_vision_layers, config.visual_token_scales) == (24, 6, matryoshka_step.SCALES)
    model = matryoshka_step.build(matryoshka_step.SHAPES["100m"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(100e6, rel=0.05)
    assert sum(p.numel() for p in model.model.vision_tower.parameters()) == pytest.approx(30e6, rel=0.1)
