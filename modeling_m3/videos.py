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
"""Frames of videos: which of them are taken, and how they are read, one after the other, from files and from memory.

A file is first read through without decoding, for the times of its frames, so that indices are exact for containers that do
not tell how many frames they have, and for frames of uneven lengths; then only what leads to a wanted frame is decoded.
transformers' own `load_video` holds all frames in memory, trusts the container's count and ignores rotation.
"""

import io
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from .pictures import open_pictures
from .visual_tokens import check_choice


NUM_FRAMES = 6  # paper section 4.3
ALL_FRAMES = "all"
WHEN_SHORT = ("fewer", "repeat", "error")

# What is read, by the names of FFmpeg's demuxers: others, as playlists, may open further files and addresses.
FORMATS = "mov,matroska,gif,avi"
MOST_FRAMES = 2**20  # that are taken at a rate: where callers may choose it, one must not take all memory there is
URL_SECONDS = 30  # without a byte of an answer
TIME_ERROR = 1e-6  # seconds by which times that were computed may be off
NEAR_FRAMES = 24  # so many frames are decoded in passing: to seek costs about as much


class Frames:
    """Frames that were taken from a video; they are decoded when they are iterated over, one at a time, as often as asked.

    Attributes:
        indices: of every frame among all of the video's.
        timestamps: when each is shown, in seconds after the video's first; None for pictures without a rate.
    """

    def __init__(self, source: Any, indices: list[int], timestamps: list[float] | None):
        self._source, self.indices, self.timestamps = source, indices, timestamps

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Image.Image]:
        """The frames as pictures, upright; of files in RGB."""
        return (Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame for frame in self.decoded())

    def decoded(self) -> Iterator[Image.Image | np.ndarray]:
        """The same, but those of files as arrays, (height, width, 3): a picture of each would be one more copy."""
        return self._source.frames(self.indices)


def sample_video(
    video: Any,
    num_frames: int | str | None = None,
    fps: float | None = None,
    video_start: float | None = None,
    video_end: float | None = None,
    when_short: str = "fewer",
    video_fps: float | None = None,
) -> Frames:
    """Takes frames of a video.

    Args:
        video: a path, a URL, the bytes of a file or a file that was opened as binary; a list of pictures; an array or a
            tensor of bytes, (frames, height, width, channels) or (frames, channels, height, width).
        num_frames: how many, evenly spaced as by the original: every floor(N / n)-th of N frames, from the first on. "all"
            takes all; 6 by default (paper section 4.3).
        fps: in place of `num_frames`, how many a second: the frames that are shown at 0, 1 / fps, 2 / fps, ... seconds.
        video_start, video_end: seconds after the first frame: only frames shown from one to the other are sampled.
        when_short: what happens where there are fewer frames than `num_frames`: "fewer" takes them all, "repeat" shows some
            again so that there are as many, "error" raises.
        video_fps: frames a second of pictures and arrays, which do not know.

    Raises:
        ValueError: for what is no video, or broken, and for options that do not fit it.
        ImportError: for a file where PyAV is not installed.
    """
    if isinstance(video, Frames):
        return Frames(video._source, video.indices, video.timestamps)  # two places in a prompt may show the same
    check_choice("when_short", when_short, WHEN_SHORT)
    if num_frames is not None and fps is not None:
        raise ValueError(f"num_frames={num_frames!r} and fps={fps!r}: give one of them.")
    is_count = type(num_frames) is int and num_frames > 0
    if num_frames is not None and num_frames != ALL_FRAMES and not is_count:
        raise ValueError(f'num_frames={num_frames!r} must be a whole number from 1, or "all".')
    for name, value in (("fps", fps), ("video_fps", video_fps)):
        if value is not None and not (type(value) in (int, float) and 0 < value < float("inf")):
            raise ValueError(f"{name}={value!r} must be a number of frames a second.")
    source = _open(video, video_fps)
    among = _shown_between(source, video_start, video_end)
    if fps is not None:
        indices = _at_rate(source, among, fps, video_start or 0.0, video_end)
    else:
        indices = [among[index] for index in frame_indices(len(among), num_frames or NUM_FRAMES, when_short)]
    return Frames(source, indices, source.times and [source.times[index] for index in indices])


def frame_indices(total: int, num_frames: int | str, when_short: str = "fewer") -> list[int]:
    """Which of `total` frames are taken: the first, and every floor(total / num_frames)-th after it.

    Source: `FpsExtractor` in IG-VLM, which the authors use, and which fails on videos with fewer frames than `num_frames`;
    here `when_short` says what happens then.
    """
    if num_frames == ALL_FRAMES:
        return list(range(total))
    if num_frames <= total:
        return [index * (total // num_frames) for index in range(num_frames)]
    if when_short == "error":
        raise ValueError(
            f"num_frames={num_frames}: there are only {total} frames. Ask for fewer, or say what happens by "
            'when_short="fewer" or "repeat".'
        )
    return [index * total // num_frames for index in range(num_frames)] if when_short == "repeat" else [*range(total)]


def _shown_between(source: Any, start: float | None, end: float | None) -> range:
    """The frames from the one shown at `start` to the one shown at `end`, as the original's `ts`."""
    if start is None and end is None:
        return range(source.total)
    times = _times_of(source, "video_start and video_end")
    first, last = start or 0.0, source.duration if end is None else end
    if not 0 <= first < source.duration or not first <= last:
        raise ValueError(
            f"video_start={start} and video_end={end}: the video lasts {source.duration:.3f} seconds. Give a part of it."
        )
    return range(_shown_at(times, first), _shown_at(times, last) + 1)


def _at_rate(source: Any, among: range, fps: float, start: float, end: float | None) -> list[int]:
    times = _times_of(source, "fps")
    last = source.duration if end is None else min(end, source.duration)
    count = max(1, int((last - start) * fps - TIME_ERROR) + 1)
    if count > MOST_FRAMES:
        raise ValueError(f"fps={fps} is {count} frames of {last - start:.1f} seconds: at most {MOST_FRAMES} are taken.")
    return [min(_shown_at(times, start + index / fps), among[-1]) for index in range(count)]


def _shown_at(times: Sequence[float], moment: float) -> int:
    return max(0, bisect_right(times, moment + TIME_ERROR) - 1)


def _times_of(source: Any, name: str) -> list[float]:
    if source.times is None:
        raise ValueError(f"{name}: pictures and arrays have no times. Give their rate too: video_fps=...")
    return source.times


def _open(video: Any, video_fps: float | None) -> Any:
    if isinstance(video, str) and video.startswith(("http://", "https://")):
        return _File(_download(video), video)
    if isinstance(video, (str, os.PathLike)):
        if not os.path.isfile(video):
            raise ValueError(f"There is no video at {os.fspath(video)}.")
        return _File(os.path.abspath(video), os.fspath(video))
    if isinstance(video, (bytes, bytearray, memoryview)):
        return _File(io.BytesIO(video), f"What these {len(video)} bytes hold")
    if hasattr(video, "read") and hasattr(video, "seek") and not isinstance(video, io.TextIOBase):
        return _File(video, getattr(video, "name", None) or "What this file holds")
    return _Pictures(video, video_fps)


class _Pictures:
    """Frames that are in memory: pictures, or one array of them."""

    def __init__(self, video: Any, video_fps: float | None):
        is_array = isinstance(video, (np.ndarray, torch.Tensor))
        if not is_array and not isinstance(video, (list, tuple)):
            raise ValueError(
                f"{str(video)[:100]!r} of type {type(video).__name__} is no video: give a path, a URL, the bytes of a file, a "
                "list of pictures or an array of (frames, height, width, channels)."
            )
        if is_array and video.ndim != 4:
            raise ValueError(f"A video of the shape {tuple(video.shape)}: give (frames, height, width, channels).")
        if len(video) == 0:
            raise ValueError("A video without frames: give at least one.")
        self._pictures = [_picture(frame, number) for number, frame in enumerate(video)] if not is_array else video
        if is_array:
            _picture(video[0], 0)  # of their shape and type all are
        self.total = len(video)
        self.times = video_fps and [index / video_fps for index in range(self.total)]
        self.duration = video_fps and self.total / video_fps

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        return (_picture(self._pictures[index], index) for index in indices)


def _picture(frame: Any, number: int) -> Image.Image:
    if isinstance(frame, Image.Image):
        return open_pictures(frame)
    if not isinstance(frame, (np.ndarray, torch.Tensor)):
        raise ValueError(f"Frame {number} of a list is a {type(frame).__name__}: give pictures or arrays.")
    array = frame.detach().cpu().numpy() if isinstance(frame, torch.Tensor) else frame
    is_bytes = array.dtype == np.uint8
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if not is_bytes or array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"Frame {number} is an array of the shape {tuple(frame.shape)} and {frame.dtype}: give (height, width, channels) "
            "of whole numbers from 0 to 255, as uint8, in 1, 3 or 4 channels."
        )
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


class _File:
    """The first video stream of a file.

    Attributes:
        total: number of frames.
        times: of every frame, in seconds after the first.
        duration: in seconds, the last frame's included.
    """

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name
        with self._container() as (container, stream):
            entries, length = [], 0
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    entries.append((packet.pts, packet.is_keyframe))
                    length = packet.duration or length
            expected, base = stream.frames, float(stream.time_base)
            end = _seconds(stream.metadata.get("DURATION"))
            if not entries:
                raise self._error("has no frames")
            if None in [pts for pts, _ in entries]:  # rare, and then nothing is known but their order
                self._pts, self._keys, rate = None, [], float(stream.average_rate or 25)
                self.total = sum(1 for _ in self._decoded(container, stream))
                self.times, self.duration = [i / rate for i in range(self.total)], self.total / rate
                return
        self._pts = sorted(pts for pts, _ in entries)
        self._keys = sorted(pts for pts, is_key in entries if is_key)
        self.total = len(entries)
        self.times = [(pts - self._pts[0]) * base for pts in self._pts]
        self.duration = self.times[-1] + length * base
        known = self._pts[0] * base + self.duration
        if expected > len(entries) or (end is not None and known < end - max(1.0, 2 * length * base)):
            whole = f"{expected} frames" if expected > len(entries) else f"{end:.1f} seconds"
            raise self._error(f"is cut off: it has {len(entries)} frames, {known:.1f} seconds, of {whole}")

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of these indices, which ascend and may repeat."""
        wanted = iter(indices)
        index = next(wanted, None)
        for number, frame in self._from_file(sorted(set(indices))):
            if frame.is_corrupt:
                raise self._error(f"is broken at frame {number}")
            picture = _upright(frame)
            while index == number:
                yield picture
                index = next(wanted, None)
        if index is not None:
            raise self._error(f"is broken: frame {index} cannot be decoded")

    def _from_file(self, indices: list[int]) -> Iterator[tuple[int, Any]]:
        with self._container() as (container, stream):
            if self._pts is None:
                yield from _of(enumerate(self._decoded(container, stream)), indices)
                return
            decoded, at = self._decoded(container, stream), 0
            for index in indices:
                target = self._pts[index]
                key = self._keys[max(0, bisect_right(self._keys, target) - 1)] if self._keys else self._pts[0]
                if bisect_right(self._pts, key) - at > NEAR_FRAMES:
                    container.seek(key, stream=stream)
                    decoded = self._decoded(container, stream)
                frame = next((frame for frame in decoded if frame.pts is not None and frame.pts >= target), None)
                if frame is None or frame.pts != target:
                    break
                at = index
                yield index, frame
            else:
                return
            # Where seeking led past a frame, all are decoded from the first.
            container.seek(self._pts[0], stream=stream)
            yield from _of(enumerate(self._decoded(container, stream)), [later for later in indices if later >= index])

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        try:
            yield from container.decode(stream)
        except _av().error.FFmpegError as error:
            raise self._error(f"cannot be decoded: {error.strerror}") from error

    @contextmanager
    def _container(self) -> Iterator[tuple[Any, Any]]:
        av = _av()
        if not isinstance(self._file, str):
            self._file.seek(0)
        try:
            with av.open(self._file, options={"format_whitelist": FORMATS}) as container:
                streams = [stream for stream in container.streams.video if not _is_cover(av, stream)]
                if not streams:
                    sounds = " but sound" if container.streams.audio else ""
                    raise self._error(f"has no moving pictures{sounds}")
                yield container, streams[0]
        except (av.error.FFmpegError, OSError) as error:
            raise self._error(
                f"is no video that can be read ({error.strerror}). Known are {FORMATS}, by the names of FFmpeg; check that the "
                "file is complete"
            ) from error

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self._name} {what}.")


def _of(frames: Iterator[tuple[int, Any]], indices: list[int]) -> Iterator[tuple[int, Any]]:
    """Those of these indices, until the last."""
    wanted = set(indices)
    for number, frame in frames:
        if number in wanted:
            yield number, frame
        if number >= indices[-1]:
            return


def _upright(frame: Any) -> np.ndarray:
    """The frame as it is meant to be seen: cameras that are held upright store how to turn it."""
    array = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counterclockwise
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array


def _is_cover(av: Any, stream: Any) -> bool:
    """Whether a stream is a picture beside sound, as the cover of an album."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _seconds(text: str | None) -> float | None:
    """Of a duration as Matroska has it, "00:00:01.600000000"."""
    try:
        hours, minutes, seconds = map(float, (text or "").split(":"))
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            'To read video files, PyAV is needed: pip install av, or ".[video]" in a clone. Lists of pictures and arrays '
            "need nothing."
        ) from error
    return av


def _download(url: str) -> Any:
    """What an address answers, as a file that is gone once it is closed."""
    file = tempfile.TemporaryFile()
    try:
        with urllib.request.urlopen(url, timeout=URL_SECONDS) as answer:
            shutil.copyfileobj(answer, file)
    except (urllib.error.URLError, OSError, ValueError) as error:
        file.close()
        raise ValueError(f"Cannot load {url}: {getattr(error, 'reason', error)}.") from error
    return file
