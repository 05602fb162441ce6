"""Matryoshka Multimodal Models (M3) for transformers.

Importing this package registers M3 with the Auto classes, so that M3 checkpoints load without `trust_remote_code`.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

# Before 5.24 `transformers.AutoImageProcessor` cannot be used without torchvision; from its own module it can.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_m3 import M3LlavaConfig
from .image_processing_m3 import M3LlavaImageProcessor, M3LlavaImageProcessorPil
from .modeling_m3 import M3LlavaForConditionalGeneration, M3LlavaModel, M3LlavaPreTrainedModel
from .processing_m3 import M3LlavaProcessor


__version__ = "0.1.0"

# What travels with a checkpoint, next to its weights.
REMOTE_CODE_FILES = (
    "automatic_budget_m3.py",
    "automatic_generation_m3.py",
    "chats.py",
    "compiling_m3.py",
    "configuration_m3.py",
    "encoding_m3.py",
    "generation_m3.py",
    "image_processing_m3.py",
    "loading_m3.py",
    "modeling_m3.py",
    "objective_m3.py",
    "outputs_m3.py",
    "parts_m3.py",
    "pictures.py",
    "processing_m3.py",
    "video_processing_m3.py",
    "videos.py",
    "visual_tokens.py",
    "weights_print_m3.py",
)

AutoConfig.register(M3LlavaConfig.model_type, M3LlavaConfig)
AutoModel.register(M3LlavaConfig, M3LlavaModel)
AutoModelForImageTextToText.register(M3LlavaConfig, M3LlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(M3LlavaConfig, M3LlavaForConditionalGeneration)
AutoProcessor.register(M3LlavaConfig, M3LlavaProcessor)
AutoImageProcessor.register(
    M3LlavaConfig,
    image_processor_classes={"torchvision": M3LlavaImageProcessor, "pil": M3LlavaImageProcessorPil},
)


def default_checkpoint() -> Path:
    """The folder of m3-tiny, a small trained checkpoint that ships with the package: `model_cards/m3-tiny.md`.

    Raises:
        OSError: git wrote the links to its code as texts.
    """
    folder = Path(__file__).with_name("m3_tiny")
    for name in REMOTE_CODE_FILES:
        if (folder / name).read_text(encoding="utf-8").strip() == f"../{name}":
            raise OSError(
                f"{folder / name} should be a link, but git wrote it as a text, as it does where it may make no links. Allow "
                "them (on Windows: Developer Mode), then run `git config core.symlinks true` and `git checkout -- "
                "modeling_m3/m3_tiny` in the clone, and install it again if it was installed."
            )
    return folder


def __getattr__(name: str) -> Any:
    if name == "load":  # which this package does without
        from .any_checkpoint import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "REMOTE_CODE_FILES",
    "M3LlavaConfig",
    "M3LlavaForConditionalGeneration",
    "M3LlavaImageProcessor",
    "M3LlavaImageProcessorPil",
    "M3LlavaModel",
    "M3LlavaPreTrainedModel",
    "M3LlavaProcessor",
    "__version__",
    "default_checkpoint",
    "load",
]
