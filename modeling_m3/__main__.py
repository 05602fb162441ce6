"""`m3-ask FILE "PROMPT"`: asks an M3 checkpoint about a picture or a video, at one number of visual tokens or at all of them.

Not part of a checkpoint: no file that travels with one imports this.
"""

import re
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from logging import Formatter, StreamHandler, getLogger
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import torch
import typer
from huggingface_hub.utils import httpx  # under whichever name this release has it
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer
from transformers.image_utils import load_image
from transformers.utils import logging

import modeling_m3
from modeling_m3.chats import SAMPLING_OPTIONS
from modeling_m3.compiling_m3 import SHORTEST_TEXT
from modeling_m3.pictures import open_pictures
from modeling_m3.processing_m3 import MAKES_TEXT_PLAIN
from modeling_m3.videos import sample_video
from modeling_m3.visual_tokens import AUTO, AUTO_NUMBER

from .any_checkpoint import M3Checkpoint, find
from .overlay import SeenPicture, see
from .questions import check_question


M3_TINY = (
    "this is m3-tiny, which was trained on drawn shapes, dots and short codes alone, and answers about photographs at random. "
    "Name another checkpoint by --model."
)

NOT_TRAINED = (
    "this checkpoint was trained at {} visual tokens alone, and answers worse with fewer. m3-train trains it for all numbers: "
    "docs/training.md."
)
NEVER_TRAINED = "this checkpoint's projector is new, and has learned nothing about pictures yet. m3-train trains it: docs/training.md."

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class _Answer(TextStreamer):
    """Prints an answer as it comes, or keeps it to itself, and notes when its first token came."""

    def __init__(self, processor: modeling_m3.M3LlavaProcessor, show: bool):
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.text, self.first_token_at = show, "", None

    def put(self, value: torch.Tensor) -> None:
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if not is_prompt and self.first_token_at is None:
            self.first_token_at = time.perf_counter()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if self.show:
            print(text, end="\n" if stream_end else "", flush=True)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"m3-hf {modeling_m3.__version__}")
        raise typer.Exit


@app.command()
def ask(
    image: Annotated[str, typer.Argument(metavar="FILE", help="A picture, or a video: a file, or a URL.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask about it.")],
    model: Annotated[
        str | None,
        typer.Option(help="An M3 or any LLaVA: a folder, or an id on the Hub. m3-tiny, a small one, by default."),
    ] = None,
    quantize: Annotated[
        Literal["nf4", "int8"] | None, typer.Option(help="The language model's layers in 4 or 8 bits, by bitsandbytes.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Of the weights; as stored by default.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of the Hub's repository that --model names.")
    ] = None,
    num_visual_tokens: Annotated[
        str | None,
        typer.Option(
            help="Visual tokens the picture may cost, per tile, or each frame of a video, or auto: as many as the question "
            "needs. The checkpoint's default if left out; for a video, as many altogether as one picture has at most."
        ),
    ] = None,
    total_visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens all frames of a video may cost together, in place of the other.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a video, evenly spaced. 6 if left out.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second, in place of --num-frames.")] = None,
    video_start: Annotated[float | None, typer.Option(help="Seconds from which on a video is shown.")] = None,
    video_end: Annotated[float | None, typer.Option(help="Seconds up to which a video is shown.")] = None,
    video_layout: Annotated[
        Literal["frames", "collage"], typer.Option(help="Every frame by itself, or all in one picture.")
    ] = "frames",
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Tell the model when each frame of a video is shown.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer at every scale of the checkpoint, and by auto.")
    ] = False,
    overlay: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.png",
            help="Write the picture as the model sees it, with a grid of its visual tokens; with --compare, at every scale.",
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile what comes before the first token; kept on disk, so that the next time is quick."
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer, in tokens, at most.")] = 256,
    device: Annotated[
        str | None, typer.Option(help="Where to run: cpu, cuda, ..., auto for all there are. The GPU if there is one.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not say what the checkpoint was trained on.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Answers a question about a picture or a video, at the number of visual tokens you choose."""
    if compare and (num_visual_tokens is not None or total_visual_tokens is not None):
        raise typer.BadParameter("--compare answers at every number of visual tokens: leave --num-visual-tokens out")
    if compiled and num_visual_tokens == AUTO:
        raise typer.BadParameter(
            "--compile is for a number of visual tokens: auto looks at several. Leave one of them out"
        )
    options = {"num_frames": num_frames, "fps": fps, "video_start": video_start, "video_end": video_end}
    options |= {"total_visual_tokens": total_visual_tokens, "add_timestamps": timestamps or None}
    options = {name: value for name, value in options.items() if value is not None}
    if video_layout != "frames":
        options["video_layout"] = video_layout
    if model is None and not quiet:
        print(f"m3-ask: {M3_TINY}", file=sys.stderr)
    try:
        name = modeling_m3.default_checkpoint() if model is None else model
        from m3_conversion.written_numbers import parse_number

        number = parse_number(num_visual_tokens, "--num-visual-tokens")
        _ask(
            image,
            prompt,
            lambda: find(name, quantize=quantize, dtype=dtype, revision=revision),
            number,
            options,
            compare,
            overlay,
            compiled,
            max_new_tokens,
            device,
            quiet,
        )
    except KeyboardInterrupt as stop:
        print("m3-ask: stopped, nothing was written", file=sys.stderr)
        raise typer.Exit(128 + stop.args[0]) from stop
    except (ValueError, OSError, ImportError, SafetensorError, NotImplementedError) as error:
        if debug:
            raise
        print(f"m3-ask: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from error


def _ask(
    image: str,
    prompt: str,
    find_checkpoint: Callable[[], M3Checkpoint],
    num_visual_tokens: int | str | None,
    options: dict[str, Any],
    compare: bool,
    overlay: Path | None,
    compiled: bool,
    max_new_tokens: int,
    device: str | None,
    quiet: bool,
) -> None:
    check_question(prompt)
    is_video = _is_video(image)
    if options and not is_video:
        raise ValueError(f"{image} is a picture: {', '.join(options)} are for videos.")
    if overlay is not None:
        _check_overlay(overlay, image, is_video)
    medium = {"type": "video", "video": image} if is_video else {"type": "image", "image": _open_picture(image)}
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    from m3_conversion.signals import handling_signals  # the conversion is imported when it may be needed

    with handling_signals(_interrupt):  # so that a conversion leaves nothing half-written
        checkpoint = find_checkpoint()
    processor = AutoProcessor.from_pretrained(checkpoint.name, **checkpoint.processor_arguments)
    if is_video and not compare and num_visual_tokens is processor.num_visual_tokens is None:
        options.setdefault("total_visual_tokens", max(processor.visual_token_scales))
    written = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.content in prompt]
    as_text = {"sanitize_control_tokens": True} if written else {}
    if written and not MAKES_TEXT_PLAIN:
        raise ValueError(
            f"The question holds {written[0]}, which is no text to a checkpoint: transformers 5.24 can ask it as text."
        )

    def prepare(scale: int | str | None, medium: dict[str, Any], options: dict[str, Any]) -> Any:
        return processor.apply_chat_template(
            [{"role": "user", "content": [medium, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": scale, **options},
            **as_text,
        )

    scales = processor.visual_token_scales
    inputs = prepare(
        scales[0] if compare else num_visual_tokens, medium, options
    )  # refuses a wrong number before the weights are loaded
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint.name, **checkpoint.model_arguments, device_map=device
    )
    trained, asked = model.config.trained_scales, {int(scale) for scale in inputs["num_visual_tokens"]} - {AUTO_NUMBER}
    if trained is not None and not quiet and not asked <= {*trained}:
        said = NOT_TRAINED.format(", ".join(map(str, trained))) if trained else NEVER_TRAINED
        print(f"m3-ask: {said}", file=sys.stderr)

    if compiled:
        text = int((inputs["input_ids"] != processor.image_token_id).sum())
        asked = scales if compare else [inputs["num_visual_tokens"].tolist()]
        model.compile_for(asked, max_text=max(SHORTEST_TEXT, 1 << (text - 1).bit_length()), like=inputs)

    def answer(
        inputs: Any, show: bool, max_new_tokens: int = max_new_tokens, **images: Any
    ) -> tuple[_Answer, float, float, Any]:
        streamer, start = _Answer(processor, show), time.perf_counter()
        output = model.generate(
            **inputs.to(model.device),
            **images,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            return_dict_in_generate=True,
        )
        return streamer, streamer.first_token_at - start, time.perf_counter() - start, output

    seen = None if overlay is None else see(processor, medium["image"])
    if not compare:
        *_, output = answer(inputs, show=True)
        [shown, *_] = inputs["num_visual_tokens"].tolist()
        if AUTO_NUMBER in inputs["num_visual_tokens"].tolist():
            chosen, spent = output.num_visual_tokens.tolist(), output.visual_tokens_spent.item()
            each = f" for each of {len(chosen)} frames" if len(chosen) > 1 else ""
            print(f"m3-ask: chose {chosen[0]} visual tokens{each}; all passes together took {spent}", file=sys.stderr)
            shown = chosen[0]
        if seen is not None:
            with handling_signals(_interrupt):
                _write_overlay(seen, [shown], overlay)
        return
    answer(inputs, show=False, max_new_tokens=1)  # warm up: the first call is slower
    images, start = inputs.to(model.device), time.perf_counter()
    with torch.no_grad():
        encoded = model.encode_images(images["pixel_values"], images.get("image_sizes"), images["image_tile_grids"])
    print(f"encoded once in {time.perf_counter() - start:.3f} s")
    medium = {"type": "video", "video": encoded}
    if "add_timestamps" in options:
        encoded.timestamps = sample_video(image, **{k: options[k] for k in SAMPLING_OPTIONS if k in options}).timestamps
        medium["add_timestamps"] = True
    print("visual tokens  first token    total  answer")
    for scale in [*scales, *([AUTO] if len(scales) > 1 else [])]:
        inputs = prepare(scale, medium, {})
        tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
        context = model.config.context_length
        if scale != AUTO and context is not None and inputs["input_ids"].shape[1] > context:
            print(f"{tokens:>13}  more than the language model's context of {context} tokens")
            continue
        shown = {"encoded_images": encoded}
        if compiled and scale != AUTO:  # a graph begins with pixels
            shown = {name: images[name] for name in ("pixel_values", "image_sizes") if name in images}
        streamer, first, total, output = answer(inputs, show=False, **shown)
        if scale == AUTO:
            tokens = f"{AUTO}: {output.visual_tokens_spent.item()}"
        row = f"{tokens:>13}  {first:>9.3f} s  {total:>4.3f} s  "
        print(row + textwrap.fill(" ".join(streamer.text.split()), 80).replace("\n", "\n" + " " * len(row)))
    if seen is not None:
        with handling_signals(_interrupt):
            _write_overlay(seen, scales, overlay)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(signum)


def _is_video(name: str) -> bool:
    """By its name; a GIF that moves is one."""
    suffix = PurePath(re.split("[?#]", name)[0]).suffix.lower()
    if suffix == ".gif" and Path(name).is_file():
        with open_pictures(name) as picture:
            return getattr(picture, "is_animated", False)
    return suffix in VIDEO_SUFFIXES


def _open_picture(image: str) -> Image.Image:
    """The picture of a file, as it lies there, or of a URL, as transformers loads it."""
    if not image.startswith(("http://", "https://")):
        if not Path(image).is_file():
            raise ValueError(f"There is no picture at {image}.")
        return open_pictures(image)
    try:
        return load_image(image, timeout=30)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"What {image} leads to is not a picture that PIL can open: {error}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"Cannot load {image}: {error}") from error


def _check_overlay(file: Path, image: str, is_video: bool) -> None:
    """Raises `ValueError` that says why no picture can be written to a file."""
    if is_video:
        raise ValueError(f"--overlay {file} is for a picture, but {image} is a video: ask about one of its frames.")
    if file.suffix.lower() != ".png":
        raise ValueError(f"--overlay {file} is written as a PNG: give it a name that ends in .png.")
    if file.exists():
        raise ValueError(f"--overlay {file} exists: name a file that is new.")
    there = next(folder for folder in file.absolute().parents if folder.exists())
    if not there.is_dir():
        raise ValueError(f"--overlay {file}: {there} is a file, and can be no folder.")


def _write_overlay(seen: SeenPicture, scales: list[int], file: Path) -> None:
    """The drawing at a scale, or those at several with captions: in one row, or below one another where they are wide."""
    pictures = [seen.draw(scale) for scale in scales]
    if len(scales) > 1:
        (width, height), caption = pictures[0].size, 32
        columns = len(scales) if width < 2 * height else 1
        rows = len(scales) // columns
        whole = Image.new("RGB", (columns * width, rows * (height + caption)), "white")
        for index, (scale, picture) in enumerate(zip(scales, pictures)):
            left, top = index % columns * width, index // columns * (height + caption)
            whole.paste(picture, (left, top + caption))
            count = seen.layout.count(scale)
            text = f"{count} visual token{'s' if count > 1 else ''}"
            at, font = (left + width // 2, top + caption), ImageFont.load_default(20)
            ImageDraw.Draw(whole).text(at, text, fill="black", font=font, anchor="mb")
        pictures = [whole]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.incomplete-{uuid.uuid4().hex[:8]}")
    try:
        pictures[0].save(part, format="PNG")
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    print(f"m3-ask: {file} shows the picture as the model sees it", file=sys.stderr)


def main() -> None:
    notices = StreamHandler()
    notices.setFormatter(Formatter("m3-ask: %(message)s"))
    for package in (modeling_m3.__name__, "m3_conversion"):
        getLogger(package).addHandler(notices)
    app(prog_name="m3-ask")


if __name__ == "__main__":
    main()
