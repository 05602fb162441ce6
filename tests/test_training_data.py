"""Records to samples to batches: what is bad and how it is told, how batches are padded and grouped."""

import base64
import copy
import json
import logging
from itertools import chain

import pytest
import torch
from conftest import GOLDENS, golden, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from m3_training.conversations import IGNORE_INDEX
from m3_training.data import BadSampleError, Collator, LlavaDataset, read_records
from m3_training.sampler import ModalityLengthSampler


IMAGES = GOLDENS / "images"


def record(image="img0_336x336.png", question="<image>\nWhat is this?", answer="A picture.", **fields):
    conversation = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": conversation, **fields}


def text_record(question="Name a fruit.", answer="Apple."):
    return {"conversations": record(question=question, answer=answer)["conversations"]}


@pytest.fixture
def dataset(loaded):
    def dataset(*records, checkpoint="llava15-m3", **options):
        options = {"image_folder": IMAGES, "template": "v1"} | options
        return LlavaDataset(records, loaded[checkpoint][1], **options)

    return dataset


def test_records_are_read_from_json_and_from_lines(tmp_path):
    records = [record(id="\u2028 is no end of line"), text_record()]
    (tmp_path / "a.json").write_text(json.dumps(records))
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "a.jsonl") == records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "There is no data file"),
        ("bad.json", "[{", "bad.json is not valid JSON: .*line 1"),
        ("bad.jsonl", '{"id": 1}\n{"id": ', "bad.jsonl, line 2 is not JSON"),
        ("dict.json", "{}", "must hold a list of records"),
        ("empty.json", "[]", "with at least one"),
        ("numbers.json", "[1]", "must hold a list of records"),
    ],
)
def test_a_bad_data_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name)


@pytest.mark.parametrize("checkpoint", ["llava15-m3", "llava-next-m3"])
def test_samples_are_what_the_processor_makes(dataset, loaded, checkpoint):
    processor = loaded[checkpoint][1]
    sample = dataset(record("img1_640x480.png"), checkpoint=checkpoint, max_length=4096)[0]
    expected = processor(
        images=picture("img1_640x480.png"),
        text=processor.tokenizer.decode(
            [token for token in sample["input_ids"] if token != processor.image_token_id][1:-3]
        ).replace("USER:", "USER: <image>"),
        return_tensors="pt",
    )
    assert sample.keys() == {*expected.keys(), "labels"} - {"attention_mask"}
    torch.testing.assert_close(sample["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
    is_image = sample["input_ids"] == processor.image_token_id
    assert is_image.sum() == (expected["input_ids"] == processor.image_token_id).sum()
    assert (sample["labels"][is_image] == IGNORE_INDEX).all()
    assert sample["num_visual_tokens"].tolist() == [576]


def test_labels_follow_the_goldens_once_images_are_expanded(dataset):
    for case in golden("train.llava15-m3")["cases"]:
        samples = dataset(*case["samples"])
        for index, (ids, labels) in enumerate(zip(case["input_ids"], case["labels"])):
            sample = samples[index]
            assert "pixel_values" in sample or not case["samples"][index]["image"]
            expanded = []
            for token, label in zip(ids, labels):
                expanded += [label] * (576 if token == -200 else 1)
            found = sample["labels"].tolist()
            assert found == expanded[: len(found)]


def test_images_may_be_pictures_and_several(dataset):
    several = record([Image.new("L", (40, 30)), "img3_1000x300.png"], "<image> and <image>: which is larger?")
    sample = dataset(several)[0]
    assert sample["pixel_values"].shape == (2, 3, 336, 336) and len(sample["num_visual_tokens"]) == 2


class Generated:
    """Records that are made when they are asked for."""

    modality_lengths = [3, -2]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return (record(Image.new("RGB", (50, 50))), text_record())[index]


def test_records_may_be_generated(dataset, loaded):
    samples = LlavaDataset(Generated(), loaded["llava15-m3"][1])
    assert samples.modality_lengths == [3, -2]
    assert "pixel_values" in samples[0] and "pixel_values" not in samples[1]


def test_lengths_are_word_counts_and_open_nothing(dataset):
    samples = dataset(record("not-there.png"), text_record(), {"id": 3})
    assert samples.modality_lengths == [6, -4, -1]


BAD = {
    "missing": (record("not-there.png"), "there is no picture at .*not-there.png"),
    "broken": (record("broken.png"), "broken.png cannot be read as a picture"),
    "no-mark": (record(question="What?"), r"its text has 0 <image> mark\(s\) for 1 image\(s\)"),
    "two-marks": (record(question="<image> <image>"), r"has 2 <image> mark\(s\) for 1 image"),
    "no-image": (text_record("<image>\nWhat?"), r"has 1 <image> mark\(s\) for 0 image"),
    "too-large": (record("thin.png"), "A picture of 40000x1 pixels .* too large"),
    "kind": (record(7), "must be a path, a data URI or a PIL image, not 7"),
    "turns": ({"image": "img0_336x336.png"}, "conversations must be a list of turns, not None"),
    "speaker": ({"conversations": [{"from": "robot", "value": ""}]}, "a turn must be"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_named_and_the_next_of_its_kind_stands_in(dataset, kind, tmp_path, caplog):
    bad, reason = BAD[kind]
    (tmp_path / "broken.png").write_bytes((IMAGES / "img0_336x336.png").read_bytes()[:200])
    (tmp_path / "img0_336x336.png").write_bytes((IMAGES / "img0_336x336.png").read_bytes())
    Image.new("RGB", (40_000, 1)).save(tmp_path / "thin.png")
    good, good_text = record(), text_record()
    records = [bad | {"id": "the-bad-one"}, good_text, good]
    samples = dataset(*records, image_folder=tmp_path)
    with caplog.at_level(logging.WARNING):
        stand_in = [samples[0], samples[0]][0]
    expected = samples[2 if bad.get("image") else 1]
    assert stand_in["input_ids"].tolist() == expected["input_ids"].tolist()
    assert samples.notes["skipped"] == [0]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("record 0 ('the-bad-one'): ")
    with pytest.raises(BadSampleError, match=f"the-bad-one'.: .*{reason}"):
        dataset(*records, image_folder=tmp_path, strict=True)[0]


def test_images_is_read_as_image(dataset):
    """The key of other training tools: one read as a record of text would be trained without its picture."""
    named = record()
    renamed = {**named, "images": [named["image"]]}
    del renamed["image"]
    first, second = dataset(named, renamed)[0], dataset(named, renamed)[1]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert dataset(named, renamed).modality_lengths[0] == dataset(named, renamed).modality_lengths[1] > 0


def test_records_are_read_as_tools_write_them(dataset, tmp_path):
    content = (IMAGES / "img0_336x336.png").read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    named, missing = record(), text_record()
    same = [record(uri), record(None, images=["img0_336x336.png"]), record(float("nan"), images="img0_336x336.png")]
    none = [{**missing, "image": nothing} for nothing in (None, float("nan"), "", [], [None])]
    samples = dataset(named, missing, *same, *none)
    for index, expected in [*((i, 0) for i in range(2, 5)), *((i, 1) for i in range(5, 10))]:
        found = samples.sample(index)
        assert found.keys() == samples[expected].keys()
        assert all(torch.equal(found[name], samples[expected][name]) for name in found)
    with pytest.raises(BadSampleError, match="'data:image/png;base64,AAAA'... cannot be read as a picture"):
        dataset(record("data:image/png;base64,AAAA")).sample(0)
    with pytest.raises(BadSampleError, match="there is no picture at"):
        dataset(record("a\0b.png")).sample(0)


def test_a_record_that_the_chat_template_refuses_is_a_bad_one(loaded):
    processor = copy.copy(loaded["llava15-m3"][1])
    processor.chat_template = "{{ raise_exception('no such record') }}"
    with pytest.raises(BadSampleError, match="record 0.*no such record"):
        LlavaDataset([text_record()], processor, strict=True)[0]


def test_bad_samples_are_counted_over_the_workers(dataset, capfd):
    samples = dataset(record("a.png"), record(), record("b.png"), text_record())
    loader = DataLoader(samples, batch_size=1, num_workers=2, collate_fn=Collator(0))
    assert sum("pixel_values" in batch for batch in loader) == 3
    assert samples.notes["skipped"] == [0, 2]


def test_where_all_are_bad_it_ends(dataset):
    with pytest.raises(BadSampleError, match=r"3 record\(s\) in a row cannot be used. .* no picture at .*c.png"):
        dataset(record("a.png"), record("b.png"), record("c.png"))[0]


def test_text_is_cut_and_images_never(dataset, caplog):
    long_answer = record(answer="word " * 200)
    whole = dataset(long_answer)[0]
    end = len(whole["input_ids"]) - whole["input_ids"].tolist()[::-1].index(1000)
    cut = dataset(long_answer, max_length=end + 60)[0]
    assert len(cut["input_ids"]) == len(cut["labels"]) == end + 60
    assert (cut["input_ids"] == whole["input_ids"][: end + 60]).all()
    samples = dataset(long_answer, max_length=end)
    assert len(samples[0]["input_ids"]) == end and samples.notes["without anything supervised"] == [0]
    assert "record 0: it has no answer within" in caplog.text
    with pytest.raises(
        BadSampleError, match=f"images end at token {end}, beyond max_length={end - 1}, and are never cut"
    ):
        dataset(long_answer, max_length=end - 1, strict=True)[0]


def test_what_the_original_leaves_unsupervised_is_counted(dataset, caplog):
    samples = dataset(record(question="<image>\nWhat is ASSISTANT: for?"), record())
    assert (samples[0]["labels"] == IGNORE_INDEX).all() and (samples[1]["labels"] != IGNORE_INDEX).any()
    assert samples.notes["without anything supervised"] == [0] and samples.notes["skipped"] == []
    assert "record 0: rounds of" in caplog.text and "Nothing of it is supervised" in caplog.text


def test_batches_are_padded_as_the_original_pads():
    expected = golden("preprocess")["collator"]
    rows = [
        {
            name: torch.tensor([v for v, mask in zip(row, attention) if mask])
            for name, row in (("input_ids", ids), ("labels", labels))
        }
        for ids, labels, attention in zip(expected["input_ids"], expected["labels"], expected["attention_mask"])
    ]
    batch = Collator(pad_token_id=0)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        name: expected[name] for name in ("input_ids", "labels", "attention_mask")
    }


@pytest.mark.parametrize("checkpoint", ["llava15-m3", "llava-next-m3"])
def test_the_model_takes_batches_of_all_kinds(dataset, loaded, checkpoint):
    model, processor = loaded[checkpoint]
    records = [record("img3_1000x300.png"), text_record(), record("img5_97x53.png", "What?\n<image>")]
    samples = dataset(*records, checkpoint=checkpoint, max_length=4096)
    collate = Collator(processor.tokenizer.pad_token_id)
    batch = collate([samples[index] for index in range(3)])
    with torch.no_grad():
        together = model(**batch).logits
        for row, index in enumerate(range(3)):
            alone = model(**collate([samples[index]])).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)
    text_only = collate([samples[1]])
    assert text_only.keys() == {"input_ids", "labels", "attention_mask"}


lengths = st.lists(st.integers(-60, 60).filter(bool), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths=lengths, batch_size=st.integers(1, 4), num_batches=st.integers(1, 4), epoch=st.integers(0, 3))
def test_every_global_batch_is_of_one_kind_and_no_sample_is_left_out(lengths, batch_size, num_batches, epoch):
    sampler = ModalityLengthSampler(lengths, batch_size, num_batches, seed=5)
    sampler.set_epoch(epoch)
    order = list(sampler)
    size = batch_size * num_batches
    assert len(order) == len(sampler) and len(order) % size == 0
    assert set(order) == set(range(len(lengths)))
    for start in range(0, len(order), size):
        assert len({lengths[index] > 0 for index in order[start : start + size]}) == 1
    again = ModalityLengthSampler(lengths, batch_size, num_batches, seed=5)
    again.set_epoch(epoch)
    assert list(again) == order


def test_orders_differ_by_epoch_and_seed_and_lengths_are_balanced():
    lengths = [((-1) ** i) * (1 + i % 50) for i in range(200)]
    sampler = ModalityLengthSampler(lengths, batch_size=4, num_batches=5, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first != list(ModalityLengthSampler(lengths, 4, 5, seed=7))
    for start in range(0, len(first), 20):
        totals = [sum(abs(lengths[i]) for i in first[s : s + 4]) for s in range(start, start + 20, 4)]
        spread = sorted(abs(lengths[i]) for i in first[start : start + 20])
        assert max(totals) - min(totals) <= spread[-1]
    assert sorted(chain(first)) == sorted(range(200))
