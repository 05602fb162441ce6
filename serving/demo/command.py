"""The command `m3-demo`: a page in the browser on which people see what visual tokens buy."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from m3_commands import has
from m3_conversion.__main__ import VERSION
from m3_conversion.signals import handling_signals

from .asking import Model
from .loading import Loading
from .people import People, private_folder


M3_TINY = "m3_tiny"  # what modeling_m3.default_checkpoint() says, for which torch would have to be imported

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="An M3 or any LLaVA: a folder, or an id on the Hub. m3-tiny, a small one, by default."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible server, as of m3-serve, that answers in place of this process."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Of the server.", envvar="OPENAI_API_KEY", show_envvar=True)
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
    device: Annotated[
        str | None, typer.Option(help="Where to run: cpu, cuda, ..., auto for all there are. The GPU if there is one.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than this machine's users see 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Show the page to the internet, by gradio's tunnel.")] = False,
    users: Annotated[
        int, typer.Option(help="People who may wait for an answer; more are asked to come later.", min=1)
    ] = 20,
    max_upload: Annotated[int, typer.Option(help="Size of an upload at most, in MB.", min=1)] = 50,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    show_version: Annotated[bool, VERSION] = False,
) -> None:
    """Opens a page on which a checkpoint answers about pictures, at every number of visual tokens."""
    if not has("m3-demo", "demo", ("gradio", "matplotlib", "av", "openai")):
        raise typer.Exit(1)
    gc.disable()  # while modules are imported, of which it would free nothing, a quarter of the time goes into it
    logging.basicConfig(format="m3-demo: %(message)s", level=logging.WARNING)
    stopped = threading.Event()
    received: list[int] = []

    def stop(signum: int, frame: object) -> None:
        received.append(signum)
        stopped.set()

    def loaded() -> None:
        gc.freeze()
        gc.enable()
        if loading.error is not None:
            stopped.set()

    try:
        _check_port(host, port)
        make, at_once = _answering(model, server, api_key, quantize, dtype, revision, device)
        folder = None if server else Path(model) if model else Path(find_spec("modeling_m3").origin).parent / M3_TINY
        loading = Loading(make, loaded, folder)
        launch = {"server_name": host, "server_port": port, "share": share, "inbrowser": open_browser}
        with handling_signals(stop), private_folder() as files:
            _serve(stopped, loading, People(files), users, at_once, max_upload * 10**6, launch)
        if loading.error is not None:
            raise loading.error
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        if debug:
            raise
        print(f"m3-demo: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from error
    if received:
        print("m3-demo: stopped", file=sys.stderr)
        raise typer.Exit(128 + received[0])


def main() -> None:
    app(prog_name="m3-demo")


def _answering(
    model: str | None,
    server: str | None,
    api_key: str | None,
    quantize: str | None,
    dtype: str | None,
    revision: str | None,
    device: str | None,
) -> tuple[Callable[[], Model], int]:
    """What makes the model, and how many answers it works on together."""
    if server is None:

        def local_model() -> Model:
            from .local_model import LocalModel  # with torch, after the page

            return LocalModel(model, quantize, dtype, revision, device)

        return local_model, 1  # two answers would share the processor, and each come later
    of_weights = {"--quantize": quantize, "--dtype": dtype, "--device": device}
    given = [option for option, value in of_weights.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} are for a checkpoint in this process: the server has loaded its own.")
    from .server_model import ServerModel

    answering = ServerModel(server, api_key=api_key, checkpoint=model, revision=revision)
    return lambda: answering, ServerModel.at_once


def _serve(
    stopped: threading.Event,
    loading: Loading,
    people: People,
    users: int,
    at_once: int,
    most_bytes: int,
    launch: dict[str, Any],
) -> None:
    """Until a signal, or until there is no model to be had."""
    # Before gradio is imported, which reads them then.
    os.environ |= {"GRADIO_TEMP_DIR": str(people.folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    from starlette.middleware import Middleware

    from .guard import Guard
    from .page import HEAD, STYLE, THEME, build

    loading.start()
    public = launch["share"] or not is_loopback(launch["server_name"])
    page = build(loading, people, users, at_once, most_bytes, public)
    people.keep_what_is_there()
    _, address, shared = page.queue(max_size=users, api_open=False).launch(
        **launch,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=most_bytes,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=THEME,
        css_paths=STYLE,
        head=HEAD,
        app_kwargs={"middleware": [Middleware(Guard, files=str(people.folder))]},
    )
    print(f"m3-demo: {shared or address}", flush=True)
    try:
        stopped.wait()
        if loading.error is not None:
            time.sleep(1)  # for pages that are open to tell it
    finally:
        page.close(verbose=False)


def _check_port(host: str, port: int) -> None:
    """Raises `ValueError` where something listens there already, or nothing can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as trial:
            trial.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server does: one that just ended counts not
            trial.bind(address)
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be listened on ({error.strerror}). Choose another --port or --host."
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than localhost may be any."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    main()
