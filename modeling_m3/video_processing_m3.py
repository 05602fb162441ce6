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
"""How videos stand in a prompt: as frames with a budget each, or as one collage, and how pictures and videos share it.

A video becomes pictures before anything else sees it: its mark as many marks of pictures, its budget one number for each. So
counts are exact as those of pictures are, and neither a template nor a serving engine needs to know of videos.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import processing_utils
from transformers.image_utils import make_flat_list_of_images

from .chats import NUMBER, SAMPLING_OPTIONS, VIDEO_OPTIONS, ChatVideo
from .pictures import open_pictures
from .videos import Frames, sample_video
from .visual_tokens import ONE_VIEW, ImageLayout, as_plain, cat_tiles, check_choice


VIDEO_LAYOUTS = ("frames", "collage")
VIDEO_MARK = "<video>"  # no token: it is gone before prompts are tokenized
FRAMES_AT_ONCE = 32

# Source: the authors' `IG-VLM/eval_llava_multiplechoice.py`.
COLLAGE_SENTENCE = "The provided image arranges keyframes from a video in a grid view."


def share_visual_tokens(
    total: int, num_frames: int, scales: Sequence[int], count: Callable[[int], int] = int
) -> list[int]:
    """A number for each frame, so that all together cost at most `total` visual tokens.

    Each frame gets the largest scale that all can have; then, from the first frame on, each is raised by one scale as long as
    the total allows.

    Args:
        total: visual tokens of the whole video.
        num_frames: how many frames share them.
        scales: the numbers of visual tokens that there are.
        count: what a frame costs at a scale.

    Raises:
        ValueError: if it is less than the coarsest scale for every frame.
    """
    if type(total) is not int or total < 1:
        raise ValueError(f"total_visual_tokens={total!r} must be a whole number from 1.")
    scales = sorted(scales)
    fitting = [index for index, scale in enumerate(scales) if num_frames * count(scale) <= total]
    if not fitting:
        least = count(scales[0])
        raise ValueError(
            f"total_visual_tokens={total} is less than {num_frames} frames cost at {scales[0]} each, {num_frames * least}. Take "
            f"{f'at most {total // least} frames' if total >= least else 'more tokens'}, by num_frames or fps."
        )
    shared = [scales[fitting[-1]]] * num_frames
    left = total - num_frames * count(shared[0])
    if fitting[-1] + 1 < len(scales):
        finer = scales[fitting[-1] + 1]
        for index in range(min(num_frames, left // (count(finer) - count(shared[0])))):
            shared[index] = finer
    return shared


def collage(frames: Sequence[Image.Image]) -> Image.Image:
    """The authors' picture of a video: rows of round(sqrt(n)) frames in order, as small as the smallest, the rest white.

    Frames that are larger are resized bilinearly between the nearest pixels, as OpenCV does it, to within 1/255.
    Source: `GridViewCreator` in IG-VLM.
    """
    width, height = (min(frame.size[axis] for frame in frames) for axis in (0, 1))
    per_row = round(len(frames) ** 0.5)
    rows = -(-len(frames) // per_row)
    picture = Image.new("RGB", (per_row * width, rows * height), "white")
    for index, frame in enumerate(frames):
        picture.paste(_resized(frame, width, height), (index % per_row * width, index // per_row * height))
    return picture


def _resized(frame: Image.Image, width: int, height: int) -> Image.Image:
    frame = frame.convert("RGB")
    if frame.size == (width, height):
        return frame
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
    return Image.fromarray(resized[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def stand_in(what: Any) -> Image.Image:
    """A picture of one pixel in place of what is prepared later, or needs not to be: transformers passes it on as a picture."""
    picture = Image.new("L", (1, 1))
    picture.stands_for = what
    return picture


def decoded(pictures: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
    """The pictures that `lay_out_videos` returned for a prompt, with frames in place of their stand-ins; and which are frames."""
    for _, group in groupby(pictures, key=_frames_of):
        group = list(group)
        is_frame = getattr(group[0], "stands_for", None) is not None
        yield from ((picture, is_frame) for picture in (group[0].stands_for[0] if is_frame else group))


def _frames_of(picture: Any) -> int:
    return id(getattr(picture, "stands_for", (None,))[0])


@dataclass
class _Medium:
    """A picture or a video in a prompt, as the pictures that it becomes."""

    pictures: list[Image.Image]
    counts: list[Callable[[int], int]]  # what each of them costs at a scale
    is_video: bool = False
    is_collage: bool = False
    timestamps: list[float] | None = None
    numbers: Any = None  # of visual tokens, where it was told itself

    def text(self, mark: str) -> str:
        if self.is_collage:
            return f"{mark}\n{COLLAGE_SENTENCE}"
        if self.timestamps is not None:
            return "\n".join(f"{seconds:.1f}s: {mark}" for seconds in self.timestamps)
        return mark * len(self.pictures)


class VideoProcessingMixin:
    """Videos for a processor whose image processor, tokenizer and layouts are M3's."""

    def stream_video(self, video: Any, frames_at_once: int = FRAMES_AT_ONCE, **options: Any) -> "VideoPixels":
        """The pixels of a video's frames for `model.encode_video`, decoded and prepared a few at a time.

        Args:
            video: as in a call.
            frames_at_once: how many are in memory together.
            options: which frames are taken, as in a call: num_frames, fps, video_start, video_end, when_short, video_fps.
        """
        if type(frames_at_once) is not int or frames_at_once < 1:
            raise ValueError(f"frames_at_once={frames_at_once!r} must be a whole number from 1.")
        unknown = options.keys() - {*SAMPLING_OPTIONS}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: a stream takes {', '.join(SAMPLING_OPTIONS)} only.")
        return VideoPixels(self, sample_video(video, **options), frames_at_once)

    def lay_out_videos(
        self,
        images: Any,
        text: list[str] | None,
        videos: Any,
        kwargs: dict[str, Any],
        beside: list[Any] | None = None,
    ) -> tuple[Any, list[str] | None]:
        """Images and prompts with pictures in place of videos, as a call has them.

        Args:
            images, text, videos: as in a call, prompts in a list.
            kwargs: of a call. What says which frames are taken and how they stand is taken out of it, and one number of visual
                tokens for every picture put in.
            beside: the number beside each picture and video of the chats, None where there is none.

        Returns:
            A list of pictures for each prompt, and the prompts with one mark for each picture. A frame is a stand-in, which
            `decoded` replaces.
        """
        own = kwargs.pop("videos_kwargs", None) or {}
        asked = {name: given.pop(name) for given in (kwargs, own) for name in VIDEO_OPTIONS if name in given}
        for given in (kwargs, own):  # transformers', for frames that are to be chosen: ours are
            given.pop("do_sample_frames", None)
        asked = {name: as_plain(value) for name, value in asked.items() if value is not None}
        video_numbers = as_plain(own.pop("num_visual_tokens", None))
        if own:
            raise ValueError(f"videos_kwargs has {', '.join(sorted(own))}: it takes {', '.join(VIDEO_OPTIONS)}.")
        with_stand_ins = _with_stand_ins(images)
        if videos is None and with_stand_ins is images and beside is None:
            return images, text
        if images is not None:
            images = self.image_processor.fetch_images(open_pictures(with_stand_ins))

        prompts, found = text if text is not None else [None], []
        pattern = re.compile(
            f"{getattr(processing_utils, '_UNMARKED', '')}"
            f"(?:{re.escape(self.image_token)}{f'|{VIDEO_MARK}' if videos is not None else ''})"
        )
        queues = [_queues(*_images_of(images), len(prompts)), _queues(*videos_of(videos), len(prompts))]
        needed, pinpoints = [0, 0], {**kwargs, **kwargs.get("images_kwargs", {})}.get("image_grid_pinpoints")
        for number, prompt in enumerate(prompts):
            marks = [match.group() == VIDEO_MARK for match in pattern.finditer(prompt)] if prompt is not None else []
            if prompt is None:
                marks = [False] * len(queues[0][0]) + [True] * len(queues[1][0])
            needed = [needed[0] + marks.count(False), needed[1] + marks.count(True)]
            if any(marks.count(bool(kind)) > len(queues[kind][number]) for kind in (0, 1)):
                break
            found.append([self._medium(queues[kind][number].popleft(), kind, asked, pinpoints) for kind in marks])
        if len(found) < len(prompts) or any(queue for kind in queues for queue in kind):
            raise ValueError(
                f"The prompts need {needed[0]} image(s) and {needed[1]} video(s) or more, by their marks {self.image_token} and "
                f"{VIDEO_MARK}, which are not those given. Write one mark for each, and give each prompt its own."
            )
        media = [medium for group in found for medium in group]
        if beside is not None and len(beside) != len(media):
            raise ValueError(
                f"There are {len(media)} pictures and videos for {len(beside)} in the chat, of which some have their number of "
                "visual tokens beside them: give each its source."
            )
        for medium, number in zip(media, beside or []):
            medium.numbers = medium.numbers if number is None else number
        if not media:
            return None, text
        kinds = {isinstance(getattr(p, "stands_for", None), ImageLayout) for m in media for p in m.pictures}
        if len(kinds) > 1:
            raise ValueError("Some pictures or videos are encoded and some are not: encode all of them, or none.")
        given = kwargs.get("images_kwargs", {})
        holder = given if given.get("num_visual_tokens") is not None else kwargs
        total = asked.get("total_visual_tokens")
        if total is not None and holder.get("num_visual_tokens") is not None and all(m.is_video for m in media):
            raise ValueError(
                f"total_visual_tokens={total!r} and num_visual_tokens={holder['num_visual_tokens']!r}: give one of them."
            )
        holder["num_visual_tokens"] = self._numbers(media, as_plain(holder.get("num_visual_tokens")), video_numbers)
        if text is not None:
            text = [_filled(prompt, pattern, group, self.image_token) for prompt, group in zip(text, found)]
        return [[picture for medium in group for picture in medium.pictures] for group in found], text

    def _medium(self, given: Any, is_video: bool, asked: dict[str, Any], pinpoints: Any) -> _Medium:
        stand = getattr(given, "stands_for", None)
        if not is_video and stand is None:
            return _Medium([given], [int])  # what it costs is not asked
        video = stand if isinstance(stand, ChatVideo) else ChatVideo(given, {})
        own = {name: as_plain(value) for name, value in video.options.items() if value is not None}
        if NUMBER in own:  # it goes before what a call says of all
            asked = {name: value for name, value in asked.items() if name != "total_visual_tokens"}
        options = {**asked, **own}
        layout = options.pop("video_layout", "frames")
        check_choice("video_layout", layout, VIDEO_LAYOUTS)
        sampling = {name: options[name] for name in SAMPLING_OPTIONS if name in options}
        layouts, video = getattr(video.video, "layouts", None), video.video
        if layouts is None:
            video = sample_video(video, **sampling)
        if layout == "collage" and layouts is not None:
            raise ValueError('video_layout="collage": what is encoded already are frames. Encode the collage instead.')
        if layout == "collage":
            picture = collage(list(video))
            medium = _Medium([picture], [self._picture_layout(picture.size[::-1], pinpoints).count], True, True)
        elif layouts is not None:
            medium = _Medium([stand_in(one) for one in layouts], [one.count for one in layouts], True)
        else:
            layouts = [self._layout(None, None)] * len(video)
            medium = _Medium([stand_in((video, i)) for i in range(len(video))], [one.count for one in layouts], True)
        if options.get("add_timestamps") and layout == "frames":
            medium.timestamps = video.timestamps
            if medium.timestamps is None:
                raise ValueError(
                    "add_timestamps: pictures and arrays have no times. Give their rate too: video_fps=..."
                )
        total = options.get("total_visual_tokens")
        medium.numbers = options.get("num_visual_tokens")
        if total is not None and medium.numbers is not None:
            raise ValueError(
                f"total_visual_tokens={total!r} and num_visual_tokens={medium.numbers!r}: give one of them."
            )
        if total is not None:
            medium.numbers = share_visual_tokens(
                total, len(medium.pictures), self.visual_token_scales, medium.counts[0]
            )
        return medium

    def _numbers(self, media: list[_Medium], numbers: Any, video_numbers: Any) -> list[Any] | None:
        """One number of visual tokens for every picture, in reading order."""
        sizes = [len(medium.pictures) for medium in media]
        if isinstance(numbers, list) and len(numbers) == sum(sizes) and not any(isinstance(n, list) for n in numbers):
            rest = iter(numbers)
            each: list[Any] = [[next(rest) for _ in range(size)] for size in sizes]
        else:
            each = numbers if isinstance(numbers, list) else [numbers] * len(media)
        videos = [medium for medium in media if medium.is_video]
        if video_numbers is not None:
            of_videos = iter(self._numbers([_Medium(v.pictures, v.counts) for v in videos], video_numbers, None))
            for medium in videos:
                own = [next(of_videos) for _ in medium.pictures]
                medium.numbers = own if medium.numbers is None else medium.numbers
        fits, result = len(each) == len(media), []
        for medium, size, own in zip(media, sizes, each if fits else [None] * len(media)):
            chosen = own if medium.numbers is None else medium.numbers
            chosen = chosen if isinstance(chosen, list) else [chosen] * size
            if not fits or len(chosen) != size:
                wrong = numbers if not fits or medium.numbers is None else medium.numbers
                raise ValueError(
                    f"num_visual_tokens={wrong!r}: there are {len(media)} images and videos, which are {sizes} pictures. Pass one "
                    "number for all, or a list with one for each image and video, or for each picture, in reading order."
                )
            given = [number for number in (own if isinstance(own, list) else [own]) if number is not None]
            self._scales(given, len(given))  # also where another took its place
            default = self.num_visual_tokens if self.num_visual_tokens is not None else max(self.visual_token_scales)
            result += [default if number is None else number for number in chosen]
        return result

    def _prepare_pictures(self, pictures: Sequence[Any], prepare: Callable[..., Any], **kwargs: Any) -> dict[str, Any]:
        """What the image processor makes of pictures among which stand-ins are: frames are prepared a few at a time.

        A frame is seen as one view, whatever tiles pictures are cut into: it costs the number that was asked.
        """
        return_tensors = kwargs.pop("return_tensors", None)
        cuts_tiles = self._pinpoints(kwargs.get("image_grid_pinpoints")) is not None
        parts = []
        for _, group in groupby(pictures, key=_frames_of):
            group = list(group)
            if getattr(group[0], "stands_for", None) is None:
                parts.append(prepare(group, return_tensors="pt", **kwargs))
                continue
            for part in _prepared(group[0].stands_for[0], FRAMES_AT_ONCE, prepare, cuts_tiles, **kwargs):
                if cuts_tiles:
                    count = len(part["pixel_values"])
                    part["pixel_values"] = part["pixel_values"][:, None]
                    part["image_tile_grids"] = torch.tensor([ONE_VIEW] * count)
                    part["image_sizes"] = torch.tensor([part["pixel_values"].shape[-2:]] * count)  # of the view
                parts.append(part)
        names = parts[0].keys()
        joined = {name: cat_tiles([part[name] for part in parts]) for name in names}
        if return_tensors is None:
            joined["pixel_values"] = list(joined["pixel_values"])
        return joined


class VideoPixels:
    """The frames of a video as pixels, (frames, channels, height, width) at a time, each time it is iterated over.

    Attributes:
        timestamps: of all frames, in seconds; None where they are not known.
    """

    def __init__(self, processor: Any, frames: Frames, frames_at_once: int):
        self._processor, self._frames, self._frames_at_once = processor, frames, frames_at_once
        self.timestamps = frames.timestamps

    def __len__(self) -> int:
        return len(self._frames)

    def __iter__(self) -> Iterator[torch.Tensor]:
        prepare, cuts_tiles = self._processor.image_processor, self._processor._pinpoints() is not None
        for part in _prepared(self._frames, self._frames_at_once, prepare, cuts_tiles):
            yield part["pixel_values"]


def videos_of(videos: Any) -> tuple[list, bool]:
    """Videos as a list, from whatever form they were given in, and whether it is one of lists, one for every prompt."""
    if videos is None:
        return [], False
    if _is_video(videos):
        return [videos], False
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        return list(videos), False
    if isinstance(videos, (list, tuple)) and videos:
        if all(_is_video(video) for video in videos):
            return list(videos), False
        if all(video is None or isinstance(video, (list, tuple)) for video in videos):
            return [videos_of(video)[0] if video else [] for video in videos], True
    raise ValueError(
        f"videos={str(videos)[:100]!r} of type {type(videos).__name__} are no videos: give paths, URLs, lists of pictures or "
        "arrays of (frames, height, width, channels)."
    )


def _is_video(video: Any) -> bool:
    if isinstance(video, (np.ndarray, torch.Tensor)):
        return video.ndim == 4
    if isinstance(video, (list, tuple)):
        return len(video) > 0 and all(
            isinstance(frame, Image.Image) or (isinstance(frame, (np.ndarray, torch.Tensor)) and frame.ndim == 3)
            for frame in video
        )
    known = (str, bytes, bytearray, memoryview, Frames)
    return isinstance(video, known) or any(hasattr(video, name) for name in ("__fspath__", "read", "layouts"))


def _with_stand_ins(images: Any) -> Any:
    """The same images where there is no video of a chat among them."""
    if isinstance(images, ChatVideo):
        return stand_in(images)
    if not isinstance(images, (list, tuple)):
        return images
    changed = [_with_stand_ins(image) for image in images]
    return images if all(new is old for new, old in zip(changed, images)) else changed


def _images_of(images: Any) -> tuple[list, bool]:
    if images is None or isinstance(images, list) and not images:
        return [], False
    if isinstance(images, list) and all(isinstance(group, list) for group in images):
        return images, True
    return list(make_flat_list_of_images(images)), False


def _queues(media: list, is_nested: bool, prompts: int) -> list[deque]:
    """What is still to be placed, for each prompt; the same for all where it came as one list."""
    if not is_nested:
        return [deque(media)] * prompts
    if len(media) != prompts:
        raise ValueError(
            f"There are {len(media)} lists of images or videos for {prompts} prompt(s): give one for each."
        )
    return [deque(group) for group in media]


def _filled(prompt: str, pattern: re.Pattern, media: list[_Medium], mark: str) -> str:
    """The prompt with what each medium is in place of its mark."""
    parts, start = [], 0
    for match, medium in zip(pattern.finditer(prompt), media):
        parts += [prompt[start : match.start()], medium.text(mark)]
        start = match.end()
        if medium.is_collage and prompt[start : start + 1].strip() == "":
            # The sentence stands where the text begins: after the newline that follows the picture.
            parts.append(" " if start < len(prompt) else "")
            start += 1
        elif medium.is_collage:
            parts.append(" ")
    return "".join([*parts, prompt[start:]])


def _prepared(
    frames: Frames, size: int, prepare: Callable[..., Any], cuts_tiles: bool, **kwargs: Any
) -> Iterator[dict[str, Any]]:
    """What the image processor makes of frames, as one view each, `size` at a time."""
    one_view = {"image_grid_pinpoints": None} if cuts_tiles else {}
    remaining = frames.decoded()
    while some := list(islice(remaining, size)):
        layout = {"input_data_format": "channels_last"} if isinstance(some[0], np.ndarray) else {}
        yield prepare(some, return_tensors="pt", **{**kwargs, **one_view, **layout})
