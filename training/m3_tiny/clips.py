"""Generated video clips with questions: some need many frames, some need detail in one of them.

A clip lasts 12 seconds and shows few distinct pictures, each for many frames: so a frozen vision tower sees a clip in the time
of two or three pictures. As in `scenes.py`, everything about a clip follows from its seed, and tests have other seeds and
another font.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import torch
from PIL import Image, ImageDraw

from m3_conversion.json_files import write_json_lines
from modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaProcessor
from modeling_m3.outputs_m3 import M3LlavaEncodedImages
from modeling_m3.visual_tokens import ImageLayout

from .scenes import COLORS, SHAPES, TEST_FONTS, TRAIN_FONTS, Code, Painter, Question, draw_shape, rgb


FRAMES_PER_SECOND = 12
SECONDS = 12
FRAMES = FRAMES_PER_SECOND * SECONDS
IN_TIME = ("blinks", "first", "when")  # kinds of questions that need many frames
KINDS = (*IN_TIME, "code", "shape", "color")

# How long the large shape is gone when it blinks, and how long it is there at least before and after.
BLINK_FRAMES = 4
BETWEEN_BLINKS = 6
MOST_BLINKS = 5
# Shapes appear in the middle of a second, never at its edge, where nobody could tell which one it is.
APPEAR_IN_SECOND = (3, 8)
MOST_SECONDS_BETWEEN = 2  # from the first shape to the second: too short for few frames to see which was first

# A step has one of these totals, for which its rows have about the same length. The smaller ones are learned from faster.
SHARES = {36: 0.45, 144: 0.45, 576: 0.1}
# (frames, visual tokens of each), by what they cost together: those that most is to be learned from are there several times.
TRAINED = {
    36: ((1, 36), (4, 9), (1, 9), (16, 1), *4 * ((36, 1),)),
    144: (*2 * ((1, 144),), (4, 36), *2 * ((16, 9),), (64, 1), *4 * ((144, 1),)),
    576: ((1, 576), (4, 144), (16, 36), (64, 9), (64, 9)),
}

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
    """The clip of this seed: its large shape blinks, or a shape appears, or two of them appear, one after the other.

    Args:
        seed: decides everything; two seeds of different text are independent.
        fonts: names of matplotlib's font files to choose from.
        take: another take shows the same pictures at other times, so that what was seen of them can be used again.
    """
    stage = _stage(seed, tuple(fonts))
    rng = random.Random(f"m3-tiny clip {seed} take {take}")
    order, questions = {"blinks": _blinks, "when": _appearance, "first": _two_appearances}[stage.story](stage, rng)
    questions.append(Question("code", rng.choice(("What does the code say?", "Read the code.")), stage.code))
    if stage.story == "blinks":  # only there is a shape from the start
        [(shape, color)] = stage.things
        questions += [
            Question("shape", "What is the large shape?", shape),
            Question("color", "What color is the large shape?", color),
        ]
    return Clip(stage.pictures, order, questions)


def training_pairs(rng: random.Random) -> tuple[tuple[int, int], ...]:
    """(frames, tokens) to choose from for the rows of one step: of one total, so that they are about as long."""
    [total] = rng.choices(list(SHARES), list(SHARES.values()))
    return TRAINED[total]


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
            lines.append(line)
    file = folder / "clips.jsonl"
    write_json_lines(file, lines)
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


@torch.no_grad()
def see(
    model: M3LlavaForConditionalGeneration, processor: M3LlavaProcessor, pictures: list[Image.Image]
) -> torch.Tensor:
    """(pictures, 576, d): what vision tower and projector make of them."""
    pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    return model.encode_images(pixel_values.to(model.device, model.dtype)).tile_features


def visual_tokens(
    model: M3LlavaForConditionalGeneration,
    seen: torch.Tensor,
    shown: Sequence[torch.Tensor],
    tokens: Sequence[int],
) -> list[torch.Tensor]:
    """(frames * tokens, d) for every row: as if each frame were an image, but every distinct picture is pooled once.

    Args:
        seen: (pictures, 576, d), of `see`.
        shown: (frames,), which of the pictures the row's frames show.
        tokens: of each frame, by row.
    """
    layouts = [ImageLayout(None, None, "flat")] * len(seen)
    encoded = M3LlavaEncodedImages(tile_features=seen.to(model.dtype), layouts=layouts)
    pooled = {scale: torch.stack(model.get_visual_tokens(encoded, scale)) for scale in set(tokens)}
    return [pooled[scale][pictures].flatten(0, 1) for pictures, scale in zip(shown, tokens)]


@dataclass(frozen=True)
class _Stage:
    """What a seed decides for all takes.

    Attributes:
        story: the kind of the question that needs many frames.
        things: (shape, color) of each, in the order in which they appear.
        code: what is written there all the time.
        pictures: without any of them, with the first, and with both.
    """

    story: str
    things: list[tuple[str, str]]
    code: str
    pictures: list[Image.Image]


@lru_cache(maxsize=64)
def _stage(seed: int | str, fonts: tuple[str, ...]) -> _Stage:
    rng = random.Random(f"m3-tiny clip {seed}")
    story = rng.choice(IN_TIME)
    number = 2 if story == "first" else 1
    while True:
        painter = Painter(rng, _VIEW, fonts)
        text = Code(painter.random_code(), rng, fonts, rng.uniform(16, 30), painter.scale)
        boxes = [painter.place(edge, edge) for edge in (rng.uniform(0.28, 0.42) * _VIEW for _ in range(number))]
        code_box = painter.place(text.width, text.height)
        # A video's sides are even, as those of unscaled canvases are, and nothing may hide behind what appears.
        if painter.scale == 1 and _are_apart(painter.taken):
            break
    painter.write(text, *code_box[:2])
    shapes, colors = rng.sample(SHAPES, number), [painter.color()]
    while len(colors) < number:
        color = painter.color()
        colors += [color] if color not in colors else []
    pictures = [painter.picture]
    for shape, color, box in zip(shapes, colors, boxes):
        picture = pictures[-1].copy()
        draw_shape(ImageDraw.Draw(picture), shape, box, rgb(rng, color))
        pictures.append(picture)
    return _Stage(story, [(shape, list(COLORS)[color]) for shape, color in zip(shapes, colors)], text.code, pictures)


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
    order = [1] * FRAMES
    for number, cut in enumerate(cuts):
        start = BETWEEN_BLINKS + cut + number * (BLINK_FRAMES + BETWEEN_BLINKS)
        order[start : start + BLINK_FRAMES] = [0] * BLINK_FRAMES
    [(shape, _)] = stage.things
    return order, [Question("blinks", f"How often does the {shape} vanish?", str(count))]


def _appearance(stage: _Stage, rng: random.Random) -> tuple[list[int], list[Question]]:
    second = rng.randrange(SECONDS)
    [(shape, _)] = stage.things
    return _order(rng, second), [Question("when", f"At which second does the {shape} appear?", str(second))]


def _two_appearances(stage: _Stage, rng: random.Random) -> tuple[list[int], list[Question]]:
    earlier = rng.randrange(SECONDS - 1)
    later = rng.randint(earlier + 1, min(SECONDS - 1, earlier + MOST_SECONDS_BETWEEN))
    names = [f"{color} {shape}" for shape, color in rng.sample(stage.things, 2)]
    question = Question("first", f"Which is there first, the {names[0]} or the {names[1]}?", stage.things[0][0])
    return _order(rng, earlier, later), [question]


def _order(rng: random.Random, *seconds: int) -> list[int]:
    """Which picture each frame shows if in each of these seconds one thing more appears."""
    starts = [second * FRAMES_PER_SECOND + rng.randint(*APPEAR_IN_SECOND) for second in seconds]
    return [sum(frame >= start for start in starts) for frame in range(FRAMES)]
