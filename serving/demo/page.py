"""The page: a picture and a question at the left, what comes of them in tabs at the right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import gradio as gr
from PIL import ImageOps

from .ask_tab import ask_tab, compare_tab
from .chat_tab import chat_tab
from .controls import Shared, more_settings, picture_input
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
HEADER = """<header class="m3-header">
<h1>M3</h1><p>One picture, as many visual tokens as you choose.</p><p id="m3-said" role="status"></p>
</header>"""
# gradio's own style cannot be told of what is around the page's parts. Its controls are named for screen readers where they are
# not, and a button in a button is none.
HEAD = """
<style>
@media (max-width: 600px) {
  .gradio-container > .main.app { padding: 0.75rem; }
  .gradio-container .tab-container button { padding: 0 0.6rem; }
}
#m3-talk [aria-label=Share] { display: none; }
.dark .tab-container button.selected { color: var(--primary-300); }
footer { display: none; }
</style>
<script>
const m3Examples = EXAMPLES;
window.m3Copy = async (text) => {
  const say = (words) => { document.getElementById("m3-said").textContent = words; };
  try { await navigator.clipboard.writeText(text); say("The Python lines are copied."); }
  catch { say("This browser does not let the page copy: open \\u201cThe same in Python\\u201d and copy from there."); }
};
new MutationObserver(() => {
  for (const zone of document.querySelectorAll("button[aria-dropeffect][aria-label]")) zone.removeAttribute("aria-label");
  for (const toast of document.querySelectorAll(".toast-header[role]")) toast.removeAttribute("role");
  for (const group of document.querySelectorAll("fieldset")) {
    group.ariaLabel ??= group.querySelector("[data-testid=block-info]")?.innerText;
    const [first, ...others] = group.querySelectorAll("input[type=radio]");
    for (const radio of others) if (radio.name !== first.name) radio.name = first.name;
  }
  for (const shown of document.querySelectorAll("#m3-talk button:not([aria-label])"))
    if (!shown.innerText.trim()) shown.ariaLabel = shown.querySelector("img")?.alt || "Picture";
  document.querySelectorAll("#m3-examples button").forEach((button, index) => { button.ariaLabel ??= m3Examples[index]; });
}).observe(document.documentElement, { childList: true, subtree: true });
</script>
""".replace("EXAMPLES", json.dumps([f"Example: {question}" for question in QUESTIONS.values()]))


def build(loading: Loading, people: People, users: int, at_once: int, most_bytes: int, public: bool) -> gr.Blocks:
    """The page.

    Args:
        loading: of the model that answers.
        people: who has the page open.
        users: that may wait for an answer.
        at_once: answers that the model works on together.
        most_bytes: of an upload.
        public: whether others than this machine's users can see the page.
    """
    shared = Shared(loading, people, at_once, more_settings())
    with gr.Blocks(title="M3: dial the visual tokens", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(HEADER)
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
                            _opening(people, name),
                            outputs=left,
                            queue=False,
                            show_progress="hidden",
                            api_visibility="private",
                        )
                with gr.Accordion("More", open=False):
                    for control in shared.settings:
                        control.render()

        known = bool(loading.scales)

        def load() -> Iterator[dict[Any, Any]]:
            for _ in loading.changes():
                yield {status: status_html(*loading.told, False, loading.sentence)}
            if loading.is_ready:
                words = f"{loading.model.name}: {loading.model.facts}. Up to {users} people may wait for an answer."
                fills = {} if known else {control: gr.update(**fill()) for control, fill in shared.fills.items()}
                yield {status: status_html(words, None, True, ""), **fills}

        page.load(
            load,
            outputs=[status, *shared.fills],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )

        def left_page(request: gr.Request) -> None:
            people.forget(request)

        page.unload(left_page)
    return page


def _opening(people: People, name: str) -> Callable[[gr.Request], dict[str, Any]]:
    """Shows the picture at the left only beside tabs that are about it."""

    def opened(request: gr.Request) -> dict[str, Any]:
        people.of(request).tab = name
        return gr.update(visible=name not in WITHOUT_PICTURE)

    return opened


def _picture_and_question(shared: Shared, most_bytes: int, public: bool) -> None:
    shared.picture = picture_input("Picture", 280, "m3-picture")
    shared.registers(shared.picture)
    with gr.Accordion("By URL", open=False):
        url = gr.Textbox(label="URL of a picture", placeholder="https://", max_lines=1)
        get = gr.Button("Load")
        problem = gr.HTML()
    shared.question = gr.Textbox(label="Question", max_lines=6, elem_id="m3-question")
    copied = copytree(EXAMPLES, shared.people.folder / "examples")  # from where gradio may show them
    shared.picture.keep_in_cache |= {str(copied / name) for name in QUESTIONS}  # gradio deletes others after a day
    examples = gr.Dataset(
        label="Examples",
        elem_id="m3-examples",
        components=[gr.Image(render=False)],
        samples=[[str(copied / name)] for name in QUESTIONS],
        type="index",
    )
    examples.click(
        lambda index: (str(copied / list(QUESTIONS)[index]), list(QUESTIONS.values())[index]),
        examples,
        [shared.picture, shared.question],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

    def load(request: gr.Request, url: str) -> Iterator[dict[Any, Any]]:
        from modeling_m3.pictures import open_pictures

        yield {problem: ""}
        content, name = fetch(url, most_bytes, public)
        # transformers, by which m3-ask loads URLs, turns their pictures as their EXIF says.
        picture = ImageOps.exif_transpose(open_pictures(content)).convert("RGB")
        file = shared.people.new_file(request, f"{Path(name).stem[:80]}.png")
        picture.save(file)
        yield {shared.picture: str(file)}

    gr.on(
        [get.click, url.submit],
        shared.answering(load, problem),
        url,
        [shared.picture, problem],
        concurrency_limit=4,
        api_visibility="private",
    )
