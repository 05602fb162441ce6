"""`m3-serve` end to end: vLLM itself, on loopback, with a converted checkpoint; what it answers is what `generate` answers."""

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import commands_on_path, golden
from conversion_checkpoints import copy_golden, edit_json, read_weights, store
from PIL import Image
from video_files import CLIP

import modeling_m3
from m3_conversion.convert import convert
from modeling_m3.videos import sample_video


pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM (CI has a stage for it)"),
]

REPOSITORY = Path(__file__).parent.parent
SCALES = [1, 9, 36, 144, 576]
NEW_TOKENS = 6
NEAR = 1e-4  # margin of logits below which two answers are both right
WIDER = {48: 128, 96: 256}  # vLLM's attention on CPUs wants heads of 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in the original's format, of random weights and a context of 4,096, converted."""
    place = tmp_path_factory.mktemp("checkpoint")
    source, generator = copy_golden("llava15-m3", place), torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in read_weights(source).items():
        shape = tensor.shape if "vision_tower" in name else [WIDER.get(size, size) for size in tensor.shape]
        drawn = torch.randn(*shape, generator=generator) * 0.08
        weights[name] = drawn + 1 if "norm" in name and len(shape) == 1 else drawn
    store(source, weights)
    edit_json(source / "config.json", hidden_size=128, intermediate_size=256)
    convert(source, place / "converted")
    return place / "converted"


@pytest.fixture(scope="module")
def model_and_processor(folder):
    model, processor = modeling_m3.load(folder, dtype="float32")
    return model.eval(), processor


@contextlib.contextmanager
def serving(folder, *options):
    """The address of a server, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["m3-serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-num-seqs", "16", *options]
    environment = {
        **os.environ,
        "PATH": commands_on_path(),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "NO_PROXY": "*",
    }
    log = folder.parent / f"server-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 180
        while "m3-serve: listens on" not in log.read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-5000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--detail-low", "9", "--detail-high", "576", "--mm-processor-cache-gb", "0") as (url, process):
        yield url, process


def picture(seed, size=None):
    drawn = np.random.default_rng(seed)
    width, height = size or (int(side) for side in drawn.integers(40, 400, 2))
    coarse = Image.fromarray(drawn.integers(0, 255, (7, 9, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def data_uri(content):
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, "PNG")
        content = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def part(content, **more):
    url = content if isinstance(content, str) else data_uri(content)
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words):
    return {"type": "text", "text": words}


def ask(number):
    """One of 200 requests: (messages or prompt, pictures, num_visual_tokens)."""
    drawn = random.Random(number)
    words = " ".join(
        drawn.choice(("a", "what", "color", "the", "is", "where", "open")) for _ in range(drawn.randint(2, 9))
    )
    if number % 10 == 9:
        return f"USER: {words} ASSISTANT:", [], None
    pictures = [picture(drawn.randrange(60)) for _ in range(1 + number % 3)]
    turns = [{"role": "user", "content": [*map(part, pictures), text(words)]}]
    if number % 4 == 3:
        turns += [{"role": "assistant", "content": "open"}, {"role": "user", "content": f"and {words}?"}]
    return turns, pictures, SCALES[number % 5]


WRONG = [
    ({"mm_processor_kwargs": {"num_visual_tokens": number}}, f"num_visual_tokens={json.dumps(number)}")
    for number in (100, "36", 36.0, True, 0, -1, [36], [36, 9], {"a": 1}, 577)
] + [
    ({"mm_processor_kwargs": {"num_visual_tokens": "auto"}}, "a server cannot choose"),
    ({"mm_processor_kwargs": {"image_grid_pinpoints": [[672, 672]]}}, "image_grid_pinpoints"),
    ({"mm_processor_kwargs": "36"}, "give an object"),
    ({"media_io_kwargs": {"image": {}}}, "media_io_kwargs"),
    ({"parts": [part(b"no picture"), text("what")]}, "none that can be opened"),
    ({"parts": [part(b""), text("what")]}, "0 bytes"),
    ({"parts": [part("http://example.com/picture.png"), text("what")]}, "not fetched from example.com"),
    ({"parts": [part("file:///etc/passwd"), text("what")]}, "file:///etc/passwd"),
    ({"parts": [part(picture(0))] * 9}, "At most 8 image"),
    ({"parts": [part(picture(0)), text("<image> what")]}, "stands for a picture"),
]


def expected_of(asked, model, processor):
    """Prompt ids and greedy answer ids of `generate`, and the logits by which it chose."""
    prompt, pictures, number = asked
    if not isinstance(prompt, str):
        turns = [
            {
                "role": turn["role"],
                "content": [{"type": "image"} if "image_url" in piece else piece for piece in turn["content"]]
                if isinstance(turn["content"], list)
                else [text(turn["content"])],
            }
            for turn in prompt
        ]
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    numbers = {} if number is None else {"num_visual_tokens": number}
    inputs = processor(images=pictures or None, text=prompt, return_tensors="pt", **numbers)
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    length = inputs["input_ids"].shape[1]
    return inputs["input_ids"][0].tolist(), output.sequences[0, length:].tolist(), torch.stack(output.logits, 1)[0]


def differs(answered, expected, logits):
    """Whether an answer is another than the expected one, and whether it is as good by its first other token."""
    if answered == expected:
        return False, False
    step = next(i for i, pair in enumerate(zip([*answered, None], [*expected, None])) if pair[0] != pair[1])
    margin = logits[step, expected[step]] - logits[step, answered[step]] if step < len(answered) else torch.inf
    return True, bool(margin < NEAR)


async def send(client, model, asked):
    """What came of a request: (prompt ids, answer ids), or the sentence that refuses it."""
    from openai import BadRequestError

    prompt, _, number = asked[:3]
    common = {"model": model, "max_tokens": NEW_TOKENS, "temperature": 0}
    more = {"return_token_ids": True, **(asked[3] if len(asked) > 3 else {})}
    if number is not None:
        more["mm_processor_kwargs"] = {"num_visual_tokens": number}
    try:
        if isinstance(prompt, str):
            found = await client.completions.create(prompt=prompt, extra_body=more, **common)
            return found.choices[0].prompt_token_ids, found.choices[0].token_ids
        found = await client.chat.completions.create(messages=prompt, extra_body=more, **common)
        return found.prompt_token_ids, found.choices[0].token_ids
    except BadRequestError as error:
        return str(error)


def test_200_requests_at_five_budgets_and_20_wrong_ones(folder, server, model_and_processor, capsys):
    from openai import AsyncOpenAI

    url, _ = server
    asked = [ask(number) for number in range(200)]
    for index, (wrong, _) in enumerate(WRONG):
        wrong = dict(wrong)
        parts = wrong.pop("parts", [part(picture(index)), text("what")])
        asked.append(([{"role": "user", "content": parts}], [], None, wrong))
    order = random.Random(0).sample(range(len(asked)), len(asked))

    async def all_of_them():
        client, turn = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), asyncio.Semaphore(16)

        async def one(index):
            async with turn:
                return index, await send(client, str(folder), asked[index])

        return dict(await asyncio.gather(*(one(index) for index in order)))

    found, near = asyncio.run(all_of_them()), 0
    for index, request in enumerate(asked[:200]):
        prompt, expected, logits = expected_of(request, *model_and_processor)
        assert not isinstance(found[index], str), (index, found[index])
        assert found[index][0] == prompt, index
        other, excused = differs(found[index][1], expected, logits)
        near += excused
        assert not other or excused, (index, found[index][1], expected)
    for index, (_, sentence) in enumerate(WRONG):
        assert (
            sentence in found[200 + index].replace("'", '"').replace('="auto"', "='auto'")
            or sentence in found[200 + index]
        )
    assert len({tuple(answer) for _, answer in (found[index] for index in range(200))}) > 100
    with capsys.disabled():
        print(f"\n200 answers of the server are generate's, {near} of them by a near-tie")


def test_a_plain_request_has_the_original_s_prompt(folder, server):
    import requests

    case = next(case for case in golden("llava15-m3")["cases"] if case["id"] == "img0-sNone")
    question = re.search(r"<image>\n(.*?) ASSISTANT:", case["prompts"][0], re.DOTALL)[1]
    messages = [{"role": "user", "content": [part(picture(1)), text(question)]}]
    found = requests.post(f"{server[0]}/tokenize", json={"model": str(folder), "messages": messages}).json()["tokens"]
    image = max(set(found), key=found.count)
    assert found.count(image) == 576
    squeezed = [token for index, token in enumerate(found) if token != image or found[index - 1] != image]
    assert squeezed == [image if token == -200 else token for token in case["input_ids"][0]]


def test_pictures_that_vllm_would_see_otherwise(folder, server, model_and_processor):
    """Turned by EXIF, transparent, with a palette, in grey, and 1,000 times as wide as high."""
    import requests

    exif = Image.Exif()
    exif[274] = 6
    turned, transparent = io.BytesIO(), picture(4, (90, 60)).convert("RGBA")
    picture(3, (120, 80)).save(turned, "JPEG", exif=exif, quality=95)
    transparent.putalpha(Image.linear_gradient("L").resize((90, 60)))
    palette = io.BytesIO()
    picture(5, (64, 64)).quantize(16).save(palette, "PNG", transparency=3)
    shown = [turned.getvalue(), data_uri(transparent), palette.getvalue(), data_uri(picture(6).convert("L"))]
    shown.append(data_uri(picture(7, (20000, 20))))
    for content in shown:
        raw = base64.b64decode(content.partition(",")[2]) if isinstance(content, str) else content
        opened = Image.open(io.BytesIO(raw))
        turns = [{"role": "user", "content": [part(content), text("what color")]}]
        prompt, expected, logits = expected_of((turns, [opened], 144), *model_and_processor)
        body = {"model": str(folder), "messages": turns, "max_tokens": NEW_TOKENS, "temperature": 0}
        body |= {"return_token_ids": True, "mm_processor_kwargs": {"num_visual_tokens": 144}}
        answer = requests.post(f"{server[0]}/v1/chat/completions", json=body).json()
        assert answer["prompt_token_ids"] == prompt
        other, excused = differs(answer["choices"][0]["token_ids"], expected, logits)
        assert not other or excused


def test_a_video_is_answered_as_its_frames(folder, server, model_and_processor):
    import requests

    url = f"data:video/mp4;base64,{base64.b64encode(CLIP.read_bytes()).decode()}"
    content = [{"type": "video_url", "video_url": {"url": url, "num_frames": 4}}, text("what color")]
    frames = [*sample_video(CLIP, num_frames=4)]
    turns = [{"role": "user", "content": [*map(part, frames), text("what color")]}]
    prompt, expected, logits = expected_of((turns, frames, 36), *model_and_processor)
    body = {"model": str(folder), "messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS}
    body |= {"temperature": 0, "return_token_ids": True, "mm_processor_kwargs": {"num_visual_tokens": 36}}
    answer = requests.post(f"{server[0]}/v1/chat/completions", json=body).json()
    assert answer["prompt_token_ids"] == prompt
    other, excused = differs(answer["choices"][0]["token_ids"], expected, logits)
    assert not other or excused


def test_what_does_not_fit_is_told_with_what_would(folder, server):
    import requests

    def refused(parts, **more):
        body = {"model": str(folder), "messages": [{"role": "user", "content": parts}], **more}
        answer = requests.post(f"{server[0]}/v1/chat/completions", json=body)
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    shown = [part(picture(seed)) for seed in range(8)]
    sentence = refused([*shown, text("what")], max_tokens=20)
    words = int(re.search(r"(\d+) of them text", sentence)[1])
    assert f"The prompt has {words + 8 * 576} tokens at num_visual_tokens=576" in sentence
    assert "4076 fit, of a context of 4096 tokens and 20 for the answer. num_visual_tokens=144 would fit." in sentence
    assert "No number of visual tokens would fit" in refused([*shown, text("what " * 5000)])
    broken = data_uri(picture(1, (300, 300)))
    raw = base64.b64decode(broken.partition(",")[2])
    assert "truncated" in refused([part(raw[: len(raw) // 2]), text("what")])
    assert requests.get(f"{server[0]}/health").status_code == 200


def test_details_metrics_and_the_client(folder, server):
    from m3_serving.client import Client

    url, _ = server
    client = Client(f"{url}/v1")
    assert client.scales == SCALES
    shown = picture(11)
    content = [part(shown, detail="low"), text("what")]
    low = client.openai.chat.completions.create(
        model=str(folder), messages=[{"role": "user", "content": content}], max_tokens=1
    )
    fine = client.ask(shown, "what", max_tokens=1)
    assert fine.prompt_tokens - low.usage.prompt_tokens == 576 - 9
    answer = client.ask(shown, "what is the color", 36, max_tokens=NEW_TOKENS)
    streamed = "".join(client.stream(shown, "what is the color", 36, max_tokens=NEW_TOKENS))
    assert streamed.strip() == answer.text and answer.num_visual_tokens == 36
    finest = client.ask(shown, "what is the color", "auto", auto_keep=1, max_tokens=NEW_TOKENS)
    assert finest.requests == 3 and finest.num_visual_tokens == 576
    assert finest.text == client.ask(shown, "what is the color", 576, max_tokens=NEW_TOKENS).text
    assert client.ask(shown, "what is the color", "auto", auto_keep=1e-30, max_tokens=NEW_TOKENS).requests == 1

    import requests

    def counted():
        lines = requests.get(f"{url}/metrics").text.splitlines()
        return float(
            next(
                (
                    line.split()[-1]
                    for line in lines
                    if line.startswith('m3_visual_tokens_total{num_visual_tokens="36"}')
                ),
                0,
            )
        )

    before = counted()
    client.ask([shown, shown], "what", 36, max_tokens=1)
    assert counted() - before == 72


def resident(process):
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(member.memory_info().rss for member in family)


def test_memory_stays_flat_over_1000_pictures(server):
    """By the engine's own cache of pictures off; the first 200 requests fill what is filled once."""
    from m3_serving.client import AsyncClient

    url, process = server
    client = AsyncClient(f"{url}/v1")

    async def soak(seeds):
        turn = asyncio.Semaphore(8)

        async def one(seed):
            async with turn:
                await client.ask(picture(1000 + seed, (80, 60)), "what", 9, max_tokens=1)

        await asyncio.gather(*map(one, seeds))

    async def whole():
        await soak(range(200))
        before = resident(process)
        await soak(range(200, 1200))
        return before, resident(process)

    before, after = asyncio.run(whole())
    assert after < 1.02 * before, f"{before / 1e6:.0f} MB, then {after / 1e6:.0f}"


def test_the_page_s_python_runs(server, monkeypatch, capsys):
    """docs/serving.md: what needs a server; test_docs.py runs the rest."""
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert blocks
    monkeypatch.chdir(REPOSITORY)
    for block in blocks:
        exec(block.replace("http://localhost:8000", server[0]), {})
    assert len(capsys.readouterr().out) > 5


def test_killed_and_started_again_it_serves_the_same(folder, server):
    from m3_serving.client import Client

    url, process = server
    asked = [(picture(30 + number), "what is open", SCALES[number]) for number in range(5)]
    before = [Client(f"{url}/v1").ask(*one, max_tokens=NEW_TOKENS) for one in asked]
    family = psutil.Process(process.pid).children(recursive=True)
    for member in [psutil.Process(process.pid), *family]:  # the engine's processes outlive a server that is killed
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    with serving(folder, "--num-visual-tokens", "36") as (url, _):
        client = Client(f"{url}/v1")
        assert [client.ask(*one, max_tokens=NEW_TOKENS) for one in asked] == before
        assert client.ask(*asked[2][:2], max_tokens=NEW_TOKENS).text == before[2].text  # the operator's default
