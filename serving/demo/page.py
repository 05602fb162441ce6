"""The page: a picture and a question at the left, what comes of them in tabs at the right."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import ImageOps

from modeling_m3.pictures import open_pictures

from .ask_tab import ask_tab, compare_tab
from .asking import AUTO, Model
from .chat_tab import chat_tab
from .controls import Shared, in_sentences, more_settings, picture_input
from .fetching import fetch
from .loading import Loading
from .people import People
from .rendering import status_html
from .see_tab import see_tab
from .video_tab import video_tab


TABS = {"Ask": ask_tab, "Compare": compare_tab, "See": see_tab, "Chat": chat_tab, "Video": video_tab}
WITHOUT_PICTURE = ("Chat", "Video")  # they have their own
EXAMPLES = Path(__file__).parent / "examples"
QUESTIONS = {
    "triangle.png": "What does the code say?",
    "circle.png": "How many dots are there?",
    "cross.png": "What color is the large shape?",
}
STYLE = Path(__file__).parent / "style.css"
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # none is fetched from anywhere
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
THEME = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=MONO).set(
    # Text that WCAG AA calls legible; gradio's own greys are not.
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    input_placeholder_color="*neutral_600",
    input_placeholder_color_dark="*neutral_300",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
    color_accent="*primary_600",
    button_transition="none",
)
HEADER = """<header class="m3-header"><h1>M3</h1><p>One picture, as many visual tokens as you choose.</p></header>
<p id="m3-said" role="status"></p>"""
# Copying is not let to pages without https by browsers. The names of gradio's controls are mended for screen readers: a drop zone
# is named otherwise than it reads, and a button lies in a button.
HEAD = """
<script>
new MutationObserver(() => {
  for (const zone of document.querySelectorAll("button[aria-dropeffect][aria-label]")) zone.removeAttribute("aria-label");
  for (const toast of document.querySelectorAll(".toast-header[role]")) toast.removeAttribute("role");
}).observe(document.documentElement, { childList: true, subtree: true });
window.m3Copy = async (text) => {
  const say = (words) => { document.getElementById("m3-said").textContent = words; };
  try { await navigator.clipboard.writeText(text); say("The Python lines are copied."); }
  catch { say("This browser does not let the page copy: open \\u201cThe same in Python\\u201d and copy from there."); }
};
</script>
"""


def build(model: Model, loading: Loading, people: People, users: int, most_bytes: int, public: bool) -> gr.Blocks:
    """The page.

    Args:
        model: that answers; it may still be loading.
        loading: of it.
        people: who has the page open.
        users: that may wait for an answer.
        most_bytes: of an upload.
        public: whether others than this machine's users can see the page.
    """
    shared = Shared(model, people, more_settings())
    with gr.Blocks(title="M3: dial the visual tokens", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(
            '<header class="m3-header"><h1>M3</h1><p>One picture, as many visual tokens as you choose.</p></header>'
        )
        status = gr.HTML(status_html("Starting", None, False, ""))
        with gr.Row(elem_classes="m3-main"):
            with gr.Column(scale=2, min_width=260) as left:
                _picture_and_question(shared, most_bytes, public)
            with gr.Column(scale=3, min_width=260):
                with gr.Tabs():
                    for name, fill in TABS.items():
                        with gr.Tab(name) as tab:
                            fill(shared, tab)
                        tab.select(
                            functools.partial(gr.update, visible=name not in WITHOUT_PICTURE),
                            outputs=left,
                            queue=False,
                            show_progress="hidden",
                            api_visibility="private",
                        )
                with gr.Accordion("More", open=False):
                    for control in shared.settings:
                        control.render()

        def load() -> Iterator[dict[Any, Any]]:
            for _ in loading.changes():
                yield {status: status_html(loading.words, loading.share, False, loading.error)}
            if loading.is_ready:
                auto, finest = [AUTO] * model.offers_auto, max(model.scales)
                words = f"{model.name}: {model.facts}. Up to {users} people may wait for an answer."
                yield {
                    status: status_html(words, None, True, ""),
                    **{
                        radio: gr.update(
                            choices=[*model.scales, *(auto if may_be_auto else [])],
                            value=finest if model.default == AUTO and not may_be_auto else model.default,
                        )
                        for radio, may_be_auto in shared.numbers
                    },
                    **{button: gr.update(interactive=True) for button in shared.buttons},
                }

        page.load(
            load,
            outputs=[status, *(radio for radio, _ in shared.numbers), *shared.buttons],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )

        def left_page(request: gr.Request) -> None:
            people.forget(request)

        page.unload(left_page)
    return page


def _picture_and_question(shared: Shared, most_bytes: int, public: bool) -> None:
    shared.picture = picture_input("Picture", 280, "m3-picture")
    shared.registers(shared.picture)
    with gr.Accordion("By URL", open=False):
        url = gr.Textbox(label="URL of a picture", placeholder="https://", max_lines=1)
        get = gr.Button("Load")
        problem = gr.HTML()
    shared.question = gr.Textbox(label="Question", max_lines=6, elem_id="m3-question")
    examples = gr.Dataset(
        label="Examples",
        components=[gr.Image(render=False)],
        samples=[[str(EXAMPLES / name)] for name in QUESTIONS],
        type="index",
    )
    examples.click(
        lambda index: (str(EXAMPLES / list(QUESTIONS)[index]), list(QUESTIONS.values())[index]),
        examples,
        [shared.picture, shared.question],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

    def load(url: str, request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield {problem: ""}
        content, name = fetch(url, most_bytes, public)
        # transformers, by which m3-ask loads URLs, turns their pictures as their EXIF says.
        picture = ImageOps.exif_transpose(open_pictures(content)).convert("RGB")
        file = shared.people.new_file(request, f"{Path(name).stem[:80]}.png")
        picture.save(file)
        yield {shared.picture: str(file)}

    gr.on(
        [get.click, url.submit],
        in_sentences(load, problem),
        url,
        [shared.picture, problem],
        concurrency_limit=4,
        api_visibility="private",
    )
