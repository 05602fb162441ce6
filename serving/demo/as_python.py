"""The Python lines that repeat what the page shows."""

from collections.abc import Sequence

from .asking import Settings


def lines_for_checkpoint(
    checkpoint: str | None,
    options: dict[str, str | None],
    picture: str,
    question: str,
    settings: Settings,
    numbers: Sequence[int | str],
    has_marks: bool = False,
) -> str:
    """Lines that print the answer at each number of visual tokens.

    Args:
        checkpoint: a folder or an id on the Hub; m3-tiny if None.
        options: of `modeling_m3.load`; those that are None are left out.
        picture: the name of a file.
        question, settings, numbers: what was asked, how, and at which numbers.
        has_marks: whether what was asked holds words that are tokens of the checkpoint, as <image>, and is to stay text.
    """
    name = "modeling_m3.default_checkpoint()" if checkpoint is None else repr(checkpoint)
    given = "".join(f", {option}={value!r}" for option, value in options.items() if value is not None)
    sampling = f"do_sample=True, temperature={settings.temperature:g}" if settings.temperature else "do_sample=False"
    beams = f"num_beams={settings.num_beams}, " if settings.num_beams > 1 else ""
    system = f'    {{"role": "system", "content": [{{"type": "text", "text": {settings.system!r}}}]}},\n'
    as_text = "        sanitize_control_tokens=True,\n" if has_marks else ""
    return f"""\
import modeling_m3
from modeling_m3.pictures import open_pictures

model, processor = modeling_m3.load({name}{given}, device_map="auto")
picture, question = open_pictures({picture!r}), {question!r}
chat = [
{system if settings.system else ""}    {{"role": "user", "content": [{{"type": "image", "image": picture}}, {{"type": "text", "text": question}}]}},
]
for number in {list(numbers)!r}:
    inputs = processor.apply_chat_template(
        chat,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={{"num_visual_tokens": number}},
{as_text}    ).to(model.device)
    answer = model.generate(**inputs, {sampling}, {beams}max_new_tokens={settings.max_new_tokens})
    print(number, processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def lines_for_server(
    url: str,
    model: str | None,
    picture: str,
    question: str,
    settings: Settings,
    numbers: Sequence[int | str],
    num_frames: int | None = None,
    has_key: bool = False,
) -> str:
    """As `lines_for_checkpoint`, for a server of `m3-serve`.

    Args:
        url: with /v1.
        model: its name there; the first that the server names if None, where there is one beam.
        num_frames: of a video, which `picture` then names.
        has_key: whether the server wants one. The lines do not hold it: they take it from OPENAI_API_KEY.
    """
    named = "" if model is None else f", model={model!r}"
    key = ', api_key=os.environ["OPENAI_API_KEY"]' if has_key else ""
    shown = repr(picture) if num_frames is None else f"[*sample_video({picture!r}, num_frames={num_frames})]"
    writes_chat = bool(settings.system) or settings.num_beams > 1
    imports = [
        *(["import os", ""] if has_key else []),
        f"from m3_serving.client import Client{', as_url' if writes_chat else ''}",
        *(["from modeling_m3.videos import sample_video"] if num_frames is not None else []),
    ]
    pictures = "[picture]" if num_frames is None else "picture"
    system = f'    {{"role": "system", "content": {settings.system!r}}},\n' if settings.system else ""
    chat = f"""\
parts = [{{"type": "image_url", "image_url": {{"url": as_url(view)}}}} for view in {pictures}]
chat = [
{system}    {{"role": "user", "content": [*parts, {{"type": "text", "text": question}}]}},
]
"""
    options = f"temperature={settings.temperature:g}, max_tokens={settings.max_new_tokens}"
    if settings.num_beams > 1:
        body = '{"use_beam_search": True, "mm_processor_kwargs": {"num_visual_tokens": number}}'
        asking = f"""\
    answers = client.openai.chat.completions.create(
        model=client.model,
        messages=chat,
        n={settings.num_beams},
        {options},
        extra_body={body},
    )
    print(number, answers.choices[0].message.content.strip())
"""
    else:
        messages = "messages=chat, " if writes_chat else ""
        asking = f"""\
    answer = client.ask(picture, question, number, {messages}{options})
    print(number, answer.text)
"""
    lines = "\n".join(imports)
    return f"""\
{lines}

client = Client({url!r}{named}{key})
picture, question = {shown}, {question!r}
{chat if writes_chat else ""}for number in {list(numbers)!r}:
{asking}"""
