"""The command `m3-serve DIR`: vLLM's OpenAI server with what M3 needs, and a budget per request."""

import os
import sys
from typing import Annotated

import typer
from huggingface_hub.errors import HfHubHTTPError

from m3_conversion.__main__ import VERSION
from modeling_m3 import M3LlavaProcessor
from modeling_m3.any_checkpoint import find
from modeling_m3.checkpoint import read_config
from modeling_m3.configuration_m3 import M3LlavaConfig

from .engine import check_engine
from .settings import Settings


MOST_PICTURES = 8  # of one request
NO_DOMAIN = "no-pictures-by-url.invalid"  # an empty list of domains would allow all of them

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="DIR", help="An M3 or any LLaVA: a folder, or an id on the Hub. Before all options."),
    ],
    num_visual_tokens: Annotated[
        int | None,
        typer.Option(
            "--num-visual-tokens",
            "--num_visual_tokens",
            help="Of requests that name none; the checkpoint's by default.",
        ),
    ] = None,
    detail_low: Annotated[
        int | None, typer.Option("--detail-low", help='Visual tokens of requests with "detail": "low".')
    ] = None,
    detail_high: Annotated[
        int | None, typer.Option("--detail-high", help='Visual tokens of requests with "detail": "high".')
    ] = None,
    max_picture_bytes: Annotated[
        int, typer.Option("--max-picture-bytes", help="Of one picture's file.", min=1)
    ] = Settings.max_picture_bytes,
    max_picture_pixels: Annotated[
        int, typer.Option("--max-picture-pixels", help="Of one picture, width times height.", min=1)
    ] = Settings.max_picture_pixels,
    max_request_bytes: Annotated[
        int, typer.Option("--max-request-bytes", help="Of one request.", min=1)
    ] = Settings.max_request_bytes,
    revision: Annotated[str | None, typer.Option(help="Of a repository on the Hub.")] = None,
    show_version: Annotated[bool, VERSION] = False,
) -> None:
    """Serves a checkpoint by vLLM. All other options are those of `vllm serve`, such as --port or --tensor-parallel-size.

    A request's budget is "mm_processor_kwargs": {"num_visual_tokens": 36}.
    """
    try:
        engine = check_engine()
        found = find(checkpoint, revision=revision)
        settings = _settings(
            str(found.folder),
            M3LlavaConfig(**read_config(found.folder)),
            num_visual_tokens,
            {"low": detail_low, "high": detail_high},
            {
                "max_picture_bytes": max_picture_bytes,
                "max_picture_pixels": max_picture_pixels,
                "max_request_bytes": max_request_bytes,
                "domains": values_of(context.args, "--allowed-media-domains"),
                "url": _url(context.args),
            },
        )
    except (ValueError, OSError, HfHubHTTPError) as error:
        print(f"m3-serve: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from error
    arguments = engine_arguments(settings, checkpoint, context.args)
    details = "".join(f", {number} for detail {name}" for name, number in settings.details.items())
    print(f"m3-serve: {engine}, {settings.default} visual tokens by default{details}", file=sys.stderr, flush=True)
    os.environ.update(settings.environment())
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    # In place of this process, so that signals, and whoever waits for it, meet the server itself.
    os.execv(sys.executable, [sys.executable, "-m", *server_module(engine), *arguments])


def engine_arguments(settings: Settings, name: str, given: list[str]) -> list[str]:
    """The arguments of `vllm serve`: ours, but for those that the operator gives, then the operator's."""
    ours = {
        "--served-model-name": [name],
        "--limit-mm-per-prompt": [f'{{"image": {MOST_PICTURES}}}'],
        "--allowed-media-domains": [NO_DOMAIN],
    }
    defaults = [part for option, values in ours.items() if not is_given(given, option) for part in (option, *values)]
    needed = ["--trust-remote-code", "--trust-request-mm-kwargs", "--middleware", "m3_serving.middleware.Budgets"]
    return [settings.folder, *needed, *defaults, *given]


def server_module(engine: str) -> list[str]:
    """What starts it: `vllm serve`, which asks for the distribution "vllm" by name; that of other builds by the older form."""
    if engine.startswith("vllm "):
        return ["vllm.entrypoints.cli.main", "serve"]
    return ["vllm.entrypoints.openai.api_server", "--model"]


def is_given(arguments: list[str], option: str) -> bool:
    """Whether an option is among vLLM's arguments, in any way that vLLM takes it."""
    return any(_name(argument) == option for argument in arguments)


def values_of(arguments: list[str], option: str) -> list[str]:
    """Those of an option that takes several; what follows the last time it is given."""
    values: list[str] = []
    for index, argument in enumerate(arguments):
        if _name(argument) == option:
            after = arguments[index + 1 :]
            end = next((i for i, other in enumerate(after) if other.startswith("-")), len(after))
            values = [argument.partition("=")[2]] if "=" in argument else after[:end]
    return values


def main() -> None:
    app(prog_name="m3-serve")


def _name(argument: str) -> str:
    """Of an option, as vLLM's parser reads it: --a_b=c is --a-b, and --a.b sets a part of --a."""
    name = argument.partition("=")[0].partition(".")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def _settings(
    folder: str, config: M3LlavaConfig, default: int | None, details: dict[str, int | None], rest: dict
) -> Settings:
    scales = config.visual_token_scales
    chosen = {name: number for name, number in details.items() if number is not None}
    for option, number in (
        ("--num-visual-tokens", default),
        *((f"--detail-{name}", number) for name, number in chosen.items()),
    ):
        if number is not None and number not in scales:
            raise ValueError(f"{option} {number} is not offered by this checkpoint. Choose from {scales}.")
    processor = M3LlavaProcessor.from_pretrained(folder)
    stored = processor.num_visual_tokens  # "auto" counts as the finest
    default = default or (stored if stored in scales else max(scales))
    return Settings(folder, scales, default, processor.image_token, chosen, **rest)


def _url(arguments: list[str]) -> str:
    host = (values_of(arguments, "--host") or ["0.0.0.0"])[0]
    port = (values_of(arguments, "--port") or ["8000"])[0]
    scheme = "https" if is_given(arguments, "--ssl-certfile") else "http"
    return f"{scheme}://{host}:{port}/v1"


if __name__ == "__main__":
    main()
