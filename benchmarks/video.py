"""What it takes to decode and prepare a video, and to encode its frames: `python -m benchmarks.video`.

Reads the same frames of the same file by this processor and by transformers' video processor of LLaVA-NeXT-Video, which needs
torchvision; and encodes frames in parts and in one batch.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import torch
import typer
from transformers.utils import is_torchvision_available
from transformers.video_utils import load_video

import modeling_m3
from modeling_m3.videos import frame_indices, sample_video

from .measure import in_turn, markdown_table, save, spread


FRAMES = (6, 32, 128)
THEIRS = "LLaVA-NeXT-Video's processor"


def write_clip(path: Path, seconds: int, height: int, rate: int = 30) -> None:
    """A clip in which something moves before noise, by H.264 with FFmpeg's own settings."""
    ground = np.random.default_rng(0).integers(0, 256, (height, height * 16 // 9, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *ground.shape[:2], "yuv420p"
        for index in range(seconds * rate):
            frame = np.roll(ground, index, axis=1)
            frame[height // 4 : height // 2, index : index + height // 4] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def measure_reading(path: Path, processor: Any, num_frames: int, repeats: int) -> dict[str, list[float]]:
    def ours() -> Any:
        return list(processor.stream_video(path, num_frames=num_frames))

    runs: dict[str, Callable] = {
        "ours": ours,
        "ours, decoding alone": lambda: list(sample_video(path, num_frames=num_frames).decoded()),
    }
    if is_torchvision_available():
        from transformers import LlavaNextVideoVideoProcessor

        size = processor.image_processor.crop_size["height"]
        theirs = LlavaNextVideoVideoProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

        def load() -> Any:
            return load_video(
                str(path),
                backend="pyav",
                sample_indices_fn=lambda metadata, **_: np.array(frame_indices(metadata.total_num_frames, num_frames)),
            )[0]

        runs[THEIRS] = lambda: theirs(load(), do_sample_frames=False, return_tensors="pt")
        runs[f"{THEIRS}, decoding alone"] = load
    return in_turn(runs, repeats)


@torch.no_grad()
def measure_encoding(model: Any, num_frames: int, repeats: int) -> dict[str, list[float]]:
    size = model.config.vision_config.image_size
    pixels = torch.randn(num_frames, 3, size, size, device=model.device, dtype=model.dtype)
    ways = {f"{n} at once": n for n in (8, 16, 32, 64) if n < num_frames} | {"in one batch": num_frames}
    runs = {way: lambda n=n: model.encode_video(pixels, frames_at_once=n) for way, n in ways.items()}
    return in_turn(runs, repeats)


def table(result: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    reading, encoding = result["reading"], result["encoding"]
    ways = list(next(iter(reading.values())))
    rows = [[frames, *(spread(times[way], 3) for way in ways)] for frames, times in reading.items()]
    text = (
        f"Seconds to decode and prepare frames of {result['seconds']} s at {result['height']} lines, H.264, "
        f"by {result['backend']}; medians of {result['repeats']}, least to most.\n\n"
        + markdown_table(["frames", *ways], rows)
    )
    if THEIRS in ways:
        ratios = [
            f"{statistics.median(times['ours']) / statistics.median(times[THEIRS]):.2f}x for {frames} frames"
            for frames, times in reading.items()
        ]
        text += f"\n\nOurs takes {', '.join(ratios)} of theirs (at most 1)."
    rows = [[way, spread(times, 2)] for way, times in encoding.items()]
    header = [f"{result['encoded']} frames through the tower", "seconds"]
    return f"{text}\n\n{markdown_table(header, rows)}"


def main(
    checkpoint: Annotated[str, typer.Option(help="A folder, or an id on the Hub.")] = "modeling_m3/m3_tiny",
    seconds: Annotated[int, typer.Option(min=5, help="Of the clip.")] = 20,
    height: Annotated[int, typer.Option(min=16, help="Of the clip, in pixels.")] = 720,
    encode: Annotated[int, typer.Option(min=1, help="Frames that are encoded.")] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
) -> None:
    """Measures what it takes to read a video and to encode its frames."""
    model, processor = modeling_m3.load(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, seconds, height)
        reading = {str(n): measure_reading(clip, processor, n, repeats) for n in FRAMES}
    result = {
        "checkpoint": Path(checkpoint).name,
        "backend": "torchvision" if is_torchvision_available() else "PIL",
        "seconds": seconds,
        "height": height,
        "repeats": repeats,
        "reading": reading,
        "encoded": encode,
        "encoding": measure_encoding(model.eval(), encode, repeats),
    }
    print(table(result))
    save(result, output)


if __name__ == "__main__":
    typer.run(main)
