"""`m3-demo --server`: the page's model behind an OpenAI server, on one that is scripted, and, behind a marker, on vLLM itself."""

import base64
import contextlib
import io
import json
import select
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

import modeling_m3
from benchmarks.roofline import analyze
from m3_serving.demo import server_model
from m3_serving.demo.asking import AUTO, Answer, Message, Person, Picture, Settings
from m3_serving.demo.server_model import ServerModel
from modeling_m3.videos import sample_video


pytestmark = pytest.mark.demo
SCALES = [1, 9, 36, 144, 576]
WORDS = 17  # tokens of every prompt but for its pictures
BUDGETS = {"scales": SCALES, "default": 36, "details": {}}
SCENE = Path(__file__).parent / "fixtures" / "scene.png"


class Fake(ThreadingHTTPServer):
    """Answers with the number, the question, and an end, a piece at a time.

    Attributes:
        budgets, models: what is told; None is answered by 404.
        wrong: by number, (status, what is answered in place of an answer).
        held: by number, or for all by None, what each piece waits for; the first piece is the head of the answer. An answer
            that is not streamed, as all of auto are, waits as AUTO: else it would take a piece of its number's stream.
        broken: numbers whose answer breaks off after the first piece, by what.
        asked, keys: the requests, and their Authorization.
        visual: tokens of a picture, by number.
        left: numbers that were being answered when the client went.
    """

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.budgets, self.models = BUDGETS, {"data": [{"id": "m3"}]}
        self.wrong, self.held, self.broken, self.asked, self.keys = {}, {}, {}, [], []
        self.visual = {number: number for number in SCALES}
        self.left: dict[int, threading.Event] = {number: threading.Event() for number in [*SCALES, None]}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        found = {"/v1/models": self.server.models, "/m3/budgets": self.server.budgets}.get(self.path)
        if isinstance(found, tuple):
            self.whole(*found)
        else:
            self.whole(*((200, found) if found is not None else (404, {"detail": "Not Found"})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["authorization"])
        number = body.get("mm_processor_kwargs", {}).get("num_visual_tokens")
        if number in self.server.wrong:
            return self.whole(*self.server.wrong[number])
        parts = [part for turn in body["messages"] if isinstance(turn["content"], list) for part in turn["content"]]
        pictures = sum(part["type"] == "image_url" for part in parts)
        beams = body.get("n", 1)
        usage = {"prompt_tokens": WORDS + pictures * self.server.visual.get(number, 0), "total_tokens": 0}
        pieces = [f" {number}:", f" {parts[-1]['text']}", " ."]
        if body.get("stream"):
            self.stream(body, number, pieces, usage, beams)
        else:
            self.wait(AUTO, number)
            logprobs = {"content": [{"token": "a", "logprob": -1 / (number or 1), "bytes": None, "top_logprobs": []}]}
            choices = [
                {
                    "index": index,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": "".join(pieces) if index == 0 else "worse"},
                    "logprobs": logprobs if body.get("logprobs") else None,
                }
                for index in range(beams)
            ]
            common = {"id": "a", "object": "chat.completion", "created": 0, "model": "m3"}
            self.whole(200, {**common, "choices": choices, "usage": {**usage, "completion_tokens": 4}})

    def stream(self, body, number, pieces, usage, beams):
        self.wait(number, number)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        if self.server.broken.get(number) == b"":  # so that its end is none
            self.send_header("content-length", "100000")
        self.end_headers()
        options = body["stream_options"]
        if beams > 1:  # as vLLM does: all at the end, and then the tokens of all
            chunks = [("".join(pieces), 0, 3, "stop"), ("worse", 1, 2, "stop")]
        else:
            chunks = [(piece, 0, count, None) for count, piece in enumerate(pieces, 1)] + [("", 0, 4, "stop")]
        for content, index, tokens, reason in [("", 0, 0, None), *chunks]:
            if content:
                self.wait(number, number)
            choice = {"index": index, "delta": {"content": content}, "finish_reason": reason}
            counted = {**usage, "completion_tokens": tokens} if options.get("continuous_usage_stats") else None
            self.event({"choices": [choice], "usage": counted})
            if content and number in self.server.broken:
                return self.wfile.write(self.server.broken[number])
        if options.get("include_usage"):
            self.event({"choices": [], "usage": {**usage, "completion_tokens": 4 if beams == 1 else 5}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content):
        common = {"id": "a", "object": "chat.completion.chunk", "created": 0, "model": "m3"}
        with contextlib.suppress(OSError):
            self.wfile.write(f"data: {json.dumps({**common, **content})}\n\n".encode())

    def wait(self, held_as, number):
        held = self.server.held.get(held_as, self.server.held.get(None))
        while held is not None and not held.acquire(timeout=0.02):
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                self.server.left[number].set()
                raise ConnectionAbortedError

    def whole(self, status, content):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("content-type", "text/html" if isinstance(content, bytes) else "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


@contextlib.contextmanager
def running(port=0):
    with Fake(port) as server:
        server.handle_error = lambda *_: None  # of clients that went
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture
def fake():
    with running() as server:
        yield server


@pytest.fixture(autouse=True)
def near_and_fast(monkeypatch):
    """No proxy in between; and a test whose answer never comes fails in a minute, not in half an hour."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(server_model, "ANSWER_SECONDS", 20)


def model_of(fake, **options):
    model = ServerModel(fake.url, **options)
    model.load(lambda words, share: None)
    return model


def shown(number=36, color="red", size=(30, 20)):
    return Picture(Image.new("RGB", size, color), str(SCENE), number, color)


def asked(text="what", *pictures):
    return Message("user", text, pictures or (shown(),))


def pixels(url):
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def test_an_answer_is_streamed(fake):
    model = model_of(fake)
    assert (model.scales, model.default, model.offers_auto, model.processor) == (SCALES, 36, True, None)
    assert model.facts == f"model m3 on 127.0.0.1:{fake.server_port}" and model.name == "m3"
    fake.held[36] = threading.Semaphore(2)  # the head, and one piece
    answers = model.answer([asked()], Settings(max_new_tokens=5), Person())
    first = next(answers)
    assert (first.text, first.finished, first.cost.answer_tokens) == ("36:", "", 1)
    assert first.cost.prompt_tokens == WORDS + 36 and first.cost.first_token_seconds == first.cost.seconds > 0
    fake.held[36].release(2)
    *_, last = answers
    assert (last.text, last.finished, last.num_visual_tokens, last.error) == ("36: what .", "stop", (36,), "")
    assert last.cost.answer_tokens == 4 and last.cost.seconds >= last.cost.first_token_seconds
    assert last.cost.first_token_seconds == first.cost.first_token_seconds
    assert (last.cost.visual_tokens, last.cost.prefill_flops) == (None, None)
    [body] = fake.asked
    assert body["mm_processor_kwargs"] == {"num_visual_tokens": 36} and body["max_tokens"] == 5
    assert (body["model"], body["temperature"], body["stream"]) == ("m3", 0, True)


def test_what_is_sent_of_a_chat(fake):
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    transparent.info["exif"] = b"Exif\x00\x00"
    model, person = model_of(fake), Person()
    pictures = Picture(transparent, "a.png", 9, "clear"), shown(9)
    video = Picture(sample_video([Image.new("RGB", (5, 5), (i, 0, 0)) for i in range(6)], 3), "a.mp4", 9, "film", True)
    chat = [asked("one", *pictures), Message("assistant", "yes"), Message("user", "two", (video,))]
    list(model.answer(chat, Settings(system="Be brief.", temperature=0.5), person))
    system, first, answer, second = fake.asked[0]["messages"]
    assert system == {"role": "system", "content": "Be brief."} and fake.asked[0]["temperature"] == 0.5
    assert (first["role"], answer["role"], answer["content"]) == (
        "user",
        "assistant",
        [{"type": "text", "text": "yes"}],
    )
    assert [part["type"] for part in first["content"]] == ["image_url", "image_url", "text"]
    seen = pixels(first["content"][0]["image_url"]["url"])
    assert seen.mode == "RGB" and seen.getpixel((0, 0)) == (255, 0, 0) and "exif" not in seen.info
    frames = [pixels(part["image_url"]["url"]).getpixel((0, 0))[0] for part in second["content"][:-1]]
    assert frames == [0, 2, 4] and second["content"][-1]["text"] == "two"
    kept = dict(person.kept)
    list(model.answer(chat, Settings(), person))
    assert set(kept) == {"clear", "red", "film"} and all(person.kept[key] is kept[key] for key in kept)
    *_, last = model.answer([Message("user", "no picture")], Settings(), person)
    assert "mm_processor_kwargs" not in fake.asked[-1] and person.kept == {}
    assert (last.text, last.cost.visual_tokens, last.num_visual_tokens) == ("None: no picture .", 0, ())


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_a_stopped_answer_closes_the_connection(fake, pieces):
    """Before its head, before its first token, and in the midst of it."""
    model, person = model_of(fake), Person()
    fake.held[36] = threading.Semaphore(pieces)
    threading.Timer(0.4, person.stop.set).start()
    *_, last = model.answer([asked()], Settings(), person)
    assert last.finished == "stopped" and last.text == ("36:" if pieces == 2 else "")
    assert fake.left[36].wait(5)


def test_an_answer_that_nobody_reads_on_closes_the_connection(fake):
    model = model_of(fake)
    fake.held[36] = threading.Semaphore(2)
    answers = model.answer([asked()], Settings(), Person())
    assert next(answers).text == "36:"
    answers.close()
    assert fake.left[36].wait(5)


def test_compared_answers_grow_together(fake):
    model = model_of(fake)
    fake.held = {number: threading.Semaphore(1) for number in SCALES}
    rows = model.compare(shown(), "what", Settings(), Person())
    released = iter([576, 1, 576, 36, 1, 9])

    def until(number, text):
        return next(compared for compared in rows if compared.answers[number].text == text)

    grown = dict.fromkeys(SCALES, "")
    for number in released:
        fake.held[number].release()
        grown[number] = {"": f"{number}:", f"{number}:": f"{number}: what"}[grown[number]]
        compared = until(number, grown[number])
        assert {number: compared.answers[number].text for number in SCALES} == grown
    assert [*compared.answers] == [*SCALES, AUTO] and compared.encoding_seconds is None
    for number in SCALES:
        fake.held[number].release(9)
    *_, compared = rows
    assert {number: answer.text for number, answer in compared.answers.items() if number != AUTO} == {
        number: f"{number}: what ." for number in SCALES
    }
    assert all(answer.finished == "stop" for answer in compared.answers.values())
    assert compared.answers[144].num_visual_tokens == (144,)


def test_an_error_ends_its_own_row_alone(fake):
    model = model_of(fake)
    fake.wrong[576] = 400, {"error": {"message": "num_visual_tokens=144 would fit.", "code": 400}}
    fake.wrong[1] = 502, b"<html>\nbad gateway</html>"
    fake.broken = {
        9: b"",
        144: b"data: [DONE]\n\n",
        36: b'data: {"error": {"message": "The engine is dead.", "code": 500}}\n\n',
    }
    model._client.openai.max_retries = 0
    *_, compared = model.compare(shown(), "what", Settings(), Person())
    errors = {number: (answer.finished, answer.error) for number, answer in compared.answers.items()}
    assert errors.pop(576) == ("error", "num_visual_tokens=144 would fit.")
    assert errors.pop(1) == ("error", f"{model.place} answers 502 to POST /v1/chat/completions.")
    assert errors.pop(144) == ("error", f"{model.place} broke off before the answer was whole.")
    assert compared.answers[9].error.startswith(f"{model.place} cannot be asked: ") and errors.pop(9)[0] == "error"
    assert errors.pop(36) == ("error", "The engine is dead.") and compared.answers[36].text == "36:"
    assert errors == {AUTO: ("stop", "")} and compared.answers[AUTO].text == "144: what ."
    with pytest.raises(ValueError, match=r"^num_visual_tokens=144 would fit\.$"):
        list(model.answer([asked("what", shown(576))], Settings(), Person()))


@pytest.mark.parametrize("by", ["stop", "close"])
def test_all_rows_end_together(fake, by):
    model, person = model_of(fake), Person()
    fake.held = {None: threading.Semaphore(0), 1: threading.Semaphore(9)}
    rows = model.compare(shown(), "what", Settings(), person)
    assert any(compared.answers[1].finished for compared in rows)
    if by == "stop":
        person.stop.set()
        [compared] = rows
        ends = {number: answer.finished for number, answer in compared.answers.items()}
        assert ends == {1: "stop", **dict.fromkeys([*SCALES[1:], AUTO], "stopped")}
    else:
        rows.close()
    assert all(fake.left[number].wait(5) for number in SCALES[1:])


def test_what_is_no_fault_of_the_server_is_raised(fake, monkeypatch):
    model = model_of(fake)
    monkeypatch.setattr(model, "_prompt", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(model.answer([asked()], Settings(), Person()))


def test_auto_asks_finer_while_it_is_unsure(fake):
    """The scripted server is as sure as e to the -1 / number: 0.993 at 144. So 9 and 144 are asked, with the whole chat."""
    model = model_of(fake, checkpoint=str(modeling_m3.default_checkpoint()))
    chat = [asked("one", shown(AUTO), shown(AUTO, "blue")), Message("assistant", "yes"), Message("user", "two")]
    [answer] = model.answer(chat, Settings(system="Be brief."), Person())
    assert (answer.text, answer.num_visual_tokens, answer.finished) == ("144: two .", (144, 144), "stop")
    assert [body["mm_processor_kwargs"]["num_visual_tokens"] for body in fake.asked] == [9, 144]
    assert all(
        [turn["role"] for turn in body["messages"]] == ["system", "user", "assistant", "user"] for body in fake.asked
    )
    cost = answer.cost
    assert (cost.visual_tokens, cost.prompt_tokens) == (2 * (9 + 144), 2 * WORDS + 2 * (9 + 144))
    assert (cost.answer_tokens, cost.first_token_seconds) == (8, None)
    each = [model._prompt(model._asked(chat[:1], Settings(), {"red": [""], "blue": [""]}), [number], Usage(number))
            for number in (9, 144)]  # fmt: skip
    assert cost.prefill_flops == sum(one["prefill_flops"] for one in each)
    fake.budgets = {"scales": [576]}
    assert not model_of(fake).offers_auto


class Usage:
    def __init__(self, number):
        self.prompt_tokens, self.prompt_tokens_details = WORDS + 2 * number, None


def test_beams(fake):
    model = model_of(fake)
    *_, answer = model.answer([asked()], Settings(num_beams=2), Person())
    assert fake.asked[0]["use_beam_search"] is True and fake.asked[0]["n"] == 2
    assert fake.asked[0]["mm_processor_kwargs"] == {"num_visual_tokens": 36}
    assert (answer.text, answer.cost.answer_tokens, answer.finished) == ("36: what .", 3, "stop")
    *_, compared = model.compare(shown(), "what", Settings(num_beams=2), Person())
    assert [*compared.answers] == SCALES


@pytest.mark.parametrize(("messages", "settings", "sentence"), [
    ([asked("what", shown(36), shown(9, "blue"))], Settings(), "have 9 and 36 visual tokens, but a server has one number"),
    ([asked("a", shown(576)), asked("b", shown(AUTO))], Settings(), "have 576 and auto visual tokens"),
    ([asked("what", shown(AUTO))], Settings(num_beams=2), "a server does not tell of beams: use 1 beam"),
])  # fmt: skip
def test_what_no_server_answers_is_refused_before_it_is_sent(fake, messages, settings, sentence):
    model = model_of(fake)
    with pytest.raises(ValueError, match=sentence):
        list(model.answer(messages, settings, Person()))
    assert not fake.asked
    with pytest.raises(ValueError, match="start m3-demo with the checkpoint"):
        model.similarities(shown(), 0)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_it_waits_for_a_server_that_starts_late(monkeypatch):
    monkeypatch.setattr(server_model, "STEP_SECONDS", 0.05)
    port, told = free_port(), []
    model = ServerModel(f"http://127.0.0.1:{port}")
    assert model.name == f"127.0.0.1:{port}"
    loading = threading.Thread(target=model.load, args=(lambda words, share: told.append(words),))
    loading.start()
    time.sleep(0.5)
    assert loading.is_alive() and told[-1] == f"Waiting for 127.0.0.1:{port}" and len(told) > 2
    with running(port) as late:
        late.models = 503, {"detail": "starting"}
        time.sleep(0.3)
        assert loading.is_alive()
        late.models = {"data": [{"id": "m3"}]}
        loading.join(10)
        assert not loading.is_alive() and model.scales == SCALES
        *_, answer = model.answer([asked()], Settings(), Person())
    assert answer.text == "36: what ."
    with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be asked: .*refused|failed"):
        list(model.answer([asked()], Settings(), Person()))


def test_its_patience_ends(monkeypatch):
    monkeypatch.setattr(server_model, "STEP_SECONDS", 0.01)
    monkeypatch.setattr(server_model, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(ValueError, match="cannot be asked: .*refused"):
        ServerModel(f"http://127.0.0.1:{free_port()}").load(lambda words, share: None)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "", "ftp://a.example", "http://", "http://a.example/v1?key=1", "http:/a", "/v1"]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match="is no address of a server: give one as http://localhost:8000"):
        ServerModel(url)


@pytest.mark.parametrize(("url", "root", "place"), [
    ("http://localhost:8000", "http://localhost:8000", "localhost:8000"),
    ("http://localhost:8000/v1/", "http://localhost:8000", "localhost:8000"),
    (" https://a.example/m3/v1", "https://a.example/m3", "a.example"),
    ("http://[::1]:8000/", "http://[::1]:8000", "[::1]:8000"),
])  # fmt: skip
def test_urls_as_people_give_them(url, root, place):
    model = ServerModel(url)
    assert (model.root, model.place) == (root, place)


def test_a_url_with_a_password_is_refused_without_it():
    with pytest.raises(ValueError, match="a.example holds a name or a password") as refused:
        ServerModel("http://someone:secret@a.example/v1")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("models", "sentence"), [
    (None, r"answers 404 to GET /v1/models\.$"),
    ((200, b"<html>a page</html>"), "is no server of OpenAI's interface"),
    ({"data": []}, "is no server of OpenAI's interface"),
    ({"data": ["m3"]}, "is no server of OpenAI's interface"),
    ([1], "is no server of OpenAI's interface"),
    ((500, {"error": {"message": "The engine is dead."}}), r"^The engine is dead\.$"),
    ({"data": [{"id": "other"}, {"id": "third"}]}, "has no model m3. Choose from: other, third"),
])  # fmt: skip
def test_what_is_no_such_server_is_refused_at_once(fake, models, sentence):
    fake.models, begin = models, time.monotonic()
    with pytest.raises(ValueError, match=sentence):
        model_of(fake, model="m3")
    assert time.monotonic() - begin < 5
    with pytest.raises(ValueError, match="cannot be asked"):  # it speaks no TLS
        ServerModel(fake.url.replace("http", "https")).load(lambda words, share: None)


@pytest.mark.parametrize("budgets", [None, (200, b"<html>a page</html>"), {"other": 1}])
def test_a_server_that_tells_no_budgets(fake, budgets):
    fake.budgets = budgets
    with pytest.raises(ValueError, match="start it by m3-serve, or name the checkpoint that it serves by --model"):
        model_of(fake)
    model = model_of(fake, checkpoint=str(modeling_m3.default_checkpoint()))
    assert (model.scales, model.default, model.offers_auto) == (SCALES, 576, True)
    assert model.processor is not None
    [answer] = model.answer([asked("what", shown(AUTO))], Settings(), Person())
    assert answer.num_visual_tokens == (144,)


def test_another_checkpoint_than_the_server_s_is_refused(fake):
    fake.budgets = {"scales": [16, 64]}
    with pytest.raises(
        ValueError, match=r"offers \[16, 64\] visual tokens, but .*: name the checkpoint that it serves"
    ):
        model_of(fake, checkpoint=str(modeling_m3.default_checkpoint()))


@pytest.mark.parametrize(("name", "size"), [("llava15-m3", (30, 20)), ("llava-next-m3", (60, 200))])
def test_flops_are_the_roofline_s(fake, converted, name, size):
    model = model_of(fake, checkpoint=str(converted[name]))
    cut = {"image_size": size[::-1]} if name == "llava-next-m3" else {}
    rows = analyze(model.config, "A100", SCALES, **cut)["precisions"]["fp16"]["scales"]
    fake.visual = {row["num_visual_tokens"]: row["visual_tokens"] for row in rows}
    assert (fake.visual[1] > 1) == (name == "llava-next-m3")
    *_, compared = model.compare(shown(size=size), "what", Settings(), Person())
    for number in SCALES:
        figures = analyze(model.config, "A100", [number], prompt_tokens=WORDS, **cut)["precisions"]["fp16"]
        [row], cost = figures["scales"], compared.answers[number].cost
        assert (cost.visual_tokens, cost.prompt_tokens) == (row["visual_tokens"], WORDS + row["visual_tokens"])
        assert cost.prefill_flops == figures["vision"]["flops"] + row["prefill"]["flops"]


QUESTIONS = ['what\'s "this"?', "a\nb\tc", "C:\\new \\", "{x} %s $y", "'''\"\"\"", "größer 貓 \u2028 ?"]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("settings", [
    Settings(max_new_tokens=7), Settings(system='Be "brief".\n{}'), Settings(temperature=0.25), Settings(num_beams=2)
], ids=["plain", "system", "temperature", "beams"])  # fmt: skip
def test_the_lines_print_what_the_page_shows(fake, question, settings, capsys):
    model = model_of(fake)
    *_, compared = model.compare(shown(), question, settings, Person())
    numbers = [*compared.answers]
    sent = {key(body): body for body in fake.asked}
    fake.asked.clear()
    exec(model.as_python(shown(), question, settings, numbers), {})
    assert capsys.readouterr().out == "".join(f"{number} {compared.answers[number].text}\n" for number in numbers)
    assert fake.asked and {key(body): settings_of(body) for body in fake.asked} == {
        number: settings_of(body) for number, body in sent.items()
    }
    assert all(Image.open(SCENE).size == pixels(picture_of(body)).size for body in fake.asked)


def key(body):
    return body["mm_processor_kwargs"]["num_visual_tokens"], bool(body.get("logprobs"))


def settings_of(body):
    texts = [
        [part for part in turn["content"] if isinstance(part, str) or part["type"] == "text"]
        for turn in body["messages"]
    ]
    return texts, *(body.get(name) for name in ("max_tokens", "temperature", "n", "use_beam_search"))


def picture_of(body):
    return next(part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url")


def test_the_lines_of_a_video_and_of_a_server_with_a_key(fake, capsys, monkeypatch):
    from video_files import CLIP

    model = model_of(fake, model="m3", api_key="secret")
    video = Picture(sample_video(CLIP, num_frames=3), str(CLIP), 9, "clip", True)
    *_, answer = model.answer([asked("what", video)], Settings(), Person())
    lines = model.as_python(video, "what", Settings(), [9])
    assert "secret" not in lines and "model='m3'" in lines and set(fake.keys) == {"Bearer secret"}
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    exec(lines, {})
    assert capsys.readouterr().out == f"9 {answer.text}\n" and fake.keys[-1] == "Bearer another"
    assert fake.asked[-1]["messages"] == fake.asked[0]["messages"]


def test_a_key_that_the_server_refuses_is_not_shown(fake):
    model = model_of(fake, api_key="secret")
    for status, body, sentence in (
        (
            401,
            {"error": "Unauthorized"},
            "answers 401 to POST /v1/chat/completions. Give the key that the server wants",
        ),
        (
            403,
            {"error": {"message": "No such key: secret."}},
            r"No such key: \.\.\.\. Give the key that the server wants",
        ),
    ):
        fake.wrong[36] = status, body
        with pytest.raises(ValueError, match=sentence) as refused:
            list(model.answer([asked()], Settings(), Person()))
        assert "secret" not in str(refused.value)


def test_a_model_in_a_folder_is_shown_without_the_folders_above(fake):
    fake.models = {"data": [{"id": "/models/llava-m3"}, {"id": "other"}]}
    model = model_of(fake)
    assert model.name == "llava-m3" and "/models" not in model.facts
    assert "/models" not in model.as_python(shown(), "what", Settings(), [36])
    list(model.answer([asked()], Settings(), Person()))
    assert fake.asked[0]["model"] == "/models/llava-m3"


@pytest.mark.serve
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM (CI has a stage for it)")
def test_vllm_answers_as_the_checkpoint_in_this_process(tmp_path):
    from test_serve_engine import serving

    from m3_serving.demo.local_model import LocalModel

    folder = tmp_path / "m3-tiny"
    shutil.copytree(modeling_m3.default_checkpoint(), folder)
    local = LocalModel(str(folder), device="cpu")
    local.load(lambda words, share: None)
    questions = ("What color is the large circle?", "Is there a triangle?", "What is there?")
    with serving(folder) as (url, _):
        model = ServerModel(url, checkpoint=str(folder))
        model.load(lambda words, share: None)
        assert (model.scales, model.default, model.name) == (local.scales, local.default, local.name)
        scene = Picture(Image.open(SCENE), "scene.png", 36, "scene")
        for question in questions:
            *_, here = local.compare(scene, question, Settings(max_new_tokens=12), Person())
            *_, there = model.compare(scene, question, Settings(max_new_tokens=12), Person())
            for number in model.scales:
                same(there.answers[number], here.answers[number], here.encoding_flops)
                assert there.answers[number].cost.answer_tokens == here.answers[number].cost.answer_tokens
            automatic = there.answers[AUTO]
            chosen = there.answers[automatic.num_visual_tokens[0]]
            assert (automatic.text, automatic.finished) == (chosen.text, chosen.finished)
        for number in model.scales:
            at = Picture(scene.image, "scene.png", number, "scene")
            chat = [Message("user", questions[0], (at,)), Message("assistant", "orange"), Message("user", questions[1])]
            for settings in (Settings(), Settings(system="Answer with one word.", max_new_tokens=3)):
                *_, here = local.answer(chat, settings, Person())
                *_, there = model.answer(chat, settings, Person())
                same(there, here)
        *_, beams = model.answer(
            [Message("user", questions[0], (scene,))], Settings(num_beams=2, max_new_tokens=4), Person()
        )
        assert beams.text and beams.finished and beams.cost.prompt_tokens == 53
        for chat, sentence in (([Message("user", "<image>?", (scene,))], "stands for a picture"),
                               ([Message("user", "?", (scene,) * 9)], "At most 8 image")):  # fmt: skip
            with pytest.raises(ValueError, match=sentence):
                list(model.answer(chat, Settings(), Person()))


def same(there: Answer, here: Answer, encoding_flops: float = 0.0):
    assert (there.text, there.finished) == (here.text.strip(), here.finished)
    costs = ("visual_tokens", "prompt_tokens")
    assert [getattr(there.cost, name) for name in costs] == [getattr(here.cost, name) for name in costs]
    assert there.cost.prefill_flops == here.cost.prefill_flops + encoding_flops
