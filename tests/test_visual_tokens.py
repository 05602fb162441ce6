"""Scales, grids, pooling and counts, against the original's geometry and closed formulas."""

import math

import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_m3 import visual_tokens
from modeling_m3.visual_tokens import ImageLayout


def golden_rows():
    geometry = golden("geometry")
    for name, rows in geometry["rows"].items():
        pinpoints = [(height, width) for width, height in geometry["pinpoints"][name]]
        for row in rows:
            yield row, tuple(reversed(row["size"])), pinpoints


def test_tile_grids_equal_the_original():
    for row, image_size, pinpoints in golden_rows():
        assert visual_tokens.select_resolution(image_size, pinpoints) == tuple(reversed(row["best_resolution"]))
        grid = visual_tokens.tile_grid(image_size, pinpoints, 336)
        assert grid == tuple(reversed(row["grid_wh"]))
        assert ImageLayout(grid, image_size, "flat").num_tiles == row["n_tiles"]


def test_counts_equal_the_original_at_every_scale_and_merge_type():
    compared = 0
    for row, image_size, pinpoints in golden_rows():
        grid = visual_tokens.tile_grid(image_size, pinpoints, 336)
        for merge_type, counts in row["n_image_tokens"].items():
            for scale, count in counts.items():
                scale = 576 if scale == "None" else int(scale)
                assert ImageLayout(grid, image_size, merge_type).count(scale) == count, (row, scale)
                compared += 1
    assert compared == 2 * 110 * 3 * 6


@settings(max_examples=1000, deadline=None)
@given(
    height=st.one_of(st.integers(1, 5000), st.sampled_from([1, 7])),
    width=st.one_of(st.integers(1, 5000), st.sampled_from([1, 1000, 5000])),
    scale=st.sampled_from([1, 4, 9, 16, 36, 64, 144, 576]),
    merge_type=st.sampled_from(visual_tokens.MERGE_TYPES),
    pinpoints=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6),
    is_cut=st.booleans(),
)
def test_the_model_makes_as_many_tokens_as_are_counted(height, width, scale, merge_type, pinpoints, is_cut):
    size, pinpoints = (height, width), [(336 * rows, 336 * columns) for rows, columns in pinpoints]
    grid = visual_tokens.tile_grid(size, pinpoints, 336) if is_cut else None
    layout = ImageLayout(grid, size, merge_type)
    merged = layout.merge(torch.zeros(layout.num_tiles, scale, 2), torch.ones(2))
    assert len(merged) == layout.count(scale)
    newlines = layout.count(scale) - len(merged[merged[:, 0] == 0])
    assert (newlines > 0) <= (merge_type == "spatial_unpad" and is_cut)


def test_default_scales_are_the_papers():
    assert visual_tokens.default_scales(24) == [1, 9, 36, 144, 576]
    assert visual_tokens.default_scales(16) == [1, 4, 16, 64, 256]
    assert visual_tokens.default_scales(1) == [1]
    assert visual_tokens.default_scales(27) == [1, 9, 81, 729]
    assert visual_tokens.default_scales(14) == [1, 49, 196]


@pytest.mark.parametrize("side", [1, 2, 14, 24, 27])
def test_possible_scales_are_all_the_squares_that_divide_the_grid(side):
    expected = sorted((side // k) ** 2 for k in range(1, side + 1) if side % k == 0)
    assert visual_tokens.possible_scales(side) == expected


def test_pooling_once_equals_the_papers_repeated_pooling():
    features = torch.randn(3, 576, 5)
    grids = features.transpose(1, 2).reshape(3, 5, 24, 24)
    for scale, window in ((144, 2), (36, 2), (9, 2), (1, 3)):
        grids = torch.nn.functional.avg_pool2d(grids, window, window)
        pooled = visual_tokens.pool_tiles(features, scale)
        torch.testing.assert_close(pooled, grids.flatten(2).transpose(1, 2))


def test_sampling_baselines_are_nested_and_keep_tokens_as_they_are():
    features = torch.arange(576.0).reshape(1, 576, 1)
    kept = {
        sampling: {s: set(visual_tokens.pool_tiles(features, s, sampling).flatten().tolist()) for s in (1, 9, 36, 144)}
        for sampling in ("spatial", "sequential")
    }
    for sets in kept.values():
        assert sets[1] < sets[9] < sets[36] < sets[144]
        assert {scale: len(tokens) for scale, tokens in sets.items()} == {1: 1, 9: 9, 36: 36, 144: 144}
    assert kept["sequential"][9] == set(range(9))
    assert kept["spatial"][9] == {row * 24 + column for row in (0, 8, 16) for column in (0, 8, 16)}


def test_merging_reads_the_grid_row_by_row_across_tiles():
    # Two tiles side by side, each a 2x2 grid numbered by where it stands in the picture.
    base, left, right = [[9.0] * 4, [0.0, 1, 4, 5], [2.0, 3, 6, 7]]
    features = torch.tensor([base, left, right]).unsqueeze(-1)
    merged = ImageLayout((1, 2), (24, 48), "spatial").merge(features)
    assert merged.flatten().tolist() == [9.0] * 4 + [0, 1, 2, 3, 4, 5, 6, 7]
    with_newlines = ImageLayout((1, 2), (24, 48), "spatial_unpad").merge(features, torch.tensor([-1.0]))
    assert with_newlines.flatten().tolist() == [9.0] * 4 + [0, 1, 2, 3, -1, 4, 5, 6, 7, -1]
    assert ImageLayout((1, 2), (24, 48), "flat").merge(features).flatten().tolist() == base + left + right


def test_a_base_view_alone_ends_with_a_newline_as_in_the_original():
    features, newline = torch.zeros(1, 9, 2), torch.ones(2)
    layout = ImageLayout((0, 0), (24, 24), "spatial_unpad")
    merged = layout.merge(features, newline)
    assert merged[:, 0].tolist() == [0.0] * 9 + [1.0]
    assert len(merged) == layout.count(9)


def test_unpadding_needs_a_newline_and_the_size():
    with pytest.raises(ValueError, match="image_newline"):
        ImageLayout((1, 2), (24, 48), "spatial_unpad").merge(torch.zeros(3, 9, 2))
    with pytest.raises(ValueError, match="image_sizes"):
        ImageLayout((1, 2), None, "spatial_unpad").count(9)


@pytest.mark.parametrize("value", [100, 200, 0, -1, "abc", "36", 36.0, 36.5, True, None.__class__, [36, 100], [[36]]])
def test_a_wrong_number_is_refused_by_name_with_what_is_allowed(value):
    with pytest.raises(ValueError, match=r"\[1, 9, 36, 144, 576\]") as error:
        visual_tokens.check_num_visual_tokens(value, [1, 9, 36, 144, 576], num_images=2)
    assert repr(value) in str(error.value)


def test_a_list_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"3 entries for 2 image\(s\)"):
        visual_tokens.check_num_visual_tokens([1, 9, 36], [1, 9, 36], num_images=2)


def test_numbers_are_spread_over_the_images():
    scales = [1, 9, 36]
    assert visual_tokens.check_num_visual_tokens(9, scales, 3) == [9, 9, 9]
    assert visual_tokens.check_num_visual_tokens([1, 9], scales, 2) == [1, 9]
    assert visual_tokens.check_num_visual_tokens(None, scales, 2) == [36, 36]


@pytest.mark.parametrize("scales", [[], [100], [9, 9], [True], [1, 576, 577], [math.inf]])
def test_scales_must_be_scales_of_the_grid(scales):
    with pytest.raises(ValueError, match="visual_token_scales"):
        visual_tokens.check_scales(scales, 24)


@pytest.mark.parametrize("pinpoints", [[], [(336, 100)], [(0, 336)], [(336,)], [(336, 336, 336)]])
def test_pinpoints_must_be_whole_tiles(pinpoints):
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        visual_tokens.check_pinpoints(pinpoints, 336)
