"""The picture as the model sees it: its pixels, one box for each visual token in the model's order, and m3-ask --overlay."""

import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import CHECKPOINTS, GOLDENS, picture, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_ask import run
from test_processing import MODELS, PINPOINTS, PROCESSORS, word_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil

import modeling_m3
from modeling_m3 import M3LlavaModel, M3LlavaProcessor
from modeling_m3.outputs_m3 import M3LlavaEncodedImages
from modeling_m3.overlay import SeenPicture, see, similarities
from modeling_m3.visual_tokens import MERGE_TYPES, ImageLayout


MARGIN = 12
NAMES = sorted(path.name for path in (GOLDENS / "images").iterdir())
SCENE = Path(__file__).parent / "fixtures" / "scene.png"


def noise(size, seed=0):
    """A picture of (height, width) whose pixels all differ."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def blank(layout, side=24, patch_size=2):
    """What is seen of a black picture that is laid out so; all scales of a grid of 12x12 patches."""
    canvas = None if layout.num_tiles == 1 else Image.new("RGB", (layout.grid[1] * side, layout.grid[0] * side))
    return SeenPicture(Image.new("RGB", (side, side)), canvas, layout, patch_size, (1, 4, 9, 16, 36, 144))


def covered(boxes, shape):
    """How many boxes there are over each pixel."""
    times = np.zeros(shape, int)
    for box in boxes:
        times[box.region] += 1
    return times


@pytest.fixture(scope="session")
def everything(loaded):
    """(model, processor) of the goldens and m3-tiny."""
    tiny = modeling_m3.default_checkpoint()
    both = AutoModelForImageTextToText.from_pretrained(tiny), AutoProcessor.from_pretrained(tiny, backend="pil")
    return {**loaded, "m3-tiny": both}


def encode(model, processor, image):
    inputs = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        return model.encode_images(inputs["pixel_values"], inputs.get("image_sizes"), inputs["image_tile_grids"])


@settings(max_examples=100, deadline=None)
@given(
    grid=st.one_of(st.none(), st.just((0, 0)), st.tuples(st.integers(1, 4), st.integers(1, 4))),
    size=st.one_of(
        st.tuples(st.integers(1, 200), st.integers(1, 200)), st.sampled_from([(1, 1000), (1000, 1), (7, 5000)])
    ),
    merge_type=st.sampled_from(MERGE_TYPES),
    scale=st.sampled_from([1, 4, 9, 16, 36, 144]),
)
def test_there_is_one_box_for_each_token(grid, size, merge_type, scale):
    layout = ImageLayout(grid, size, merge_type)
    seen = blank(layout)
    boxes = seen.boxes(scale)
    assert [box.index for box in boxes] == list(range(layout.count(scale)))
    assert {box.count for box in boxes} == {layout.count(scale)}
    drawing = seen.draw(scale)
    assert covered(boxes, drawing.size[::-1]).max() == 1, "no two boxes overlap, and all are in the drawing"
    assert (
        sum((box.right - box.left) * (box.bottom - box.top) for box in boxes)
        == covered(boxes, drawing.size[::-1]).sum()
    )
    assert len({box.describe() for box in boxes}) == len(boxes)


@settings(max_examples=100, deadline=None)
@given(
    size=st.one_of(
        st.tuples(st.integers(1, 200), st.integers(1, 200)), st.sampled_from([(1, 1000), (1000, 1), (7, 5000)])
    ),
    scale=st.sampled_from([1, 9, 36, 144]),
    kind=st.sampled_from(list(MODELS)),
)
def test_boxes_are_where_the_models_tokens_come_from(size, scale, kind):
    """The features of every patch are where it is in the drawing: what the model makes of them is where its tokens are."""
    processor, model = PROCESSORS[kind], MODELS[kind]
    image = Image.new("RGB", size[::-1])
    seen = see(processor, image)
    inputs = processor(images=image, return_tensors="pt")
    rows, columns = inputs["image_tile_grids"][0].tolist()
    enlarged = 14 * max(1, min(rows, columns, 4))  # 24 pixels to 336; the base view to as many tiles
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    centres = torch.stack([x, y], -1).reshape(1, 144, 2) * 2 + 1
    tiles = [MARGIN + enlarged * centres]
    origin = torch.tensor([MARGIN + enlarged * 24 + 2 * MARGIN, MARGIN])
    for row in range(rows):
        for column in range(columns):
            tiles.append(origin + 14 * (centres + 24 * torch.tensor([column, row])))
    layout = processor.image_layout(inputs, 0)
    features = torch.zeros(layout.num_tiles, 144, 32)
    features[..., :2] = torch.cat(tiles)
    encoded = M3LlavaEncodedImages(tile_features=features, layouts=[layout])
    with torch.no_grad():
        if model.image_newline is not None:
            model.image_newline.fill_(-1)
        [tokens] = model.get_visual_tokens(encoded, scale)
    boxes = seen.boxes(scale)
    assert len(tokens) == len(boxes)
    for token, box in zip(tokens[:, :2].tolist(), boxes):
        assert box.is_newline == (token == [-1, -1])
        if not box.is_newline:
            assert token == pytest.approx([(box.left + box.right) / 2, (box.top + box.bottom) / 2], abs=1e-3)
    for before, box in zip(boxes, boxes[1:]):
        if box.is_newline and not before.is_newline and before.view != "the base view":
            assert (before.top, before.bottom) == (box.top, box.bottom) and before.right <= box.left


@pytest.mark.parametrize("scale", [1, 9, 36, 144, 576])
@pytest.mark.parametrize("name", [*CHECKPOINTS, "m3-tiny"])
def test_boxes_tile_the_views(name, scale, everything):
    _, processor = everything[name]
    seen = see(processor, noise((672, 672)))  # of which nothing is cut off
    boxes = [box for box in seen.boxes(scale) if not box.is_newline]
    times = covered(boxes, seen.draw(scale).size[::-1])
    edges = [336] if seen.canvas is None else [672, 672]  # the base view is as high as the tiles
    for index, edge in enumerate(edges):
        left = MARGIN + index * (edge + 2 * MARGIN)
        assert (times[MARGIN : MARGIN + edge, left : left + edge] == 1).all()
    assert times.sum() == sum(edge * edge for edge in edges)


def test_what_a_box_says(everything):
    seen = see(everything["m3-tiny"][1], Image.open(SCENE))
    assert seen.boxes(36)[12].describe() == "token 13 of 36: row 3, column 1 of the base view"
    seen = see(everything["llava-next-m3"][1], picture("img3_1000x300.png"))
    boxes = seen.boxes(9)  # 3 x 3 of the base view, then rows of 9 and a newline
    assert [boxes[i].describe() for i in (8, 9, 13, 18, 19, 38)] == [
        "token 9 of 39: row 3, column 3 of the base view",
        "token 10 of 39: row 1, column 1 of the tile in row 1, column 1",
        "token 14 of 39: row 1, column 2 of the tile in row 1, column 2",
        "token 19 of 39: the newline after row 1 of the tiles",
        "token 20 of 39: row 2, column 1 of the tile in row 1, column 1",
        "token 39 of 39: the newline after row 3 of the tiles",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_padded_view_is_the_picture_resized(name, loaded):
    image = picture(name).convert("RGB")
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), (122, 116, 104))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    seen = see(loaded["llava15-m3"][1], image)
    assert seen.canvas is None
    difference = np.array(seen.base, int) - np.array(square.resize((336, 336), Image.Resampling.BICUBIC), int)
    assert abs(difference).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_base_view_and_the_tiles_are_the_picture_resized(name, loaded):
    image = picture(name).convert("RGB")
    seen = see(loaded["llava-next-m3"][1], image)
    assert np.array_equal(seen.base, image.resize((336, 336), Image.Resampling.BICUBIC))
    width, height = seen.canvas.size
    factor = min(width / image.width, height / image.height)
    fitted = image.resize(
        (min(math.ceil(image.width * factor), width), min(math.ceil(image.height * factor), height)),
        Image.Resampling.BICUBIC,
    )
    canvas = Image.new("RGB", seen.canvas.size)
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    assert np.array_equal(seen.canvas, canvas)


def test_clips_own_image_processor():
    clip = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)
    image = noise((40, 24))
    seen = see(M3LlavaProcessor(clip, word_tokenizer(), patch_size=2), image)
    assert np.array_equal(seen.base, np.array(image)[8:32])
    assert len(seen.boxes(36)) == 36


def test_pixels_that_were_neither_rescaled_nor_normalized():
    for options in ({"do_normalize": False}, {"do_rescale": False, "do_normalize": False}):
        clip = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24, **options)
        image = noise((24, 24))
        assert np.array_equal(see(M3LlavaProcessor(clip, word_tokenizer(), patch_size=2), image).base, image)


@pytest.mark.parametrize("scale", [1, 9, 36, 144, 576])
@pytest.mark.parametrize("name", [*CHECKPOINTS, "m3-tiny"])
def test_mean_colours(name, scale, everything):
    _, processor = everything[name]
    image = Image.open(SCENE) if name == "m3-tiny" else noise((672, 672))
    pixels = processor(images=image, return_tensors="pt")["pixel_values"].reshape(-1, 3, 336, 336)
    mean, std = (torch.tensor(processor.image_processor.to_dict()[key]) for key in ("image_mean", "image_std"))
    base, *tiles = ((pixels * std[:, None, None] + mean[:, None, None]) * 255).round().double()
    views = [base]
    if tiles:
        assert len(tiles) == 4
        views.append(torch.cat([torch.cat(tiles[:2], dim=2), torch.cat(tiles[2:], dim=2)], dim=1))
    edge = 336 // math.isqrt(scale)
    means = [view.unflatten(2, (-1, edge)).unflatten(1, (-1, edge)).mean((2, 4)).flatten(1).T for view in views]
    means = torch.cat(means)
    seen = see(processor, image)
    drawn = np.array(seen.draw(scale, "mean"))
    boxes = [box for box in seen.boxes(scale) if not box.is_newline]
    assert len(boxes) == len(means)
    for box, mean in zip(boxes, means):
        colours = drawn[box.region].reshape(-1, 3)
        assert (colours == colours[0]).all()
        assert abs(colours[0] - mean.numpy()).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("name", [*CHECKPOINTS, "m3-tiny"])
@pytest.mark.parametrize("scale", [1, 9, 36, 144, 576])
def test_the_token_at_the_centre_of_its_box(name, scale, everything):
    seen = see(everything[name][1], picture("img4_200x700.png"))
    boxes = seen.boxes(scale)
    some = boxes[:: 1 + len(boxes) // 40] + boxes[-5:]
    for box in some:
        assert seen.token_at((box.left + box.right) / 2, (box.top + box.bottom) / 2, scale) == box.index
        assert seen.token_at(box.left, box.top, scale) == box.index
        assert seen.token_at(box.right - 1, box.bottom - 1, scale) == box.index
    assert seen.token_at(3, 3, scale) is None and seen.token_at(10_000, 20, scale) is None


@pytest.mark.parametrize("scale", [1, 9, 36])
@pytest.mark.parametrize("name", [*CHECKPOINTS, "m3-tiny"])
def test_similarities(name, scale, everything):
    model, processor = everything[name]
    encoded = encode(model, processor, picture("img1_640x480.png"))
    with torch.no_grad():
        tokens = model.get_visual_tokens(encoded, scale)[0]
    token = len(tokens) // 2
    found = similarities(model, encoded, token, scale)
    expected = torch.nn.functional.cosine_similarity(tokens[token][None], tokens, dim=-1)
    by_numpy = tokens.double().numpy() / np.linalg.norm(tokens.double().numpy(), axis=1, keepdims=True)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    assert found == pytest.approx((by_numpy @ by_numpy[token]).tolist(), abs=1e-5)
    assert found[token] == pytest.approx(1, abs=1e-6) and all(-1 <= value <= 1 for value in found)
    seen = see(processor, picture("img1_640x480.png"))
    assert seen.draw(scale, "similarity", found, token).size == seen.draw(scale).size


def test_similarity_is_viridis_over_the_greyed_picture():
    seen = blank(ImageLayout(None, None, "flat"))
    values = np.linspace(-1, 1, 36)
    drawn = np.array(seen.draw(36, "similarity", list(values)), float)
    for box, value in zip(seen.boxes(36), values):
        expected = 255 * np.array(matplotlib.colormaps["viridis"]((value + 1) / 2)[:3])
        assert abs(drawn[box.region] / 0.7 - expected).max() < 6  # of 255: an interpolation, and bytes


def test_the_grid_leaves_the_pixels_between_its_lines_and_hatches_what_is_cut_off():
    """20 rows of pixels are in the middle of two tiles of 24 beside one another: of 12 rows of tokens 2 are padding."""
    seen = see(PROCESSORS["spatial_unpad"], noise((20, 48)))
    drawn, boxes = np.array(seen.draw(144)), seen.boxes(144)
    assert drawn.shape == (336 + 2 * MARGIN, 3 * 336 + 4 * MARGIN, 3)
    pixels = np.full_like(drawn, 255)
    pixels[MARGIN:-MARGIN, MARGIN : MARGIN + 336] = np.array(seen.base).repeat(14, 0).repeat(14, 1)
    pixels[MARGIN:-MARGIN, 3 * MARGIN + 336 : -MARGIN] = np.array(seen.canvas).repeat(14, 0).repeat(14, 1)
    for box in boxes:
        inside = slice(box.top + 2, box.bottom - 2), slice(box.left + 2, box.right - 2)
        assert box.is_newline or np.array_equal(drawn[inside], pixels[inside])
        assert (drawn[box.region] != pixels[box.region]).any(), "its lines"
    assert sum(box.is_newline for box in boxes) == 10 and len(boxes) == 144 + 10 * 25
    canvas = drawn[MARGIN:-MARGIN, 3 * MARGIN + 336 : -MARGIN]
    for hatched in (canvas[4:24, 4:-4], canvas[-24:-4, 4:-4]):
        middle = np.delete(hatched, range(328, 340), axis=1)  # without the thick line between the tiles
        assert middle.min() > 120 and len(np.unique(middle.reshape(-1, 3), axis=0)) == 2
    assert (canvas[:, 334:338] != pixels[MARGIN:-MARGIN, 3 * MARGIN + 336 : -MARGIN][:, 334:338]).any(-1).all()


def test_pixels_beyond_the_last_patch_are_hatched():
    """24 pixels of patches of 5: the tower leaves the last 4 out, and so do boxes."""
    seen = blank(ImageLayout(None, None, "flat"), patch_size=5)
    boxes = seen.boxes(16)
    assert max(box.right for box in boxes) == MARGIN + 20 * 14 == max(box.bottom for box in boxes)
    drawn = np.array(seen.draw(16))
    assert drawn[MARGIN + 20 * 14 : -MARGIN, MARGIN:-MARGIN].min() > 100 and drawn[MARGIN + 10, MARGIN + 10].max() == 0


def test_a_class_token_has_a_box_without_pixels():
    seen = SeenPicture(
        *(Image.new("RGB", (24, 24)), Image.new("RGB", (48, 24)), ImageLayout((1, 2), (24, 48), "flat", True)),
        2,
        (144,),
    )
    boxes = seen.boxes(144)
    assert [box.index for box in boxes if box.is_class_token] == [0, 145, 290] and len(boxes) == 3 * 145
    assert boxes[290].describe() == "token 291 of 435: the class token of the tile in row 1, column 2"
    assert seen.token_at(boxes[0].left, boxes[0].top, 144) == 1
    assert seen.draw(144, "mean", chosen=0).size == seen.draw(144, "similarity", [0.5] * 435, chosen=145).size


@pytest.mark.parametrize(("arguments", "message"), [
    ((100,), r"scale=100: .*\[1, 4, 9, 16, 36, 144\]"),
    ((9, "dots"), "tokens='dots' must be one of 'grid', 'mean', 'similarity'"),
    ((9, "similarity"), "tokens='similarity' takes 9 values.*, not 0"),
    ((9, "similarity", [0.0] * 8), "tokens='similarity' takes 9 values.*, not 8"),
    ((9, "similarity", [0.0] * 8 + [2.0]), "values hold 2.0: .* from -1 to 1"),
    ((9, "similarity", [0.0] * 8 + [math.nan]), "values hold nan"),
    ((9, "grid", [0.0] * 9), "tokens='grid' takes 0 values"),
    ((9, "grid", None, 9), "chosen=9 must be .* from 0 to 8"),
    ((9, "grid", None, -1), "chosen=-1 must be .* from 0 to 8"),
])  # fmt: skip
def test_what_cannot_be_drawn(arguments, message):
    with pytest.raises(ValueError, match=message):
        blank(ImageLayout(None, None, "flat")).draw(*arguments)


def test_similarities_of_what_is_not_there(loaded):
    model, processor = loaded["llava15-m3"]
    encoded = encode(model, processor, picture("img5_97x53.png"))
    with pytest.raises(ValueError, match="token=9 must be .* from 0 to 8"):
        similarities(model, encoded, 9, 9)
    with pytest.raises(ValueError, match="100"):
        similarities(model, encoded, 0, 100)
    both = M3LlavaModel(tiny_config()).eval()
    layouts = [ImageLayout(None, None, "flat")] * 2
    with pytest.raises(ValueError, match="2 pictures"):
        similarities(both, M3LlavaEncodedImages(tile_features=torch.zeros(2, 144, 32), layouts=layouts), 0, 9)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_m3_ask_writes_what_draw_returns(name, converted, loaded, tmp_path):
    image, out = GOLDENS / "images" / "img1_640x480.png", tmp_path / "new" / "out.png"
    options = (image, "What is this?", "--model", converted[name], "--max-new-tokens", 4, "--num-visual-tokens", 36)
    asked = run(*options, "--overlay", out)
    assert asked.exit_code == 0, asked.output
    assert asked.stderr == f"m3-ask: {out} shows the picture as the model sees it\n"
    assert asked.stdout == run(*options).stdout
    assert [path.name for path in out.parent.iterdir()] == ["out.png"]
    assert np.array_equal(Image.open(out), see(loaded[name][1], Image.open(image)).draw(36))


def test_m3_ask_draws_what_auto_chose(tmp_path, everything):
    out = tmp_path / "out.png"
    asked = run(SCENE, "How many dots are there?", "--num-visual-tokens", "auto", "--overlay", out)
    chosen = int(re.search(r"chose (\d+) visual tokens", asked.stderr)[1])
    assert np.array_equal(Image.open(out), see(everything["m3-tiny"][1], Image.open(SCENE)).draw(chosen))


@pytest.mark.parametrize("name", ["m3-tiny", "llava-next-m3"])
def test_m3_ask_compares_all_scales_in_one_picture(name, converted, everything, tmp_path):
    folder = {**converted, "m3-tiny": modeling_m3.default_checkpoint()}[name]
    asked = run(SCENE, "?", "--model", folder, "--compare", "--max-new-tokens", 2, "--overlay", tmp_path / "out.png")
    assert asked.exit_code == 0, asked.output
    whole, seen = np.array(Image.open(tmp_path / "out.png")), see(everything[name][1], Image.open(SCENE))
    for index, scale in enumerate([1, 9, 36, 144, 576]):
        drawn = np.array(seen.draw(scale))
        height, width, _ = drawn.shape
        top, left = (0, index * width) if name == "m3-tiny" else (index * (height + 32), 0)
        assert np.array_equal(whole[top + 32 : top + 32 + height, left : left + width], drawn)
        assert (whole[top : top + 32, left : left + width] < 128).any(), "a caption"


@pytest.mark.parametrize(("name", "message"), [
    ("out.jpg", "out.jpg is written as a PNG"),
    ("there.png", "there.png exists: name a file that is new"),
    ("folder.png", "folder.png exists: name a file that is new"),
    ("there.png/out.png", "there.png is a file, and can be no folder"),
])  # fmt: skip
def test_a_wrong_name_is_refused_before_anything_is_loaded(name, message, tmp_path):
    (tmp_path / "there.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    asked = run(SCENE, "?", "--model", tmp_path / "no-checkpoint", "--overlay", tmp_path / name)
    assert asked.exit_code == 1 and not asked.stdout
    assert re.fullmatch(rf"m3-ask: --overlay .*{re.escape(message)}.*\n", asked.stderr)
    assert (tmp_path / "there.png").read_text() == "mine" and not (tmp_path / "out.jpg").exists()


def test_a_video_has_no_overlay(tmp_path):
    asked = run(SCENE.with_name("clip.mp4"), "?", "--quiet", "--overlay", tmp_path / "out.png")
    assert asked.exit_code == 1
    assert re.fullmatch(
        r"m3-ask: --overlay .*out\.png is for a picture, but .*clip\.mp4 is a video: .*\n", asked.stderr
    )


def test_nothing_half_written_stays_behind(tmp_path, monkeypatch):
    def fails(self, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", fails)
    options = (SCENE, "What color is the large circle?", "--quiet", "--max-new-tokens", 2)
    asked = run(*options, "--overlay", tmp_path / "out.png")
    assert asked.exit_code == 1 and asked.stderr == "m3-ask: the disk is full\n"
    assert not list(tmp_path.iterdir())


def test_tiles_of_all_pinpoints_are_drawn_at_a_useful_size():
    for height, width in PINPOINTS:
        seen = see(PROCESSORS["flat"], noise((height, width)))
        assert seen.canvas.size == (width, height) and min(seen.draw(36).size) >= 336
