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
TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "cmb10",
    "cmr10",
    "cmtt10",
)
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


@dataclass
class Scene:
    """A picture, its questions, and what every patch shows.

    Attributes:
        picture: of any size and shape; its long edge is the view's.
        questions: about the picture, in a fixed order.
        labels: (view / 14, view / 14, 7) int64, one class of each of `LABELS` for every patch: the fields of `Element` at its
            middle, then the first to fourth character of a code, where the patch sees enough of it to tell.
    """

    picture: Image.Image
    questions: list[Question] = field(default_factory=list)
    labels: np.ndarray | None = None


# The dense labels: (name of the field, number of classes, none included).
LABELS = (
    ("shape", len(SHAPES) + 1),
    ("color", len(COLORS) + 1),
    ("small", len(SHAPES) + 2),  # small shapes, and dots
    *((f"character {slot + 1}", len(CHARACTERS) + 1) for slot in range(max(CODE_LENGTHS))),
)


def scene(seed: int | str, fonts: Sequence[str] = TRAIN_FONTS, view: int = 336) -> Scene:
    """The scene of this seed.

    Args:
        seed: decides everything; two seeds of different text are independent.
        fonts: names of matplotlib's font files to choose from.
        view: side of the square that the picture is padded to, a multiple of 14.
    """
    rng = random.Random(f"m3-tiny {seed}")
    return Painter(rng, view, fonts).paint()


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
    draw_shape(ImageDraw.Draw(picture), SHAPES[shape], (left, top, left + width, top + height), rgb(rng, color))
    box = [edge * labels.width / side for edge in (left, top, left + width, top + height)]
    draw_shape(ImageDraw.Draw(labels), SHAPES[shape], box, 1)
    return Scene(picture, labels=_patch_labels(labels, [Element(), Element(shape=shape + 1, color=color + 1)]))


def text_scene(seed: int | str, view: int = 336) -> Scene:
    """As many codes as fit, without questions: many characters for the vision tower to learn from."""
    painter = Painter(random.Random(f"m3-tiny text {seed}"), view, TRAIN_FONTS)
    painter.fill_with_codes()
    return Scene(painter.picture, labels=_patch_labels(painter.labels, painter.elements, painter.characters))


def repeated_code_scene(seed: int | str, view: int = 336) -> Scene:
    """One code all over the picture, to be read: where every patch knows a part of it, reading is learned in no time."""
    painter = Painter(random.Random(f"m3-tiny repeated code {seed}"), view, TRAIN_FONTS)
    code = painter.random_code()
    painter.fill_with_codes(code)
    return Scene(painter.picture, [painter.code_question(code)])


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


class Code:
    """A code and how wide it is in a random font."""

    def __init__(self, code: str, rng: random.Random, fonts: Sequence[str], size: float, scale: float):
        self.code = code
        self.font = _font(rng.choice(fonts), max(8, round(size * scale)))
        spacing = rng.uniform(0.0, 0.15) * size
        self.advances = [self.font.getlength(character) / scale + spacing for character in self.code]
        self.width, self.height = sum(self.advances), 0.75 * size


class Painter:
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
        self.characters = np.zeros((view // PATCH, view // PATCH, max(CODE_LENGTHS)), np.int64)
        self.taken: list[tuple[float, float, float, float]] = []

    def paint(self) -> Scene:
        rng = self.rng
        shape, color = rng.randrange(len(SHAPES)), self.color()
        edge = rng.uniform(0.2, 0.42) * self.view
        box = self.place(edge * rng.uniform(0.75, 1.3) if shape == 1 else edge, edge)
        self._shape(box, Element(shape=shape + 1, color=color + 1))

        text = Code(self.random_code(), rng, self.fonts, self._text_size(), self.scale)
        self.write(text, *self.place(text.width, text.height)[:2])
        other = rng.choice([name for index, name in enumerate(SHAPES) if index != shape])
        small, small_color = rng.randrange(1, len(SHAPES)), self.color()  # not a circle: dots are
        small_edge = rng.uniform(16, 26)
        small_box = self.place(small_edge, small_edge)
        self._shape(small_box, Element(small=small + 1, color=small_color + 1))

        dots, dot_color = rng.randint(0, MOST_DOTS), self.color()
        radius = rng.uniform(4, 7)
        for _ in range(dots):
            dot_box = self.place(2 * radius, 2 * radius, margin=8)
            self._shape(dot_box, Element(small=len(SHAPES) + 1, color=dot_color + 1), "circle")

        name, color_name = SHAPES[shape], list(COLORS)[color]
        asked = rng.choice((name, other))
        column = min(2, int(3 * (small_box[0] + small_box[2]) / 2 * self.scale / self.width))
        row = min(2, int(3 * (small_box[1] + small_box[3]) / 2 * self.scale / self.height))
        questions = [
            Question("shape", rng.choice(("What is the large shape?", "Which large shape is there?")), name),
            Question("color", rng.choice((f"What color is the large {name}?", "What color is the large shape?")), color_name),
            Question("presence", f"Is there a large {asked}?", "yes" if asked == name else "no"),
            self.code_question(text.code),
            Question("count", rng.choice(("How many dots are there?", "Count the dots.")), str(dots)),
            Question("place", f"Where is the small {SHAPES[small]}?", PLACES[row][column]),
            Question("small shape", rng.choice(("What is the small shape?", "Which small shape is there?")), SHAPES[small]),
        ]  # fmt: skip
        return Scene(self.picture, questions, _patch_labels(self.labels, self.elements, self.characters))

    def random_code(self) -> str:
        return "".join(self.rng.choice(CHARACTERS) for _ in range(self.rng.choice(CODE_LENGTHS)))

    def code_question(self, code: str) -> Question:
        return Question("code", self.rng.choice(("What does the code say?", "Read the code.")), code)

    def fill_with_codes(self, code: str | None = None) -> None:
        """Line after line of random codes, or of this one."""
        rng = self.rng
        room_x, room_y = self.width / self.scale, self.height / self.scale
        top = rng.uniform(2, 10)
        while True:
            size, left = self._text_size(), rng.uniform(2, 20)
            if top + 0.75 * size > room_y - 2:
                return
            while True:
                text = Code(code or self.random_code(), rng, self.fonts, size, self.scale)
                if left + text.width > room_x - 2:
                    break
                self.write(text, left, top)
                left += text.width + rng.uniform(0.7, 1.5) * size
            top += 0.75 * size + rng.uniform(5, 12)

    def _text_size(self) -> float:
        return self.rng.uniform(16, 30)

    def write(self, text: "Code", left: float, top: float) -> None:
        """Writes a code, character by character."""
        color = self.color()
        ink, bottom = rgb(self.rng, color), top + text.height
        for slot, (character, advance) in enumerate(zip(text.code, text.advances)):
            at = (left * self.scale, bottom * self.scale)
            self.draw.text(at, character, ink, text.font, anchor="ls")
            box = (left, top, left + advance, bottom)
            self._label(lambda box: self.label_draw.rectangle(box, len(self.elements)), box)
            self.elements.append(Element(color=color + 1))
            self._label_character(box, slot, CHARACTERS.index(character) + 1)
            left += advance

    def _shape(self, box: tuple[float, ...], element: Element, shape: str | None = None) -> None:
        shape = shape or SHAPES[(element.shape or element.small) - 1]
        draw_shape(self.draw, shape, [edge * self.scale for edge in box], rgb(self.rng, element.color - 1))
        self._label(
            lambda box: draw_shape(self.label_draw, shape, box, len(self.elements)), box, small=element.small > 0
        )
        self.elements.append(element)

    def _label(self, paint, box: Sequence[float], small: bool = False) -> None:
        """Paints into the labels. A small thing is marked where a patch's middle will see it."""
        left, top, right, bottom = self._in_square(box)
        if small:
            column, row = int((left + right) / 2 // PATCH), int((top + bottom) / 2 // PATCH)
            half = PATCH // 2
            self.label_draw.rectangle(
                [column * half, row * half, column * half + half - 1, row * half + half - 1], len(self.elements)
            )
            return
        paint([left / 2, top / 2, right / 2, bottom / 2])

    def _label_character(self, box: Sequence[float], slot: int, character: int) -> None:
        """Every patch that holds a fifth of a character is to know it, also where it holds parts of several."""
        left, top, right, bottom = self._in_square(box)
        edges = np.arange(self.view // PATCH) * PATCH
        across = np.clip(np.minimum(right, edges + PATCH) - np.maximum(left, edges), 0, None) / (right - left)
        down = np.clip(np.minimum(bottom, edges + PATCH) - np.maximum(top, edges), 0, None) / (bottom - top)
        self.characters[np.outer(down, across) >= 0.2, slot] = character

    def _in_square(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """The box in the padded square that the vision tower sees."""
        offset_x = (self.view - self.width / self.scale) / 2
        offset_y = (self.view - self.height / self.scale) / 2
        left, top, right, bottom = box
        return left + offset_x, top + offset_y, right + offset_x, bottom + offset_y

    def place(self, width: float, height: float, margin: float = 6) -> tuple[float, float, float, float]:
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

    def color(self) -> int:
        """One that stands out from the background."""
        hidden = ("black", "blue", "brown", "teal", "purple") if self.dark else ("yellow",)
        return self.rng.choice([index for index, name in enumerate(COLORS) if name not in hidden])


def rgb(rng: random.Random, color: int) -> tuple[int, ...]:
    """A palette colour, a little different every time."""
    return tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in list(COLORS.values())[color])


@lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _patch_labels(labels: Image.Image, elements: list[Element], characters: np.ndarray | None = None) -> np.ndarray:
    """(rows, columns, 7): what lies at the middle of every patch, and the `characters` in it, (rows, columns, 4)."""
    half = PATCH // 2
    indices = np.asarray(labels)[half // 2 :: half, half // 2 :: half]
    table = np.array([[element.shape, element.color, element.small] for element in elements], np.int64)
    if characters is None:
        characters = np.zeros((*indices.shape, max(CODE_LENGTHS)), np.int64)
    return np.concatenate([table[indices], characters], axis=-1)
