"""The command `python -m conversion SRC DST`, installed as `m3-convert`."""

import argparse
import logging
import re
import signal
import sys
from collections.abc import Sequence

from .chat_templates import CHAT_TEMPLATES


DTYPES = ("float32", "float16", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status: 0, or 1 where one line on stderr says what is wrong (2 for usage)."""
    options = _parser().parse_args(arguments)
    notices = logging.StreamHandler()
    notices.setFormatter(logging.Formatter("m3-convert: %(message)s"))
    logger = logging.getLogger("conversion")
    logger.handlers, logger.propagate = [notices], False
    logger.setLevel(logging.INFO)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        _convert(options)
    except KeyboardInterrupt as stop:
        print("m3-convert: stopped, nothing was written", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"m3-convert: {_one_line(error)}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _convert(options: argparse.Namespace) -> None:
    import torch  # here, so that --help and usage errors come at once

    from .convert import convert

    conversion = convert(
        options.source,
        options.destination,
        vision_tower=options.vision_tower,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        max_shard_size=options.max_shard_size,
        chat_template=options.chat_template,
        model_id=options.model_id,
        license=options.license,
        overwrite=options.overwrite,
    )
    print(conversion)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="m3-convert",
        description="Convert an original LLaVA or M3 checkpoint to a folder that transformers loads and the Hub takes.",
    )
    parser.add_argument("source", metavar="SRC", help="the original checkpoint: a folder or a Hub id")
    parser.add_argument("destination", metavar="DST", help="the folder to write")
    parser.add_argument(
        "--vision-tower", metavar="DIR", help="CLIP folder or Hub id, in place of the config's mm_vision_tower"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="store weights in this type (default: as they are stored)")
    parser.add_argument(
        "--max-shard-size", default="5GB", type=_size, metavar="SIZE", help="of a weight file (default: 5GB)"
    )
    parser.add_argument(
        "--chat-template", choices=sorted(CHAT_TEMPLATES), help="(default: by the checkpoint's name and language model)"
    )
    parser.add_argument("--model-id", metavar="ID", help="Hub id of the original, for the card (default: SRC)")
    parser.add_argument("--license", help="for the card (default: that of SRC's own card)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST where it exists")
    parser.add_argument("--debug", action="store_true", help="show a traceback where something is wrong")
    return parser


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, as 5GB or 200MB")
    return size


def _stop(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(signum)  # ends the program through the blocks that clean up


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
