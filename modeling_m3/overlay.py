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
NEWLINE = CLASS_TOKEN = -1  # in place of the view, and of the row, of a token that has pixels
NEWLINE_COLOR = (150, 150, 150)
CHOSEN_COLOR = (255, 70, 50)
CUT_COLOR, HATCH_COLOR = (232, 232, 232), (190, 190, 190)
# Matplotlib's viridis at every eighth of its range, between which colours are interpolated.
VIRIDIS = np.array([
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99), (170, 220, 50),
    (253, 231, 37),
])  # fmt: skip


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
        columns = self.layout.grid[1] if self.canvas else 1  # of tiles
        order = self._order(side)
        # Rows that are left follow one another. Where no column is left, newlines are, one for every row.
        first = next(((view - 1) // columns * side + row for view, row, _ in order if view > 0), 0)
        rows = count(first if self.canvas else side - 1)

        def corner(panel: "_Panel", row: int, column: int) -> tuple[int, int]:
            """Of a token by its row and column in all of the panel: past a view's last token there may be pixels that none sees."""
            left, top = (n // side * self.base.width + n % side * edge for n in (column, row))
            return panel.left + panel.zoom * left, MARGIN + panel.zoom * top

        boxes: list[Box] = []
        for index, (view, row, column) in enumerate(order):
            panel = panels[-1 if view else 0]
            span, place = edge * panel.zoom, (index, len(order))
            if view == NEWLINE:
                row, column, name = next(rows), columns * side, "the tiles" if self.canvas else "the base view"
                left = NEWLINE_GAP + (boxes[-1].right if order[index - 1][0] > 0 else panel.right)
                _, top = corner(panel, row, 0)
                boxes.append(
                    Box(left, top, left + NEWLINE_WIDTH, top + span, row, column, name, *place, is_newline=True)
                )
                continue
            tile_row, tile_column = divmod(view - 1, columns) if view else (0, 0)
            name = f"the tile in row {tile_row + 1}, column {tile_column + 1}" if view else "the base view"
            left, top = corner(panel, tile_row * side + max(row, 0), tile_column * side + column)
            if row == CLASS_TOKEN:
                boxes.append(Box(left, top, left, top, 0, 0, name, *place, is_class_token=True))
            else:
                boxes.append(Box(left, top, left + span, top + span, row, column, name, *place))
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
        if chosen is not None and not boxes[chosen].is_class_token:
            box = boxes[chosen]
            for grown, color in ((3, "black"), (2, CHOSEN_COLOR), (1, CHOSEN_COLOR), (0, "black")):
                outline = box.left - grown, box.top - grown, box.right - 1 + grown, box.bottom - 1 + grown
                ImageDraw.Draw(picture).rectangle(outline, outline=color)
        return picture

    def token_at(self, x: float, y: float, scale: int) -> int | None:
        """The index of the visual token at a pixel of what `draw` returned; None beside them."""
        at = (box.index for box in self.boxes(scale) if box.left <= x < box.right and box.top <= y < box.bottom)
        return next(at, None)

    def _order(self, side: int) -> list[tuple[int, int, int]]:
        """(view, row, column) of each token as the model reads them; `NEWLINE` in place of a view; a class token's row is -1."""
        tokens = [(row, column) for row in range(side) for column in range(side)]
        tokens = [(CLASS_TOKEN, 0)] * self.layout.keeps_class_token + tokens
        views = [[(view, row, column) for row, column in tokens] for view in range(self.layout.num_tiles)]
        newline = torch.tensor([NEWLINE, 0, 0]) if self.layout.merge_type == "spatial_unpad" else None
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
        panels, tile = self._panels, self.base.width
        outlined = [(*box.region, 1) for box in boxes]
        for panel in panels[1:]:
            edge = tile * panel.zoom
            lefts, tops = range(panel.left, panel.right, edge), range(MARGIN, panel.bottom, edge)
            outlined += [(slice(top, top + edge), slice(left, left + edge), 2) for top in tops for left in lefts]
        for rows, columns, width in outlined:
            area = drawing[rows, columns]
            for part, color, strength in (
                (area[-width:], 0, 0.5), (area[:, -width:], 0, 0.5), (area[:width], 255, 0.6), (area[:, :width], 255, 0.6),
            ):  # fmt: skip
                part += max(strength, 0.45 * width) * (color - part)


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
        rows, columns = layout.grid
        side = views.shape[1]
        tiles = views[1:].reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
        canvas = Image.fromarray(tiles.reshape(rows * side, columns * side, 3))
    scales = tuple(sorted(processor.visual_token_scales))
    return SeenPicture(Image.fromarray(views[0]), canvas, layout, processor.patch_size, scales)


@torch.no_grad()
def similarities(
    model: "M3LlavaForConditionalGeneration", encoded: "M3LlavaEncodedImages", token: int, scale: int
) -> list[float]:
    """Cosine similarity of one visual token to each of its picture's, newlines included, as the language model gets them.

    Args:
        encoded: what `model.encode_images` returned of one picture.
        token: its index among the picture's tokens.
        scale: visual tokens per view.

    Raises:
        ValueError: for several pictures, a scale that is not offered, or a token that is none.
    """
    if len(encoded.layouts) != 1:
        raise ValueError(f"These are {len(encoded.layouts)} pictures, encoded: similarities are of one.")
    [features] = model.get_visual_tokens(encoded, scale)
    if token not in range(len(features)):
        raise ValueError(f"token={token!r} must be the index of a token, from 0 to {len(features) - 1}.")
    features = features.float()
    return cosine_similarity(features[token], features).clamp(-1, 1).tolist()


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
    return np.array([np.interp(value, np.linspace(-1, 1, len(VIRIDIS)), channel) for channel in VIRIDIS.T])


def _check_values(tokens: str, values: Sequence[float] | None, num_tokens: int) -> None:
    if tokens != "similarity":
        if values is not None:
            raise ValueError(f'tokens={tokens!r} draws no values: leave them out, or use tokens="similarity".')
        return
    if values is None or len(values) != num_tokens:
        raise ValueError(
            f'tokens="similarity" needs {num_tokens} values, one for each token: there are {len(values or ())}.'
        )
    wrong = [value for value in values if not -1 <= value <= 1]
    if wrong:
        raise ValueError(f"values hold {wrong[0]!r}: each must be from -1 to 1.")
