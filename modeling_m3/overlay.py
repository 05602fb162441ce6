"""The picture as the model sees it, with its visual tokens drawn over it: `see(processor, picture).draw(36)`.

Not part of a checkpoint: no file that travels with one imports this. Pixels are what the image processor hands to the vision
tower, turned back into bytes; how many tokens there are, and in which order, is asked of the picture's `ImageLayout`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import cosine_similarity

from .visual_tokens import ImageLayout, check_choice, check_num_visual_tokens


if TYPE_CHECKING:
    from .modeling_m3 import M3LlavaForConditionalGeneration
    from .outputs_m3 import M3LlavaEncodedImages
    from .processing_m3 import M3LlavaProcessor


DRAWINGS = ("grid", "mean", "similarity")

LEAST_EDGE = 336  # of a view in a drawing: smaller ones are enlarged
MOST_ENLARGED = 4  # times that the base view is, to be as high as many tiles
MARGIN = 12
NEWLINE_GAP, NEWLINE_WIDTH = 2, 6  # within the margin, where no columns are cut off
PATCHES, NEWLINE, CLASS_TOKEN = range(3)  # what a token is of
NEWLINE_COLOR, CHOSEN_COLOR, CUT_COLOR, HATCH_COLOR = (150,) * 3, (255, 70, 50), (232,) * 3, (190,) * 3
# Matplotlib's viridis at every sixteenth of its range, between which colours are interpolated.
VIRIDIS = bytes.fromhex(
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e "
    "21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
)


@dataclass(frozen=True)
class Box:
    """Where one visual token of a picture is in a drawing.

    Attributes:
        left, top, right, bottom: in pixels of the drawing, the last two exclusive. A class token sees all of its view and has no
            place in it: its box is empty, at the view's upper left.
        row, column: of the token in its view, from 0. A newline's are those of all tiles together, the column after their last;
            a class token's are 0.
        view: "the base view", "the tile in row 1, column 2", or, for a newline, "the tiles".
        index: the token's place in the order in which the model reads them, from 0.
        count: how many tokens the picture has.
        is_newline: it ends a row of tiles, and has no pixels.
        is_class_token: it is the class token of its view.
    """

    left: int
    top: int
    right: int
    bottom: int
    row: int
    column: int
    view: str
    index: int
    count: int
    is_newline: bool = False
    is_class_token: bool = False

    def describe(self) -> str:
        """A sentence for people, who count from 1: "token 13 of 36: row 3, column 1 of the base view"."""
        where = f"row {self.row + 1}, column {self.column + 1} of {self.view}"
        if self.is_newline:
            where = f"the newline after row {self.row + 1} of {self.view}"
        if self.is_class_token:
            where = f"the class token of {self.view}"
        return f"token {self.index + 1} of {self.count}: {where}"

    @property
    def region(self) -> tuple[slice, slice]:
        """Its pixels in an array, (height, width, ...), of the drawing."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class SeenPicture:
    """What the vision tower sees of a picture.

    Attributes:
        base: the base view, side x side pixels; the only one unless the picture is cut into tiles.
        canvas: the tiles put together, None where there are none.
        layout: how the model lays out the picture's tokens.
        patch_size: pixels along one side of a patch of the vision tower.
        scales: the numbers of visual tokens that the checkpoint offers for a view.
    """

    base: Image.Image
    canvas: Image.Image | None
    layout: ImageLayout
    patch_size: int
    scales: tuple[int, ...]

    def boxes(self, scale: int) -> list[Box]:
        """One box for each visual token at `scale` tokens per view, in the order in which the model reads them.

        Rows and columns that are cut off as padding have none. Raises `ValueError` for a scale that is not offered.
        """
        [scale] = check_num_visual_tokens(scale, self.scales, 1, name="scale")
        side, panels = math.isqrt(scale), self._panels
        edge = self.base.width // self.patch_size // side * self.patch_size  # of a token, in pixels of its view
        order = self._order(side)
        # Rows that are left follow one another. Where no column is left, newlines are, one for every row.
        rows = count(next((row for _, is_tile, row, _ in order if is_tile), 0) if self.canvas else side - 1)
        boxes: list[Box] = []
        for index, (kind, is_tile, row, column) in enumerate(order):
            is_newline, is_class_token = kind == NEWLINE, kind == CLASS_TOKEN
            panel = panels[-1 if is_tile or is_newline else 0]
            row = next(rows) if is_newline else row
            # Past the last token of a view there may be pixels that none sees.
            left, top = (n // side * self.base.width + n % side * edge for n in (column, row))
            left, top = panel.left + panel.zoom * left, MARGIN + panel.zoom * top
            width = height = 0 if is_class_token else panel.zoom * edge
            view = f"the tile in row {row // side + 1}, column {column // side + 1}" if is_tile else "the base view"
            if is_newline:
                left = NEWLINE_GAP + (boxes[-1].right if order[index - 1][1] else panel.right)
                width, view = NEWLINE_WIDTH, "the tiles" if self.canvas else "the base view"
                column = panel.picture.width // self.base.width * side
            else:
                row, column = row % side, column % side
            area = left, top, left + width, top + height
            boxes.append(Box(*area, row, column, view, index, len(order), is_newline, is_class_token))
        return boxes

    def draw(
        self, scale: int, tokens: str = "grid", values: Sequence[float] | None = None, chosen: int | None = None
    ) -> Image.Image:
        """The base view and, right of it, the tiles, in RGB, with the visual tokens at `scale` tokens per view; what the model is
        not given, as it is cut off, is hatched.

        Args:
            tokens: "grid" draws lines between them, thicker ones between tiles; "mean" fills each with the mean colour of its
                pixels, newlines with grey; "similarity" colours each by its entry in `values`.
            values: from -1 to 1, one for each token, as `similarities` returns them; for "similarity" alone.
            chosen: the index of a token that is outlined.

        Raises:
            ValueError: for a scale that is not offered, and for other arguments than these.
        """
        check_choice("tokens", tokens, DRAWINGS)
        boxes = self.boxes(scale)
        _check_values(tokens, values, len(boxes))
        if chosen is not None and chosen not in range(len(boxes)):
            raise ValueError(f"chosen={chosen!r} must be the index of a token, from 0 to {len(boxes) - 1}.")
        panels = self._panels
        height, width = max(panel.bottom for panel in panels) + MARGIN, panels[-1].right + MARGIN
        drawing, is_cut = np.full((height, width, 3), 255.0), np.zeros((height, width), bool)
        for panel in panels:
            pixels = np.asarray(panel.picture, float)
            pixels = pixels.mean(-1, keepdims=True) if tokens == "similarity" else pixels
            drawing[panel.region] = pixels.repeat(panel.zoom, 0).repeat(panel.zoom, 1)
            is_cut[panel.region] = True
        for box in boxes:
            is_cut[box.region] = False
            if tokens == "similarity":
                drawing[box.region] += 0.7 * (_viridis(values[box.index]) - drawing[box.region])
            elif box.is_newline:
                drawing[box.region] = NEWLINE_COLOR
            elif tokens == "mean" and not box.is_class_token:
                drawing[box.region] = drawing[box.region].mean(axis=(0, 1))
        hatch = np.add.outer(np.arange(height), np.arange(width)) % 10 < 2
        drawing[is_cut] += 0.75 * (np.where(hatch[is_cut, None], HATCH_COLOR, CUT_COLOR) - drawing[is_cut])
        if tokens == "grid":
            self._draw_lines(drawing, boxes)
        picture = Image.fromarray(drawing.round().astype(np.uint8))
        if chosen is not None and not (box := boxes[chosen]).is_class_token:
            for grown, color in ((3, "black"), (2, CHOSEN_COLOR), (1, CHOSEN_COLOR), (0, "black")):
                outline = box.left - grown, box.top - grown, box.right - 1 + grown, box.bottom - 1 + grown
                ImageDraw.Draw(picture).rectangle(outline, outline=color)
        return picture

    def token_at(self, x: float, y: float, scale: int) -> int | None:
        """The index of the visual token at a pixel of what `draw` returned; None beside them."""
        at = (box.index for box in self.boxes(scale) if box.left <= x < box.right and box.top <= y < box.bottom)
        return next(at, None)

    def _order(self, side: int) -> list[list[int]]:
        """What each token is, whether it is of a tile, and its row and column in the base view or over all tiles, as it is read.

        A class token's row and column are its view's first.
        """
        views = []
        for number in range(self.layout.num_tiles):
            tile = divmod(number - 1, self.layout.grid[1]) if number else (0, 0)
            rows, columns = (range(n * side, (n + 1) * side) for n in tile)
            class_token = [(CLASS_TOKEN, number > 0, rows[0], columns[0])] * self.layout.keeps_class_token
            views.append(class_token + [(PATCHES, number > 0, row, column) for row in rows for column in columns])
        newline = torch.tensor([NEWLINE, 0, 0, 0]) if self.layout.merge_type == "spatial_unpad" else None
        return self.layout.merge(torch.tensor(views), newline).tolist()

    @property
    def _panels(self) -> list["_Panel"]:
        """The tiles keep their pixels unless they are small; the base view is enlarged to be as high, but no wider."""
        zoom = -(-LEAST_EDGE // self.base.width)
        if self.canvas is None:
            return [_Panel(self.base, zoom, MARGIN)]
        base = _Panel(self.base, zoom * min(*self.layout.grid, MOST_ENLARGED), MARGIN)
        return [base, _Panel(self.canvas, zoom, base.right + 2 * MARGIN)]

    def _draw_lines(self, drawing: np.ndarray, boxes: list[Box]) -> None:
        """A light line beside a dark one, of which one is seen on any pixels: thin ones around tokens, thick ones around tiles."""
        outlined = [(*box.region, 1) for box in boxes]
        for panel in self._panels[1:]:
            edge = self.base.width * panel.zoom
            lefts, tops = range(panel.left, panel.right, edge), range(MARGIN, panel.bottom, edge)
            outlined += [(slice(top, top + edge), slice(left, left + edge), 2) for top in tops for left in lefts]
        for rows, columns, w in outlined:
            area = drawing[rows, columns]
            for line, color in ((area[-w:], 0), (area[:, -w:], 0), (area[:w], 255), (area[:, :w], 255)):
                line += (0.55 if w == 1 else 0.9) * (color - line)


def see(processor: "M3LlavaProcessor", picture: Image.Image) -> SeenPicture:
    """What a checkpoint's vision tower sees of a picture, as its processor prepares it.

    Raises `ValueError` for what is no picture, and for an image processor whose views are not those of the model.
    """
    inputs = processor(images=picture, return_tensors="pt")
    layout = processor.image_layout(inputs, 0)
    pixels = inputs["pixel_values"][0]
    views = _as_bytes(pixels.reshape(-1, *pixels.shape[-3:])[: layout.num_tiles].cpu(), processor.image_processor)
    canvas = None
    if layout.num_tiles > 1:
        (rows, columns), side = layout.grid, views.shape[1]
        tiles = views[1:].reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
        canvas = Image.fromarray(tiles.reshape(rows * side, columns * side, 3))
    base, scales = Image.fromarray(views[0]), tuple(processor.visual_token_scales)
    return SeenPicture(base, canvas, layout, processor.patch_size, scales)


@torch.no_grad()
def similarities(
    model: "M3LlavaForConditionalGeneration", encoded: "M3LlavaEncodedImages", token: int, scale: int
) -> list[float]:
    """Cosine similarity of a visual token, by its index, to each of its picture's at `scale` tokens per view, newlines included.

    `encoded` is what `model.encode_images` returned of one picture. Raises `ValueError` for several, for a scale that is not
    offered, and for a token that is none.
    """
    if len(encoded.layouts) != 1:
        raise ValueError(f"These are {len(encoded.layouts)} pictures, encoded: similarities are of one.")
    [features] = model.get_visual_tokens(encoded, scale)
    if token not in range(len(features)):
        raise ValueError(f"token={token!r} must be the index of a token, from 0 to {len(features) - 1}.")
    return cosine_similarity(features[token].float(), features.float()).clamp(-1, 1).tolist()


class _Panel(NamedTuple):
    """A view, or the grid of tiles, in a drawing; how many times its pixels are enlarged."""

    picture: Image.Image
    zoom: int
    left: int

    @property
    def right(self) -> int:
        return self.left + self.picture.width * self.zoom

    @property
    def bottom(self) -> int:
        return MARGIN + self.picture.height * self.zoom

    @property
    def region(self) -> tuple[slice, slice]:
        return slice(MARGIN, self.bottom), slice(self.left, self.right)


def _as_bytes(views: torch.Tensor, image_processor: Any) -> np.ndarray:
    """Normalized views, (t, c, h, w), as the bytes that they were, (t, h, w, c)."""
    views = views.double().permute(0, 2, 3, 1).numpy()
    if image_processor.do_normalize:
        views = views * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    if image_processor.do_rescale:
        views = views / image_processor.rescale_factor
    return views.round().clip(0, 255).astype(np.uint8)


def _viridis(value: float) -> np.ndarray:
    """The colour of a number from -1 to 1."""
    channels = np.frombuffer(VIRIDIS, np.uint8).reshape(-1, 3).T
    return np.array([np.interp(value, np.linspace(-1, 1, len(channel)), channel) for channel in channels])


def _check_values(tokens: str, values: Sequence[float] | None, num_tokens: int) -> None:
    needed, given = num_tokens if tokens == "similarity" else 0, () if values is None else values
    if len(given) != needed:
        raise ValueError(f"tokens={tokens!r} takes {needed} values, one for each token to colour, not {len(given)}.")
    wrong = [value for value in given if not -1 <= value <= 1]
    if wrong:
        raise ValueError(f"values hold {wrong[0]!r}: each must be from -1 to 1.")
