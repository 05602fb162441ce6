"""The fast tokenizer against the original's token ids, and against sentencepiece on any text."""

import io
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from m3_conversion.tokenizer import build_tokenizer


GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
IMAGE = -200  # how the original marks an image among token ids
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
TOKENIZATION = json.loads((GOLDENS / "expected" / "tokenization.json").read_text())
PROMPTS = [case for case in TOKENIZATION["conversations"] + TOKENIZATION["raw"] if "prompt" in case]
CHECKPOINTS = ("llava15-m3", "llava-next-m3")
CASES = {name: json.loads((GOLDENS / "expected" / f"{name}.json").read_text())["cases"] for name in CHECKPOINTS}


class Original:
    """`tokenizer_image_token` with transformers 4.37's slow LlamaTokenizer, rewritten around sentencepiece.

    `special` are the tokens in `all_special_tokens`, `plain` the other added ones; both with their ids. One thing is ours: a
    prompt that is written with the token that begins it is, after that token, what it is without.
    """

    def __init__(self, model: bytes, legacy: bool, special=SPECIAL, plain=None, bos=(1,)):
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        if not legacy:
            proto.normalizer_spec.add_dummy_prefix = False
        self.sentencepiece = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.legacy, self.special, self.bos = legacy, special, list(bos)
        self.added = special | (plain or {})
        longest_first = sorted(self.added, key=len, reverse=True)
        self.cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def __call__(self, prompt: str, placeholders: int = 1, image_id: int = IMAGE) -> list[int]:
        ids = list(self.bos)
        if self.bos and prompt.startswith("<s>"):
            ids, prompt = [*ids, *self.bos], prompt.removeprefix("<s>")
        for i, piece in enumerate(prompt.split("<image>")):
            ids += [image_id] * placeholders if i else []
            ids += [self.added.get(token, self.sentencepiece.piece_to_id(token)) for token in self.tokens(piece)]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Of ids without special tokens."""
        tokens = [self.sentencepiece.id_to_piece(i) for i in ids]
        return self.sentencepiece.decode([tokens[0].removeprefix("▁"), *tokens[1:]])

    def tokens(self, text):
        if self.legacy or not text:
            return self.stretches(text)
        tokens = self.stretches("▁" + text.replace("▁", " "))
        return tokens[1:] if tokens[0] == "▁" and tokens[1:2] and tokens[1] in self.special else tokens

    def stretches(self, text):
        tokens = []
        for stretch in filter(None, self.cut.split(text)):
            tokens += [stretch] if stretch in self.added else self.pieces(stretch)
        return tokens

    def pieces(self, text):
        if self.legacy or not text.startswith(("▁", " ")):
            return self.sentencepiece.encode(text, out_type=str)
        unknown = self.sentencepiece.encode("<unk>", out_type=str)
        return self.sentencepiece.encode("<unk>" + text, out_type=str)[len(unknown) :]


def write_source(folder: Path, model: bytes, config: dict, **files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def reloaded(tokenizer, folder: Path):
    """The tokenizer as a user gets it: from the saved files alone."""
    tokenizer.save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return AutoTokenizer.from_pretrained(folder)


def model_bytes(name: str) -> bytes:
    return (GOLDENS / name / "tokenizer.model").read_bytes()


def expand(ids, placeholders, image_id):
    return [new for i in ids for new in ([image_id] * placeholders if i == IMAGE else [i])]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Reloaded tokenizers by (golden folder, legacy)."""
    made = {}
    for name in ("tokenizer_v1", *CHECKPOINTS):
        folder = tmp_path_factory.mktemp(name)
        made[name, False] = reloaded(build_tokenizer(GOLDENS / name), folder / "saved")
        config = json.loads((GOLDENS / name / "tokenizer_config.json").read_text()) | {"legacy": True}
        source = write_source(folder / "legacy", model_bytes(name), config)
        made[name, True] = reloaded(build_tokenizer(source), folder / "legacy-saved")
    return made


@pytest.mark.parametrize("placeholders", [1, 3, 576])
@pytest.mark.parametrize("legacy", [False, True])
def test_golden_prompts(tokenizers, legacy, placeholders):
    tokenizer = tokenizers["tokenizer_v1", legacy]
    for case in PROMPTS:
        ids = tokenizer(case["prompt"].replace("<image>", "<image>" * placeholders))["input_ids"]
        expected = case["ids_legacy_true" if legacy else "ids"]
        assert ids == expand(expected, placeholders, tokenizer.image_token_id), case["prompt"]


@pytest.mark.parametrize("placeholders", [1, 3, 576])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_prompts_of_checkpoints(tokenizers, name, placeholders):
    tokenizer = tokenizers[name, False]
    for case in CASES[name]:
        for row, prompt in enumerate(case["prompts"]):
            mask = case["attention_mask"][row] if case["attention_mask"] else [1] * len(case["input_ids"][row])
            expected = [i for i, is_valid in zip(case["input_ids"][row], mask) if is_valid]
            ids = tokenizer(prompt.replace("<image>", "<image>" * placeholders))["input_ids"]
            assert ids == expand(expected, placeholders, tokenizer.image_token_id), case["id"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_generated_text(tokenizers, name):
    tokenizer = tokenizers[name, False]
    compared = 0
    for case in CASES[name]:
        for ids, text in zip(case.get("new_ids") or [], case.get("generated_text") or []):
            if not has_broken_run(tokenizer.convert_ids_to_tokens(ids)):
                assert tokenizer.decode(ids, skip_special_tokens=True) == text, case["id"]
                compared += 1
    assert compared >= 20


def has_broken_run(tokens) -> bool:
    """Whether a run of bytes holds both a character and an invalid byte: the backend replaces all of such a run."""
    runs = re.findall("(?:<0x[89A-F].>)+", "".join(tokens))
    runs = [bytes.fromhex(run.replace("<0x", "").replace(">", "")) for run in runs]
    return any(run.decode("utf-8", "ignore") and "\ufffd" in run.decode("utf-8", "replace") for run in runs)


@pytest.mark.parametrize("text", ["Hello there", "  two  spaces", "\nnew\r\nlines\n", "é 👩‍👩‍👧\n한국어\0", "x"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["tokenizer_v1", "llava15-m3"])
def test_decoding(tokenizers, name, legacy, text):
    tokenizer, original = tokenizers[name, legacy], Original(model_bytes(name), legacy)
    ids = original(text)
    for start in range(1, len(ids)):
        if not has_broken_run(tokenizer.convert_ids_to_tokens(ids[start:])):
            assert tokenizer.decode([1, *ids[start:], 2], skip_special_tokens=True) == original.decode(ids[start:])


@pytest.mark.parametrize("legacy", [False, True])
def test_the_reference_of_the_tests_below_equals_the_original(legacy):
    original = Original(model_bytes("tokenizer_v1"), legacy)
    for case in PROMPTS:
        assert original(case["prompt"]) == case["ids_legacy_true" if legacy else "ids"]


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
AWKWARD = ["<image>", "<image>", "</s>", "<s>", "<unk>", " ", "  ", "\n", "\t", "\r\n", "▁", "\0", "<", ">", "<0x0A>"]
AWKWARD += ["the", " a", "aaaa", "----", "1234", "é", "👩‍👩‍👧", "\u200b", "\u2028", "한국어", "<image", "image>"]
ANY_PROMPT = st.lists(st.sampled_from(AWKWARD) | ANY_TEXT, max_size=10).map("".join)
PROPERTY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["tokenizer_v1", "llava15-m3"])
def test_any_prompt(tokenizers, name, legacy):
    tokenizer, original = tokenizers[name, legacy], Original(model_bytes(name), legacy)

    @PROPERTY
    @given(ANY_PROMPT, st.integers(1, 3))
    def equal(prompt, placeholders):
        ids = tokenizer(prompt.replace("<image>", "<image>" * placeholders))["input_ids"]
        assert ids == original(prompt, placeholders, tokenizer.image_token_id)

    equal()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["tokenizer_v1", "llava15-m3"])
def test_runs_of_one_character(tokenizers, name, legacy):
    """Spaces of all lengths share one score in tokenizer_v1; runs are where the order of equal merges shows."""
    tokenizer, original = tokenizers[name, legacy], Original(model_bytes(name), legacy)
    for length in [*range(1, 70), 200]:
        for character in " -=#*.ax\n\té":
            prompt = f"<image>{character * length}b{character * length}</s>{character * length}"
            assert tokenizer(prompt)["input_ids"] == original(prompt, image_id=tokenizer.image_token_id)


def test_long_words_are_fast(tokenizers):
    words = ["a" * 5_000, "ab" * 50_000, "é" * 20_000, " " * 20_000]
    start = time.perf_counter()
    for word in words:
        tokenizers["tokenizer_v1", False](word)
    assert time.perf_counter() - start < 2


def test_runs_of_pieces_that_share_a_score(tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes("llava15-m3"))
    for place, text in ((300, "aa"), (301, "aaa"), (302, "aaaaaa")):
        proto.pieces[place].piece, proto.pieces[place].score = text, 0
    model = proto.SerializeToString()
    tokenizer, original = build_tokenizer(write_source(tmp_path, model, {})), Original(model, legacy=True)
    for length in range(1, 40):
        assert tokenizer("x" + "a" * length)["input_ids"] == original("x" + "a" * length)


def train(add_dummy_prefix: bool = True, user_defined_symbols=(), byte_fallback: bool = True) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(case["prompt"] for case in PROMPTS if case["prompt"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        user_defined_symbols=list(user_defined_symbols),
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("add_dummy_prefix", [False, True])
@pytest.mark.parametrize("kind", ["user-defined", "added", "added-special", "at-loading", "chatml"])
def test_other_tokens_in_the_text(tmp_path, kind, add_dummy_prefix, legacy):
    """Tokens as Yi has them (user-defined symbols), and `<im_start>`: saved with a checkpoint, or added at loading."""
    symbols = ["<|im_start|>", "<|im_end|>"] if kind in ("user-defined", "chatml") else []
    model = train(add_dummy_prefix, symbols)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    marks = {"<im_patch>": size, "<im_start>": size + 1, "<im_end>": size + 2}
    config, files, model_config, special, plain = {"legacy": legacy}, {}, None, dict(SPECIAL), {}
    if kind == "added":
        files, plain = {"added_tokens": marks}, marks
        model_config = {"mm_use_im_start_end": True}  # which then adds nothing
    elif kind == "added-special":
        files, special = {"added_tokens": marks}, special | marks
        files["special_tokens_map"] = {"additional_special_tokens": list(marks)}
    elif kind == "at-loading":
        model_config, special = {"mm_use_im_start_end": True, "vocab_size": size}, special | marks
    elif kind == "chatml":
        decoder = {0: "<unk>", 1: "<s>", 2: "</s>", 4: "<|im_end|>"}
        config["added_tokens_decoder"] = {i: {"content": text, "special": True} for i, text in decoder.items()}
        config |= {"eos_token": "<|im_end|>", "add_bos_token": False}
        special, plain = {"<unk>": 0, "<s>": 1, "<|im_end|>": 4}, {"</s>": 2}
    source = write_source(tmp_path / "source", model, config, **files)
    tokenizer = reloaded(build_tokenizer(source, model_config=model_config), tmp_path / "saved")
    original = Original(model, legacy, special, plain, bos=() if kind == "chatml" else (1,))
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in (special | plain)} == special | plain
    assert tokenizer.image_token_id == size + (3 if kind not in ("user-defined", "chatml") else 0)

    atoms = [*special, *plain, *symbols, "<image>", "<image>", " ", "\n", "a", "▁", "What is", "é"]

    @settings(PROPERTY, max_examples=100)
    @given(st.lists(st.sampled_from(atoms), max_size=8).map("".join))
    def equal(prompt):
        # The one known difference: a plain token alone between cuts gets no space.
        cut = "|".join(map(re.escape, ["<image>", *original.added] if legacy else special))
        if not {*symbols, *plain}.intersection(re.split(cut, prompt)):
            assert tokenizer(prompt)["input_ids"] == original(prompt, image_id=tokenizer.image_token_id)

    equal()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_model_without_byte_fallback(tmp_path, legacy):
    model = train(byte_fallback=False)
    tokenizer = build_tokenizer(write_source(tmp_path, model, {"legacy": legacy}))
    for prompt in ("日本語 x", "a日b", "日", "<image>日日</s>日"):
        assert tokenizer(prompt)["input_ids"] == Original(model, legacy)(prompt, image_id=tokenizer.image_token_id)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_source_with_only_tokenizer_json(tmp_path, legacy):
    """As transformers 4 wrote it, where the space before the text comes from the normalizer."""
    saved = json.loads(build_tokenizer(GOLDENS / "tokenizer_v1").backend_tokenizer.to_str())
    del saved["model"]["vocab"]["<image>"]
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in SPECIAL]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    saved["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    saved["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    tokenizer = build_tokenizer(tmp_path)
    for case in PROMPTS:
        expected = expand(case["ids_legacy_true" if legacy else "ids"], 1, 32000)
        assert tokenizer(case["prompt"])["input_ids"] == expected, case["prompt"]


def test_what_a_user_finds(tokenizers):
    tokenizer = tokenizers["llava15-m3", False]
    assert (tokenizer.image_token, tokenizer.image_token_id) == ("<image>", 1000)
    assert len(tokenizer) == 1001
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == ("<unk>", 0, "left")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, 2048)
    batch = tokenizer(["<image>", "<image>\nWhat is this?"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0] == [0] * (len(batch["input_ids"][1]) - 2) + [1, 1000]
    assert batch["attention_mask"][0] == [0] * (len(batch["input_ids"][1]) - 2) + [1, 1]
    ids = tokenizer("Hi <image>")["input_ids"]
    assert tokenizer.decode([*ids, 2]) == "<s> Hi <image></s>"
    assert tokenizer.decode([*ids, 2], skip_special_tokens=True) == "Hi "


@pytest.mark.parametrize(
    ("config", "files", "pad"),
    [
        ({}, {}, "<unk>"),
        ({"pad_token": "</s>"}, {}, "</s>"),
        ({"pad_token": None}, {"special_tokens_map": {"pad_token": {"content": "<s>"}}}, "<s>"),
        ({"pad_token": "</s>"}, {"special_tokens_map": {"pad_token": "<s>"}}, "<s>"),
        ({"pad_token": "</s>", "added_tokens_decoder": {}}, {"special_tokens_map": {"pad_token": "<s>"}}, "</s>"),
        ({"pad_token": "<pad>"}, {"added_tokens": {"<pad>": 1000}}, "<pad>"),
    ],
)
def test_padding_token(tmp_path, config, files, pad):
    tokenizer = build_tokenizer(write_source(tmp_path, model_bytes("llava15-m3"), config, **files))
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id == SPECIAL.get(pad, 1000)
    assert tokenizer.image_token_id == (1001 if pad == "<pad>" else 1000)


def test_without_a_word_of_it_legacy_is_true(tmp_path, tokenizers):
    source = write_source(tmp_path / "source", model_bytes("llava15-m3"), {})
    (source / "tokenizer_config.json").unlink()
    ids = build_tokenizer(source)("x</s>y")["input_ids"]
    assert ids == tokenizers["llava15-m3", True]("x</s>y")["input_ids"]
    assert ids != tokenizers["llava15-m3", False]("x</s>y")["input_ids"]


def test_the_original_adds_the_patch_token_unless_told_not_to(tmp_path):
    def image_id(**model_config):
        return build_tokenizer(GOLDENS / "llava15-m3", model_config={"vocab_size": 1000, **model_config}).image_token_id

    assert image_id() == 1001
    assert image_id(mm_use_im_patch_token=False) == 1000


def unigram() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(case["prompt"] for case in PROMPTS if case["prompt"]),
        model_writer=model,
        vocab_size=150,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def changed_spec(**changes) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes("llava15-m3"))
    for name, value in changes.items():
        setattr(proto.normalizer_spec, name, value)
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (b"", "empty"),
        (b"not a model at all", "cut off or of another kind"),
        (b"\xff" * 10_000, "cut off or of another kind"),
        (b"PK\x03\x04" + bytes(100), "cut off or of another kind"),
        (unigram, "not a BPE model"),
        (lambda: changed_spec(remove_extra_whitespaces=True), "normalizes text"),
        (lambda: changed_spec(escape_whitespaces=False), "escape"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, model, reason):
    source = write_source(tmp_path, model() if callable(model) else model, {})
    with pytest.raises(ValueError, match=rf"tokenizer\.model: .*{reason}.*copy tokenizer\.model") as error:
        build_tokenizer(source)
    assert "\n" not in str(error.value)


def test_files_cut_off_anywhere_are_refused(tmp_path):
    whole = model_bytes("llava15-m3")
    for size in [*range(1, len(whole), 397), *range(len(whole) - 30, len(whole))]:
        source = write_source(tmp_path, whole[:size], {})
        with pytest.raises(ValueError, match=r"tokenizer\.model: .*cut off"):
            build_tokenizer(source)


def test_other_bad_sources(tmp_path):
    def refused(match, **kwargs):
        with pytest.raises(ValueError, match=match):
            build_tokenizer(tmp_path, **kwargs)

    refused("no tokenizer.model and no tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    refused("tokenizer.json is not valid JSON")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"Ġa": 0}, "merges": []}}))
    refused("tokenizer.json: not a LLaMA-style")
    shutil.copy(GOLDENS / "llava15-m3" / "tokenizer.model", tmp_path)
    refused("1000 tokens, but config.json has vocab_size 999", model_config={"vocab_size": 999})
    (tmp_path / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    refused("tokenizer_config.json: add_eos_token")
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": null}')
    refused("tokenizer_config.json: unk_token")


def test_pieces_that_share_a_score_are_reported(tmp_path, caplog):
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes("llava15-m3"))
    for piece in proto.pieces[300:310]:
        piece.score = -5.0
    build_tokenizer(write_source(tmp_path, proto.SerializeToString(), {}))
    assert "share a score" in caplog.text
