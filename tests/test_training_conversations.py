"""Labels against those of the original's `preprocess`, and what no template may do."""

import dataclasses

import pytest
from conftest import GOLDENS, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from m3_conversion.chat_templates import CHAT_TEMPLATES
from m3_conversion.tokenizer import build_tokenizer
from m3_training.conversations import IGNORE_INDEX, IMAGE_MARK, TEMPLATES, encode


@dataclasses.dataclass
class Prompts:
    """The part of a processor that text needs."""

    tokenizer: object
    chat_template: str = CHAT_TEMPLATES["vicuna_v1"]
    image_token: str = IMAGE_MARK

    @property
    def image_token_id(self):
        return self.tokenizer.image_token_id


@pytest.fixture(scope="module")
def processor():
    return Prompts(build_tokenizer(GOLDENS / "tokenizer_v1"))


@pytest.fixture(scope="module")
def legacy_processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("legacy")
    for file in (GOLDENS / "tokenizer_v1").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(config.replace('"legacy": false', '"legacy": true'))
    return Prompts(build_tokenizer(folder))


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def assert_equals_golden(sample, processor):
    encoded = encode(sample["conversations"][0], sample["version"], processor, sample["model_max_length"])
    marks = [-200 if token == processor.image_token_id else token for token in encoded.input_ids]
    assert marks == sample["input_ids"]
    assert encoded.labels == sample["labels"]
    assert bool(encoded.mismatch) == ("printed_warning" in sample)


@pytest.mark.parametrize("sample", golden("preprocess")["samples"], ids=lambda s: s["version"])
def test_labels_equal_the_original(sample, processor):
    assert_equals_golden(sample, processor)


@pytest.mark.parametrize("sample", golden("preprocess")["samples_legacy_true"], ids=lambda s: s["version"])
def test_labels_equal_the_original_with_a_legacy_tokenizer(sample, legacy_processor):
    assert_equals_golden(sample, legacy_processor)


@pytest.mark.parametrize("sample", golden("preprocess")["samples_short_max_length"], ids=lambda s: s["version"])
def test_lengths_are_not_compared_beyond_the_longest(sample, processor):
    assert_equals_golden(sample, processor)


@pytest.mark.parametrize("case", golden("train.llava15-m3")["cases"], ids=lambda c: c["id"])
def test_labels_of_the_training_goldens(case, loaded):
    processor = loaded["llava15-m3"][1]
    for sample, labels in zip(case["samples"], case["labels"]):
        found = encode(sample["conversations"], "v1", processor).labels
        assert found == labels[: len(found)] and set(labels[len(found) :]) <= {IGNORE_INDEX}


@pytest.mark.parametrize("question", ["What follows ASSISTANT: here?", "An </s> in it"])
def test_a_separator_in_a_question_leaves_nothing_to_learn(question, processor):
    encoded = encode(talk(question, "An answer."), "v1", processor)
    assert set(encoded.labels) == {IGNORE_INDEX} and "separator" in encoded.mismatch


def test_v0_masks_questions_but_for_their_first_two_tokens(processor):
    encoded = encode(talk("<image>\nWhat?", "A dog."), "v0", processor)
    text = processor.tokenizer.decode([token for token in encoded.labels if token != IGNORE_INDEX])
    assert "A dog." in text and "What" not in text


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_own_template_supervises_what_its_generation_marks_say(template, processor):
    processor = dataclasses.replace(processor, chat_template=CHAT_TEMPLATES[template])
    conversation = talk("<image>\nWas ist 这个?", "  Ein Hund 🐱.", "Sure?", "Yes")
    encoded = encode(conversation, "chat_template", processor)
    assert encoded.input_ids.count(processor.image_token_id) == 1
    rendered = processor.tokenizer.apply_chat_template(
        [{"role": ("user", "assistant")[i % 2], "content": turn["value"]} for i, turn in enumerate(conversation)],
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert encoded.input_ids == rendered["input_ids"]
    assert encoded.input_ids[0] == processor.tokenizer.bos_token_id and encoded.labels[0] == IGNORE_INDEX
    assert [int(label != IGNORE_INDEX) for label in encoded.labels] == rendered["assistant_masks"]


def test_the_own_template_of_vicuna_supervises_what_v1_does(processor):
    for sample in golden("preprocess")["samples"]:
        conversation = sample["conversations"][0]
        # An image without a word is a mark and a newline in the template, and only a mark in the original.
        alone = conversation[0]["value"].strip() == IMAGE_MARK
        if sample["version"] == "v1" and "printed_warning" not in sample and not alone:
            assert encode(conversation, "chat_template", processor) == encode(conversation, "v1", processor)


def test_a_template_that_writes_bos_gets_no_second_one(processor):
    template = "{% for m in messages %}{{ bos_token if loop.first }}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    encoded = encode(talk("Hi", "Ho"), "chat_template", dataclasses.replace(processor, chat_template=template))
    assert encoded.input_ids.count(processor.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("conversation", "template", "message"),
    [
        ([], "v1", "no turn by human"),
        (talk("Hi", "Ho"), "v2", "template='v2' is not known: choose from chat_template, v1"),
        ([{"from": "system", "value": "x"}], "v1", 'must be {"from": "human" or "gpt", "value": text}, not {\'from\''),
        ([{"from": "human"}], "v1", "must be"),
        (talk("Hi", "Ho")[:1] * 2, "v1", "in alternation, not .'human', 'human'"),
        (talk("no mark", "a caption"), "plain", "one question with an <image>"),
        (talk("", "Ho"), "llama_2", "first turn is empty"),
    ],
)
def test_what_cannot_be_encoded_is_named(conversation, template, message, processor):
    with pytest.raises(ValueError, match=message):
        encode(conversation, template, processor)


words = st.text(alphabet="ab <>/s:?\n#ASSISTANT[INST]猫🐱", max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    template=st.sampled_from(TEMPLATES),
    texts=st.lists(words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0),
    marks=st.integers(0, 3),
)
def test_placeholders_are_never_supervised_and_labels_are_the_inputs(template, texts, marks, processor):
    texts[0] = IMAGE_MARK * marks + texts[0] + "?"
    if template == "plain":
        texts = [IMAGE_MARK + texts[0], texts[1]]
    if template == "chat_template" and any(token in text for text in texts for token in ("<s>", "</s>")):
        with pytest.raises(ValueError, match="special token"):  # which the original's templates let through
            encode(talk(*texts), template, processor)
        return
    encoded = encode(talk(*texts), template, processor)
    assert len(encoded.labels) == len(encoded.input_ids)
    for token, label in zip(encoded.input_ids, encoded.labels):
        assert label in (IGNORE_INDEX, token)
        assert token != processor.image_token_id or label == IGNORE_INDEX
    assert encoded.input_ids.count(processor.image_token_id) == "".join(texts).count(IMAGE_MARK)
