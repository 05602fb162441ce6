"""What vLLM's Transformers backend costs: `python -m benchmarks.backend`, in an environment that has vLLM.

A language model alone, of random weights, is served twice at once: by the backend through which M3 runs, and by vLLM's own class
for it. Both get the same requests, in turn: prompts of token ids as long as M3's at several numbers of visual tokens.
"""

import asyncio
import contextlib
import itertools
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import requests
import torch
import typer
from openai import AsyncOpenAI
from transformers import LlamaConfig, LlamaForCausalLM

import modeling_m3

from .measure import markdown_table, save
from .random_checkpoint import SHAPES


WAYS = {"Transformers backend": "transformers", "vLLM's class": "vllm"}
NEW_TOKENS = 16
drawn = random.Random(0)


@contextlib.contextmanager
def server(folder: Path, implementation: str, options: list[str]) -> Iterator[str]:
    """The address of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / f"{implementation}.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    with log.open("wb") as output:
        command += ["--host", "127.0.0.1", "--model-impl", implementation, *options]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(log.read_text(errors="replace")[-3000:])
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


async def ask(client: AsyncOpenAI, model: str, prompts: list[list[int]]) -> tuple[float, float]:
    """Tokens per second, those of prompts and answers together, and the mean time to the first, of requests all at once."""

    async def one(prompt: list[int]) -> float:
        begin, first = time.perf_counter(), 0.0
        settings = {"max_tokens": NEW_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}, "stream": True}
        async for _ in await client.completions.create(model=model, prompt=prompt, **settings):
            first = first or time.perf_counter() - begin
        return first

    begin = time.perf_counter()
    firsts = await asyncio.gather(*map(one, prompts))
    seconds = time.perf_counter() - begin
    return sum(len(prompt) + NEW_TOKENS for prompt in prompts) / seconds, statistics.mean(firsts)


def main(
    size: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = "1b",
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    lengths: Annotated[str, typer.Option(help="Of prompts, in tokens.")] = "51,591",
    in_flight: Annotated[str, typer.Option(help="Requests at once.")] = "1,8",
    repeats: Annotated[int, typer.Option(help="Of everything.")] = 3,
    options: Annotated[str, typer.Option(help="Of vLLM.")] = "--enforce-eager --max-model-len 1024",
    output: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measures, and prints a table."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{os.cpu_count() - 1}")  # as benchmarks.serving
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as servers:
        folder = Path(place) / "model"
        torch.manual_seed(0)
        config = LlamaConfig(
            **SHAPES[size], vocab_size=512, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2
        )
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
        _, processor = modeling_m3.load(modeling_m3.default_checkpoint())
        processor.tokenizer.save_pretrained(folder)
        given = [*options.split(), "--dtype", dtype, "--served-model-name", "model"]
        clients = {
            way: AsyncOpenAI(
                base_url=servers.enter_context(server(folder, implementation, given)), api_key="none", timeout=3600
            )
            for way, implementation in WAYS.items()
        }
        loop = asyncio.new_event_loop()
        measured: dict[str, list[tuple[float, float]]] = {}
        sizes = list(itertools.product(map(int, in_flight.split(",")), map(int, lengths.split(","))))
        for repeat in range(repeats + 1):  # the first to warm up
            for count, length in sizes:
                prompts = [[drawn.randrange(4, 512) for _ in range(length)] for _ in range(count)]
                for way in sorted(WAYS, reverse=bool(repeat % 2)):
                    found = loop.run_until_complete(ask(clients[way], "model", prompts))
                    if repeat:
                        measured.setdefault(f"{way} {count} {length}", []).append(found)
                        print(way, count, length, [round(number, 2) for number in found], flush=True)
    result = {"size": size, "dtype": dtype, "measured": measured}
    print(table(result))
    save(result, output)


def table(result: dict[str, Any]) -> str:
    """Markdown: medians."""
    medians = {
        key: [statistics.median(numbers) for numbers in zip(*found)] for key, found in result["measured"].items()
    }
    sizes = sorted({tuple(map(int, key.split()[-2:])) for key in medians})
    rows = []
    for count, length in sizes:
        (rate, first), (own_rate, own_first) = (medians[f"{way} {count} {length}"] for way in WAYS)
        rates = [f"{rate:.0f}", f"{own_rate:.0f}", f"{rate / own_rate:.2f}"]
        rows.append([count, length, *rates, f"{first:.2f}", f"{own_first:.2f}"])
    backend, own = WAYS
    head = ["in flight", "prompt", f"{backend}, tokens/s", own, "of it", f"{backend}, first token, s", own]
    about = f"Language model {result['size']}, {result['dtype']}; {NEW_TOKENS} tokens of answer."
    return f"{about}\n\n{markdown_table(head, rows)}"


if __name__ == "__main__":
    typer.run(main)
