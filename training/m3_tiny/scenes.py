"""Generated pictures with questions: some need detail (codes to read, small things), some need none (one large shape).

A scene is a canvas with one large shape, a code, some dots and one small shape. Everything about it follows from the
seed, so a training set costs no disk and never repeats, and a test set is a range of other seeds and another font.
Lengths are in pixels of the *view*: the square that the vision tower sees after padding and resizing.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont


PATCH = 14
SHAPES = ("circle", "rectangle", "triangle", "diamond", "star", "cross")
COLORS = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
    "green": (0, 255, 0),
    "orange": (255, 140, 0),
    "purple": (140, 40, 200),
}
# All digits, and letters that are not like one of them or like each other.
CHARACTERS = "0123456789AEHKTX"
CODE_LENGTHS = (3, 4)
MOST_DOTS = 6
PLACES = tuple(
    tuple(" ".join(part for part in (row, column) if part) or "center" for column in ("left", "", "right"))
    for row in ("top", "", "bottom")
)

# Fonts that matplotlib ships, so that the pictures are the same on every machine.
TRAIN_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "cmr10", "cmtt10")
TEST_FONTS = ("cmss10",)  # Computer Modern Sans: no training picture has it

# Kinds of questions, by what they need.
EASY_KINDS = ("shape", "color", "presence")
DETAIL_KINDS = ("code", "count", "place", "small shape")


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@dataclass
class Element:
    """What a patch can show: the classes that the vision tower learns first. 0 is none, in each."""

    shape: int = 0
    color: int = 0
    small: int = 0
    character: int = 0
    slot: int = 0  # which character of its code


@dataclass
class Scene:
    """A picture, its questions, and what every patch shows.

    Attributes:
        picture: of any size and shape; its long edge is the view's.
        questions: about the picture, in a fixed order.
        labels: (view / 14, view / 14, 5) int64, the fields of `Element` at the middle of every patch.
    """

    picture: Image.Image
    questions: list[Question] = field(default_factory=list)
    labels: np.ndarray | None = None


# The dense labels: (name of the field, number of classes, none included).
LABELS = (
    ("shape", len(SHAPES) + 1),
    ("color", len(COLORS) + 1),
    ("small", len(SHAPES) + 2),  # small shapes, and dots
    ("character", len(CHARACTERS) + 1),
    ("slot", max(CODE_LENGTHS) + 1),
)


def scene(seed: int | str, fonts: Sequence[str] = TRAIN_FONTS, view: int = 336) -> Scene:
    """The scene of this seed.

    Args:
        seed: decides everything; two seeds of different text are independent.
        fonts: names of matplotlib's font files to choose from.
        view: side of the square that the picture is padded to, a multiple of 14.
    """
    rng = random.Random(f"m3-tiny {seed}")
    return _Painter(rng, view, fonts).paint()


def low_resolution_scene(seed: int | str, view: int = 336) -> Scene:
    """One shape on a pale canvas of few pixels, without questions: teaches the vision tower blurred edges."""
    rng = random.Random(f"m3-tiny low resolution {seed}")
    side = view * 64 // 336
    picture = Image.new("RGB", (side, side), tuple(rng.randint(225, 255) for _ in range(3)))
    labels = Image.new("L", (view // 2, view // 2))
    shape, color = rng.randrange(3), rng.randrange(8)
    width, height = rng.randint(8, side // 2), rng.randint(8, side // 2)
    if shape != 1:
        height = width
    left, top = rng.randint(0, side - width), rng.randint(0, side - height)
    draw_shape(ImageDraw.Draw(picture), SHAPES[shape], (left, top, left + width, top + height), _rgb(rng, color))
    box = [edge * labels.width / side for edge in (left, top, left + width, top + height)]
    draw_shape(ImageDraw.Draw(labels), SHAPES[shape], box, 1)
    return Scene(picture, labels=_patch_labels(labels, [Element(), Element(shape=shape + 1, color=color + 1)]))


def text_scene(seed: int | str, view: int = 336) -> Scene:
    """As many codes as fit, without questions: many characters for the vision tower to learn from."""
    painter = _Painter(random.Random(f"m3-tiny text {seed}"), view, TRAIN_FONTS)
    painter.fill_with_codes()
    return Scene(painter.picture, labels=_patch_labels(painter.labels, painter.elements))


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: Sequence[float], fill: tuple[int, ...] | int) -> None:
    """Draws one of `SHAPES` into the box (left, top, right, bottom)."""
    left, top, right, bottom = box
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    if shape == "circle":
        draw.ellipse(list(box), fill)
    elif shape == "rectangle":
        draw.rectangle(list(box), fill)
    elif shape == "triangle":
        draw.polygon([(middle_x, top), (right, bottom), (left, bottom)], fill)
    elif shape == "diamond":
        draw.polygon([(middle_x, top), (right, middle_y), (middle_x, bottom), (left, middle_y)], fill)
    elif shape == "cross":
        third_x, third_y = (right - left) / 3, (bottom - top) / 3
        draw.rectangle([left + third_x, top, right - third_x, bottom], fill)
        draw.rectangle([left, top + third_y, right, bottom - third_y], fill)
    else:
        radius_x, radius_y = (right - left) / 2, (bottom - top) / 2
        points = []
        for corner in range(10):
            length = 1.0 if corner % 2 == 0 else 0.42
            angle = math.pi * corner / 5
            points.append(
                (middle_x + length * radius_x * math.sin(angle), middle_y - length * radius_y * math.cos(angle))
            )
        draw.polygon(points, fill)


class _Code:
    """A random code and how wide it is in a random font."""

    def __init__(self, rng: random.Random, fonts: Sequence[str], size: float, scale: float):
        self.code = "".join(rng.choice(CHARACTERS) for _ in range(rng.choice(CODE_LENGTHS)))
        self.font = _font(rng.choice(fonts), max(8, round(size * scale)))
        spacing = rng.uniform(0.0, 0.15) * size
        self.advances = [self.font.getlength(character) / scale + spacing for character in self.code]
        self.width, self.height = sum(self.advances), 0.75 * size


class _Painter:
    """Paints one scene; holds what its steps share."""

    def __init__(self, rng: random.Random, view: int, fonts: Sequence[str]):
        self.rng, self.view, self.fonts = rng, view, fonts
        short = rng.choice((1.0, 1.0, 0.75, 0.6)) * view
        width, height = (view, short) if rng.random() < 0.5 else (short, view)
        self.scale = rng.choice((1.0, 1.0, 1.0, 0.75, 1.5))  # some pictures are resized on their way to the model
        self.width, self.height = round(width * self.scale), round(height * self.scale)
        self.dark = rng.random() < 0.35
        low, high = (0, 70) if self.dark else (185, 255)
        background = tuple(rng.randint(low, high) for _ in range(3))
        self.picture = Image.new("RGB", (self.width, self.height), background)
        self.draw = ImageDraw.Draw(self.picture)
        # Labels are painted at half the view's resolution, with the element's index as colour.
        self.elements = [Element()]
        self.labels = Image.new("L", (view // 2, view // 2))
        self.label_draw = ImageDraw.Draw(self.labels)
        self.taken: list[tuple[float, float, float, float]] = []

    def paint(self) -> Scene:
        rng = self.rng
        shape, color = rng.randrange(len(SHAPES)), self._color()
        edge = rng.uniform(0.2, 0.42) * self.view
        box = self._place(edge * rng.uniform(0.75, 1.3) if shape == 1 else edge, edge)
        self._shape(box, Element(shape=shape + 1, color=color + 1))

        text = _Code(rng, self.fonts, self._text_size(), self.scale)
        self._write(text, *self._place(text.width, text.height)[:2])
        other = rng.choice([name for index, name in enumerate(SHAPES) if index != shape])
        small, small_color = rng.randrange(1, len(SHAPES)), self._color()  # not a circle: dots are
        small_edge = rng.uniform(16, 26)
        small_box = self._place(small_edge, small_edge)
        self._shape(small_box, Element(small=small + 1, color=small_color + 1))

        dots, dot_color = rng.randint(0, MOST_DOTS), self._color()
        radius = rng.uniform(4, 7)
        for _ in range(dots):
            dot_box = self._place(2 * radius, 2 * radius, margin=8)
            self._shape(dot_box, Element(small=len(SHAPES) + 1, color=dot_color + 1), "circle")

        name, color_name = SHAPES[shape], list(COLORS)[color]
        asked = rng.choice((name, other))
        column = min(2, int(3 * (small_box[0] + small_box[2]) / 2 * self.scale / self.width))
        row = min(2, int(3 * (small_box[1] + small_box[3]) / 2 * self.scale / self.height))
        questions = [
            Question("shape", rng.choice(("What is the large shape?", "Which large shape is there?")), name),
            Question("color", rng.choice((f"What color is the large {name}?", "What color is the large shape?")), color_name),
            Question("presence", f"Is there a large {asked}?", "yes" if asked == name else "no"),
            Question("code", rng.choice(("What does the code say?", "Read the code.")), text.code),
            Question("count", rng.choice(("How many dots are there?", "Count the dots.")), str(dots)),
            Question("place", f"Where is the small {SHAPES[small]}?", PLACES[row][column]),
            Question("small shape", rng.choice(("What is the small shape?", "Which small shape is there?")), SHAPES[small]),
        ]  # fmt: skip
        return Scene(self.picture, questions, _patch_labels(self.labels, self.elements))

    def fill_with_codes(self) -> None:
        """Line after line of codes."""
        rng = self.rng
        room_x, room_y = self.width / self.scale, self.height / self.scale
        top = rng.uniform(2, 10)
        while True:
            size, left = self._text_size(), rng.uniform(2, 20)
            if top + 0.75 * size > room_y - 2:
                return
            while True:
                text = _Code(rng, self.fonts, size, self.scale)
                if left + text.width > room_x - 2:
                    break
                self._write(text, left, top)
                left += text.width + rng.uniform(0.7, 1.5) * size
            top += 0.75 * size + rng.uniform(5, 12)

    def _text_size(self) -> float:
        return self.rng.uniform(16, 30)

    def _write(self, text: "_Code", left: float, top: float) -> None:
        """Writes a code, character by character."""
        color = self._color()
        ink, bottom = _rgb(self.rng, color), top + text.height
        for slot, (character, advance) in enumerate(zip(text.code, text.advances)):
            at = (left * self.scale, bottom * self.scale)
            self.draw.text(at, character, ink, text.font, anchor="ls")
            element = Element(color=color + 1, character=CHARACTERS.index(character) + 1, slot=slot + 1)
            box = (left, top, left + advance, bottom)
            self._label(lambda box: self.label_draw.rectangle(box, len(self.elements)), box)
            self.elements.append(element)
            left += advance

    def _shape(self, box: tuple[float, ...], element: Element, shape: str | None = None) -> None:
        shape = shape or SHAPES[(element.shape or element.small) - 1]
        draw_shape(self.draw, shape, [edge * self.scale for edge in box], _rgb(self.rng, element.color - 1))
        self._label(
            lambda box: draw_shape(self.label_draw, shape, box, len(self.elements)), box, small=element.small > 0
        )
        self.elements.append(element)

    def _label(self, paint, box: Sequence[float], small: bool = False) -> None:
        """Paints into the labels, in the padded square. A small thing is marked where a patch's middle will see it."""
        offset_x = (self.view - self.width / self.scale) / 2
        offset_y = (self.view - self.height / self.scale) / 2
        left, top, right, bottom = box[0] + offset_x, box[1] + offset_y, box[2] + offset_x, box[3] + offset_y
        if small:
            column, row = int((left + right) / 2 // PATCH), int((top + bottom) / 2 // PATCH)
            half = PATCH // 2
            self.label_draw.rectangle(
                [column * half, row * half, column * half + half - 1, row * half + half - 1], len(self.elements)
            )
            return
        paint([left / 2, top / 2, right / 2, bottom / 2])

    def _place(self, width: float, height: float, margin: float = 6) -> tuple[float, float, float, float]:
        """A free box of this size; where none is found, one that lies over others."""
        room_x, room_y = self.width / self.scale, self.height / self.scale
        for _ in range(60):
            left, top = self.rng.uniform(2, room_x - width - 2), self.rng.uniform(2, room_y - height - 2)
            box = (left, top, left + width, top + height)
            if all(
                box[2] + margin < other[0] or other[2] + margin < box[0] or box[3] + margin < other[1] or other[3] + margin < box[1]
                for other in self.taken
            ):  # fmt: skip
                break
        self.taken.append(box)
        return box

    def _color(self) -> int:
        """One that stands out from the background."""
        hidden = ("black", "blue", "brown", "teal", "purple") if self.dark else ("yellow",)
        return self.rng.choice([index for index, name in enumerate(COLORS) if name not in hidden])


def _rgb(rng: random.Random, color: int) -> tuple[int, ...]:
    """A palette colour, a little different every time."""
    return tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in list(COLORS.values())[color])


@lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _patch_labels(labels: Image.Image, elements: list[Element]) -> np.ndarray:
    """(rows, columns, 5): what lies at the middle of every patch."""
    half = PATCH // 2
    indices = np.asarray(labels)[half // 2 :: half, half // 2 :: half]
    table = np.array([[getattr(element, name) for name, _ in LABELS] for element in elements], np.int64)
    return table[indices]
