"""What a folder of weights is to the conversion, whichever layout it has: all that is written is planned from this."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from modeling_m3 import M3LlavaConfig, M3LlavaImageProcessorPil, M3LlavaProcessor

from .original import ConversionError, StoredTensor, read_json


_SAMPLING_SETTINGS = ("do_sample", "temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read, but for the values of its tensors.

    Attributes:
        config: of the new checkpoint.
        tensors: what the weights come from, each with its table of keys, which `remap_key` reads.
        rows: of the embedding as it is stored; the new one may have more.
        processor, generation_config: of the new checkpoint.
        folders: all that is read.
    """

    config: M3LlavaConfig
    tensors: list[tuple[dict[str, StoredTensor], dict[str, str | None]]]
    rows: int
    processor: M3LlavaProcessor
    generation_config: GenerationConfig
    folders: tuple[Path | None, ...]


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Names the file or folder that other code could not handle, in whatever way it says so."""
    try:
        yield
    except Exception as error:  # every library has its own types for a value it does not like
        text = " ".join(str(error).split())
        text = text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
        raise ConversionError(text if str(file) in text else f"{file}: {text}") from error


def build_processor(
    config: M3LlavaConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str, **preprocessing: Any
) -> M3LlavaProcessor:
    """The processor of a checkpoint with such a configuration; `preprocessing` are the image processor's settings."""
    return M3LlavaProcessor(
        image_processor=M3LlavaImageProcessorPil(image_grid_pinpoints=config.image_grid_pinpoints, **preprocessing),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        visual_token_scales=config.visual_token_scales,
        patch_merge_type=config.patch_merge_type,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=chat_template,
    )


def generation_config(
    original: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase, chat_template: str
) -> GenerationConfig:
    """Token ids, and how to sample where the original samples.

    The original ships a temperature without `do_sample`, which has no effect and which transformers 5 refuses to save,
    and a `max_length` that counts the prompt, about which every call with `max_new_tokens` would warn. To be greedy is
    written down because `pipeline` samples where a checkpoint says nothing.
    """
    file = folder / "generation_config.json"
    given = {**original, **(read_json(file) if file.exists() else {})}
    given = {key: value for key, value in given.items() if value is not None}
    kept = {"do_sample": False}
    if given.get("do_sample"):
        kept = {key: given[key] for key in _SAMPLING_SETTINGS if key in given}
    ends = given.get("eos_token_id", tokenizer.eos_token_id)
    if chat_template == "chatml":  # whose turns end with a token that need not be the vocabulary's end of sentence
        turn_end = tokenizer.get_vocab().get("<|im_end|>")
        ends = sorted({*(ends if isinstance(ends, list) else [ends]), turn_end} - {None})
    return GenerationConfig(
        bos_token_id=given.get("bos_token_id", tokenizer.bos_token_id),
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        **kept,
    )
