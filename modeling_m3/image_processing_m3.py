# Copyright 2026 The M3 for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Pictures to pixel values, bit for bit as the original does it with the PIL backend, faster with torchvision.

One class per backend, as transformers has it; which views of a picture are taken is written once, for both.
Arrays and tensors are (c channels, h height, w width) until they are stacked.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.utils.rnn import pad_sequence
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available, logging

from .pictures import open_pictures
from .visual_tokens import as_plain, check_pinpoints, tile_grid


logger = logging.get_logger(__name__)

# Rows are padded and narrowed in bands of so many pixels, and no picture is ever held at more than the second number: sizes grow by
# aspect ratio, so that a file of a few kilobytes could ask for all memory there is. No canvas is wider than the third.
BAND_PIXELS = 2**22
MOST_PIXELS = 2**27
MOST_EDGE = 2**15


class M3LlavaImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    image_grid_pinpoints (`list[list[int]]`, *optional*):
        (height, width) pairs in pixels that a picture may be resized to before it is cut into tiles ("anyres").
    image_mean, image_std (`float` or `list[float]`, *optional*):
        One number for all channels, or one for each; numpy's and torch's too.
    """

    image_grid_pinpoints: list | tuple | None
    image_mean: Any
    image_std: Any


class _Views:
    """The views of a picture that the vision tower sees, and the attributes both backends share.

    Without `image_grid_pinpoints` a picture is one view: padded to a square with the mean colour where `do_pad` is set
    (the original's `expand2square`), then resized and cropped as CLIP's own preprocessing does. With them it is the whole
    picture squeezed to a square, followed by the tiles of the picture fitted into the best of the resolutions and padded
    with black (the original's `process_anyres_image`).
    """

    # All that travels to the model with images; the numbers of visual tokens are the processor's.
    model_input_names = ["pixel_values", "image_sizes", "image_tile_grids", "num_visual_tokens"]
    valid_kwargs = M3LlavaImageProcessorKwargs
    _auto_class = "AutoImageProcessor"  # saving copies the code along

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 336}
    default_to_square = False
    crop_size = {"height": 336, "width": 336}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_pad = True
    image_grid_pinpoints = None

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        if self.image_grid_pinpoints is not None:
            check_pinpoints(self.image_grid_pinpoints, self.crop_size.height)

    def _standardize_kwargs(self, image_mean: Any = None, image_std: Any = None, **kwargs: Any) -> dict[str, Any]:
        """One number for all channels becomes one for each."""
        image_mean, image_std = _per_channel("image_mean", image_mean), _per_channel("image_std", image_std)
        if image_std is not None and 0 in image_std:
            raise ValueError(f"image_std={image_std!r}: nothing can be divided by 0.")
        return super()._standardize_kwargs(image_mean=image_mean, image_std=image_std, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Names the classes of both backends, so that a saved folder keeps the choice between them."""
        output = super().to_dict()
        module = type(self).__module__.split(".")[-1]
        classes = [f"{module}.M3LlavaImageProcessorPil", f"{module}.M3LlavaImageProcessor"]
        output["auto_map"] = {**output.get("auto_map", {}), self._auto_class: classes}
        return output

    def fetch_images(self, images: Any) -> Any:
        """Opens files as the original does, whether they are named, open or bytes; URLs and base64 are left to transformers,
        which rotates by EXIF.

        Raises `ValueError` for what is no picture.
        """
        images = open_pictures(images)
        try:
            return super().fetch_images(images)
        except (UnidentifiedImageError, Image.DecompressionBombError, RuntimeError) as error:  # PIL's or torchvision's
            raise ValueError(f"{images[:200]} cannot be read as a picture: {error}") from error

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> Any:
        """One picture in the backend's own format, (3, h, w).

        It is taken as it lies in the file, as the original takes it: transparency dropped, not blended, and an EXIF rotation
        not applied. Arrays and tensors likewise. Raises `ValueError` for a file that PIL cannot decode.
        """
        if isinstance(image, Image.Image):
            # transformers' own conversion copies once more, and turns a colour that an RGB file calls transparent white.
            return super().process_image(_as_rgb(image) if do_convert_rgb else image, do_convert_rgb=False, **kwargs)
        if kwargs.get("input_data_format") is None and image.ndim == 3:  # Before 5.24 four channels were unknown
            kwargs["input_data_format"] = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        image = super().process_image(image, do_convert_rgb=False, **kwargs)
        if image.dtype in (bool, torch.bool):
            image = (image.astype(np.uint8) if isinstance(image, np.ndarray) else image.byte()) * 255
        if do_convert_rgb and len(image) != 3:
            image = image[:3] if len(image) == 4 else image[[0, 0, 0]]
        return image

    def _preprocess(
        self,
        images: list,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        do_pad: bool,
        image_grid_pinpoints: list | tuple | None,
        return_tensors: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        """Returns `pixel_values`, (images, c, h, w), and `image_tile_grids`, (images, 2), the (rows, columns) of tiles that
        each is cut into. With pinpoints `pixel_values` are (images, most tiles, c, h, w), zeros after an image's last tile,
        and there are `image_sizes`, (images, 2): the pictures' (height, width). Without, grids are (0, 0)."""
        if not images:
            raise ValueError("There is no picture among the images: give at least one.")
        fractions = [_holds_fractions(image, do_rescale) for image in images]
        if do_rescale and any(fractions):
            logger.warning_once(
                "Pictures whose values are from 0 to 1 already are divided by 255 again: pass do_rescale=False with them."
            )
        background = tuple(int(mean * 255) for mean in image_mean)
        grids = [(0, 0)] * len(images)
        if image_grid_pinpoints is not None:
            check_pinpoints(image_grid_pinpoints, crop_size.height)
            grids = [tile_grid(image.shape[-2:], image_grid_pinpoints, crop_size.height) for image in images]

        def finish(view: Any) -> Any:
            if do_resize:
                view = self.resize(view, size, resample)
            return self.center_crop(view, crop_size) if do_center_crop else view

        def views(image: Any, grid: tuple[int, int], is_fractions: bool) -> list:
            for wanted in [size] * do_resize + [crop_size] * do_center_crop:
                _check_resized(image.shape[-2:], wanted, is_square=do_pad or image_grid_pinpoints is not None)
            if image_grid_pinpoints is not None:
                tiles = self._tiles(image, grid, crop_size.height)
                edge = size.shortest_edge or size.height
                base = self.resize(image, SizeDict(height=edge, width=edge), PILImageResampling.BICUBIC)
                return [finish(view) for view in (base, *tiles)]
            if do_pad:
                on = tuple(value / 255 for value in background) if is_fractions else background
                image = self._padded(image, on, size if do_resize else None, resample)
            return [finish(image)]

        normalization = (do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        seen = [views(*image) for image in zip(images, grids, fractions)]
        data = {"image_tile_grids": [list(grid) for grid in grids]}
        if image_grid_pinpoints is not None:
            data["pixel_values"] = self._normalized(seen, *normalization)
            data["image_sizes"] = [list(image.shape[-2:]) for image in images]
        elif len({image[0].shape for image in seen}) > 1:  # neither resized nor cropped
            data["pixel_values"] = [self._normalized([image], *normalization)[0, 0] for image in seen]
        else:
            data["pixel_values"] = self._normalized(seen, *normalization)[:, 0]
        if not return_tensors:
            data["pixel_values"] = list(data["pixel_values"])
        return BatchFeature(data, tensor_type=return_tensors)

    def _tiles(self, image: Any, grid: tuple[int, int], tile: int) -> list:
        """The tiles of the picture in reading order, after it is fitted into its grid.

        By PIL's default of bicubic, as in the original: `resample` is for CLIP's own preprocessing.
        """
        height, width = image.shape[-2:]
        target_height, target_width = grid[0] * tile, grid[1] * tile
        scale_height, scale_width = target_height / height, target_width / width
        if scale_width < scale_height:
            fitted = SizeDict(height=min(math.ceil(height * scale_width), target_height), width=target_width)
        else:
            fitted = SizeDict(height=target_height, width=min(math.ceil(width * scale_height), target_width))
        canvas = self._on_canvas(
            self.resize(image, fitted, PILImageResampling.BICUBIC), target_height, target_width, (0, 0, 0)
        )
        return [
            canvas[:, top : top + tile, left : left + tile]
            for top in range(0, target_height, tile)
            for left in range(0, target_width, tile)
        ]

    def _padded(self, image: Any, background: tuple, size: SizeDict | None, resample: Any) -> Any:
        """The picture in the middle of a square canvas, of the wanted size already where it is of bytes.

        Resizing by PIL is two passes: every row is narrowed by itself, then every column is shortened. So rows can be padded
        and narrowed band by band, to the same bits, and no square canvas is made.
        """
        height, edge = image.shape[-2], max(image.shape[-2:])
        wanted = size and (size.shortest_edge or (size.height == size.width and size.height))
        is_bytes = image.dtype in (
            np.uint8,
            torch.uint8,
        )  # others may be brought into bytes by what the whole picture holds
        if not wanted or size.longest_edge or not is_bytes:
            if edge**2 > MOST_PIXELS:
                raise _too_large(image.shape[-2:], f"is padded to a square of {edge}x{edge}")
            return self._on_canvas(image, edge, edge, background)
        if edge > MOST_EDGE:
            raise _too_large(image.shape[-2:], f"is padded to a square of {edge}x{edge}")

        def narrowed(rows: Any) -> Any:
            canvas = self._on_canvas(rows, rows.shape[-2], edge, background)
            return self.resize(canvas, SizeDict(height=rows.shape[-2], width=wanted), resample)

        band = max(1, BAND_PIXELS // edge)
        rows = [narrowed(image[:, start : start + band]) for start in range(0, height, band)]
        if len(rows) > 1:
            rows = [np.concatenate(rows, axis=1) if isinstance(image, np.ndarray) else torch.cat(rows, dim=1)]
        # What is of one colour stays so: the rows without any of the picture need not be narrowed.
        canvas = self._on_canvas(rows[0], edge, wanted, background)
        return self.resize(canvas, SizeDict(height=wanted, width=wanted), resample)

    @staticmethod
    def _on_canvas(image: Any, height: int, width: int, background: tuple[int, ...]) -> Any:
        """The picture in the middle of a canvas of one colour."""
        if image.shape[-2:] == (height, width):
            return image
        if (
            isinstance(image, torch.Tensor) and image.is_cpu and image.dtype == torch.uint8
        ):  # numpy starts no threads for it
            return torch.from_numpy(_Views._on_canvas(image.numpy(), height, width, background))
        top, left = (height - image.shape[-2]) // 2, (width - image.shape[-1]) // 2
        # In memory it is (h, w, c), as PIL has it. Written row by row: pixel by pixel is several times slower.
        if isinstance(image, np.ndarray):
            canvas = np.empty((height, width, len(background)), image.dtype)
            canvas.reshape(height, -1)[:] = np.tile(np.array(background, image.dtype), width)
            canvas = canvas.transpose(2, 0, 1)
        elif image.stride(0) == 1:
            canvas = image.new_empty(height, width, len(background))
            canvas.view(height, -1)[:] = image.new_tensor(background).repeat(width)
            canvas = canvas.permute(2, 0, 1)
        else:  # as the picture is
            canvas = image.new_empty(len(background), height, width)
            for channel, value in zip(canvas, background):
                channel.fill_(value)
        canvas[:, top : top + image.shape[-2], left : left + image.shape[-1]] = image
        return canvas


# trf-ignore: TRF057 - see configuration_m3.py
class M3LlavaImageProcessorPil(_Views, PilBackend):
    """The PIL backend of M3's image processor: equal to the original to the last bit."""

    def process_image(self, image: Any, **kwargs: Any) -> np.ndarray:
        """Tensors may lie on any device, and be of types that numpy does not have."""
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = image.float() if image.dtype == torch.bfloat16 else image
        return super().process_image(image, **kwargs)

    def resize(self, image: np.ndarray, size: SizeDict, resample: Any = None, **kwargs: Any) -> np.ndarray:
        """As transformers does it; bytes that have the size already are returned as they are, as PIL would."""
        wanted = (size.height, size.width)
        if size.shortest_edge and not size.longest_edge:
            wanted = (size.shortest_edge, size.shortest_edge)
        if image.dtype == np.uint8 and image.shape[-2:] == wanted:
            return image
        return super().resize(image, size, resample, **kwargs)

    def _normalized(self, images: list[list[np.ndarray]], *normalization: Any) -> np.ndarray:
        """Rescaled and normalized views, (images, most views, c, h, w); zeros after an image's last."""
        do_rescale, rescale_factor, do_normalize, image_mean, image_std = normalization
        if not all(view.dtype == np.uint8 for views in images for view in views):
            if do_rescale:
                images = [[self.rescale(view, rescale_factor) for view in views] for views in images]
            if do_normalize:
                images = [[self.normalize(view, image_mean, image_std) for view in views] for views in images]
            return _in_one_array(images)
        # A byte has 256 values: looking them up gives the same bits as computing every pixel, several times faster.
        return _in_one_array(images, _normalized_bytes(*normalization))


# trf-ignore: TRF057 - see configuration_m3.py
class M3LlavaImageProcessor(_Views, TorchvisionBackend):
    """The torchvision backend of M3's image processor: faster, within 2/255 of the PIL backend before normalization.

    Where torchvision is not installed, asking for it gives the PIL backend and a warning.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if is_torchvision_available():
            return super().__new__(cls)
        logger.warning_once("torchvision is not installed: images are prepared by PIL, exactly as the original does.")
        return M3LlavaImageProcessorPil(*args, **kwargs)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """A PIL image stays (h, w, c) in memory, which transformers' own changes: so it is resized twice as fast. Arrays that are
        said to lie so stay so, too."""
        if do_convert_rgb and isinstance(image, Image.Image):
            return torch.from_numpy(np.array(_as_rgb(image))).permute(2, 0, 1).to(device)
        is_rgb = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
        if is_rgb and kwargs.get("input_data_format") == "channels_last":  # as a decoded frame is
            return torch.from_numpy(image).permute(2, 0, 1).to(device)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, device=device, **kwargs)

    def resize(self, image: torch.Tensor, size: SizeDict, resample: Any = None, **kwargs: Any) -> torch.Tensor:
        """The width first and then the height, rounded to bytes in between: mostly PIL's order."""
        height, width = image.shape[-2:]
        new_height, new_width = size.height, size.width
        if size.shortest_edge:
            long_edge = int(size.shortest_edge * max(height, width) / min(height, width))
            edges = size.shortest_edge, long_edge
            new_height, new_width = edges[height > width], edges[width > height]
        # Pillow 13 begins with the height where that saves more than twice as many rows as columns (its #9549).
        if new_height < height and height - new_height > 2 * (width - new_width):
            image = super().resize(image, SizeDict(height=new_height, width=width), resample, **kwargs)
        elif image.device.type != "cpu":  # where torchvision does not round in between by itself
            image = super().resize(image, SizeDict(height=height, width=new_width), resample, **kwargs)
        return super().resize(image, SizeDict(height=new_height, width=new_width), resample, **kwargs)

    def _normalized(self, images: list[list[torch.Tensor]], *normalization: Any) -> torch.Tensor:
        """Rescaled and normalized views, (images, most views, c, h, w); zeros after an image's last."""
        do_rescale, rescale_factor, do_normalize, mean, std = normalization
        views = [view for image in images for view in image]
        _check_one_shape(views)
        if (
            do_normalize
        ):  # where memory is new, touching it takes longer than the arithmetic: so all is done in one piece
            joined = views[0].new_empty((len(views), *views[0].shape), dtype=torch.float32)
            for view, values in zip(views, joined):
                if (
                    view.is_cpu and view.dtype == torch.uint8
                ):  # numpy changes the order of pixels and channels several times faster
                    values.numpy()[:] = view.numpy()
                else:
                    values.copy_(view)
            mean, std, _ = self._fuse_mean_std_and_rescale_factor(
                do_normalize, mean, std, do_rescale, rescale_factor, joined.device
            )
            mean, std = (torch.as_tensor(value, device=joined.device)[:, None, None] for value in (mean, std))
            views = joined.sub_(mean).div_(std)
        else:
            views = self.rescale_and_normalize(torch.stack(views), *normalization)
        counts = [len(image) for image in images]
        if len(set(counts)) == 1:
            return views.unflatten(0, (len(counts), counts[0]))
        return pad_sequence(views.split(counts), batch_first=True)


def _as_rgb(image: Image.Image) -> Image.Image:
    """The picture, read and in RGB. Raises `ValueError` for a file that PIL cannot decode."""
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # which copies what is RGB already
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        name = getattr(image, "filename", "") or "an image without a file name"
        raise ValueError(f"Cannot decode {name}: {error}. Check that the file is complete.") from error


def _holds_fractions(image: np.ndarray | torch.Tensor, do_rescale: bool) -> bool:
    """Whether the values of a picture are from 0 to 1 already. Raises `ValueError` for those that rescaling is not for."""
    if image.dtype in (np.uint8, torch.uint8):
        return False
    values = image.detach().float() if isinstance(image, torch.Tensor) else image
    least, most = float(values.min()), float(values.max())
    if do_rescale and not 0 <= least <= most <= 255:
        raise ValueError(
            f"The values of a picture are from {least:g} to {most:g}: give whole numbers from 0 to 255, or fractions from 0 to "
            "1 and do_rescale=False."
        )
    is_float = image.dtype.is_floating_point if isinstance(image, torch.Tensor) else image.dtype.kind == "f"
    return is_float and 0 <= least and 0 < most <= 1


def _per_channel(name: str, value: Any) -> tuple[float, ...] | None:
    """As many numbers as an RGB picture has channels, from as many or one for all. Raises `ValueError` for anything else."""
    if value is None:
        return None
    values = as_plain(value)
    values = values if isinstance(values, list) else [values]
    if len(values) not in (1, 3) or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise ValueError(
            f"{name}={value!r}: give one number for all channels, or a list with one for each of the three."
        )
    return tuple(values * 3 if len(values) == 1 else values)


def _check_resized(image_size: tuple[int, int], size: SizeDict, is_square: bool) -> None:
    """Raises `ValueError` for sizes that are huge, as for a thin picture one of the shorter side alone may be."""
    height, width = (edge or size.longest_edge or 0 for edge in (size.height, size.width))
    if size.shortest_edge and not size.longest_edge:
        ratio = 1 if is_square else max(image_size) / min(image_size)
        height, width = size.shortest_edge, int(size.shortest_edge * ratio)
    if height * width > MOST_PIXELS:
        raise _too_large(image_size, f"is to become one of {height}x{width}")


def _too_large(image_size: tuple[int, int], becomes: str) -> ValueError:
    height, width = image_size
    return ValueError(
        f"A picture of {width}x{height} pixels {becomes} pixels, which is too large: crop it or resize it before."
    )


def _check_one_shape(views: list) -> None:
    shapes = sorted({tuple(view.shape) for view in views})
    if len(shapes) > 1:
        raise ValueError(
            f"Views of the shapes {shapes} do not fit into one batch: let images be converted to RGB, resized and cropped."
        )


def _in_one_array(images: list[list[np.ndarray]], table: np.ndarray | None = None) -> np.ndarray:
    """The views of every image, (images, most views, c, h, w), zeros after an image's last.

    With a `table`, (c, 256), values of its type in place of bytes. Raises `ValueError` for views of different shapes.
    """
    _check_one_shape([view for views in images for view in views])
    dtype = np.result_type(*{view.dtype for views in images for view in views}) if table is None else table.dtype
    values = np.empty((len(images), max(map(len, images)), *images[0][0].shape), dtype)
    for views, out in zip(images, values):
        out[len(views) :] = 0
        for view, to in zip(views, out):
            if table is None:
                to[:] = view
                continue
            for channel in range(len(view)):  # "clip" spares a buffer, and no byte is beyond the table
                np.take(table[channel], view[channel], out=to[channel], mode="clip")
    return values


@lru_cache
def _normalized_bytes(
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: tuple[float, ...],
    image_std: tuple[float, ...],
) -> np.ndarray:
    """What rescaling and normalization make of every byte, (c, 256): in float32, in the original's order of operations."""
    values = np.arange(256, dtype=np.uint8).repeat(len(image_mean)).reshape(256, -1).T
    if do_rescale:
        values = (values.astype(np.float64) * rescale_factor).astype(np.float32)
    if do_normalize:
        mean, std = (np.array(value, np.float32)[:, None] for value in (image_mean, image_std))
        values = (values.astype(np.float32) - mean) / std
    return values


__all__ = ["M3LlavaImageProcessor", "M3LlavaImageProcessorPil"]
