"""The statistics of outcomes at several scales: by hand, against loops, and intervals on simulated data."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from m3_evaluation import statistics
from modeling_m3 import M3LlavaForConditionalGeneration


SCALES = [1, 9, 36]
# Right everywhere; only at 9; only at 1; never; graded; graded, right at the finest alone.
SCORES = np.array([[1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0.3, 0.6, 1.0], [0.2, 0.4, 0.5]])


def test_by_hand():
    assert statistics.first_sufficient(statistics.sufficient(SCORES)).tolist() == [0, 1, 0, -1, 1, 2]
    fewest, finest = (statistics.oracle(SCORES, SCALES, never=never) for never in (0, -1))
    assert fewest == statistics.Choice((1 + 1 + 1 + 0 + 0.6 + 0.5) / 6, (1 + 9 + 1 + 1 + 9 + 36) / 6)
    assert finest == statistics.Choice((1 + 1 + 1 + 0 + 0.6 + 0.5) / 6, (1 + 9 + 1 + 36 + 9 + 36) / 6)
    assert statistics.oracle(SCORES, SCALES, threshold=0.7).tokens == (1 + 9 + 1 + 1 + 36 + 1) / 6
    tiles = np.array([1, 2, 1, 1, 3, 2])
    of_tiles = statistics.oracle(SCORES, tiles[:, None] * SCALES)
    assert of_tiles.tokens == (1 + 2 * 9 + 1 + 1 + 3 * 9 + 2 * 36) / 6
    shares = statistics.shares_of_complexity(SCORES, SCALES)
    assert shares == {"1": 2 / 6, "9": 2 / 6, "36": 1 / 6, "never": 1 / 6}
    assert statistics.coarse_right_fine_wrong(SCORES).tolist() == [False, True, True, False, False, False]
    assert statistics.agreement([["a", "a", "b"], ["c", "d", "d"]]).tolist() == [
        [1, 0.5, 0],
        [0.5, 1, 0.5],
        [0, 0.5, 1],
    ]


def test_mixes_by_hand():
    tokens, scores = [1, 9, 36, 144, 576], [0.1, 0.5, 0.4, 0.9, 0.9]
    assert statistics.mix_hull(tokens, scores) == [(1, 0.1), (9, 0.5), (144, 0.9)]
    mix = statistics.best_mix(tokens, scores, 5)
    assert (mix.first, mix.second, mix.share, mix.performance) == (1, 9, 0.5, pytest.approx(0.3))
    assert statistics.best_mix(tokens, scores, 576) == statistics.Mix(0.9, 144, 144, 144, 0)
    with pytest.raises(ValueError, match="the cheapest scale costs 1"):
        statistics.best_mix(tokens, scores, 0.5)


@given(st.lists(st.integers(0, 20), min_size=2, max_size=6), st.floats(0, 1))
def test_no_mix_of_two_is_better(values, where):
    tokens = [4**index for index in range(len(values))]
    cost = tokens[0] + where * (tokens[-1] - tokens[0])
    best = max(value for token, value in zip(tokens, values) if token <= cost)
    for (low, a), (high, b) in itertools.combinations(zip(tokens, values), 2):
        if low <= cost <= high:
            best = max(best, a + (b - a) * (cost - low) / (high - low))
    assert statistics.best_mix(tokens, values, cost).performance == pytest.approx(best)


@given(st.lists(st.lists(st.sampled_from([0, 0.3, 0.5, 1]), min_size=3, max_size=3), min_size=1, max_size=20))
def test_oracle_as_in_a_loop(rows):
    tokens, performance = 0, 0.0
    for row in rows:
        index = next((i for i, score in enumerate(row) if score >= 0.5), 0)
        tokens, performance = tokens + SCALES[index], performance + row[index]
    found = statistics.oracle(np.array(rows), SCALES)
    assert found.tokens == pytest.approx(tokens / len(rows))
    assert found.performance == pytest.approx(performance / len(rows))


@pytest.mark.slow
@pytest.mark.parametrize("hard", [0.2, 0.03], ids=["many samples need detail", "few samples need detail"])
def test_intervals_hold_the_truth(hard):
    """Of 1,000 simulated data sets, each of: a share, a graded mean, two paired differences, the oracle's mean tokens."""
    generator, held, size = np.random.default_rng(0), np.zeros(5), 300
    scales = np.array([1, 9, 144])
    patterns = np.array([[0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 1], [0, 1, 0]])
    shares = np.array([hard, hard, *(np.array([0.15, 0.3, 0.05, 0.1]) * (1 - 2 * hard) / 0.6)])
    means = shares @ patterns
    tokens = np.array([144, 9, 1, 1, 1, 9])
    for _ in range(1000):
        drawn = generator.choice(len(patterns), size, p=shares)
        scores = patterns[drawn]
        assert (scales[statistics.oracle_choice(scores)] == tokens[drawn]).all()
        differences = statistics.difference_intervals(scores, resamples=400)
        graded = generator.beta(2, 3, size)
        found = {
            means[0]: statistics.intervals(scores)[0],
            0.4: statistics.intervals(graded[:, None], resamples=400)[0],
            means[0] - means[2]: differences[0],
            means[1] - means[2]: differences[1],
            shares @ tokens: statistics.intervals(tokens[drawn][:, None], resamples=400)[0],
        }
        held += [low <= truth <= high for truth, (low, high) in found.items()]
    assert ((held >= 930) & (held <= 970)).all(), held


def test_no_difference_in_a_few_samples_is_no_proof():
    low, high = statistics.difference_intervals(np.ones((50, 2)))[0]
    assert -low == high == pytest.approx(0.0713, abs=1e-4)
    assert statistics.difference_intervals(np.ones((50, 2)))[1] == (0, 0)  # the reference


def test_intervals_of_what_is_always_right_are_no_point():
    assert statistics.wilson_interval(50, 50) == (pytest.approx(0.9287, abs=1e-4), 1.0)
    assert statistics.wilson_interval(0, 50)[1] == pytest.approx(0.0713, abs=1e-4)


def test_resampling_is_the_same_in_parts(monkeypatch):
    whole = statistics.resampled_means(SCORES, 50, seed=3)
    monkeypatch.setattr(statistics, "CHUNK", 6 * 7)
    assert (statistics.resampled_means(SCORES, 50, seed=3) == whole).all()
    assert whole.shape == (50, 3)


def test_flops_are_those_that_torch_counts():
    with torch.device("meta"):
        model = M3LlavaForConditionalGeneration(tiny_config()).eval()
    counted = []
    for length in (5, 12):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(inputs_embeds=torch.empty(1, length, 32, device="meta"), logits_to_keep=1)
        # Older releases of transformers make the angles of rotary embeddings by a product of matrices.
        of_angles = sum(
            sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith("rotary_emb")
        )
        counted.append(counter.get_total_flops() - of_angles)
    assert statistics.prefill_flops(model.config, {5: 3, 12: 1}) == (3 * counted[0] + counted[1]) / 4


def test_imports_are_light():
    code = (
        "import sys, m3_evaluation.statistics; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
