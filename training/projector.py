"""The projector alone as a file, LLaVA's `mm_projector.bin`: what its first stage writes and its second one begins with.

Source: `maybe_zero_3`, `get_mm_adapter_state_maybe_zero_3` and `safe_save_model_for_hf_trainer` of the original's
`llava/train/train.py` for writing, `initialize_vision_modules` of its `llava/model/llava_arch.py` for reading.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from m3_conversion.original import PROJECTOR_FILE
from modeling_m3 import M3LlavaForConditionalGeneration


_OWN = "model.multi_modal_projector."
_ORIGINAL = "model.mm_projector."


def write_projector(weights: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Writes `mm_projector.bin`, with the original's names, and returns its path.

    Args:
        weights: of a model, by name; others than the projector's are left out.
        folder: where it goes.

    Raises:
        ValueError: the projector is the identity, which has no weights.
    """
    own = {name: tensor for name, tensor in weights.items() if name.startswith(_OWN)}
    if not own:
        raise ValueError("The projector is the identity (multimodal_projector_depth=0): it has no weights to write.")
    depth = sum(name.endswith(".weight") for name in own)
    named = {original_name(name, depth): tensor.detach().cpu().clone() for name, tensor in own.items()}
    file = folder / PROJECTOR_FILE
    partial = file.with_name(f".{file.name}.incomplete")
    torch.save(named, partial)
    partial.replace(file)
    return file


def read_projector(model: M3LlavaForConditionalGeneration, file: Path) -> None:
    """Gives a model the projector in a file that the original or `write_projector` wrote, in place.

    Raises:
        ValueError: no such file, one that is not of PyTorch, one that holds other weights than a projector's, or a projector
            of another shape than the model's.
    """
    if not file.is_file():
        raise ValueError(f"projector_weights={file} is no file: name an {PROJECTOR_FILE}.")
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"projector_weights={file} is no file of PyTorch's: name an {PROJECTOR_FILE}.") from error
    if not isinstance(stored, dict) or not stored:
        raise ValueError(f"projector_weights={file} holds no tensors by name: name an {PROJECTOR_FILE}.")
    projector = model.model.multi_modal_projector
    wanted = {original_name(_OWN + name, projector.depth): tensor for name, tensor in projector.state_dict().items()}
    # Whatever it was wrapped in when it was saved, as the original has it.
    found = {_ORIGINAL + name.split("mm_projector.")[-1] if "mm_projector." in name else name: name for name in stored}
    if set(found) != set(wanted):
        raise ValueError(
            f"projector_weights={file} holds {', '.join(sorted(map(str, found)))}: the model's projector takes "
            f"{', '.join(sorted(wanted)) or 'no weights'}."
        )
    for name, tensor in wanted.items():
        given = stored[found[name]]
        if given.shape != tensor.shape:
            raise ValueError(
                f"projector_weights={file}: {name} has the shape {tuple(given.shape)}, but {tuple(tensor.shape)} in the model. It "
                "is of another vision tower or language model."
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[found[name]])


def original_name(name: str, depth: int) -> str:
    """The original's name of a parameter: its projector is one layer, or a sequence with activations at the odd places.

    Args:
        name: as `model.multi_modal_projector.linear_2.weight`.
        depth: the number of linear layers.
    """
    layer, kind = name.removeprefix(_OWN).split(".")
    place = "" if depth == 1 else f"{2 * (int(layer.removeprefix('linear_')) - 1)}."
    return f"{_ORIGINAL}{place}{kind}"
