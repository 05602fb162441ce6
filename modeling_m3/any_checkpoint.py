"""Any LLaVA as an M3, loaded: a checkpoint that is none yet is converted first, once, and kept.

Not part of a checkpoint: no file that travels with one imports this. It imports the conversion when it has to convert.
"""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from .cache import FORMAT, cache_folder, converted_once, place_for, revision_of
from .checkpoint import no_such_folder, read_config
from .configuration_m3 import M3LlavaConfig


if TYPE_CHECKING:
    from .modeling_m3 import M3LlavaForConditionalGeneration
    from .processing_m3 import M3LlavaProcessor


logger = logging.getLogger(__name__)

Quantization = Literal["nf4", "int8"]


@dataclass(frozen=True)
class M3Checkpoint:
    """An M3 checkpoint to load, and how.

    Attributes:
        name: a folder, or a Hub id.
        model_arguments: of `from_pretrained` for the model.
        processor_arguments: of `from_pretrained` for the processor.
    """

    name: str
    model_arguments: dict[str, Any]
    processor_arguments: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its files are; of what is on the Hub, the snapshot in the cache."""
        if Path(self.name).is_dir():
            return Path(self.name)
        return Path(snapshot_download(self.name, revision=self.model_arguments["revision"]))

    def load(self, **kwargs: Any) -> tuple["M3LlavaForConditionalGeneration", "M3LlavaProcessor"]:
        """The model and the processor. `kwargs` are of the model's `from_pretrained`."""
        processor = AutoProcessor.from_pretrained(self.name, **self.processor_arguments)
        return AutoModelForImageTextToText.from_pretrained(self.name, **self.model_arguments, **kwargs), processor


def load(
    name: str | Path,
    *,
    quantize: Quantization | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> tuple["M3LlavaForConditionalGeneration", "M3LlavaProcessor"]:
    """The model and the processor of a checkpoint: an M3, or any LLaVA that `m3-convert` converts.

    What is no M3 is converted once into a cache beside the Hub's, `cache_folder()`, and found there by its revision.

    Args:
        name: a folder or a Hub id.
        quantize: the language model's layers in 4 bits ("nf4") or 8 ("int8").
        dtype: of the weights, as "bfloat16" or `torch.bfloat16`; as they are stored by default.
        revision: a branch, tag or commit of the Hub's repository.
        kwargs: of the model's `from_pretrained`, such as `device_map` or `attn_implementation`.

    Raises:
        ValueError: it is nothing that can be loaded or converted, or is neither here nor on the Hub.
        OSError: a file that cannot be read or written.
    """
    return find(name, quantize=quantize, dtype=dtype, revision=revision).load(**kwargs)


def find(
    name: str | Path,
    *,
    quantize: Quantization | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> M3Checkpoint:
    """As `load`, but for the loading: converts where it has to.

    Who needs the folder and the model finds once and loads what was found: another call, with other arguments, may convert again.
    """
    from m3_conversion.original import check_name

    check_name(name)
    name = os.fspath(name)
    dtype = _type(dtype)
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is of a repository on the Hub, but {name} is a folder: leave it out."
            )
        folder, commit = Path(name), None
    else:
        folder = _config_on_the_hub(name, revision).parent
        commit = folder.name  # of the snapshot, which the Hub's cache has by commit
    model_arguments: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    if read_config(folder).get("model_type") == M3LlavaConfig.model_type:
        if quantize is not None:
            model_arguments["quantization_config"] = _quantization(quantize, dtype)
        at = {} if commit is None else {"revision": commit}
        return M3Checkpoint(name, {**model_arguments, **at}, at)

    from m3_conversion.convert import convert

    precision = quantize or ("as-stored" if dtype is None else str(dtype).removeprefix("torch."))
    if quantize is not None and dtype is not None:
        precision += "-" + str(dtype).removeprefix("torch.")
    from . import __version__

    called = name if commit is not None else folder.resolve().name
    place = place_for(called, commit or revision_of(folder), f"{precision}-{__version__}-{FORMAT}")

    def write(destination: Path) -> None:
        download = 0 if commit is None else _check_room(name, commit)
        first = f"{download / 1e9:.1f} GB are downloaded, then " if download else ""
        logger.warning("%s is no M3 yet: %sit is converted once, and kept in %s", name, first, cache_folder())
        logger.warning("%s", convert(name, destination, revision=commit, dtype=dtype, quantize=quantize))

    return M3Checkpoint(str(converted_once(place, write)), model_arguments, {})


def _check_room(name: str, commit: str) -> int:
    """How many bytes of weights there are to download. Raises `ValueError` where the disk has not room for them."""
    from m3_conversion.original import weights_to_download

    nbytes, free = weights_to_download(name, commit), shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free
    if nbytes > free:
        raise ValueError(
            f"{name} is {nbytes / 1e9:.1f} GB to download, but {free / 1e9:.1f} GB are free in {constants.HF_HUB_CACHE}"
        )
    return nbytes


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _config_on_the_hub(name: str, revision: str | None) -> Path:
    from m3_conversion.original import ConversionError, is_hub_id

    if not is_hub_id(name):
        raise ValueError(no_such_folder(name))
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        at = "" if revision is None else f" (revision {revision})"
        raise ConversionError(f"{name}{at} is neither a folder here nor reachable on the Hub: {reason}") from error


def _type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be float32, float16 or bfloat16.")
    return found


def _quantization(quantize: Quantization, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    if quantize not in ("nf4", "int8"):
        raise ValueError(f"quantize={quantize!r} must be 'nf4' or 'int8'.")
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.bfloat16
    )
