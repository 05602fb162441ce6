"""What a budget buys on a server: `python -m benchmarks.serving`, in an environment that has vLLM.

Requests per second and the time to the first token at every number of visual tokens, with 1, 8 and 32 requests in flight, by
`m3-serve`, and by `generate` in batches of as many; in turn, in one run. Every request has a picture of its own.
"""

import asyncio
import contextlib
import itertools
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import requests
import torch
import typer
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

import modeling_m3
from m3_serving.client import AsyncClient

from .measure import markdown_table, save
from .random_checkpoint import _TINY_VISION, SHAPES, build


BAR = 9  # requests per second at 36 tokens over those at 576, with eight in flight
SCALES = [576, 144, 36, 9, 1]
QUESTION = "What color is the large circle?"
NEW_TOKENS = 4
_picture_numbers = itertools.count()


def save_checkpoint(size: str, tower: str, folder: Path, dtype: torch.dtype) -> None:
    """Random weights in a shape of `SHAPES`, with m3-tiny's tokenizer."""
    _, processor = modeling_m3.load(modeling_m3.default_checkpoint())
    config = modeling_m3.M3LlavaConfig(
        vision_config=_TINY_VISION if tower == "tiny" else None,
        text_config={**SHAPES[size], "vocab_size": 512, "max_position_embeddings": 4096, "eos_token_id": 2},
        image_token_id=processor.image_token_id,
        eos_token_id=2,
        pad_token_id=0,
    )
    build(config, dtype, "cpu").save_pretrained(folder)
    processor.save_pretrained(folder)


def picture() -> Image.Image:
    """Another one at every call."""
    drawn = np.random.default_rng(next(_picture_numbers))
    return Image.fromarray(drawn.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((400, 300))


@contextlib.contextmanager
def server(folder: Path, options: list[str]) -> Iterator[str]:
    """The address of one by `m3-serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [
        sys.executable,
        "-m",
        "m3_serving.serve_command",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT)
    try:
        while "m3-serve: listens on" not in log.read_text(errors="replace"):
            if process.poll() is not None:
                raise RuntimeError(log.read_text(errors="replace")[-3000:])
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def ask_server(client: AsyncClient, number: int, in_flight: int, requests: int) -> dict[str, float]:
    """Requests per second, and the mean time to the first token."""
    pictures = [picture() for _ in range(requests)]

    async def whole() -> list[float]:
        turn = asyncio.Semaphore(in_flight)

        async def one(shown: Image.Image) -> float:
            async with turn:
                begin, first = time.perf_counter(), 0.0
                request = client._request(shown, QUESTION, number, {"max_tokens": NEW_TOKENS, "stream": True})
                request["extra_body"]["ignore_eos"] = True
                async for _ in await client.openai.chat.completions.create(model=await client._model(), **request):
                    first = first or time.perf_counter() - begin  # a token may have no text
                return first

        return await asyncio.gather(*map(one, pictures))

    begin = time.perf_counter()
    firsts = asyncio.get_event_loop().run_until_complete(whole())
    return {"rate": requests / (time.perf_counter() - begin), "first": statistics.mean(firsts)}


class _FirstToken(StoppingCriteria):
    """Notes when there was a first token."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def ask_model(model: Any, processor: Any, number: int, in_flight: int, requests: int) -> dict[str, float]:
    """The same by `generate`."""
    firsts, begin = [], time.perf_counter()
    for start in range(0, requests, in_flight):
        batch = min(in_flight, requests - start)
        began, first = time.perf_counter(), _FirstToken()
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(
            images=[[picture()] for _ in range(batch)],
            text=[text] * batch,
            num_visual_tokens=number,
            return_tensors="pt",
        ).to(model.device, model.dtype)
        model.generate(
            **inputs,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([first]),
        )
        firsts.append(first.at - began)
    return {"rate": requests / (time.perf_counter() - begin), "first": statistics.mean(firsts)}


def capacity(url: str, prompts: dict[int, int]) -> dict[int, int]:
    """How many prompts and their answers fit in the KV cache at once, by number of visual tokens."""
    line = next(
        line for line in requests.get(f"{url}/metrics").text.splitlines() if line.startswith("vllm:cache_config_info")
    )
    blocks, size = (int(re.search(f'{name}="(\\d+)"', line)[1]) for name in ("num_gpu_blocks", "block_size"))
    return {number: blocks // -(-(tokens + NEW_TOKENS) // size) for number, tokens in prompts.items()}


def main(
    size: Annotated[str, typer.Option(help=f"Of the language model: {', '.join(SHAPES)}.")] = "1b",
    tower: Annotated[
        str, typer.Option(help="clip, CLIP-ViT-L/14-336, or tiny, which leaves the language model's cost.")
    ] = "clip",
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Of generate.")] = "cpu",
    in_flight: Annotated[str, typer.Option(help="Requests at once.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="Of every number of requests in flight, each with as many.")] = 1,
    repeats: Annotated[int, typer.Option(help="Of everything.")] = 1,
    options: Annotated[str, typer.Option(help="Of vLLM.")] = "--enforce-eager --max-num-seqs 32 --max-model-len 1024",
    output: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measures, and prints the table."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # By itself vLLM keeps a core for its other processes, which is half of a small machine.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{os.cpu_count() - 1}")
    flights = [int(count) for count in in_flight.split(",")]
    measured: dict[str, list[dict[str, float]]] = {}
    asyncio.set_event_loop(asyncio.new_event_loop())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_checkpoint(size, tower, folder, getattr(torch, dtype))
        model, processor = modeling_m3.load(folder, dtype=dtype, device_map=device)
        model.eval()
        no_cache = ["--mm-processor-cache-gb", "0", "--dtype", dtype]
        with server(folder, [*options.split(), *no_cache]) as url, torch.no_grad():
            client = AsyncClient(f"{url}/v1", timeout=3600)
            words = len(processor.tokenize_prompts([QUESTION])[0]) + 8
            ways: dict[str, Callable[..., dict[str, float]]] = {
                "m3-serve": lambda *how: ask_server(client, *how),
                "generate": lambda *how: ask_model(model, processor, *how),
            }
            for run in ways.values():
                run(1, 1, 1)
            fits = capacity(url, {number: number + words for number in SCALES})
            for _ in range(repeats):
                for count, number in itertools.product(flights, SCALES):
                    for way, run in ways.items():
                        found = run(number, count, count * rounds)
                        measured.setdefault(f"{way} {count} {number}", []).append(found)
                        print(way, count, number, {name: round(value, 3) for name, value in found.items()}, flush=True)
    result = {
        "size": size,
        "tower": tower,
        "dtype": dtype,
        "measured": measured,
        "capacity": {str(number): count for number, count in fits.items()},
    }
    print(table(result))
    save(result, output)


def table(result: dict[str, Any]) -> str:
    """Markdown: medians."""
    medians = {
        key: {name: statistics.median(one[name] for one in found) for name in ("rate", "first")}
        for key, found in result["measured"].items()
    }
    rows = []
    for count in sorted({int(key.split()[1]) for key in medians}):
        for number in SCALES:
            served, generated = (medians[f"{way} {count} {number}"] for way in ("m3-serve", "generate"))
            gain = served["rate"] / medians[f"m3-serve {count} {SCALES[0]}"]["rate"]
            rates = [f"{served['rate']:.2f}", f"{generated['rate']:.2f}", f"{gain:.1f}"]
            firsts = [f"{served['first']:.1f}", f"{generated['first']:.1f}"]
            rows.append([count, number, *rates, *firsts, result["capacity"][str(number)]])
    head = [
        "in flight",
        "visual tokens",
        "requests/s",
        "by generate",
        "over 576",
        "first token, s",
        "by generate",
        "fit in the KV cache",
    ]
    about = f"Language model {result['size']}, vision tower {result['tower']}, {result['dtype']}; {NEW_TOKENS} tokens of answer."
    return f"{about}\n\n{markdown_table(head, rows)}"


if __name__ == "__main__":
    typer.run(main)
