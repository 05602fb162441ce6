"""The model card: `model_cards/template.md`, filled in with what is known of the checkpoint."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_m3 import M3LlavaConfig

from .original import ConversionError


PAPER_URL = "https://arxiv.org/abs/2405.17430"
TAGS = ["m3", "matryoshka", "llava", "multimodal", "visual-tokens", "custom_code"]
_QUANTIZATION_TAGS = {"nf4": ("bitsandbytes", "4-bit"), "int8": ("bitsandbytes", "8-bit")}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(
    name: str,
    model_id: str,
    config: M3LlavaConfig,
    *,
    trained_for_scales: bool,
    quantization: str | None = None,
    hub_id: str | None = None,
    source: Path,
    license: str | None = None,
    training: str | None = None,
    parts: tuple[str, str] | None = None,
) -> str:
    """The text of `README.md`.

    Args:
        name: of the new checkpoint.
        model_id: Hub id of the original or its folder. The two that the paper's authors released are recognised by the
            last part, and get the paper's published numbers.
        config: of the new checkpoint.
        trained_for_scales: whether the original was trained for several numbers of visual tokens.
        quantization: how the language model's layers are stored, "nf4" or "int8", where they are not whole.
        hub_id: where the new checkpoint will be on the Hub.
        source: folder of the original, whose own card names a license.
        license: Hub identifier of the license, in place of the source's.
        training: for a checkpoint that was trained from `model_id`, not converted: how, in Markdown. What is published of
            the original is then left out.
        parts: of a new M3, the vision tower and the language model that it was made of, as Hub ids or names; `model_id` is
            then the latter.

    Raises:
        ConversionError: the source's card cannot be read.
    """
    known = None if training or parts else _known_card(Path(model_id).name)
    about = known.data if known else ModelCardData()
    results = about.eval_results or []
    base_model = about.base_model or (model_id if _HUB_ID.fullmatch(model_id) and not Path(model_id).is_dir() else None)
    data = ModelCardData(
        license=license or _license_of(source) or about.license or "other",
        language=about.language,
        base_model=base_model,
        base_model_relation="quantized" if base_model and quantization else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, *_QUANTIZATION_TAGS.get(quantization, ())],
        model_name=name if results else None,
        eval_results=results or None,
    )
    if parts is not None:
        data.base_model = [part for part in parts if _HUB_ID.fullmatch(part)] or None
    scales = config.visual_token_scales
    card = ModelCard.from_template(
        data,
        template_str=_model_cards().joinpath("template.md").read_text(encoding="utf-8"),
        name=name,
        checkpoint=hub_id or name,
        hub_id=hub_id,
        about=known.text.strip() if known else None,
        model_id=None if parts else base_model,
        parts=parts,
        training=training,
        trained_for_scales=trained_for_scales,
        tiled=config.image_grid_pinpoints is not None,
        scales=scales,
        quantization=quantization,
        example_scales=tuple(sorted({min(scales, key=lambda scale: abs(scale - wanted)) for wanted in (9, 36, 576)})),
        results="\n\n".join(_markdown_tables(results)),
        paper_url=PAPER_URL,
    )
    return re.sub(r"\n{3,}", "\n\n", f"{str(card).rstrip()}\n")  # what the template left out leaves gaps


def _model_cards() -> Any:
    return files(__package__.replace("conversion", "model_cards"))  # beside this one, m3_* where both are installed


def _known_card(name: str) -> ModelCard | None:
    """What `model_cards/` says about a checkpoint of this name."""
    file = _model_cards().joinpath(f"{name}.md")
    return ModelCard(file.read_text(encoding="utf-8")) if name != "template" and file.is_file() else None


def _license_of(source: Path) -> str | None:
    """The license that the original's own card names."""
    file = source / "README.md"
    if not file.exists():
        return None
    try:
        return ModelCard(file.read_text(encoding="utf-8-sig")).data.to_dict().get("license")
    except (ValueError, yaml.YAMLError) as error:
        raise ConversionError(f"{file}: its metadata cannot be read ({error}): correct or remove it") from error


def _markdown_tables(results: list[EvalResult]) -> list[str]:
    """Published numbers as the paper's tables have them: a row for each number of visual tokens, a column per benchmark."""
    tables = []
    for source in dict.fromkeys(result.source_name for result in results):
        scores: dict[int, dict[str, float]] = {}
        for result in (result for result in results if result.source_name == source):
            scores.setdefault(result.metric_args["num_visual_tokens"], {})[result.dataset_name] = result.metric_value
        benchmarks = list(next(iter(scores.values())))
        rows = [[f"Visual tokens ({source.split(', ')[-1]})", *benchmarks], ["---", *("--:" for _ in benchmarks)]]
        rows += [[scale, *(row[benchmark] for benchmark in benchmarks)] for scale, row in scores.items()]
        tables.append("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))
    return tables
