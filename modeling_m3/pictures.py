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
"""Pictures as people hold them: files by name or open, their bytes, cells of a data set, and places where there is none."""

import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


def open_pictures(images: Any) -> Any:
    """PIL images in place of files, at any depth of lists, and nothing in place of None.

    Files are taken as they lie, as the original takes them: an EXIF rotation is not applied. Strings that name no file may
    be URLs or base64 and are returned as they are, for transformers to load.

    Args:
        images: a PIL image, an array, a tensor, a string, a path, bytes, a binary file, a dict of `bytes` and `path`,
            as a data set that does not decode has them, or any of them in lists, or in lists of lists, one per prompt.

    Raises:
        ValueError: for a file that is no picture, or has more pixels than PIL takes, and for anything else.
    """
    if isinstance(images, np.ndarray) and images.dtype == object:
        images = images.tolist()
    if isinstance(images, Image.Image):
        if 0 in images.size:
            raise ValueError(f"A picture of {images.width}x{images.height} pixels has none.")
        return images
    if isinstance(images, (np.ndarray, torch.Tensor)):
        is_numbers = not images.is_complex() if isinstance(images, torch.Tensor) else images.dtype.kind in "buif"
        if images.ndim not in (2, 3, 4) or 0 in images.shape or not is_numbers:
            raise ValueError(f"An array of the shape {tuple(images.shape)} and {images.dtype} holds no picture.")
        return images[None] if images.ndim == 2 else images  # one channel
    if isinstance(images, str):
        return _open(images, images) if os.path.isfile(images) else images
    if isinstance(images, os.PathLike):
        if not os.path.isfile(images):
            raise ValueError(f"There is no picture at {os.fspath(images)}.")
        return _open(images, os.fspath(images))
    if isinstance(images, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(images), f"What these {len(images)} bytes hold")
    if isinstance(images, Mapping) and images.keys() == {"bytes", "path"} and not _is_none(images):
        return open_pictures(images["path"] if images["bytes"] is None else images["bytes"])
    if hasattr(images, "read") and not isinstance(images, io.TextIOBase):
        picture = _open(images, getattr(images, "name", None) or "What this file holds")
        picture.load()  # a file that is given twice has one position
        return picture
    if isinstance(images, Iterable) and not isinstance(images, (Mapping, io.TextIOBase)):
        pictures = [None if _is_none(image) else open_pictures(image) for image in images]
        if any(isinstance(picture, list) for picture in pictures):  # one list per prompt: one of them has no image
            return [[] if picture is None else picture for picture in pictures]
        return [picture for picture in pictures if picture is not None]
    raise ValueError(
        f"{str(images)[:100]!r} of type {type(images).__name__} is no picture: give a PIL image, an array, a tensor, a path, "
        "a URL, the bytes of a file or a file that was opened as binary."
    )


def _is_none(image: Any) -> bool:
    is_cell = isinstance(image, Mapping) and image.keys() == {"bytes", "path"}
    return image is None or (is_cell and image["bytes"] is None and image["path"] is None)


def _open(file: Any, name: str) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that PIL can open. Check that the file is complete.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels: {error}") from error
