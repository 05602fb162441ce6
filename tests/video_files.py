"""Videos for the tests, written by PyAV; `python tests/video_files.py` draws the clip among the fixtures anew."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw


CLIP = Path(__file__).parent / "fixtures" / "clip.mp4"
MILLISECONDS = Fraction(1, 1000)


def moving_frames(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """(frames, height, width, 3): a bar that grows on a ground that changes, so that no two frames are alike."""
    frames = np.empty((count, height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[:] = index * 7 % 256
        frame[:, : 1 + index % width] = (255, index * 11 % 256, 0)
    return frames


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = 25,
    times: Sequence[int] | None = None,
) -> Path:
    """A file of these frames, (height, width, 3) each; `times` in milliseconds in place of a rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if times is not None:
            stream.time_base = stream.codec_context.time_base = MILLISECONDS
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = times[index], MILLISECONDS
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def decoded(path: Path) -> list[np.ndarray]:
    """All frames of a file, by PyAV alone."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turned(source: Path, path: Path) -> Path:
    """The same MP4 with a matrix that says: turn it clockwise by a quarter, as a camera that is held upright writes it."""
    data = bytearray(source.read_bytes())
    start = (
        data.index(b"tkhd") + 4 + 4 + 5 * 4 + 8 + 4 * 2
    )  # version and flags, five numbers, reserved, layer to volume
    matrix = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    data[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
    return path


def draw_clip() -> None:
    """Four seconds: a blue circle, and after two of them a red star beside it."""
    frames = []
    for index in range(48):
        picture = Image.new("RGB", (224, 168), (225, 225, 225))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((20, 50, 90, 120), fill=(0, 0, 255))
        if index >= 24:
            angles = np.arange(10) * np.pi / 5 - np.pi / 2
            radii = np.where(np.arange(10) % 2, 18, 42)
            draw.polygon([(160 + r * np.cos(a), 88 + r * np.sin(a)) for r, a in zip(radii, angles)], fill=(255, 0, 0))
        frames.append(np.array(picture))
    write_video(CLIP, frames, rate=12)


if __name__ == "__main__":
    draw_clip()
