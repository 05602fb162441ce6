"""What a folder of weights is to the conversion, whichever layout it has: all that is written is planned from this."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from modeling_m3 import M3LlavaConfig, M3LlavaImageProcessorPil, M3LlavaProcessor

from .generation_settings import sampling, token_ids
from .original import ConversionError, StoredTensor, read_json


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
    original: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase, chat_template: str, rows: int
) -> GenerationConfig:
    """Token ids, and how to sample where the original samples.

    The original ships a temperature without `do_sample`, which has no effect, and a `max_length` that counts the prompt, about
    which every call with `max_new_tokens` would warn.

    Args:
        original: settings beside the `generation_config.json` of `folder`, which come second.
        tokenizer, chat_template: of the new checkpoint.
        rows: of its embedding.

    Raises:
        ConversionError: for a value that nothing generates with.
    """
    file = folder / "generation_config.json"
    stored = read_json(file) if file.exists() else {}
    given = {**original, **{key: value for key, value in stored.items() if value is not None}}
    ids = token_ids({**given, "pad_token_id": None}, tokenizer, rows, file)
    if chat_template == "chatml":  # whose turns end with a token that need not be the vocabulary's end of sentence
        ends = ids["eos_token_id"]
        turn_end = tokenizer.get_vocab().get("<|im_end|>")
        ids["eos_token_id"] = sorted({*(ends if isinstance(ends, list) else [ends]), turn_end} - {None})
    return GenerationConfig(**ids, **sampling(given, file))
