"""m3-demo in a real browser: what people see on the page, next to what `m3-ask` and `generate` answer."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, which

import pytest
from conftest import commands_on_path
from PIL import Image, ImageChops
from typer.testing import CliRunner
from video_files import CLIP

import modeling_m3


AXE = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
MISSING = [name for name in ("gradio", "playwright", "matplotlib", "av", "openai") if find_spec(name) is None]
MISSING += [name for name, there in (("Chromium", CHROMIUM), (f"{AXE}, of npm", AXE.is_file())) if not there]
if not MISSING:
    import httpx  # of gradio

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (CI has a stage for it)"),
]

REPOSITORY = Path(__file__).parent.parent
SCENE = REPOSITORY / "tests" / "fixtures" / "scene.png"
WIDTHS = {"wide": 1200, "narrow": 380}
SCALES = (1, 9, 36, 144, 576)
# Writes down every address that the server's process connects to.
AUDIT = """
import os, sys
def seen(event, args):
    if event == "socket.connect":
        with open(os.environ["M3_CONNECTIONS"], "a") as file:
            print(args[1], file=file)
sys.addaudithook(seen)
"""
# Writes down, at a signal, how many bytes Python, NumPy and torch hold: what allocators keep beyond that depends on luck.
COUNT = """
import gc, os, signal, sys, tracemalloc
def count(*_):
    gc.collect()
    torch = sys.modules["torch"]
    tensors = [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]
    storages = {held.untyped_storage().data_ptr(): held.untyped_storage().nbytes() for held in tensors}
    held = tracemalloc.get_traced_memory()[0] + sum(storages.values())
    with open(os.environ["M3_HELD"] + ".part", "w") as file:
        file.write(str(held))
    os.replace(file.name, os.environ["M3_HELD"])
signal.signal(signal.SIGUSR1, count)
tracemalloc.start()
"""


class Server:
    """`m3-demo` as a process, with a folder of its own for what is temporary."""

    def __init__(self, folder, *options, watch=AUDIT):
        self.temporary, self.connections = folder / "temporary", folder / "connections"
        self.temporary.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(watch)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}/", folder / "log"
        environment = {
            **os.environ,
            "PATH": commands_on_path(),
            "PYTHONPATH": str(folder),
            "TMPDIR": str(self.temporary),
            "M3_CONNECTIONS": str(self.connections),
            "M3_HELD": str(folder / "held"),
        }
        command = ["m3-demo", "--port", str(self.port), *map(str, options)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        until(lambda: self.url in self.said or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.said

    @property
    def said(self):
        return self.log.read_text(errors="replace")

    def files(self):
        """Of people: the page's own examples are not among them."""
        held = [file for file in self.temporary.rglob("*") if file.is_file() and file.name != "lock"]
        return [file for file in held if file.name not in ("triangle.png", "circle.png", "cross.png")]

    def end(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)
        return self.process.wait(30)


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


@contextlib.contextmanager
def serving(folder, *options, **given):
    server = Server(folder, *options, **given)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            assert server.end() == 128 + signal.SIGTERM
            assert not list(server.temporary.iterdir())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("m3-tiny")) as server:
        yield server
    assert "Traceback" not in server.said
    connected = set(server.connections.read_text().splitlines())
    assert connected and all("127.0.0.1" in address for address in connected), connected


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A checkpoint that never ends an answer by itself, so that it can be stopped in the middle."""
    folder = tmp_path_factory.mktemp("talkative")
    copytree(modeling_m3.default_checkpoint(), folder / "checkpoint")
    settings = folder / "checkpoint" / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": None}))
    with serving(folder, "--model", folder / "checkpoint", "--users", 30) as server:
        yield server
    assert "Traceback" not in server.said


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Whose camera sees the scene."""
    from playwright.sync_api import sync_playwright

    film = tmp_path_factory.mktemp("camera") / "scene.mjpeg"
    Image.open(SCENE).convert("RGB").resize((640, 640)).save(film, "JPEG", quality=95)
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", f"--use-file-for-fake-video-capture={film}"]
    arguments += [f"--use-fake-{what}-for-media-stream" for what in ("device", "ui")]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, server, width=1200, **options):
    """The page, once it can be used. It must ask nothing of any other host, and print no error."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    context.set_default_timeout(15000)
    page, requests, errors = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    button(page, "Ask").wait_for()
    page.wait_for_function("!document.querySelector('progress')", timeout=30000)
    page.get_by_text("people may wait").wait_for()
    try:
        yield page
    finally:
        context.close()
    elsewhere = [url for url in requests if not url.startswith((server.url, "data:", "blob:"))]
    assert requests and not elsewhere and not errors, (elsewhere, errors)


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        yield page


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def section(page, name):
    page.get_by_role("button", name=re.compile(f"^{name}")).click()


def upload(page, file=SCENE, place="#m3-picture"):
    zone = page.locator(place)
    with page.expect_file_chooser() as chooser:
        zone.locator("button[aria-dropeffect]").click()
    chooser.value.set_files(str(file))


def upload_picture(page, file=SCENE, place="#m3-picture"):
    upload(page, file, place)
    page.locator(f"{place} img").wait_for()


def choose(page, label, value):
    page.get_by_role("group", name=re.compile(f"^{label}")).locator("visible=true").get_by_label(
        str(value), exact=True
    ).check()


def finished(page, kind="answer"):
    """The text of what is shown, once it is there as a whole."""
    shown = page.locator(f".m3-{kind}[aria-busy=false]").locator("visible=true")
    shown.wait_for(timeout=60000)
    return shown.inner_text().strip()


def costs(page):
    facts = page.locator(".m3-cost").locator("visible=true")
    return dict(zip(facts.locator("dt").all_inner_texts(), facts.locator("dd").all_inner_texts()))


def problem(page):
    shown = page.locator(".m3-problem[role=alert]").locator("visible=true")
    shown.wait_for()
    return shown.inner_text()


def ask(page, question, number=None, file=SCENE):
    upload_picture(page, file)
    page.get_by_label("Question", exact=True).fill(question)
    if number is not None:
        choose(page, "Visual tokens", number)
    button(page, "Ask").click()


@cache
def said_by_m3_ask(question, *options, file=SCENE):
    from modeling_m3.__main__ import app

    result = CliRunner().invoke(app, [str(file), question, "--quiet", *map(str, options)])
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def rows(page):
    """(visual tokens, answer) of the comparison."""
    table = page.locator(".m3-compared tbody tr")
    return [(row.locator("th").inner_text(), row.locator("td").first.inner_text()) for row in table.all()]


@pytest.mark.parametrize("number", [1, 144, "auto"])
def test_an_answer_is_that_of_m3_ask(number, page):
    ask(page, "What does the code say?", number)
    assert finished(page) == said_by_m3_ask("What does the code say?", "--num-visual-tokens", number)
    facts = costs(page)
    assert list(facts) == ["Visual tokens", "Prompt tokens", "Prefill", "First token", "Total", "Speed"]
    assert facts["Visual tokens"].split()[0] == {"auto": "145"}.get(number, str(number))  # of both of its passes
    assert re.fullmatch(r"[\d.]+ GFLOPs", facts["Prefill"]) and "–" not in facts.values()


def test_a_question_holds_what_it_will(page):
    question = '<image> <b>&amp;</b> "quoted" </s>\nand another line'
    ask(page, question, 9)
    assert finished(page) == said_by_m3_ask(question, "--num-visual-tokens", 9)


def test_a_picture_is_pasted(browser, server):
    with opened(browser, server, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.evaluate(
            """bytes => navigator.clipboard.write([
                new ClipboardItem({"image/png": new Blob([Uint8Array.from(bytes)], {type: "image/png"})})
            ])""",
            list(SCENE.read_bytes()),
        )
        page.locator("#m3-picture").get_by_label("Paste from clipboard").click()
        page.locator("#m3-picture img").wait_for()
        page.get_by_label("Question", exact=True).fill("What does the code say?")
        button(page, "Ask").click()
        assert finished(page) == said_by_m3_ask("What does the code say?")


def test_a_picture_of_the_camera_can_be_read(browser, server):
    """It is not mirrored, as gradio's are."""
    with opened(browser, server, permissions=["camera"]) as page:
        picture = page.locator("#m3-picture")
        picture.get_by_label("Capture from camera").click()
        picture.get_by_text("Click to Access Webcam").click()
        picture.get_by_label("capture photo").click()
        picture.locator("img").wait_for()
        page.get_by_label("Question", exact=True).fill("What does the code say?")
        button(page, "Ask").click()
        assert finished(page) == said_by_m3_ask("What does the code say?")


def test_compare(browser, server, tmp_path):
    with opened(browser, server, permissions=["clipboard-read", "clipboard-write"]) as page:
        upload_picture(page)
        page.get_by_label("Question", exact=True).fill("What does the code say?")
        tab(page, "Compare")
        button(page, "Compare").click()
        finished(page, "compared")
        answers = dict(rows(page))
        marked = page.locator(".m3-compared mark").all_inner_texts()
        plot = page.locator("svg.m3-plot").get_attribute("aria-label")
        button(page, "Copy as Python").click()
        page.get_by_text("The Python lines are copied.").wait_for()
        lines = page.evaluate("navigator.clipboard.readText()")
        tab(page, "Ask")
        assert page.locator("#m3-picture img").is_visible()
    said = said_by_m3_ask("What does the code say?", "--compare")
    expected = dict(re.findall(r"^ +(auto: \d+|\d+) +[\d.]+ s +[\d.]+ s  (.*)$", said, re.MULTILINE))
    shown = {name.partition(":")[0]: text.replace(" (the same)", "") for name, text in answers.items()}
    assert shown == {name.partition(":")[0]: text for name, text in expected.items()}
    assert list(shown) == [*map(str, SCALES), "auto"]
    assert marked == [answer for answer in dict.fromkeys(shown.values()) if answer != shown["576"]]
    assert all(f"{number} visual tokens: " in plot for number in SCALES)
    (tmp_path / "scene.png").write_bytes(SCENE.read_bytes())
    repeated = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert repeated.stdout.splitlines() == [f"{name} {answer}" for name, answer in shown.items()]


def test_see(page, tmp_path):
    from modeling_m3.overlay import see

    _, processor = modeling_m3.load(modeling_m3.default_checkpoint())
    seen = see(processor, Image.open(SCENE))
    upload_picture(page)
    tab(page, "See")
    choose(page, "Visual tokens", 9)
    page.get_by_text("9 visual tokens: 3 x 3.").wait_for()
    with page.expect_download() as download:
        page.locator("#m3-seen").get_by_role("link").or_(
            page.locator("#m3-seen").get_by_label("Download")
        ).first.click()
    download.value.save_as(tmp_path / "seen.png")
    assert download.value.suggested_filename == "m3-grid-9.png"
    drawn = Image.open(tmp_path / "seen.png").convert("RGB")
    assert drawn.size == seen.draw(9).size and ImageChops.difference(drawn, seen.draw(9)).getbbox() is None
    box, picture = seen.boxes(9)[5], page.locator("#m3-seen img")
    shown = picture.bounding_box()
    ratio = min(shown["width"] / drawn.width, shown["height"] / drawn.height)
    left = (shown["width"] - ratio * drawn.width) / 2 + ratio * (box.left + box.right) / 2
    top = (shown["height"] - ratio * drawn.height) / 2 + ratio * (box.top + box.bottom) / 2
    picture.click(position={"x": left, "y": top})
    page.get_by_text(f"How similar each token is to {box.describe()}").wait_for()
    assert page.get_by_label("Similarity to one token").is_checked()
    page.get_by_role("slider", name="Token").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text(seen.boxes(9)[6].describe()).wait_for()
    choose(page, "Visual tokens", 1)
    page.get_by_text(seen.boxes(1)[0].describe()).wait_for()


def say(page, words):
    page.get_by_label("Message", exact=True).fill(words)
    button(page, "Send").click()


def answers_in_chat(page, count):
    said = page.locator("#m3-talk [data-testid=bot]")
    until(lambda: said.count() >= count and not page.locator("#m3-talk .generating").count())
    page.wait_for_timeout(400)
    return [text.strip() for text in said.all_inner_texts()]


def of_a_chat(*turns):
    """Greedy answers of `generate` to each turn, (pictures with their numbers, question), from the whole chat anew."""
    model, processor = modeling_m3.load(modeling_m3.default_checkpoint())
    chat, numbers, answers = [], [], []
    for pictures, question in turns:
        images = [{"type": "image", "image": Image.open(file)} for file, _ in pictures]
        chat.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        numbers += [number for _, number in pictures]
        inputs = processor.apply_chat_template(
            chat,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": numbers},
        )
        answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(answer, skip_special_tokens=True))
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
    return answers


def test_chat_with_two_pictures(page):
    other = REPOSITORY / "serving" / "demo" / "examples" / "cross.png"
    tab(page, "Chat")
    upload_picture(page, SCENE, "#m3-chat-picture")
    choose(page, "Visual tokens of this picture", 36)
    say(page, "What color is the large circle?")
    first = answers_in_chat(page, 1)
    upload_picture(page, other, "#m3-chat-picture")
    choose(page, "Visual tokens of this picture", 144)
    say(page, "What is the large shape?")
    both = answers_in_chat(page, 2)
    cached = costs(page)
    turns = [([(SCENE, 36)], "What color is the large circle?"), ([(other, 144)], "What is the large shape?")]
    assert both == of_a_chat(*turns) and both[:1] == first
    assert cached["Visual tokens"] == "180 (36 + 144 a tile)" or cached["Visual tokens"].startswith("180")
    button(page, "Retry").click()
    page.wait_for_timeout(1500)
    assert answers_in_chat(page, 2) == both
    # A third picture at 576 is beyond m3-tiny's context of 1,024 tokens together with a fourth.
    for _ in range(2):
        upload_picture(page, other, "#m3-chat-picture")
        choose(page, "Visual tokens of this picture", 576)
        button(page, "Add another picture").click()
        page.get_by_text("With the next message: ").wait_for()
        page.locator("#m3-chat-picture img").wait_for(state="detached")
    say(page, "And these?")
    assert "1024" in problem(page).replace(",", "")
    assert page.get_by_label("Message", exact=True).input_value() == "And these?"
    assert answers_in_chat(page, 2) == both
    button(page, "New chat").click()
    page.get_by_text("Ask about one picture or several").wait_for()
    say(page, "Hello?")
    answers_in_chat(page, 1)
    assert costs(page)["Visual tokens"] == "0"


def test_stop_in_the_middle(browser, talkative):
    with opened(browser, talkative) as page:
        section(page, "More")
        page.get_by_label("Length of the answer", exact=False).first.fill("1024")
        ask(page, "What is it?", 1)
        page.locator(".m3-answer[aria-busy=true]").wait_for()
        page.wait_for_timeout(500)
        button(page, "Stop").locator("visible=true").click()
        assert finished(page).endswith("(stopped)")
        assert float(costs(page)["Total"].split()[0]) < 20
        page.get_by_label("Length of the answer", exact=False).first.fill("8")
        button(page, "Ask").click()  # and the next answer is whole
        page.get_by_text("cut off: it reached the longest length").wait_for()


@pytest.mark.parametrize("kind", ["text", "cut", "none", "no question"])
def test_wrong_input_is_a_sentence(kind, page, tmp_path):
    file = tmp_path / "notes.png"
    if kind in ("text", "cut"):
        file.write_bytes(b"not a picture" if kind == "text" else SCENE.read_bytes()[:900])
        upload(page, file)
        page.locator("#m3-picture img").wait_for(state="attached")
    elif kind == "no question":
        upload_picture(page)
    page.get_by_label("Question", exact=True).fill("\u3000\u200b" if kind == "no question" else "What is it?")
    button(page, "Ask").click()
    expected = {
        "text": "notes.png is not a picture that can be opened. Check that the file is complete.",
        "cut": "notes.png is not a picture that can be opened. Check that the file is complete.",
        "none": "There is no picture yet: upload one, paste it, or take an example.",
        "no question": "There is no question yet: write one first.",
    }
    assert problem(page) == expected[kind]


def test_a_picture_over_the_limit(browser, tmp_path):
    Image.effect_noise((1200, 1200), 100).save(tmp_path / "large.png")
    with serving(tmp_path, "--max-upload", 1) as server:
        with opened(browser, server) as page:
            upload(page, tmp_path / "large.png")
            page.get_by_text(re.compile("exceed the maximum")).first.wait_for()
            assert not page.locator("#m3-picture img").count()
        assert not server.files()


def test_examples_and_keyboard_alone(page):
    """From the top of the page to an answer by Tab, Space, Enter and the arrows."""

    def go_to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("[document.activeElement.ariaLabel, document.activeElement.innerText]").count(name):
                return
        raise AssertionError(f"{name} is not reached")

    go_to("Example: What color is the large shape?")
    page.keyboard.press("Enter")
    page.locator("#m3-picture img").wait_for()
    go_to("Ask")  # the tab
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "radio":
            break
    page.keyboard.press("ArrowLeft")  # from 576 to the next coarser
    go_to("Ask")
    page.keyboard.press("Enter")
    assert finished(page) == "red"
    assert costs(page)["Visual tokens"] == "144"


def test_two_browsers_at_once(browser, server):
    with opened(browser, server) as one, opened(browser, server) as other:
        for page, number in ((one, 1), (other, 576)):
            upload_picture(page)
            page.get_by_label("Question", exact=True).fill("What does the code say?")
            choose(page, "Visual tokens", number)
        for _ in range(3):
            button(one, "Ask").click()
            button(other, "Ask").click()
            said = [finished(one), finished(other)]
        assert said == [said_by_m3_ask("What does the code say?", "--num-visual-tokens", n) for n in (1, 576)]
        assert [costs(page)["Visual tokens"] for page in (one, other)] == ["1", "576"]


class Sessions:
    """Other people with the page open, each with a session of its own: they send what a browser sent."""

    def __init__(self, page, server):
        self.client = httpx.Client(base_url=f"{server.url}gradio_api/queue/", timeout=120)
        with page.expect_request("**/queue/join*") as sent:
            button(page, "Ask").click()
        self.sent = sent.value.post_data_json
        finished(page)

    def ask(self, number, session, length=256):
        """(answer, visual tokens) of the same question at a number of visual tokens."""
        picture, question, _, system, _, *settings = self.sent["data"]
        asked = [picture, question, number, system, length, *settings]
        data = {**self.sent, "data": asked, "session_hash": session}
        self.client.post("join", json=data).raise_for_status()
        sent, said = {}, {}
        with self.client.stream("GET", "data", params={"session_hash": session}) as events:
            for line in events.iter_lines():
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if event.get("msg") == "process_generating":
                    _patch(sent, event["output"]["data"])
                    said |= {place: text for place, text in sent.items() if isinstance(text, str)}
                if event.get("msg") == "process_completed":
                    assert event["success"], event
                    break
        shown = re.search(r'aria-busy="false">(.*?)</div>', said[0])[1]
        return shown, re.search(r"<dd>(.*?)</dd>", said[1])[1]


def _patch(sent, outputs):
    """Takes what came of each output: its value, or how it differs from the one before, as gradio sends both."""
    for place, output in enumerate(outputs):
        if not isinstance(output, list):
            sent[place] = output
            continue
        for kind, path, value in output:
            assert not path
            sent[place] = value if kind == "replace" else sent[place] + value


def test_twenty_users_in_the_queue(page, server):
    ask(page, "What does the code say?", 36)
    finished(page)
    people, numbers = Sessions(page, server), [SCALES[index % len(SCALES)] for index in range(20)]
    with ThreadPoolExecutor(20) as at_once:
        shown = list(at_once.map(people.ask, numbers, [f"person{index}" for index in range(20)]))
    expected = {n: said_by_m3_ask("What does the code say?", "--num-visual-tokens", n) for n in SCALES}
    assert shown == [(expected[number], str(number)) for number in numbers]


def test_more_users_than_may_wait_are_asked_to_come_later(browser, tmp_path):
    with serving(tmp_path, "--users", 1) as server, opened(browser, server) as page:
        ask(page, "What does the code say?", 36)
        finished(page)
        people = Sessions(page, server)
        with ThreadPoolExecutor(8) as at_once:
            asked = [at_once.submit(people.ask, 576, f"person{index}") for index in range(8)]
        refused = [one.exception().response.status_code for one in asked if one.exception()]
        answered = [one.result() for one in asked if not one.exception()]
    assert set(refused) == {503} and set(answered) == {("E419", "576")}


def test_reload_in_the_middle(browser, talkative):
    with opened(browser, talkative) as page:
        section(page, "More")
        page.get_by_label("Length of the answer", exact=False).first.fill("1024")
        ask(page, "What is it?", 1)
        page.locator(".m3-answer[aria-busy=true]").wait_for()
        page.reload()
        page.get_by_text("The answer appears here.").wait_for()
        page.get_by_text("people may wait").wait_for()
        until(lambda: not talkative.files())  # the picture went with the page that was left
        ask(page, "What is it?", 1)
        assert finished(page).endswith("(cut off: it reached the longest length)")
    until(lambda: not talkative.files())


def test_video(page):
    tab(page, "Video")
    upload(page, CLIP, "#m3-video")
    page.get_by_text("Frame 6 at 3.3 s: 36 visual tokens").wait_for()  # all together no more than a picture may cost
    choose(page, "Visual tokens of each frame", 9)
    page.get_by_text("Frame 6 at 3.3 s: 9 visual tokens").wait_for()
    captions = page.locator(".m3-frames figcaption").all_inner_texts()
    assert len(captions) == 6 and all(caption.endswith(": 9 visual tokens") for caption in captions)
    page.get_by_label("Question about the video").fill("Is there a star?")
    button(page, "Ask about the video").click()
    expected = said_by_m3_ask("Is there a star?", "--num-visual-tokens", 9, file=CLIP)
    assert finished(page) == expected
    assert costs(page)["Visual tokens"].startswith("54")


def test_a_picture_by_url(page, tmp_path):
    (tmp_path / "scene.png").write_bytes(SCENE.read_bytes())
    handler = type("Handler", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=tmp_path)) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{files.server_address[1]}"
        section(page, "By URL")
        for url, sentence in (
            (f"{address}/nothing.png", "the server answered 404"),
            ("/etc/passwd", "is no URL of a picture"),
            ("file:///etc/passwd", "is no URL of a picture"),
        ):
            page.get_by_label("URL of a picture").fill(url)
            button(page, "Load").click()
            page.get_by_text(sentence).wait_for()
        page.get_by_label("URL of a picture").fill(f"{address}/scene.png")
        button(page, "Load").click()
        page.locator("#m3-picture img").wait_for()
        files.shutdown()
    page.get_by_label("Question", exact=True).fill("What color is the large circle?")
    choose(page, "Visual tokens", 36)
    button(page, "Ask").click()
    assert finished(page) == "orange"


def test_no_path_of_the_machine_is_reachable(page, server):
    for path in (
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={REPOSITORY}/README.md",
        f"gradio_api/file={server.log}",
        "gradio_api/file=../../etc/passwd",
        f"gradio_api/file={server.temporary}/x/../../log",
        "gradio_api/file=http://127.0.0.1:1/",
        "gradio_api/proxy=http://127.0.0.1:1/",
        "gradio_api/info",
        "monitoring",
        "docs",
        "openapi.json",
    ):
        response = page.request.get(server.url + path)
        assert response.status in (403, 404), (path, response.status)
    assert str(REPOSITORY) not in page.content()


LOOKS = [(width, scheme) for width in WIDTHS for scheme in ("light", "dark")]


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_accessible_and_within_the_screen(width, scheme, browser, server, request, tmp_path_factory):
    folder = request.config.getoption("--screenshots") or tmp_path_factory.mktemp("screenshots")
    found = []

    def look(page, name):
        page.wait_for_timeout(500)
        page.screenshot(path=Path(folder) / f"demo-{name}-{width}-{scheme}.png", full_page=True)
        report = page.evaluate("axe.run()")
        found.extend(
            (name, finding["id"], node["html"][:200])
            for finding in report["violations"]
            for node in finding["nodes"]
            if finding["impact"] in ("serious", "critical")
        )
        assert report["passes"]
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width], name

    with opened(browser, server, WIDTHS[width], color_scheme=scheme) as page:
        page.evaluate(AXE.read_text())
        ask(page, "What does the code say?", 36)
        finished(page)
        look(page, "ask")
        tab(page, "Compare")
        button(page, "Compare").click()
        finished(page, "compared")
        look(page, "compare")
        tab(page, "See")
        choose(page, "Visual tokens", 36)
        page.get_by_text("36 visual tokens: 6 x 6.").wait_for()
        look(page, "see")
        tab(page, "Chat")
        upload_picture(page, SCENE, "#m3-chat-picture")
        say(page, "What color is the large circle?")
        answers_in_chat(page, 1)
        button(page, "Retry").wait_for()
        look(page, "chat")
        tab(page, "Video")
        upload(page, CLIP, "#m3-video")
        page.get_by_text("Frame 6 at ").wait_for()
        look(page, "video")
        section(page, "More")
        tab(page, "Ask")
        page.get_by_label("Question", exact=True).fill("")
        button(page, "Ask").click()
        problem(page)
        look(page, "more")
    assert not found, found


def test_memory_after_many_asks_is_that_of_a_few(browser, tmp_path):
    with serving(tmp_path, watch=AUDIT + COUNT) as server, opened(browser, server) as page:
        ask(page, "What does the code say?", 36)
        finished(page)
        people, counted, held = Sessions(page, server), tmp_path / "held", {}
        for count in range(1, 201):
            assert people.ask(SCALES[count % len(SCALES)], "person")
            if count in (20, 100, 200):
                server.process.send_signal(signal.SIGUSR1)
                until(counted.is_file)
                held[count] = int(counted.read_text())
                counted.unlink()
        files = server.files()
    assert len(files) == 1, files
    # Gradio keeps 17 kB an ask for who asks; a picture or its visual tokens are hundreds.
    assert held[200] - held[100] < 100 * 32_768 and held[100] - held[20] < 80 * 32_768, held


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_in_temporary_folders(signum, browser, tmp_path):
    server = Server(tmp_path)
    with opened(browser, server) as page:
        ask(page, "What is it?", 1)
        finished(page)
        assert server.files()
        status = server.end(signum)
    if signum == signal.SIGKILL:
        server = Server(tmp_path)  # started again
        assert not server.files()
        server.end()
    else:
        assert status == 128 + signum and "m3-demo: stopped" in server.said
    assert not list(server.temporary.iterdir())


def test_in_front_of_a_server(browser, tmp_path):
    from test_demo_server import running

    with running() as fake, serving(tmp_path, "--server", fake.url) as server, opened(browser, server) as page:
        ask(page, "What?", 36)
        assert finished(page) == "36: What? ."
        assert costs(page)["Prompt tokens"] == "53"
        tab(page, "Compare")
        button(page, "Compare").click()
        finished(page, "compared")
        assert [row for row in rows(page) if row[0].isdecimal()] == [(str(n), f"{n}: What? .") for n in SCALES]
        tab(page, "See")
        assert "start m3-demo with --model" in problem(page)


@pytest.mark.parametrize(("options", "sentence"), [
    (["--model", "nothing/here"], "nothing/here"),
    (["--server", "ftp://somewhere"], "ftp://somewhere"),
    (["--server", "http://localhost:1", "--dtype", "float16"], "--dtype are for a checkpoint in this process"),
])  # fmt: skip
def test_what_cannot_be_had_ends_the_command_in_a_line(options, sentence, tmp_path):
    environment = {**os.environ, "PATH": commands_on_path(), "TMPDIR": str(tmp_path)}
    result = subprocess.run(["m3-demo", "--port", "7896", *options], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert sentence in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "numbers", [(10**9, 0, 1), (0, 0, 1), (256, -1, 1), (256, 0, 100), (256, "hot", 1), (None, 0, 1)]
)
def test_numbers_that_no_control_offers_are_refused(numbers):
    from m3_serving.demo.controls import settings_of

    with pytest.raises(ValueError, match="must be a number from"):
        settings_of("", *numbers)
