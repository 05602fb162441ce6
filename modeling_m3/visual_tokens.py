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
"""How many visual tokens an image has, and how they are made: the one source for both.

The processor asks this module how many placeholders an image needs; the model asks it for the features themselves. Both
hold an `ImageLayout`, so they cannot disagree:

1. every tile (a square view of the image) is pooled from its `side * side` grid to one of the *scales* (paper section 3);
2. the pooled tiles of an image are merged into one sequence, as its layout says (`patch_merge_type` of LLaVA-NeXT).

Sizes, resolutions and grids are (height, width) or (rows, columns) throughout; the original code has (width, height).
Tensor shapes use: t tiles of one image, n tokens per tile, d hidden size.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence


SAMPLINGS = ("average", "spatial", "sequential")
MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
SELECT_STRATEGIES = ("default", "full")
AUTO = "auto"  # in place of a number: the model chooses
AUTO_NUMBER = 0  # what the processor writes for it
ONE_VIEW = (
    -1,
    -1,
)  # in place of a grid, among images that are cut into tiles: one that is not, as the frame of a video
MOST_TILES = 1024  # of an image: where callers may choose its resolution, one must not take all memory there is


@dataclass(frozen=True)
class ImageLayout:
    """What decides how many visual tokens an image has and in which order they stand, at every scale.

    Args:
        grid: (rows, columns) of tiles that follow the base view, (0, 0) where none do; None: an image that is one view.
        size: (height, width) of the original image in pixels; needed where a grid is unpadded.
        merge_type: one of `MERGE_TYPES`.
        keeps_class_token: whether every tile has one token more than its scale.
    """

    grid: tuple[int, int] | None
    size: tuple[int, int] | None
    merge_type: str
    keeps_class_token: bool = False

    @property
    def num_tiles(self) -> int:
        """How many tiles the vision tower sees: the base view and the grid's."""
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]

    def count(self, scale: int) -> int:
        """The number of visual tokens at `scale` tokens per tile, i.e. how many placeholders the prompt needs."""
        if self.grid is None or self.merge_type != "spatial_unpad":
            return self.num_tiles * (scale + self.keeps_class_token)
        if self.grid == (0, 0):
            return scale + 1
        rows, columns = self._kept_rows_and_columns(math.isqrt(scale))
        return scale + len(rows) * (len(columns) + 1)

    def merge(self, features: torch.Tensor, newline: torch.Tensor | None = None) -> torch.Tensor:
        """The pooled tiles as one sequence: the base view first, then the grid.

        "flat" keeps tile after tile; "spatial" reads the grid row by row across its tiles; "spatial_unpad" does so after
        cutting off the rows and columns that are padding, and ends every row with `newline`. At coarse scales nothing
        may be left of the grid. Source: the original's `prepare_inputs_labels_for_multimodal` and `unpad_image`.

        Args:
            features: (t, n, d).
            newline: (d,), needed by "spatial_unpad".

        Returns:
            (`count(scale)`, d).

        Raises:
            ValueError: if "spatial_unpad" has no `newline`, or no size, to unpad a grid with.
        """
        t, n, d = features.shape
        if self.grid is None or self.merge_type == "flat":
            return features.reshape(t * n, d)
        if self.grid == (0, 0):
            return features[0] if newline is None else torch.cat([features[0], newline[None]])
        side = math.isqrt(n)
        tiles = features[1:].reshape(*self.grid, side, side, d)
        canvas = tiles.transpose(1, 2).reshape(self.grid[0] * side, self.grid[1] * side, d)
        if self.merge_type == "spatial_unpad":
            if newline is None:
                raise ValueError(
                    'patch_merge_type="spatial_unpad" needs an image_newline, which a model has if its configuration has '
                    "image_grid_pinpoints. Set them there, or use another patch_merge_type."
                )
            rows, columns = self._kept_rows_and_columns(side)
            canvas = canvas[rows.start : rows.stop, columns.start : columns.stop]
            canvas = torch.cat([canvas, newline.expand(len(rows), 1, d)], dim=1)
        return torch.cat([features[0], canvas.reshape(-1, d)])

    def _kept_rows_and_columns(self, side: int) -> tuple[range, range]:
        """The rows and columns of the canvas of pooled tokens that show the image and not its padding.

        `int(x)` floors as the original does; transformers rounds to 7 digits first, which gives other counts.
        """
        if self.size is None:
            raise ValueError("The tiles of an image are unpadded by its size: pass the processor's image_sizes.")
        rows, columns = self.grid[0] * side, self.grid[1] * side
        height, width = self.size
        if width / height > columns / rows:
            padding = (rows - int(height * (columns / width))) // 2
            return range(padding, rows - padding), range(columns)
        padding = (columns - int(width * (rows / height))) // 2
        return range(rows), range(padding, columns - padding)


def keeps_class_token(select_strategy: str) -> bool:
    """Whether a `vision_feature_select_strategy` keeps the class token. Raises `ValueError` for an unknown one."""
    check_choice("vision_feature_select_strategy", select_strategy, SELECT_STRATEGIES)
    return select_strategy == "full"


def default_scales(side: int, with_class_token: bool = False) -> list[int]:
    """The paper's scales for a grid of `side * side` patches: each pools the next finer one by as little as its side divides by.

    `[1, 9, 36, 144, 576]` for CLIP-ViT-L/14-336, whose side is 24 (paper section 4.1), and `[1, 9, 81, 729]` for 27, SigLIP's at
    384. Only the finest with a class token, which cannot be pooled.
    """
    if side < 1:
        raise ValueError(f"A tile has {side} patches along its side: its patches are larger than the tile itself.")
    sides = [side]
    while sides[-1] > 1 and not with_class_token:
        sides.append(sides[-1] // next(k for k in range(2, sides[-1] + 1) if sides[-1] % k == 0))
    return sorted(s * s for s in sides)


def possible_scales(side: int) -> list[int]:
    """Every scale that a grid of `side * side` patches has: `(side / k) ** 2` for the whole numbers k that divide it."""
    return [s * s for s in range(1, side + 1) if side % s == 0]


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises `ValueError` that names the option and its choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def ascending_scales(scales: Any) -> Any:
    """The scales in ascending order, Python's own numbers in a list; what is no list of whole numbers as it is."""
    scales = as_plain(scales)
    return sorted(scales) if isinstance(scales, list) and all(type(scale) is int for scale in scales) else scales


def check_scales(scales: Any, side: int) -> None:
    """Raises `ValueError` unless `scales` is a list of distinct scales of a grid of `side * side` patches."""
    possible = possible_scales(side)
    known = isinstance(scales, list) and all(type(scale) is int and scale in possible for scale in scales)
    if not known or not scales or len(set(scales)) != len(scales):
        raise ValueError(
            f"visual_token_scales={scales!r} must be distinct scales of the {side}x{side} grid of patches: "
            f"choose from {possible}."
        )


def check_num_visual_tokens(
    num_visual_tokens: Any,
    scales: Sequence[int],
    num_images: int,
    name: str = "num_visual_tokens",
    may_be_auto: bool = False,
) -> list[int]:
    """One scale per image from what a caller may pass: an int for all, a list with one per image, None for the finest.

    Lists may be tuples, arrays or tensors, and numbers numpy's or torch's; what is returned is Python's own. With `may_be_auto`,
    "auto" may stand for a number, and becomes `AUTO_NUMBER`.

    Raises `ValueError` that gives the value by `name` and the allowed scales. The original rounds such values silently: 100
    becomes 144, 200 becomes 576.
    """
    if num_visual_tokens is None:
        return [max(scales)] * num_images
    num_visual_tokens = as_plain(num_visual_tokens)
    values = num_visual_tokens if isinstance(num_visual_tokens, list) else [num_visual_tokens]
    for value in values:
        if may_be_auto and value == AUTO:
            if len(scales) < 2:
                raise ValueError(
                    f"{name}={num_visual_tokens!r}: this checkpoint offers {scales[0]} alone, so there is no choice."
                )
        elif isinstance(value, bool) or not isinstance(value, int) or value not in scales:
            raise ValueError(
                f"{name}={num_visual_tokens!r}: {value!r} is not a number of visual tokens this checkpoint "
                f"offers. Choose from {sorted(scales)}{', or auto' if may_be_auto else ''}."
            )
    # The checkpoint's own numbers: a compiler may take the caller's for unknowns, but cannot these.
    values = [AUTO_NUMBER if value == AUTO else next(scale for scale in scales if scale == value) for value in values]
    if not isinstance(num_visual_tokens, list):
        return values * num_images
    if len(values) != num_images:
        raise ValueError(
            f"{name}={num_visual_tokens!r} has {len(values)} entries for {num_images} image(s). Pass one int "
            "for all images, or a list with one int per image in reading order."
        )
    return values


def laid_out(numbers: Any, scales: Sequence[int]) -> Any:
    """The numbers of visual tokens that the processor laid prompts out for: the finest scale where it wrote `AUTO_NUMBER`."""
    if not isinstance(numbers, list):
        return numbers
    return [max(scales) if type(number) is int and number == AUTO_NUMBER else number for number in numbers]


def as_plain(value: Any) -> Any:
    """Python's own numbers, in lists, for numpy's and torch's scalars and arrays, and tuples or lists of them."""
    if isinstance(value, (list, tuple)):
        return [as_plain(entry) for entry in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) else value


def check_pinpoints(image_grid_pinpoints: Sequence[Sequence[int]], tile_size: int) -> None:
    """Raises `ValueError` unless these are (height, width) pairs, each of at most `MOST_TILES` tiles of `tile_size` pixels."""
    if not isinstance(image_grid_pinpoints, (list, tuple)) or not image_grid_pinpoints:
        raise ValueError(
            f"image_grid_pinpoints={image_grid_pinpoints!r}: give a list with at least one (height, width) pair, or None "
            "for no tiles."
        )
    for pair in image_grid_pinpoints:
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(edge, int) for edge in pair)
        if not is_pair or any(edge < tile_size or edge % tile_size for edge in pair):
            raise ValueError(
                f"image_grid_pinpoints holds {pair!r}: every entry must be a (height, width) pair of positive multiples of "
                f"the tile size, {tile_size} pixels."
            )
        if (pair[0] // tile_size) * (pair[1] // tile_size) > MOST_TILES:
            raise ValueError(f"image_grid_pinpoints holds {pair!r}, which is more than {MOST_TILES} tiles.")


def select_resolution(image_size: tuple[int, int], image_grid_pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The pinpoint that keeps most of the image's pixels, then wastes least; the earlier one on a tie.

    Source: the original's `select_best_resolution`.
    """
    height, width = image_size

    def fit(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - pinpoint[0] * pinpoint[1]

    best_height, best_width = max(image_grid_pinpoints, key=fit)
    return best_height, best_width


def tile_grid(
    image_size: tuple[int, int], image_grid_pinpoints: Sequence[Sequence[int]], tile_size: int
) -> tuple[int, int]:
    """The (rows, columns) of tiles that an image of (height, width) pixels is cut into, the base view not counted."""
    height, width = select_resolution(image_size, image_grid_pinpoints)
    return height // tile_size, width // tile_size


def split_tiles(
    pixel_values: torch.Tensor | list[torch.Tensor], image_tile_grids: Sequence[Sequence[int]] | None
) -> tuple[list[torch.Tensor], list[tuple[int, int] | None]]:
    """The tiles of each image, without the padding of the batch, and how they are arranged.

    Args:
        pixel_values: (images, channels, height, width), one view per image; or (images, tiles, channels, height, width)
            with zeros after an image's last tile; or a list with one such tensor per image.
        image_tile_grids: (rows, columns) of tiles of every image, (0, 0) for one view; `ONE_VIEW` for one that is not cut
            among images that are.

    Returns:
        One (t, channels, height, width) per image, and its grid as `ImageLayout` takes it.

    Raises:
        ValueError: for pixels of another shape, tiles without a word on their grid, and tiles that are not the grid's.
    """
    images = list(pixel_values)
    if not images or not isinstance(images[0], torch.Tensor):
        raise ValueError(
            f"pixel_values hold {f'a {type(images[0]).__name__}' if images else 'no image'}: pass tensors, as the processor "
            'makes them with return_tensors="pt".'
        )
    if images[0].ndim not in (3, 4):
        raise ValueError(
            f"pixel_values of one image have the shape {tuple(images[0].shape)}: expected (channels, height, width), "
            "or (tiles, channels, height, width)."
        )
    is_one_view = images[0].ndim == 3
    tiles = [image[None] for image in images] if is_one_view else images
    held = [len(image) for image in tiles]
    if image_tile_grids is None and set(held) != {1}:
        raise ValueError(
            "pixel_values hold several tiles per image: pass the processor's image_tile_grids, or image_sizes and the "
            "image_grid_pinpoints that they were cut by."
        )
    grids = [(0, 0)] * len(tiles) if image_tile_grids is None else [tuple(grid) for grid in image_tile_grids]
    is_grid = [len(grid) == 2 and all(isinstance(n, int) and n >= 0 for n in grid) for grid in grids]
    if not all(known or grid == ONE_VIEW for known, grid in zip(is_grid, grids)):
        raise ValueError(f"image_tile_grids={grids}: give the (rows, columns) of every image, whole numbers from 0.")
    counts = [1 if grid == ONE_VIEW else 1 + grid[0] * grid[1] for grid in grids]
    if len(counts) != len(tiles) or any(n < count for n, count in zip(held, counts)):
        raise ValueError(
            f"pixel_values hold {held} tiles, but by image_tile_grids, or by image_sizes and image_grid_pinpoints, they "
            f"should be {counts}. Pass all that the processor returned."
        )
    one_view = [is_one_view or grid == ONE_VIEW for grid in grids]
    grids = [None if is_one else grid for is_one, grid in zip(one_view, grids)]
    return [image[:count] for image, count in zip(tiles, counts)], grids


def cat_tiles(tensors: Sequence[torch.Tensor], dim: int = 0, **kwargs: Any) -> torch.Tensor:
    """As `torch.cat`; images with fewer tiles than others, (images, tiles, c, h, w), get zeros after their last."""
    if dim == 0 and all(pixels.ndim == 5 for pixels in tensors) and len({pixels.shape[1] for pixels in tensors}) > 1:
        return pad_sequence([image for pixels in tensors for image in pixels], batch_first=True)
    return torch.cat(tensors, dim=dim, **kwargs)


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `torch.cat`, but one part is itself, of which nothing has to be copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def pool_tiles(features: torch.Tensor, scale: int, sampling: str = "average") -> torch.Tensor:
    """Reduces every tile's grid of tokens to `scale` tokens, in reading order.

    One average over k x k tokens equals the paper's repeated 2x2 pooling, and the original's `avg_pool2d`.

    Args:
        features: (t, side * side, d).
        scale: a scale of the grid; `side * side` returns `features` as they are.
        sampling: "average", the method; or the training-free baselines of paper Table 4 and Figure 5: "spatial" keeps
            the first token of every window, "sequential" the first `scale` tokens of the tile.

    Returns:
        (t, scale, d).

    Raises:
        ValueError: if the tiles are not square grids or `scale` is not one of theirs.
    """
    t, n, d = features.shape
    if scale == n:
        return features
    side = math.isqrt(n)
    if side * side != n or scale not in possible_scales(side):
        raise ValueError(f"Tiles of {n} tokens cannot be pooled to {scale}: choose from {possible_scales(side)}.")
    if sampling == "sequential":
        return features[:, :scale]
    window = side // math.isqrt(scale)
    windows = features.reshape(t, side // window, window, side // window, window, d)
    pooled = windows[:, :, 0, :, 0] if sampling == "spatial" else windows.mean(dim=(2, 4))
    return pooled.reshape(t, scale, d)


def expand_placeholders(input_ids: Sequence[int], image_token_id: int, counts: Iterable[int]) -> list[int]:
    """Where each token comes from once every image's mark is as many placeholders: indices into `input_ids`.

    Args:
        input_ids: of a prompt with one mark per image.
        image_token_id: the mark's, and the placeholder's.
        counts: the number of placeholders of each image, in reading order.
    """
    counts = iter(counts)
    return [i for i, token in enumerate(input_ids) for _ in range(next(counts) if token == image_token_id else 1)]


def as_lists(*values: Any) -> list[Any]:
    """The values with lists in place of tensors, which are fetched from their device in one go, and of arrays."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    values = [value if isinstance(value, torch.Tensor) else as_plain(value) for value in values]
    if not tensors:
        return values
    fetched = torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors]).cpu()
    parts = iter(fetched.split([tensor.numel() for tensor in tensors]))
    return [next(parts).view(value.shape).tolist() if isinstance(value, torch.Tensor) else value for value in values]
