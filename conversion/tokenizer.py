"""The tokenizer of an original checkpoint as a fast one: same token ids, from `tokenizer.json` alone.

The original cuts a prompt at `<image>` and gives each piece to transformers 4.37's slow `LlamaTokenizer`
(`llava/mm_utils.py: tokenizer_image_token`). That class puts a space before the text, and where else it does so depends
on its `legacy` flag:

    legacy=False   at the start of each piece, unless the piece starts with a special token
    legacy=True    at the start of every stretch of text between added tokens, if the sentencepiece model asks for it

transformers 5's `LlamaTokenizer` does neither for `<image>`, and rebuilds its own pre-tokenizer when loaded. So the
rules are written into a plain `PreTrainedTokenizerFast`, in terms of its backend: added tokens with `normalized=False`
cut the text first; the normalizer and then the pre-tokenizers see each stretch between them; added tokens with
`normalized=True` cut what the normalizer returned.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .original import ConversionError, check_content, read_json


logger = logging.getLogger(__name__)

SPACE = "▁"  # U+2581: what sentencepiece writes for a space
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # of LlamaTokenizer


def build_tokenizer(
    source: Path, *, model_config: dict[str, Any] | None = None, image_token: str = "<image>"
) -> PreTrainedTokenizerFast:
    """Builds the fast tokenizer of the checkpoint in `source`, with an image token at the first free id.

    Read from `source`: `tokenizer.model` (without it, a `tokenizer.json` made from such a model),
    `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`. Ids of the original are kept. The padding
    token is the one that the checkpoint names, else the unknown token, as LLaVA pads; padding goes to the left, as
    batched generation needs.

    Args:
        source: folder with the original tokenizer's files.
        model_config: the original `config.json`. It says which of `<im_patch>`, `<im_start>`, `<im_end>` the original
            adds when it loads the checkpoint (`llava/model/builder.py`); None adds none of them.
        image_token: the placeholder in prompts; reachable as `tokenizer.image_token` and `tokenizer.image_token_id`.

    Raises:
        ConversionError: a file is missing, damaged or of another kind, or asks for something that LLaVA's tokenizers
            never do.
    """
    config = _read_config(source)
    if (source / "tokenizer.model").is_file():
        vocabulary = read_sentencepiece(source / "tokenizer.model")
    elif (source / "tokenizer.json").is_file():
        vocabulary = read_tokenizer_json(source / "tokenizer.json")
    else:
        raise ConversionError(
            f"{source}: no tokenizer.model and no tokenizer.json: copy the one of the checkpoint's language model there"
        )
    model_config = model_config or {}
    rows = model_config.get("vocab_size")
    if rows is not None and len(vocabulary.ids) > rows:
        raise ConversionError(
            f"{vocabulary.path}: {len(vocabulary.ids)} tokens, but config.json has vocab_size {rows}: "
            "copy the checkpoint's own tokenizer files there"
        )
    added = _AddedTokens(vocabulary, config, model_config, image_token)
    bos = str(config.named["bos_token"]) if config.add_bos_token else None
    backend = _build_backend(vocabulary, added, image_token, bos, legacy=config.legacy)
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, added.ids[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: str(token) for name, token in config.named.items()},
        image_token=image_token,
        extra_special_tokens=[str(token) for token in config.additional],
        model_max_length=config.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Vocabulary:
    """What a vocabulary file says: the tokens, how they merge, and how text is prepared for them."""

    path: Path
    ids: dict[str, int]
    merges: list[tuple[str, str]]  # the earlier, the sooner applied
    user_defined: set[str]  # symbols that sentencepiece finds in text whole, before any merge
    added: dict[int, AddedToken]  # tokens that a tokenizer.json holds beside its model
    unk_token: str
    byte_fallback: bool
    add_dummy_prefix: bool


def read_sentencepiece(path: Path) -> Vocabulary:
    """Reads a sentencepiece BPE model.

    Raises:
        ConversionError: the file is empty, cut off, no sentencepiece model, not BPE, or changes text before it splits.
    """
    data = path.read_bytes()
    check_content(path, data)
    try:
        model = _parse_sentencepiece(data)
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        unknown = [piece.piece for piece in model.pieces if piece.type == piece.UNKNOWN]
        user_defined = {piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED}
        obstacles = {
            "it is not a BPE model": trainer.model_type != trainer.BPE,
            "its vocabulary is inconsistent": len(unknown) != 1 or len(ids) != len(model.pieces),
            "it has unused pieces": any(piece.type == piece.UNUSED for piece in model.pieces),
            "it has user-defined symbols with spaces": any(SPACE in piece for piece in user_defined),
            "it writes spaces as suffixes": trainer.treat_whitespace_as_suffix,
            "it normalizes text": normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces,
            "it does not escape spaces": not normalizer.escape_whitespaces,
        }
        for obstacle, is_there in obstacles.items():
            if is_there:
                raise ValueError(obstacle)
    except ValueError as error:
        raise ConversionError(
            f"{path}: not a LLaMA-style sentencepiece BPE model ({error}): "
            "copy tokenizer.model again from the checkpoint or from its language model"
        ) from error
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    shared = Counter(scores.values())
    tied = [piece for piece, score in scores.items() if shared[score] > 1 and len(set(piece)) > 1]
    if tied:
        logger.warning("%s: %d pieces share a score, as %r does: a few token ids may differ", path, len(tied), tied[0])
    return Vocabulary(
        path=path,
        ids=ids,
        merges=_rank_merges(scores),
        user_defined=user_defined,
        added={},
        unk_token=unknown[0],
        byte_fallback=trainer.byte_fallback,
        add_dummy_prefix=normalizer.add_dummy_prefix,
    )


def read_tokenizer_json(path: Path) -> Vocabulary:
    """Reads the `tokenizer.json` that transformers saves of a LLaMA-style tokenizer: vocabulary, merges, added tokens.

    Its normalizer and pre-tokenizer only say whether text gets a leading space; the rest of them is not the original's.
    Its merges are taken as they are (those that transformers 4 wrote are in sentencepiece's order).

    Raises:
        ConversionError: the file is not JSON, or not of such a tokenizer.
    """
    data = read_json(path)
    model = data.get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback") or SPACE not in model.get("vocab", {}):
        raise ConversionError(
            f"{path}: not a LLaMA-style BPE tokenizer with byte fallback: "
            "put the tokenizer.model of the checkpoint's language model beside it"
        )
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    added = {entry["id"]: _as_token(entry) for entry in data.get("added_tokens", [])}
    steps = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    return Vocabulary(
        path=path,
        ids=dict(model["vocab"]),
        merges=merges,
        user_defined=set(),
        added=added,
        unk_token=model.get("unk_token") or DEFAULT_TOKENS["unk_token"],
        byte_fallback=True,
        add_dummy_prefix=bool(
            re.search(r'"type": "Prepend"|"prepend_scheme": "(first|always)"|"add_prefix_space": true', steps)
        ),
    )


class _AddedTokens:
    """The tokens that are found in text before any merge, with their ids, sorted by how the original treats them.

    `special` are those that a slow tokenizer lists in `all_special_tokens`; `plain` are the other added tokens and
    sentencepiece's user-defined symbols, of which `user_defined` are those that only sentencepiece knows of. New ids
    are given in the order of the original's loading.
    """

    def __init__(self, vocabulary: Vocabulary, config: _Config, model_config: dict[str, Any], image_token: str) -> None:
        listed = vocabulary.added | config.added
        by_text = {token.content: token for token in listed.values()}
        marks = ["<im_patch>"] if model_config.get("mm_use_im_patch_token", bool(model_config)) else []
        marks += ["<im_start>", "<im_end>"] if model_config.get("mm_use_im_start_end") else []
        special = [*config.named.values(), *config.additional]
        special += [AddedToken(mark) for mark in marks if mark not in by_text]
        self.special = {token.content: by_text.get(token.content, token) for token in special}
        self.user_defined = {
            text for text in vocabulary.user_defined if text not in {*by_text, *self.special, image_token}
        }
        plain = by_text | {text: AddedToken(text) for text in self.user_defined}
        self.plain = {text: token for text, token in plain.items() if text not in {*self.special, image_token}}

        texts = {i: text for text, i in vocabulary.ids.items()} | {i: token.content for i, token in listed.items()}
        self.ids = {text: i for i, text in texts.items()}  # an added token may have replaced a piece
        for text in (*self.special, image_token):
            self.ids.setdefault(text, max(self.ids.values()) + 1)


def _build_backend(
    vocabulary: Vocabulary, added: _AddedTokens, image_token: str, bos: str | None, *, legacy: bool
) -> Tokenizer:
    backend = Tokenizer(
        BPE(
            added.ids,
            [(a, b) for a, b in vocabulary.merges if a in added.ids and b in added.ids and a + b in added.ids],
            unk_token=vocabulary.unk_token,
            fuse_unk=True,
            byte_fallback=vocabulary.byte_fallback,
        )
    )
    if legacy:
        steps, splits, normalized = _prepare_legacy(added, vocabulary.add_dummy_prefix)
    else:
        steps, splits, normalized = _prepare(added, image_token, bos)
    backend.normalizer = normalizers.Sequence(steps)
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    # Of a run of bytes that is not UTF-8, sentencepiece replaces the invalid ones, but ByteFallback all of them. ASCII
    # bytes, newlines above all, are kept out of its runs.
    ascii_bytes = [decoders.Replace(f"<0x{byte:02X}>", chr(byte)) for byte in range(128)]
    # The slow tokenizer drops a leading space, and sentencepiece a second one if it was to put one there.
    leading = 1 + (legacy and vocabulary.add_dummy_prefix)
    backend.decoder = decoders.Sequence(
        [
            *(ascii_bytes if vocabulary.byte_fallback else []),
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", leading, 0),
        ]
    )
    backend.add_special_tokens(
        [_with_flags(token, special=True, normalized=text in normalized) for text, token in added.special.items()]
        + [AddedToken(image_token, special=True, normalized=image_token in normalized)]
    )
    backend.add_tokens(
        [_with_flags(token, special=False, normalized=text in normalized) for text, token in added.plain.items()]
    )
    return backend


# In the two functions below a plain " " is free as a mark: by the time it is used, all spaces of the text are SPACE.
# Each returns normalizers, pre-tokenizers, and the texts of the added tokens that are to be found in normalized text.
# A token's own text passes through the same normalizers, hence the `(?!\z)`: a token alone must come out as it is. (So
# a stretch that is one such plain token and nothing else gets no space, though it should.)

_Steps = tuple[list[normalizers.Normalizer], list[pre_tokenizers.PreTokenizer], set[str]]


def _prepare(added: _AddedTokens, image_token: str, bos: str | None) -> _Steps:
    """legacy=False: a space before each piece, but not before a special token.

    A first piece also begins after the token that begins a sequence, where a prompt is written with it: so that templates
    can write it, for engines that add no token. Special tokens are found in normalized text, since they would else be cut
    out first, and where the text starts could not be seen.
    """
    image, special = re.escape(image_token), _any_of([*added.special, image_token])
    steps: list[normalizers.Normalizer] = [
        normalizers.Replace(Regex(rf"(?<={image})(?!{special}|\z)"), " "),
        normalizers.Replace(" ", SPACE),
    ]
    if bos is not None:
        begin = re.escape(bos)
        steps.insert(0, normalizers.Replace(Regex(rf"\A{begin}(?!{special}|\z)"), f"{bos} "))
    splits: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Metaspace(" ", "first", split=False)]
    if added.plain:
        # A plain token at the very start gets the space too, but there is no text for Metaspace to put it before. The
        # mark is such a text. Metaspace turns it into " ▁ " at the start of the prompt and leaves it "▁ " elsewhere.
        steps.append(normalizers.Replace(Regex(rf"\A(?=(?:{_any_of(added.plain)})(?!\z))"), SPACE + " "))
        splits.append(pre_tokenizers.Split(SPACE + " ", "removed"))
    splits.append(pre_tokenizers.Metaspace(SPACE, "never", split=False))
    return steps, splits, {image_token, *added.special, *added.plain}


def _prepare_legacy(added: _AddedTokens, add_dummy_prefix: bool) -> _Steps:
    """legacy=True: a space before each stretch of text, if sentencepiece is to add one (`add_dummy_prefix`)."""
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    if not add_dummy_prefix:
        return steps, [], set()
    splits: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Metaspace(" ", "always", split=False)]
    if added.user_defined:
        # To sentencepiece these are part of the stretch: the space goes before them and not after them.
        symbols = _any_of(added.user_defined)
        steps.append(normalizers.Replace(Regex(rf"\A(?=(?:{symbols})(?!\z))"), " "))
        steps.append(normalizers.Replace(Regex(rf"(?<={symbols})(?!\z)"), SPACE + " "))
        splits.append(pre_tokenizers.Split(" " + SPACE + " ", "removed"))
    splits.append(pre_tokenizers.Metaspace(SPACE, "never", split=False))
    return steps, splits, set(added.user_defined)


def _any_of(texts: Iterable[str]) -> str:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return "|".join(re.escape(text.replace(" ", SPACE)) for text in longest_first)


def _with_flags(token: AddedToken, *, special: bool, normalized: bool) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        special=special,
        normalized=normalized,
    )


def _rank_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All ways to put a piece together from two pieces, in the order in which sentencepiece would apply them.

    It merges the pair with the best score first and takes the leftmost of equal ones. A rank knows no position, but a
    longer left part first has the same effect on a run of one character: what is growing goes on growing.
    """
    merges = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return sorted(merges, key=lambda merge: (-scores[merge[0] + merge[1]], -len(merge[0])))


@dataclass(frozen=True)
class _Config:
    """What the three small files say, merged by the rules of transformers 4.37 and completed by its defaults."""

    named: dict[str, AddedToken]  # "bos_token" and so on; those that there are
    additional: list[AddedToken]
    added: dict[int, AddedToken]
    add_bos_token: bool
    legacy: bool
    model_max_length: int | None


def _read_config(source: Path) -> _Config:
    path = source / "tokenizer_config.json"
    config = _read_json_if_there(path)
    if "added_tokens_decoder" in config:  # then the two older files are not looked at
        added = {int(i): _as_token(token) for i, token in config["added_tokens_decoder"].items()}
    else:
        config |= _read_json_if_there(source / "special_tokens_map.json")
        older = _read_json_if_there(source / "added_tokens.json")
        added = {int(i): AddedToken(text) for text, i in older.items()}
    tokens = {name: config.get(name, DEFAULT_TOKENS.get(name)) for name in NAMED_TOKENS}
    tokens["pad_token"] = tokens["pad_token"] or tokens["unk_token"]
    add_bos_token = config.get("add_bos_token", True)
    for name in ("unk_token", "bos_token") if add_bos_token else ("unk_token",):
        if not tokens[name]:
            raise ConversionError(f"{path}: {name} is null: name one, for LLaMA {DEFAULT_TOKENS[name]}")
    if config.get("add_eos_token"):
        raise ConversionError(
            f"{path}: add_eos_token is true, which would end the prompt before the answer: set it to false"
        )
    return _Config(
        named={name: _as_token(token) for name, token in tokens.items() if token},
        additional=[_as_token(token) for token in config.get("additional_special_tokens") or []],
        added=added,
        add_bos_token=add_bos_token,
        legacy=config.get("legacy") is not False,  # no word of it means True, as in LlamaTokenizer
        model_max_length=config.get("model_max_length"),
    )


def _read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _as_token(token: str | dict[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token)
    return AddedToken(**{key: token[key] for key in ("content", "single_word", "lstrip", "rstrip") if key in token})


def _parse_sentencepiece(data: bytes) -> ModelProto:
    if not data:
        raise ValueError("the file is empty")
    try:
        model = ModelProto.FromString(data)
        if not model.HasField("trainer_spec") or not model.HasField("normalizer_spec"):  # they follow the pieces
            raise DecodeError("the file ends too early")
    except DecodeError as error:
        raise ValueError("it is cut off or of another kind") from error
    return model
