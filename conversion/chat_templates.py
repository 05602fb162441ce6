"""Chat templates that write the prompts of the original's `llava/conversation.py`, and the choice among them.

A message's content is a string, which may hold `<image>` marks of its own, or a list of parts: then the images come
first, each as `<image>` and a newline, and the texts after them. A system message at the start takes the place of the
template's own system sentence. Each writes `<s>` first (`BEGINNING`), which engines and tokenizers leave to templates; the
processor sees to it that there is one. What the assistant said, with the token that ends it, stands between `generation`
marks, for `return_assistant_tokens_mask`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def choose_chat_template(model_type: str, name_hint: str) -> str:
    """Names the template for a checkpoint by the original's rule: by its name (`llava/serve/cli.py`).

    Args:
        model_type: of the original `config.json`; `llava_mistral` decides where the name says nothing.
        name_hint: the checkpoint's path or Hub id. Only its last part counts, as in the original
            (`llava/mm_utils.py: get_model_name_from_path`), or its last two where the last is `checkpoint-<step>`.

    Returns:
        A key of `CHAT_TEMPLATES`.
    """
    parts = name_hint.lower().replace("\\", "/").rstrip("/").split("/")
    name = "_".join(parts[-2:] if parts[-1].startswith("checkpoint-") else parts[-1:])
    if "llama-2" in name:
        return "llama_2"
    if "mistral" in name or model_type == "llava_mistral":
        return "mistral"
    if "34b" in name or re.search(r"(?<![a-z])yi(?![a-z])", name):
        return "chatml"
    return "vicuna_v1"


# Every template is a loop over messages that first puts the message's content into `state.text`. It is written out in
# each, not a macro: a server finds out from the loop over the parts that contents may be lists.
_FOR_EACH_MESSAGE = r"""
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set state.text = message['content'] -%}
    {%- else -%}
        {%- set state.text = '' -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set state.text = state.text + '<image>\n' -%}
            {%- elif part['type'] != 'text' -%}
                {{- raise_exception('Parts of a message are images and texts, not ' + part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {%- set state.text = state.text + part['text'] -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if loop.first and message['role'] == 'system' -%}
        {%- set state.system = state.text -%}
    {%- elif message['role'] not in ['user', 'assistant'] -%}
        {{- raise_exception('A message is by user or assistant, or first by system, not ' + message['role']) -}}
    {%- endif -%}
"""

_VICUNA_V1 = (
    r"""
{%- set state = namespace(text='', system="A chat between a curious user and an artificial intelligence assistant. """
    r"""The assistant gives helpful, detailed, and polite answers to the user's questions.") -%}
"""
    + _FOR_EACH_MESSAGE
    + r"""
    {%- if loop.first and state.system -%}
        {{- state.system + ' ' -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER:' -}}
        {%- if state.text -%}{{- ' ' + state.text + ' ' -}}{%- endif -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- if state.text -%}{%- generation -%}{{- ' ' + state.text + '</s>' -}}{%- endgeneration -%}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""
)

# llama_2 and mistral: the system text goes into the first user turn. They differ in the default one and in what follows
# a finished turn.
_INSTRUCT = (
    r"""
{%- set state = namespace(text='', system='DEFAULT_SYSTEM', started=false) -%}
"""
    + _FOR_EACH_MESSAGE
    + r"""
    {%- if message['role'] == 'user' and state.text -%}
        {%- if not state.started -%}
            {%- set state.started = true -%}
            {%- if state.system -%}
                {%- set state.text = '<<SYS>>\n' + state.system + '\n<</SYS>>\n\n' + state.text -%}
            {%- endif -%}
        {%- elif 'TURN_START' -%}
            {{- 'TURN_START' -}}
        {%- endif -%}
        {{- '[INST] ' + state.text + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' and state.text -%}
        {%- if not state.started -%}
            {{- raise_exception('The first message must be by the user') -}}
        {%- endif -%}
        {%- generation -%}{{- ' ' + state.text + ' </s>' -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
)

_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

_CHATML = (
    r"""
{%- set state = namespace(text='', system='Answer the questions.') -%}
"""
    + _FOR_EACH_MESSAGE
    + r"""
    {%- if loop.first -%}
        {{- '<|im_start|>system\n' + state.system + '<|im_end|>' -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- '<|im_start|>user\n' -}}
        {%- if state.text -%}{{- state.text + '<|im_end|>' -}}{%- endif -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if state.text -%}{%- generation -%}{{- state.text + '<|im_end|>' -}}{%- endgeneration -%}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
)

BEGINNING = "{{- bos_token -}}"
CHAT_TEMPLATES: dict[str, str] = {
    "vicuna_v1": BEGINNING + _VICUNA_V1,
    "llama_2": BEGINNING + _INSTRUCT.replace("DEFAULT_SYSTEM", _LLAMA_2_SYSTEM).replace("TURN_START", "<s>"),
    "mistral": BEGINNING + _INSTRUCT.replace("DEFAULT_SYSTEM", "").replace("TURN_START", ""),
    "chatml": BEGINNING + _CHATML,
}
"""The templates of the original's vicuna_v1, llava_llama_2, mistral_instruct and chatml_direct, by our names."""


# Put before the template of a language model that knows only texts: messages of parts become messages of text, images first,
# as in the templates above. It ends where a line ends, so that the template begins on a line of its own.
_PARTS_AS_TEXT = r"""
{%- set m3 = namespace(messages=[], text='') -%}
{%- for message in messages -%}
    {%- if message['content'] is not defined or message['content'] is none or message['content'] is string -%}
        {%- set m3.messages = m3.messages + [message] -%}
    {%- else -%}
        {%- set m3.text = '' -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set m3.text = m3.text + '<image>\n' -%}
            {%- elif part['type'] != 'text' -%}
                {{- raise_exception('Parts of a message are images and texts, not ' + part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {%- set m3.text = m3.text + part['text'] -%}
        {%- endfor -%}
        {%- set m3.messages = m3.messages + [dict(message, content=m3.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = m3.messages %}
""".lstrip("\n")


def with_image_marks(template: str) -> str:
    """A language model's own chat template, which then takes messages with images, too.

    Messages that are texts are left to it as they are.
    """
    return _PARTS_AS_TEXT + template


def chat_template_for(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """One of `CHAT_TEMPLATES`, without the token that begins prompts where the tokenizer adds none, and with its own last one."""
    template = CHAT_TEMPLATES[name]
    if tokenizer.eos_token:
        template = template.replace("</s>", tokenizer.eos_token)
    return template if tokenizer("")["input_ids"] else template.removeprefix(BEGINNING)
