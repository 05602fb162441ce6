"""Chat templates that do what those of widely used checkpoints do, written anew, and what is supervised under each.

Each is asked about one conversation: `CONVERSATION`.
"""

from dataclasses import dataclass


CONVERSATION = ("<image>\nWhat is it?", "A dog.", "Its color?", "Brown.")
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|eot|>", "<|header|>"),
    *("<start_of_turn>", "<end_of_turn>", "<end_of_utterance>", "<|endoftext|>"),
)
"""Tokens that the templates write, to be added to a tokenizer as special ones."""


@dataclass(frozen=True)
class Kind:
    """A template, and what it makes of `CONVERSATION`.

    Attributes:
        template: in Jinja.
        supervised: the characters of each sequence that are.
        adds_end: whether the end of answers is the tokenizer's.
        parts: whether the template reads contents that are lists of parts.
    """

    template: str
    supervised: list[list[str]]
    adds_end: bool = False
    parts: bool = True


def one(first: str, second: str) -> list[list[str]]:
    return [[first, second]]


_EACH_PART = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}IMAGE{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
_PARTS_ALONE = "{% for p in m.content %}{% if p['type'] == 'image' %}IMAGE{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
_IMAGES_FIRST = (
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] + ' ' }}{% endfor %}"
)
_CHATML = "{{ '<|im_start|>' + m.role + '\n' }}CONTENT{{ '<|im_end|>\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def _loop(body: str, after: str = "", before: str = "") -> str:
    text = before + "{% for m in messages %}" + body + "{% endfor %}" + after
    return text.replace("IMAGE", "{{ '<image>\n' }}")


KINDS = {
    # Parts alone, images first, no end of a turn: the one that 21 of the public faults is about.
    "llava-1.5": Kind(
        _loop(
            "{{ m['role'].upper() + ': ' }}" + _IMAGES_FIRST,
            "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        ),
        one(" A dog.</s>", " Brown.</s>"),
        adds_end=True,
    ),
    # A sentence of its own unless there is a system turn; answers between generation marks.
    "llava-1.6-vicuna": Kind(
        _loop(
            "{% if m.role == 'user' %}{{ 'USER: ' }}CONTENT{{ ' ' }}{% else %}{{ 'ASSISTANT:' }}{% generation %}{{ ' ' }}"
            "CONTENT{{ eos_token }}{% endgeneration %}{% endif %}".replace("CONTENT", _EACH_PART),
            "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
            "{% if messages[0].role != 'system' %}{{ 'A chat. ' }}{% endif %}",
        ),
        one(" A dog.</s>", " Brown.</s>"),
    ),
    "llava-1.6-mistral": Kind(
        _loop(
            "{% if m.role == 'user' %}{{ '[INST] ' }}CONTENT{{ ' [/INST]' }}{% else %}{{ ' ' }}CONTENT{{ '</s> ' }}"
            "{% endif %}".replace("CONTENT", _PARTS_ALONE),
        ),
        one(" A dog.</s>", " Brown.</s>"),
    ),
    # A space after the name of a side in turns, and none in prompts.
    "llava-onevision": Kind(
        _loop(
            "{{ '<|im_start|>' + m['role'] + ' ' }}"
            + _IMAGES_FIRST.replace("<image>\n", "<image>").replace("p['text'] + ' '", "'\n' + p['text']")
            + "{{ '<|im_end|>' }}",
            _PROMPT,
        ),
        [["A dog.<|im_end|>"], ["Brown.<|im_end|>"]],
    ),
    # A default system turn, texts or parts.
    "qwen2-vl": Kind(
        _loop(
            "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
            + _CHATML.replace("CONTENT", _EACH_PART),
            _PROMPT,
        ),
        one("A dog.<|im_end|>", "Brown.<|im_end|>"),
    ),
    # What stands after the role depends on the first part, so the prompt ends before the space.
    "smolvlm": Kind(
        _loop(
            "{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
            + _PARTS_ALONE
            + "{{ '<end_of_utterance>\n' }}",
            "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
            "{{ '<|im_start|>' }}",
        ),
        one(" A dog.<end_of_utterance>", " Brown.<end_of_utterance>"),
    ),
    # Strict alternation, texts trimmed, another name for the assistant, BOS of its own.
    "gemma": Kind(
        _loop(
            "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
            "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
            "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}"
            "{% if p.type == 'image' %}IMAGE{% else %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}"
            "{{ '<end_of_turn>\n' }}",
            "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
            "{{ bos_token }}",
        ),
        one("A dog.<end_of_turn>", "Brown.<end_of_turn>"),
    ),
    # Texts are trimmed, parts are not; the day is written.
    "llama-3-vision": Kind(
        _loop(
            "{{ '<|header|>' + m.role + '<|header|>\n\n' }}{% if m.content is string %}{{ m.content | trim }}{% else %}"
            "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
            "{{ '<|eot|>' }}",
            "{% if add_generation_prompt %}{{ '<|header|>assistant<|header|>\n\n' }}{% endif %}",
            "{{ bos_token + '<|header|>system<|header|>\n\nToday: ' + strftime_now('%d %b %Y') + '<|eot|>' }}",
        ),
        one("A dog.<|eot|>", "Brown.<|eot|>"),
    ),
    # Texts alone, and an end of the whole conversation after the last turn.
    "phi-3": Kind(
        _loop(
            "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}",
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        ),
        one("A dog.<|end|>", "Brown.<|end|>"),
        parts=False,
    ),
    # Tools and their turns; nothing before an answer but the end of the user's turn.
    "pixtral": Kind(
        _loop(
            "{% if m.role == 'user' %}{% if tools is not none and loop.last %}{{ '[TOOLS]' }}{% endif %}{{ '[INST]' }}CONTENT{{ '[/INST]' }}"
            "{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content }}{% elif m.tool_calls is defined %}{{ '[CALLS]' }}"
            "{% elif m.role == 'assistant' %}CONTENT{{ eos_token }}{% else %}{{ raise_exception('Only user, assistant and tool') }}"
            "{% endif %}".replace("CONTENT", _EACH_PART),
            before="{{ bos_token }}",
        ),
        one("A dog.</s>", "Brown.</s>"),
    ),
    "internvl": Kind(
        _loop(_CHATML.replace("CONTENT", _EACH_PART), _PROMPT), one("A dog.<|im_end|>", "Brown.<|im_end|>")
    ),
    # Texts alone, stripped, BOS before every question, system turns only first.
    "llama-2": Kind(
        _loop(
            "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
            "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}{% else %}"
            "{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}",
        ),
        one(" A dog. </s>", " Brown. </s>"),
        parts=False,
    ),
    # Thoughts in the answers after the last question alone, so that earlier turns are rewritten.
    "qwen3": Kind(
        _loop(
            "{{ '<|im_start|>' + m.role + '\n' }}"
            "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
            + _EACH_PART
            + "{{ '<|im_end|>\n' }}",
            _PROMPT,
            "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}",
        ),
        [["<think>\n\n</think>\n\nA dog.<|im_end|>"], ["<think>\n\n</think>\n\nBrown.<|im_end|>"]],
    ),
    # The prompt brings the closed block of thoughts itself.
    "qwen3-not-thinking": Kind(
        _loop(
            "{{ '<|im_start|>' + m.role + '\n' }}"
            "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
            + _EACH_PART
            + "{{ '<|im_end|>\n' }}",
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}",
        ),
        [["A dog.<|im_end|>"], ["Brown.<|im_end|>"]],
    ),
    # Thoughts as a field of the message, and a whole history that is written again once it is longer.
    "counts-turns": Kind(
        _loop(
            _CHATML.replace("CONTENT", _EACH_PART), _PROMPT, "{{ '<|im_start|>' ~ (messages | length // 2) ~ '\n' }}"
        ),
        [["A dog.<|im_end|>"], ["Brown.<|im_end|>"]],
    ),
    "smollm2": Kind(
        _loop(
            "{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
            "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}",
            _PROMPT,
        ),
        one("A dog.<|im_end|>", "Brown.<|im_end|>"),
        parts=False,
    ),
    # The prompt is written where the last message is met.
    "zephyr": Kind(
        _loop(
            "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
            "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        ),
        one("A dog.</s>", "Brown.</s>"),
        parts=False,
    ),
    # No end of a turn, texts alone, a blank line between turns.
    "falcon": Kind(
        _loop(
            "{% if not loop.first %}{{ '\n\n' }}{% endif %}{{ m.role | capitalize + ': ' + m.content.replace('\r\n', '\n') }}",
            "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}",
        ),
        one(" A dog.</s>", " Brown.</s>"),
        adds_end=True,
        parts=False,
    ),
    # An end after the last turn alone: what is asked again has none.
    "ends-once": Kind(
        _loop(
            "{{ m.role.upper() + ':' }}{% if m.role == 'user' or loop.last %}{{ ' ' }}{% else %}{{ ' ' }}{% endif %}"
            + _EACH_PART
            + "{{ ' ' }}",
            "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% elif messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}",
        ),
        [[" A dog. </s>"], [" Brown. </s>"]],
    ),
    # The prompt ends with a space, which belongs to the answer's first token.
    "spaced": Kind(
        _loop(
            "{{ m.role.upper() + ': ' }}CONTENT{{ '\n' if m.role == 'user' else eos_token }}".replace(
                "CONTENT", _EACH_PART
            ),
            "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
        ),
        one("A dog.</s>", "Brown.</s>"),
    ),
    # An end that is a word to the tokenizer.
    "marked-by-words": Kind(
        _loop(
            "{{ '### ' + m.role + ': ' }}" + _EACH_PART + "{{ ' ###\n' }}",
            "{% if add_generation_prompt %}{{ '### assistant:' }}{% endif %}",
        ),
        one(" A dog. ###", " Brown. ###"),
    ),
}

DROPPING = {
    "an answer": (
        _loop(
            "{% if m.role == 'user' %}" + _EACH_PART + "{% else %}{{ 'ASSISTANT: ' }}{% endif %}",
            "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
        ),
        r"drops the text of turn 2 \(assistant\), 'A dog.'",
    ),
    "the questions after the first": (
        _loop("{% if loop.first or m.role == 'assistant' %}" + _EACH_PART + "{{ eos_token }}{% endif %}"),
        r"drops the text of turn 3 \(user\), 'Its color\?'",
    ),
    "the images": (
        _loop(_CHATML.replace("CONTENT", _PARTS_ALONE).replace("IMAGE", ""), _PROMPT),
        r"writes 0 image mark\(s\) for 1 image\(s\)",
    ),
    "nothing, but twice": (
        _loop(_CHATML.replace("CONTENT", _EACH_PART + _EACH_PART.replace("IMAGE", "")), _PROMPT),
        r"repeats the text of turn 1 \(user\), 'What is it\?'",
    ),
    "case": (
        _loop(
            "{{ m.role + ': ' + (m.content if m.content is string else '<image>' + m.content[-1].text) | upper + eos_token }}"
        ),
        "drops the text of turn 2",
    ),
    "what it does not like": (
        _loop(
            _CHATML.replace("CONTENT", _EACH_PART.replace("m.content }}", "m.content | replace('dog', 'cat') }}")),
            _PROMPT,
        ),
        r"changes the text of turn 2 \(assistant\), 'A dog.'",
    ),
    "order": (
        _loop(_EACH_PART + "{{ eos_token }}").replace(
            "in messages", "in messages | sort(attribute='role', reverse=true)"
        ),
        "moves the text of turn",
    ),
    "the prompt for an answer": (
        _loop(_CHATML.replace("CONTENT", _EACH_PART), _PROMPT.replace("assistant\n", "assistant\n<think>\n")),
        "ends its prompt for turn 2 with .*<think>.*, and the same turn, once it is there, begins with",
    ),
    "every list": (
        _loop("{{ m.content.text + p }}"),
        "the chat template fails: UndefinedError: .*has no attribute 'text'",
    ),
    "everything": (
        "{{ raise_exception('not for training') }}",
        "the chat template fails: TemplateError: not for training",
    ),
    "types": (_loop("{{ 1 + m.content }}"), "the chat template fails: TypeError"),
}
"""Templates that do not write `CONVERSATION` whole, and what is said of each."""
