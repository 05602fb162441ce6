"""Chat templates against the prompts that the original's `get_prompt` wrote, and the choice among them."""

import json
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError

from m3_conversion.chat_templates import CHAT_TEMPLATES, choose_chat_template
from m3_conversion.tokenizer import build_tokenizer


GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
IMAGE = -200  # how the original marks an image among token ids
OUR_NAMES = {
    "vicuna_v1": "vicuna_v1",
    "llava_llama_2": "llama_2",
    "mistral_instruct": "mistral",
    "chatml_direct": "chatml",
}
CONVERSATIONS = [
    conversation
    for conversation in json.loads((GOLDENS / "expected" / "tokenization.json").read_text())["conversations"]
    if conversation["template"] in OUR_NAMES
]
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(GOLDENS / "tokenizer_v1")


@pytest.fixture
def render(tokenizer):
    def render(name, messages, add_generation_prompt=True, **kwargs):
        kwargs = {"tokenize": False} | kwargs
        return tokenizer.apply_chat_template(
            messages, chat_template=CHAT_TEMPLATES[name], add_generation_prompt=add_generation_prompt, **kwargs
        )

    return render


def as_messages(turns):
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def test_goldens_cover_every_template():
    assert {OUR_NAMES[conversation["template"]] for conversation in CONVERSATIONS} == set(CHAT_TEMPLATES)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda c: f"{c['template']}-{c['turns'][0][0][:30]}")
def test_prompts_equal_the_original(render, tokenizer, conversation):
    turns = conversation["turns"]
    arguments = OUR_NAMES[conversation["template"]], as_messages(turns), turns[-1][1] is None
    assert render(*arguments) == "<s>" + conversation["prompt"]
    ids = render(*arguments, tokenize=True, return_dict=False)  # as engines have it: no token is added
    assert ids == [tokenizer.image_token_id if token == IMAGE else token for token in conversation["ids"]]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_image_parts_come_first(render, name):
    conversation = next(c for c in CONVERSATIONS if OUR_NAMES[c["template"]] == name and "<image>\n" in c["prompt"])
    messages = as_messages(conversation["turns"])
    text = messages[0]["content"].removeprefix("<image>\n")
    messages[0]["content"] = [{"type": "text", "text": text}, {"type": "image"}]
    assert render(name, messages) == "<s>" + conversation["prompt"]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_several_images_and_texts_keep_their_order(render, name):
    parts = [
        {"type": "text", "text": "one"},
        {"type": "image"},
        {"type": "text", "text": " two"},
        {"type": "image", "image": "cat.png"},
    ]
    rendered = render(name, [{"role": "user", "content": parts}])
    assert "<image>\n<image>\none two" in rendered
    assert rendered == render(name, [{"role": "user", "content": "<image>\n<image>\none two"}])


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("vicuna_v1", "Be brief. USER: Hi ASSISTANT:"),
        ("llama_2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        ("mistral", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"),
    ],
)
def test_a_system_message_replaces_the_default(render, name, prompt):
    for content in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        assert (
            render(name, [{"role": "system", "content": content}, {"role": "user", "content": "Hi"}]) == "<s>" + prompt
        )


def test_an_empty_system_message_removes_the_default(render):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    assert render("vicuna_v1", messages) == "<s>USER: Hi ASSISTANT:"
    assert render("llama_2", messages) == "<s>[INST] Hi [/INST]"


def test_without_generation_prompt_the_prompt_ends_with_the_last_message(render):
    assert render("vicuna_v1", as_messages([["Hi", None]]), False) == "<s>" + VICUNA_SYSTEM + "USER: Hi "
    assert render("mistral", as_messages([["Hi", "Ho"]]), False) == "<s>[INST] Hi [/INST] Ho </s>"


def test_a_message_can_be_continued(render):
    rendered = render("vicuna_v1", as_messages([["Hi", "Ho ho"]]), False, continue_final_message=True)
    assert rendered == "<s>" + VICUNA_SYSTEM + "USER: Hi ASSISTANT: Ho ho"


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("vicuna_v1", "▁Hi ▁there </s> ▁Yes </s>"),
        ("llama_2", "▁Hi ▁there ▁ </s> ▁Yes ▁ </s>"),
        ("mistral", "▁Hi ▁there ▁ </s> ▁Yes ▁ </s>"),
    ],
)
def test_the_assistant_mask_covers_the_answers(render, tokenizer, name, answers):
    out = render(
        name,
        as_messages([["<image>\nHello", "Hi there"], ["Thanks", "Yes"]]),
        add_generation_prompt=False,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    masked = [i for i, is_answer in zip(out["input_ids"], out["assistant_masks"]) if is_answer]
    assert tokenizer.convert_ids_to_tokens(masked) == answers.split(" ")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}],
        [{"role": "user", "content": [{"type": "video"}]}],
    ],
)
def test_messages_that_no_template_can_write_are_refused(render, name, messages):
    with pytest.raises(TemplateError, match="not (tool|system|video)"):
        render(name, messages)


@pytest.mark.parametrize("name", ["llama_2", "mistral"])
def test_an_answer_before_any_question_is_refused(render, name):
    with pytest.raises(TemplateError, match="must be by the user"):
        render(name, [{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    ("model_type", "name", "template"),
    [
        ("llava_llama", "liuhaotian/llava-v1.5-7b", "vicuna_v1"),
        ("llava_llama", "mucai/llava-next-vicuna-7b-m3", "vicuna_v1"),
        ("llava", "/data/mistral-runs/llava-v1.5-7b/", "vicuna_v1"),
        ("llava_llama", "liuhaotian/llava-llama-2-13b-chat-lightning-preview", "llama_2"),
        ("llava_llama", "runs/LLaVA-Llama-2-7b/checkpoint-500", "llama_2"),
        ("llava_mistral", "liuhaotian/llava-v1.6-mistral-7b", "mistral"),
        ("llava_mistral", "my-model", "mistral"),
        ("llava_llama", "liuhaotian/llava-v1.6-34b", "chatml"),
        ("llava_llama", "someone/llava_Yi_6B", "chatml"),
        ("llava_llama", "someone/llava-playing", "vicuna_v1"),
        ("llava_llama", "C:\\models\\llava-v1.6-34b", "chatml"),
    ],
)
def test_choice_by_name(model_type, name, template):
    assert choose_chat_template(model_type, name) == template
