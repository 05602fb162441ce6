"""From a checkpoint to a folder of ONNX graphs that onnxruntime runs: written, compared with the model, and only then named."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from modeling_m3 import M3LlavaConfig, M3LlavaForConditionalGeneration
from modeling_m3.checkpoint import check_checkpoint
from modeling_m3.outputs_m3 import CACHE_NAME

from .exported_graphs import check_exportable, write_language, write_vision
from .onnx_answers import LANGUAGE, NEWLINE, VISION, OnnxM3
from .original import ConversionError, check_name, local_folder, stored_tensors
from .source import naming
from .writer import new_folder, write_other_files


TOLERANCE = 1e-3  # between logits of the model and of the graphs, in float32

_CARD = """# {name}

{source} as ONNX graphs, written by `m3-export` of M3 for Hugging Face with torch {torch}. `vision.onnx` takes the pixels
of tiles to their visual tokens at {scales} a tile, `language.onnx` takes tokens to logits. They are run so:

```python
from m3_conversion.onnx_answers import OnnxM3
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
inputs = processor(images="photo.jpg", text="USER: <image>\\nWhat is this? ASSISTANT:", num_visual_tokens={scale}, return_tensors="pt")
answers = OnnxM3.from_folder("{name}").generate(inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answers, skip_special_tokens=True))
```
"""


@dataclass(frozen=True)
class Export:
    """What was written. `differences` are the largest between logits, by number of visual tokens; empty where not checked."""

    destination: Path
    nbytes: int
    differences: dict[str, float]
    seconds: float

    def __str__(self) -> str:
        checked = (
            f"logits within {max(self.differences.values()):.1e} of the model's" if self.differences else "not checked"
        )
        return f"wrote {self.destination}: {self.nbytes / 1e9:.2f} GB, {checked}, {self.seconds:.0f} s"


def export(
    source: str | Path,
    destination: str | Path,
    *,
    check: bool = True,
    report: Callable[[str, float], object] = lambda scales, difference: None,
) -> Export:
    """Exports a checkpoint to ONNX, in float32.

    Args:
        source: an M3 checkpoint's folder or its Hub id.
        destination: the folder to write. It appears under this name only when it is whole.
        check: compare logits with the model's at every number of visual tokens, under onnxruntime.
        report: called with each of `Export.differences` as soon as it is known.

    Raises:
        ConversionError: anything that is wrong with the checkpoint or the request, and graphs that do not answer as the model
            does, in one line.
        OSError: a file that cannot be read or written.
    """
    start = time.monotonic()
    check_name(destination, "the folder to write")
    destination = Path(destination).resolve()
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ConversionError(f"{destination} exists: name a folder that is new")
    folder = local_folder(source)
    check_checkpoint(folder)
    model = _whole_model(folder)
    with naming(folder):
        processor = AutoProcessor.from_pretrained(folder)
    with new_folder(destination, overwrite=False) as partial:
        nbytes = sum(parameter.nbytes for parameter in model.parameters())
        free = shutil.disk_usage(partial).free
        if free < nbytes:
            raise ConversionError(
                f"{destination} needs {nbytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on its disk"
            )
        write_vision(model, partial / VISION)
        write_language(model, partial / LANGUAGE)
        if model.model.image_newline is not None:
            np.save(partial / NEWLINE, model.model.image_newline.detach().numpy())
        offered = model.config.visual_token_scales
        card = _CARD.format(
            name=destination.name,
            source=f"[{source}](https://huggingface.co/{source})" if folder != Path(source) else folder.resolve().name,
            torch=torch.__version__,
            scales=", ".join(map(str, offered)),
            scale=offered[len(offered) // 2],
        )
        write_other_files(partial, model.config, processor, model.generation_config, card)
        differences = {}
        for scales, difference in compare(model, partial) if check else ():
            differences[scales] = difference
            report(scales, difference)
        nbytes = sum(file.stat().st_size for file in partial.iterdir())
    return Export(destination, nbytes, differences, time.monotonic() - start)


def compare(model: M3LlavaForConditionalGeneration, folder: Path) -> Iterator[tuple[str, float]]:
    """The largest difference between logits of the model and of its graphs, for two pictures at every number of visual tokens.

    Two prompts of different lengths in a batch: at every token but the visual ones, whose logits nobody reads, and at one more that
    follows them from the cache. At last with the coarsest and the finest number in one batch.

    Raises:
        ConversionError: it is more than `TOLERANCE`.
    """
    processor, graphs = AutoProcessor.from_pretrained(folder), OnnxM3.from_folder(folder)
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (*size, 3), np.uint8)) for size in ((200, 300), (300, 100))]
    text = [f"{processor.image_token}\nWhat is this?", f"{processor.image_token}\nIs anything written there, and what?"]
    scales = model.config.visual_token_scales
    for numbers in [*([scale] * 2 for scale in scales), *([[scales[0], scales[-1]]] if len(scales) > 1 else [])]:
        inputs = processor(
            images=images, text=text, num_visual_tokens=numbers, padding=True, padding_side="left", return_tensors="pt"
        )
        difference = _difference(model, graphs, inputs)
        name = " and ".join(map(str, dict.fromkeys(numbers)))
        if not difference <= TOLERANCE:
            raise ConversionError(
                f"At {name} visual tokens the graphs' logits differ from the model's by {difference:.1e}, more than "
                f"{TOLERANCE}: they would not answer alike, so nothing was written"
            )
        yield name, difference


def _difference(model: M3LlavaForConditionalGeneration, graphs: OnnxM3, inputs: dict[str, torch.Tensor]) -> float:
    mask = inputs["attention_mask"]
    longer = torch.nn.functional.pad(mask, (0, 1), value=1)
    positions = (longer.cumsum(1) - 1).clamp(min=0)  # as `generate` counts them
    with torch.no_grad():
        expected = model(**inputs, position_ids=positions[:, :-1], use_cache=True)
        cached = getattr(expected, CACHE_NAME)
        following = expected.logits[:, -1:].argmax(-1)
        step = model(input_ids=following, attention_mask=longer, position_ids=positions[:, -1:], cache=cached)
    visual_tokens = np.concatenate(graphs.get_visual_tokens(inputs))
    logits, cache = graphs.forward(inputs["input_ids"].numpy(), mask.numpy(), visual_tokens)
    after, _ = graphs.forward(following.numpy(), longer.numpy(), visual_tokens[:0], cache)
    is_text = (mask.bool() & (inputs["input_ids"] != model.config.image_token_id)).numpy()
    differences = [np.abs(logits - expected.logits.numpy())[is_text].max(), np.abs(after - step.logits.numpy()).max()]
    return float(max(differences)) if np.isfinite(differences).all() else float("nan")


def _whole_model(folder: Path) -> M3LlavaForConditionalGeneration:
    """In float32. Raises `ConversionError` where a weight is missing, which transformers would only warn of and make up."""
    with naming(folder):
        config = M3LlavaConfig.from_pretrained(folder)
        check_exportable(config)
        with torch.device("meta"):
            expected = M3LlavaForConditionalGeneration(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := sorted(expected.keys() - stored_tensors(folder).keys() - tied):
        raise ConversionError(f"{folder} has no weights for {missing[0]}: is the checkpoint whole?")
    with naming(folder):
        model = M3LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()
