"""Pictures to pixel values: equal to the original with PIL, close with torchvision, and odd pictures accepted."""

import hashlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import CHECKPOINTS, GOLDENS, golden, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.utils import is_torchvision_available

from modeling_m3 import M3LlavaImageProcessor, M3LlavaImageProcessorPil, image_processing_m3


PINPOINTS = [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]
SETTINGS = {"llava15-m3": {"do_pad": True}, "llava-next-m3": {"do_pad": False, "image_grid_pinpoints": PINPOINTS}}
NEEDS_TORCHVISION = [
    pytest.mark.torchvision,
    pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed"),
]
BACKENDS = [M3LlavaImageProcessorPil, pytest.param(M3LlavaImageProcessor, marks=NEEDS_TORCHVISION)]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_pixels_equal_the_original_to_the_last_bit(name):
    image_processor = M3LlavaImageProcessorPil(**SETTINGS[name])
    for case in golden(f"{name}.pixels")["cases"]:
        inputs = image_processor(picture(case["image_file"]), return_tensors="np")
        pixel_values = inputs["pixel_values"][0]
        assert list(pixel_values.shape) == case["shape"]
        assert pixel_values.dtype == np.float32
        assert hashlib.sha256(np.ascontiguousarray(pixel_values).tobytes()).hexdigest() == case["sha256_f32"]


@pytest.mark.torchvision
@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_torchvision_is_close_before_normalization(name):
    settings = {**SETTINGS[name], "do_rescale": False, "do_normalize": False}
    for case in golden(f"{name}.pixels")["cases"]:
        image = picture(case["image_file"])
        expected = M3LlavaImageProcessorPil(**settings)(image, return_tensors="pt")["pixel_values"]
        actual = M3LlavaImageProcessor(**settings)(image, return_tensors="pt")["pixel_values"]
        assert (actual.int() - expected.int()).abs().max() <= 2
        # Resizing depends on how the bytes lie in memory: a tensor's channel after channel, a picture's pixel after pixel.
        tensor = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(M3LlavaImageProcessor(**settings)(tensor, return_tensors="pt")["pixel_values"], actual)


def test_without_padding_it_is_clips_own_preprocessing():
    image = picture("img3_1000x300.png")
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
    ours = M3LlavaImageProcessorPil(do_pad=False)
    assert np.array_equal(ours(image)["pixel_values"][0], clip(image)["pixel_values"][0])


def test_bytes_that_are_looked_up_equal_pixels_that_are_computed():
    image = np.array(picture("img5_97x53.png").resize((336, 336)))
    looked_up = M3LlavaImageProcessorPil()(image)["pixel_values"][0]
    computed = M3LlavaImageProcessorPil()(image.astype(np.float32), do_resize=False)["pixel_values"][0]
    assert np.array_equal(looked_up, computed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_a_batch_are_padded_with_empty_tiles(backend):
    image_processor = backend(**SETTINGS["llava-next-m3"])
    wide, square = picture("img3_1000x300.png"), picture("img1_640x480.png")
    together = image_processor([wide, square], return_tensors="pt")
    assert together["pixel_values"].shape == (2, 5, 3, 336, 336)
    assert together["image_sizes"].tolist() == [[300, 1000], [480, 640]]
    assert torch.equal(together["pixel_values"][0, :4], image_processor(wide, return_tensors="pt")["pixel_values"][0])
    assert not together["pixel_values"][0, 4].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (5000, 7)])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_extreme_sizes(name, size):
    pixel_values = M3LlavaImageProcessorPil(**SETTINGS[name])(Image.new("RGB", size, "red"), return_tensors="pt")
    assert pixel_values["pixel_values"].shape[-3:] == (3, 336, 336)


def test_images_that_stay_of_several_sizes_are_a_list():
    images = [picture("img5_97x53.png"), picture("img4_200x700.png")]
    image_processor = M3LlavaImageProcessorPil(do_pad=False, do_resize=False, do_center_crop=False)
    pixel_values = image_processor(images)["pixel_values"]
    assert [pixels.shape for pixels in pixel_values] == [(3, 53, 97), (3, 700, 200)]
    assert all(
        np.array_equal(pixels, image_processor(image)["pixel_values"][0]) for pixels, image in zip(pixel_values, images)
    )


def test_tiles_that_cannot_be_one_batch_are_refused():
    gray, color = np.zeros((1, 40, 50), np.uint8), np.zeros((3, 40, 50), np.uint8)
    image_processor = M3LlavaImageProcessorPil(image_grid_pinpoints=PINPOINTS, do_convert_rgb=False)
    with pytest.raises(ValueError, match=r"\(1, 336, 336\), \(3, 336, 336\)"):
        image_processor([gray, color])


def odd_picture(kind: str, folder: Path) -> Image.Image:
    image = picture("img5_97x53.png")
    if kind == "16 bit":
        return Image.fromarray((np.arange(53 * 97, dtype=np.uint16) * 12).reshape(53, 97))
    if kind == "EXIF-rotated":
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: rotate by 90 degrees to see it upright
        image.save(folder / "rotated.jpg", exif=exif)
        return Image.open(folder / "rotated.jpg")
    if kind == "with a transparent colour":
        image.save(folder / "transparent.png", transparency=image.getpixel((0, 0)))
        return Image.open(folder / "transparent.png")
    if kind == "transparent":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        return image
    return image.convert(kind)


@pytest.mark.parametrize(
    "kind", ["CMYK", "P", "L", "1", "transparent", "with a transparent colour", "16 bit", "EXIF-rotated"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_pictures_are_converted_as_the_original_converts_them(kind, backend, tmp_path):
    # The original opens every picture with `Image.open(...).convert("RGB")`.
    odd = odd_picture(kind, tmp_path)
    expected = M3LlavaImageProcessorPil()(np.array(odd.convert("RGB")))["pixel_values"][0]
    actual = np.asarray(backend()(odd_picture(kind, tmp_path))["pixel_values"][0])
    assert np.abs(actual - expected).max() <= (0 if backend is M3LlavaImageProcessorPil else 2 / 255 / 0.26)


@pytest.mark.parametrize(("content", "message"), [
    (None, r"half\.png.*complete"),
    (b"", r"half\.png is not a picture"),
    (b"this is no picture", r"half\.png is not a picture"),
])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_cannot_be_read_is_named(content, message, backend, tmp_path):
    file = tmp_path / "half.png"
    file.write_bytes((GOLDENS / "images" / "img1_640x480.png").read_bytes()[:50_000] if content is None else content)
    image_processor = backend()
    with pytest.raises(ValueError, match=message):
        image_processor(image_processor.fetch_images([str(file)]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_path_is_the_picture_that_lies_there(backend, tmp_path):
    rotated = odd_picture("EXIF-rotated", tmp_path)
    image_processor = backend()
    fetched = image_processor.fetch_images(str(tmp_path / "rotated.jpg"))
    assert fetched.size == rotated.size
    assert np.array_equal(image_processor(fetched)["pixel_values"][0], image_processor(rotated)["pixel_values"][0])


def test_pinpoints_that_are_not_whole_tiles_are_refused():
    with pytest.raises(ValueError, match=r"holds \[336, 500\]"):
        M3LlavaImageProcessorPil(image_grid_pinpoints=[[336, 500]])
    with pytest.raises(ValueError, match=r"holds \[336, 500\]"):
        M3LlavaImageProcessorPil()(picture("img5_97x53.png"), image_grid_pinpoints=[[336, 500]])


def test_pinpoints_of_one_call_leave_the_next_alone():
    image_processor = M3LlavaImageProcessorPil()
    image = picture("img5_97x53.png")
    assert image_processor(image, image_grid_pinpoints=[[1008, 1008]])["pixel_values"][0].shape[0] == 10
    assert image_processor(image)["pixel_values"][0].shape == (3, 336, 336)


def test_tiles_are_fitted_by_bicubic_whatever_clip_asks_for():
    # The original resizes pictures to their resolution with PIL's default.
    settings = {"do_rescale": False, "do_normalize": False, "image_grid_pinpoints": [[336, 672]]}
    image = picture("img3_1000x300.png")
    bilinear = M3LlavaImageProcessorPil(resample=2, **settings)(image)["pixel_values"][0]
    assert np.array_equal(bilinear, M3LlavaImageProcessorPil(**settings)(image)["pixel_values"][0])


def on_a_whole_canvas(pixels, edge, resample, background):
    """The plain way, in PIL's own words: all of the square is there, and is resized at once."""
    canvas = Image.new("RGB", (max(pixels.shape[:2]),) * 2, background)
    canvas.paste(Image.fromarray(pixels), tuple((canvas.width - size) // 2 for size in pixels.shape[1::-1]))
    return np.array(canvas.resize((edge, edge), resample)).transpose(2, 0, 1)


@settings(max_examples=100, deadline=None)
@given(
    longer=st.integers(40, 1200),
    share=st.floats(0, 1),
    is_tall=st.booleans(),
    edge=st.integers(1, 500),
    resample=st.sampled_from(list(Image.Resampling)),
    band=st.integers(1, 100_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_bands_of_a_canvas_are_the_whole_of_it(longer, share, is_tall, edge, resample, band, seed):
    shape = (longer, max(1, round(longer * share)), 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    pixels = pixels if is_tall else np.ascontiguousarray(pixels.swapaxes(0, 1))
    image_processor = M3LlavaImageProcessorPil(
        size={"shortest_edge": edge}, crop_size=edge, resample=resample, do_rescale=False, do_normalize=False
    )
    with mock.patch.object(image_processing_m3, "BAND_PIXELS", band):
        banded = image_processor(Image.fromarray(pixels))["pixel_values"][0]
    background = tuple(int(mean * 255) for mean in image_processor.image_mean)
    assert np.array_equal(banded, on_a_whole_canvas(pixels, edge, resample, background))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(20_000, 20), (20, 8_000)], ids=str)
def test_long_thin_pictures_need_little_memory(size, backend):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image, image_processor = Image.fromarray(pixels), backend(do_rescale=False, do_normalize=False)
    asked = []
    plain = image_processor._on_canvas
    image_processor._on_canvas = lambda rows, height, width, fill: (
        asked.append(height * width) or plain(rows, height, width, fill)
    )
    actual = np.asarray(image_processor(image)["pixel_values"][0]).astype(int)
    assert 0 < max(asked) <= max(image_processing_m3.BAND_PIXELS, max(size) * 336)  # a part, or all of it narrowed
    if max(size) < 10_000:  # the plain way takes a third of a gigabyte here, and two there
        background = tuple(int(mean * 255) for mean in image_processor.image_mean)
        expected = on_a_whole_canvas(pixels, 336, Image.Resampling.BICUBIC, background)
        assert np.abs(actual - expected).max() <= (0 if backend is M3LlavaImageProcessorPil else 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("options", "size", "message"), [
    ({}, (100_000, 1), "100000x1 pixels is padded to a square of 100000x100000"),
    ({}, (1, 40_000), "1x40000 pixels is padded to a square of 40000x40000"),
    ({"do_resize": False}, (20_000, 20), "20000x20 pixels is padded to a square of 20000x20000"),
    ({"do_pad": False}, (100_000, 1), "100000x1 pixels is to become one of 336x33600000"),
    ({"size": {"shortest_edge": 10**6}}, (40, 30), "become one of 1000000x1000000"),
    ({"size": {"height": 10**6, "width": 10**6}}, (40, 30), "become one of 1000000x1000000"),
    ({"size": {"shortest_edge": 10**6}, **SETTINGS["llava-next-m3"]}, (40, 30), "become one of 1000000x1000000"),
    ({"crop_size": 10**6}, (40, 30), "become one of 1000000x1000000"),
    ({"image_grid_pinpoints": [[336 * 10**6, 336]]}, (40, 30), r"\[336000000, 336\], which is more than 1024 tiles"),
])  # fmt: skip
def test_sizes_that_would_take_all_memory_are_refused(options, size, message, backend):
    with pytest.raises(ValueError, match=message):
        backend(**options)(Image.new("RGB", size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (3, 30_000)], ids=str)
def test_the_thinnest_pictures_have_tiles(size, backend):
    pixel_values = backend(**SETTINGS["llava-next-m3"])(Image.new("RGB", size, "red"))["pixel_values"]
    assert pixel_values[0].shape[1:] == (3, 336, 336)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [0.5, 1, np.float32(0.5), [0.5], np.array([0.5, 0.5, 0.5]), torch.tensor(0.5)])
def test_one_mean_is_that_of_every_channel(number, backend):
    image = picture("photo_400x266.png")
    three = [float(torch.as_tensor(number).flatten()[0])] * 3
    expected = backend(image_mean=three, image_std=three)(image, return_tensors="pt")["pixel_values"]
    image_processor = backend(image_mean=number, image_std=number)
    assert torch.equal(image_processor(image, return_tensors="pt")["pixel_values"], expected)
    per_call = backend()(image, image_mean=number, image_std=number, return_tensors="pt")["pixel_values"]
    assert torch.equal(per_call, expected)
    assert list(json.loads(image_processor.to_json_string())["image_mean"]) == three


@pytest.mark.parametrize("number", ["a", True, [0.5, 0.5], [], float("nan"), [[0.5] * 3]], ids=str)
def test_a_mean_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match="image_mean=.* one number for all channels"):
        M3LlavaImageProcessorPil()(picture("photo_400x266.png"), image_mean=number)


def test_nothing_is_divided_by_0():
    with pytest.raises(ValueError, match="image_std"):
        M3LlavaImageProcessorPil(image_std=0.0)


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_from_0_to_1_need_no_rescaling(kind, backend, monkeypatch):
    bytes_ = np.array(picture("photo_400x266.png").convert("RGB"))
    is_tensor = isinstance(kind, torch.dtype)
    scaled = torch.from_numpy(bytes_ / 255).permute(2, 0, 1).to(kind) if is_tensor else (bytes_ / 255).astype(kind)
    expected = backend()(bytes_, return_tensors="pt")["pixel_values"]
    of_255 = 255 * torch.tensor(backend.image_std)[:, None, None]
    actual = backend()(scaled, do_rescale=False, return_tensors="pt")["pixel_values"]
    assert ((actual - expected) * of_255).abs().max() < 1.5  # a byte of rounding before resizing, by PIL or bfloat16
    said = []
    monkeypatch.setattr(image_processing_m3.logger, "warning_once", said.append)
    for each in (bytes_, bytes_.astype(np.float32)):
        backend()(each)
    assert not said
    backend()(scaled)
    assert len(said) == 1 and "do_rescale=False" in said[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("array", "message"), [
    (np.full((5, 5, 3), 300), "from 300 to 300"),
    (np.full((5, 5, 3), 60_000, np.uint16), "from 60000 to 60000"),
    (np.full((5, 5, 3), -1.0), "from -1 to -1"),
    (np.full((5, 5, 3), np.nan), "from nan to nan"),
], ids=str)  # fmt: skip
def test_values_that_are_none_of_a_picture_are_refused(array, message, backend):
    with pytest.raises(ValueError, match=message):
        backend()(array)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_are_the_pictures_they_were_made_of(backend):
    """Transparency dropped as of PIL's pictures, one channel as gray, true and false as white and black."""
    image = picture("photo_400x266.png").convert("RGB")
    transparent = image.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(image.size))
    for odd in (transparent, image.convert("L"), image.convert("1")):
        array = np.array(odd)
        expected = np.array(odd.convert("RGB"))
        for image_like in (array, torch.from_numpy(array)):
            actual = backend()(image_like, return_tensors="pt")["pixel_values"]
            assert torch.equal(actual, backend()(expected, return_tensors="pt")["pixel_values"])
