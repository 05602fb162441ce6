"""Generated video clips with questions: some need many frames, some need detail in one of them.

A clip lasts 12 seconds and shows few distinct pictures, each for many frames: so a frozen vision tower sees a clip in the time
of two or three pictures. As in `scenes.py`, everything about a clip follows from its seed, and tests have other seeds and
another font.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
from PIL import Image, ImageDraw

from .scenes import COLORS, SHAPES, TEST_FONTS, TRAIN_FONTS, Question, _Code, _Painter, _rgb, draw_shape


FRAMES_PER_SECOND = 12
SECONDS = 12
FRAMES = FRAMES_PER_SECOND * SECONDS
KINDS = ("blinks", "first", "when", "code", "shape", "color")

# How long the large shape is gone when it blinks, and how long it is there at least before and after.
BLINK_FRAMES = 3
BETWEEN_BLINKS = 6
MOST_BLINKS = 5
# Shapes appear in the middle of a second, never at its edge, where nobody could tell which one it is.
APPEAR_IN_SECOND = (3, 8)
MOST_SECONDS_BETWEEN = 2  # from the first shape to the second: too short for few frames to see which was first

_VIEW = 336


@dataclass
class Clip:
    """A clip and its questions.

    Attributes:
        pictures: the distinct ones, all of one size.
        order: (144,), which of the pictures each frame shows.
        questions: about the clip, in a fixed order.
    """

    pictures: list[Image.Image]
    order: list[int]
    questions: list[Question]


def clip(seed: int | str, fonts: Sequence[str] = TRAIN_FONTS, take: int = 0) -> Clip:
    """The clip of this seed: either its large shape blinks, or two more shapes appear, one after the other.

    Args:
        seed: decides everything; two seeds of different text are independent.
        fonts: names of matplotlib's font files to choose from.
        take: another take shows the same pictures at other times, so that what was seen of them can be used again.
    """
    stage = _stage(seed, tuple(fonts))
    rng = random.Random(f"m3-tiny clip {seed} take {take}")
    order, questions = _blinks(stage, rng) if stage.blinks else _appearances(stage, rng)
    main = stage.things[0]
    questions += [
        Question("code", rng.choice(("What does the code say?", "Read the code.")), stage.code),
        Question("shape", "Which shape is there from the start?", main.shape),
        Question("color", "What color is the shape that is there from the start?", main.color),
    ]
    return Clip(stage.pictures, order, questions)


def frame_indices(count: int) -> list[int]:
    """Which frames are seen where `count` are: evenly spaced, the first included."""
    step = max(1, FRAMES // count)
    return [step * number for number in range(count)]


def frames_of(clip: Clip, indices: Iterable[int]) -> list[Image.Image]:
    """The pictures that these frames of the clip show."""
    return [clip.pictures[clip.order[index]] for index in indices]


def held_out_clips(count: int, fonts: Sequence[str] = TEST_FONTS) -> Iterable[Clip]:
    """Clips of seeds and, unless said otherwise, a font that training never sees."""
    return (clip(f"test {index}", fonts) for index in range(count))


def write_clips(folder: Path, count: int) -> Path:
    """The held-out clips as video files, and `clips.jsonl` with one line for each question; returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, made in enumerate(held_out_clips(count)):
        name = f"clip-{index:04}"
        write_video(made, folder / f"{name}.mp4")
        for number, question in enumerate(made.questions):
            line = {
                "id": f"{name}-{number}",
                "video": f"{name}.mp4",
                "question": question.text,
                "answer": question.answer,
                "kind": question.kind,
            }
            lines.append(json.dumps(line) + "\n")
    file = folder / "clips.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def write_video(clip: Clip, file: Path) -> None:
    """An mp4 of nearly the clip's own pixels, so that codes stay readable."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("h264", rate=FRAMES_PER_SECOND, options={"crf": "12", "preset": "veryfast"})
        stream.width, stream.height = clip.pictures[0].size
        stream.pix_fmt = "yuv420p"
        for picture in frames_of(clip, range(FRAMES)):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


@dataclass(frozen=True)
class _Thing:
    """A shape on the canvas, in what it is called."""

    shape: str
    color: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class _Stage:
    """What a seed decides for all takes.

    Attributes:
        blinks: whether the first thing blinks; else two other things appear.
        things: the one that is there from the start, then in the order in which they appear.
        pictures: with the thing and without it; or with the first of them, the first two, all three.
    """

    blinks: bool
    things: list[_Thing]
    code: str
    pictures: list[Image.Image]


@lru_cache(maxsize=64)
def _stage(seed: int | str, fonts: tuple[str, ...]) -> _Stage:
    rng = random.Random(f"m3-tiny clip {seed}")
    blinks = rng.random() < 0.5
    while True:
        painter = _Painter(rng, _VIEW, fonts)
        text = _Code(painter.random_code(), rng, fonts, rng.uniform(16, 30), painter.scale)
        edges = [rng.uniform(0.3, 0.42) * _VIEW, *(rng.uniform(0.22, 0.3) * _VIEW for _ in range(2))]
        boxes = [painter._place(edge, edge) for edge in edges]
        code_box = painter._place(text.width, text.height)
        # A video's sides are even, as those of unscaled canvases are, and nothing may hide behind what appears.
        if painter.scale == 1 and _are_apart(painter.taken):
            break
    painter._write(text, *code_box[:2])
    shapes, colors = rng.sample(SHAPES, 3), list[int]()
    while len(colors) < 3:
        color = painter._color()
        colors += [color] if color not in colors else []
    fills = [_rgb(rng, color) for color in colors]
    pictures = []
    for shown in (1, 0) if blinks else (1, 2, 3):
        picture = painter.picture.copy()
        for shape, box, fill in list(zip(shapes, boxes, fills))[:shown]:
            draw_shape(ImageDraw.Draw(picture), shape, box, fill)
        pictures.append(picture)
    things = [_Thing(shape, list(COLORS)[color]) for shape, color in zip(shapes, colors)]
    return _Stage(blinks, things, text.code, pictures)


def _are_apart(boxes: Sequence[tuple[float, float, float, float]]) -> bool:
    return not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for number, box in enumerate(boxes)
        for other in boxes[:number]
    )


def _blinks(stage: _Stage, rng: random.Random) -> tuple[list[int], list[Question]]:
    count = rng.randint(1, MOST_BLINKS)
    # Room that is left between blinks, cut at random: every way to place them is as likely.
    free = FRAMES - count * BLINK_FRAMES - (count + 1) * BETWEEN_BLINKS
    cuts = sorted(rng.randint(0, free) for _ in range(count))
    order = [0] * FRAMES
    for number, cut in enumerate(cuts):
        start = BETWEEN_BLINKS + cut + number * (BLINK_FRAMES + BETWEEN_BLINKS)
        order[start : start + BLINK_FRAMES] = [1] * BLINK_FRAMES
    return order, [Question("blinks", f"How often does the {stage.things[0].name} vanish?", str(count))]


def _appearances(stage: _Stage, rng: random.Random) -> tuple[list[int], list[Question]]:
    first = rng.randrange(SECONDS - 1)
    second = rng.randint(first + 1, min(SECONDS - 1, first + MOST_SECONDS_BETWEEN))
    starts = [at * FRAMES_PER_SECOND + rng.randint(*APPEAR_IN_SECOND) for at in (first, second)]
    order = [sum(frame >= start for start in starts) for frame in range(FRAMES)]
    _, earlier, later = stage.things
    asked = rng.sample((earlier, later), 2)
    return order, [
        Question("first", f"Which shape appears first, the {asked[0].name} or the {asked[1].name}?", earlier.shape),
        Question("when", f"At which second does the {earlier.name} appear?", str(first)),
        Question("when", f"At which second does the {later.name} appear?", str(second)),
    ]
