"""A causal language model of any family, as `m3-create` takes it: a folder, a Hub id or a GGUF file.

No family is known here by name. What differs is asked of transformers' own class for it, built without weights.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from jinja2 import TemplateError
from tokenizers import Tokenizer, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from modeling_m3.outputs_m3 import CACHE_NAME

from .chat_templates import chat_template_for, with_image_marks
from .generation_settings import SAMPLING, sampling, storable, token_ids
from .mapping import VOCABULARY_NAMES
from .original import (
    ConversionError,
    HeldTensor,
    StoredTensor,
    check_name,
    is_hub_id,
    local_folder,
    read_json,
    stored_tensors,
)
from .plain_text import plain_text
from .source import naming


logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# What a chat template may be asked for; one that refuses a kind of chat, as a system message, may.
_PROBES = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hello!\n"}],
    [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ],
)


@dataclass(frozen=True)
class LanguageModel:
    """A language model that was looked at, but for its weights.

    Attributes:
        folder, gguf_file: where it lies; the second where it is a GGUF file in the folder.
        readable: the folder as transformers can read it.
        config: its configuration.
        names: of its parameters, as transformers has them, with their names in an M3.
    """

    folder: Path
    gguf_file: str | None
    readable: Path
    config: PreTrainedConfig
    names: dict[str, str]

    @property
    def file(self) -> Path:
        """What errors are about."""
        return self.folder / (self.gguf_file or "config.json")

    @property
    def source(self) -> dict[str, Any]:
        """The arguments of transformers' `from_pretrained`."""
        given = {"pretrained_model_name_or_path": self.readable}
        return given if self.gguf_file is None else {**given, "gguf_file": self.gguf_file}


@contextmanager
def read_language_model(name: str | Path) -> Iterator[LanguageModel]:
    """A language model that was looked at, and can be loaded as long as the block runs.

    Raises:
        ConversionError: it is none, or of a kind that M3 has no place for, by its name.
    """
    check_name(name)
    folder, gguf_file = _locate(str(name))
    file = folder / (gguf_file or "config.json")
    if gguf_file is None:
        _check_kind(read_json(file), file)
    with plain_text(folder) if gguf_file is None else nullcontext(folder) as readable:
        with naming(file):
            config = AutoConfig.from_pretrained(readable, **({} if gguf_file is None else {"gguf_file": gguf_file}))
        yield LanguageModel(folder, gguf_file, readable, config, _names(config, file))


def load_reference(model: LanguageModel, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own causal language model with all of its weights.

    Raises:
        ConversionError: it does not load, or weights are missing.
    """
    with naming(model.file):
        reference, info = AutoModelForCausalLM.from_pretrained(**model.source, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConversionError(
            f"{model.folder}: {missing[0]} is missing from the weights, and {len(missing) - 1} others: is it a whole causal language "
            "model?"
        )
    return reference.eval()


def is_tied(reference: PreTrainedModel) -> bool:
    """Whether head and embedding are one. Where a folder says so and has others for both, transformers takes both."""
    return reference.get_output_embeddings().weight is reference.get_input_embeddings().weight


def stored_dtype(model: LanguageModel) -> torch.dtype:
    """The type of the weights as they are stored; float32 for a GGUF file, whose are quantized."""
    if model.gguf_file is not None:
        return torch.float32
    stored = stored_tensors(model.folder)
    embedding = next((tensor for key, tensor in stored.items() if key.endswith("embed_tokens.weight")), None)
    if embedding is None:
        raise ConversionError(f"{model.folder}: its weights have no embed_tokens.weight: is it a whole language model?")
    return embedding.dtype


def language_tensors(model: LanguageModel, reference: PreTrainedModel) -> dict[str, StoredTensor]:
    """The weights by their names in an M3: to be read from the files where those have transformers' own names, else, as a GGUF
    file's, from the model in memory."""
    held = reference.state_dict()
    tied = {key for key, name in model.names.items() if name == VOCABULARY_NAMES[1]} if is_tied(reference) else set()
    if model.gguf_file is None:
        stored = stored_tensors(model.folder)
        is_whole = model.names.keys() - tied <= stored.keys() <= model.names.keys()
        if is_whole and all(tensor.shape == tuple(held[key].shape) for key, tensor in stored.items()):
            return {model.names[key]: tensor for key, tensor in stored.items() if key not in tied}
    return {name: HeldTensor.of(key, model.file, held[key]) for key, name in model.names.items() if key not in tied}


def build_language_processing(
    model: LanguageModel, chat_template: str | None
) -> tuple[PreTrainedTokenizerFast, str, PreTrainedTokenizerBase]:
    """The tokenizer with an image token, the chat template with image marks, and the language model's own tokenizer.

    Args:
        model: the language model.
        chat_template: a key of `CHAT_TEMPLATES` in place of its own; vicuna_v1 where it has none.

    Raises:
        ConversionError: there is no fast tokenizer, the vocabulary has no room, or chats of texts alone would be tokenized
            otherwise than by the language model's own.
    """
    with naming(model.file):
        own = AutoTokenizer.from_pretrained(**model.source)
    if not own.is_fast:
        raise ConversionError(f"{model.folder}: its tokenizer is a {type(own).__name__}, of which there is no fast one")
    rows, ids = model.config.vocab_size, max(own.get_vocab().values()) + 1
    if ids > rows:
        raise ConversionError(
            f"{model.file}: its tokenizer has ids up to {ids - 1}, but the embedding has {rows} rows, which is no room for "
            f"{IMAGE_TOKEN}: use the tokenizer files of this model"
        )
    template = own.get_chat_template() if own.chat_template and chat_template is None else None
    tokenizer = _with_image_token(own)
    if template is None:
        if chat_template is None:
            logger.info("%s has no chat template: vicuna_v1 is taken (--chat-template names another)", model.file)
        return tokenizer, chat_template_for(tokenizer, chat_template or "vicuna_v1"), own
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token is not None
    with naming(model.file):
        rendered = _render(own, _PROBES[0])
    if begins and not rendered.startswith(tokenizer.bos_token):
        logger.info("%s: its chats do not begin with %s, so prompts do not", model.file, tokenizer.bos_token)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    return tokenizer, with_image_marks(template), own


def check_chats(model: LanguageModel, processor: Any, own: PreTrainedTokenizerBase) -> None:
    """Raises `ConversionError` where a chat of texts is rendered or tokenized otherwise than by the language model's own."""
    if not own.chat_template:
        return
    for chat in _PROBES:
        try:
            expected = _render(own, chat)
        except TemplateError:  # it refuses this kind of chat, as one with a system message
            continue
        ids = own(expected, add_special_tokens=False)["input_ids"]
        rendered = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        if rendered != expected or processor(text=rendered)["input_ids"] != [ids]:
            raise ConversionError(
                f"{model.file}: its chats of texts would not be the same with images beside them, as {expected[:80]!r}: name one of "
                "ours with --chat-template"
            )


def own_generation_config(
    model: LanguageModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> GenerationConfig:
    """The language model's own.

    Raises:
        ConversionError: for a value that nothing generates with.
    """
    given, file = reference.generation_config.to_diff_dict(), model.folder / "generation_config.json"
    settings = {**sampling(given, file), **token_ids(given, tokenizer, model.config.vocab_size, file)}
    others = {name: value for name, value in given.items() if name not in (*SAMPLING, "_from_model_config")}
    return storable({**others, **settings}, file)


@torch.no_grad()
def probe(model: PreTrainedModel, input_ids: torch.LongTensor) -> torch.Tensor:
    """Logits of a prompt of text, (1, s), and of its last token again, read after a cache of the rest: (s + 1, vocabulary)."""
    whole = model(input_ids=input_ids, use_cache=False).logits[0]
    cache = getattr(model(input_ids=input_ids[:, :-1], use_cache=True), CACHE_NAME)
    step = model(input_ids=input_ids[:, -1:], use_cache=True, **{CACHE_NAME: cache}).logits[0]
    return torch.cat([whole, step])


def check_same(model: LanguageModel, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Raises `ConversionError` unless logits of text alone, from `probe`, are those of the language model.

    Its own vocabulary may have fewer rows: a matrix of another size may be summed up in another order, so that as much is let
    pass as rounding makes of it.
    """
    found = found[:, : expected.shape[1]]
    difference = (found - expected).abs().max().item()
    allowed = 16 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    if not difference <= allowed:
        raise ConversionError(
            f"{model.file}: with a {model.config.model_type} in it, M3 does not give the logits of the language model itself (they "
            f"differ by up to {difference:.2g}): this family does something that M3 does not know, and is not supported"
        )


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> torch.LongTensor:
    """A prompt of text, (1, s)."""
    ids = tokenizer("The quick brown fox jumps over the lazy dog. 2 + 2 = 4, and Paris is the capital of France.")[
        "input_ids"
    ]
    return torch.tensor([ids])


def _locate(name: str) -> tuple[Path, str | None]:
    if not name.endswith(".gguf") or Path(name).is_dir():
        return local_folder(name), None
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConversionError(f"{name}: a GGUF file needs gguf: pip install '.[gguf]' in the clone") from error
    owner, _, file = name.rpartition("/")
    if not Path(name).exists() and is_hub_id(owner):
        try:
            return Path(hf_hub_download(owner, file)).parent, file
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConversionError(f"{name} is neither a file here nor reachable on the Hub: {reason}") from error
    if not Path(name).is_file():
        raise ConversionError(f"{name} is missing: name a GGUF file, a language model's folder or its Hub id")
    return Path(name).parent, Path(name).name


def _check_kind(config: dict[str, Any], file: Path) -> None:
    """Raises `ConversionError` for what is not a language model alone, before anything of it is built."""
    kind = config.get("model_type")
    if config.get("quantization_config"):
        raise ConversionError(
            f"{file}: its weights are quantized: start from the full-precision model, or from a GGUF file"
        )
    if config.get("is_encoder_decoder"):
        raise ConversionError(
            f"{file}: model_type {kind!r} is an encoder-decoder: M3 needs a language model that is a decoder alone"
        )
    if kind in ("m3_llava", "llava", "llava_next"):
        raise ConversionError(
            f"{file}: model_type {kind!r} is not a language model alone: name the one that it was made of"
        )
    if "vision_config" in config or "num_channels" in config or str(kind).endswith("vision_model"):
        raise ConversionError(
            f"{file}: model_type {kind!r} has to do with pictures, and is not a language model alone: were the two folders swapped?"
        )


def _names(config: PreTrainedConfig, file: Path) -> dict[str, str]:
    """The names in an M3 by those of transformers' own class; its structure is checked on the way."""

    def refuse(reason: str) -> ConversionError:
        return ConversionError(
            f"{file}: model_type {config.model_type!r} is not supported as a language model: {reason}"
        )

    if config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder, and M3 needs a decoder alone")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refuse("transformers has no causal language model of it")
    if config.get_text_config() is not config:
        raise refuse("it is not a language model alone")
    with naming(file), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base, head = model.base_model, model.get_output_embeddings()
    if base is model or type(base) is not MODEL_MAPPING.get(type(config), None):
        raise refuse("its base model is not one of its own")
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise refuse("its head is not a linear layer without bias")
    if getattr(base, "embed_tokens", None) is not base.get_input_embeddings():
        raise refuse("its embedding is not called embed_tokens")
    prefix = f"{model.base_model_prefix}."
    head_name = next(name for name, module in model.named_modules() if module is head)
    names = {}
    for key in model.state_dict():
        if key == f"{head_name}.weight":
            names[key] = VOCABULARY_NAMES[1]
        elif key.startswith(prefix):
            names[key] = f"model.language_model.{key.removeprefix(prefix)}"
        else:
            raise refuse(f"it has {key} beside its base model and head")
    return names


def _with_image_token(own: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The same tokenizer without what its class would make of it anew, and with the image token at the first free id."""
    named = {name: str(token) for name in _NAMED_TOKENS if (token := getattr(own, name, None)) is not None}
    named.setdefault("pad_token", named.get("eos_token") or named.get("unk_token"))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(own.backend_tokenizer.to_str()),
        **{name: token for name, token in named.items() if token is not None},
        image_token=IMAGE_TOKEN,
        model_max_length=own.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _render(own: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> str:
    return own.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
