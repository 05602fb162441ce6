"""What a folder of weights is to the conversion, whichever layout it has: all that is written is planned from this."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig

from modeling_m3 import M3LlavaConfig, M3LlavaProcessor

from .original import ConversionError, StoredTensor


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read, but for the values of its tensors.

    Attributes:
        config: of the new checkpoint.
        tensors: what the weights come from, each with its table of keys, which `remap_key` reads.
        rows: of the embedding as it is stored; the new one may have more.
        processor, generation_config: of the new checkpoint.
        trained_for_scales: whether it was trained for several numbers of visual tokens.
        folders: all that is read.
    """

    config: M3LlavaConfig
    tensors: list[tuple[dict[str, StoredTensor], dict[str, str | None]]]
    rows: int
    processor: M3LlavaProcessor
    generation_config: GenerationConfig
    trained_for_scales: bool
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
