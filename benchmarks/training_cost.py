"""What the two stages of a new M3 cost, computed: `python -m benchmarks.training_cost --language-model 8b --gpus 8`.

FLOPs are those of `m3_evaluation.operations` and of a backward pass: the same again for the gradients of what a layer is given,
and again for those of its weights where they are trained. A frozen vision tower has no backward. With gradient
checkpointing the language model's forward is computed twice. Memory is of what every process holds whatever the batch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from m3_evaluation import operations
from m3_evaluation.devices import find_device
from modeling_m3 import M3LlavaConfig

from .measure import markdown_table, save
from .memory_held import model_without_weights
from .roofline import load_config


SO400M = {  # SigLIP and SigLIP 2, 14/384
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
LLAMA = {"model_type": "llama", "vocab_size": 128256 + 64, "num_key_value_heads": 8}
LANGUAGE_MODELS = {  # Llama 3's of these sizes, with a row for the image token
    "1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "3b": {
        **LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
# Bytes of a parameter as m3-train keeps it: float32; where it is trained also its gradient and AdamW's two averages.
FROZEN_BYTES, TRAINED_BYTES = 4, 16


@dataclass(frozen=True)
class TrainingStage:
    """A stage: on how many samples, of how much text, and what of it is trained.

    Attributes:
        name: of the row.
        samples: in all.
        text_tokens: of a sample, on average.
        answer_tokens: of them, those with a label: logits are computed only there.
        one_scale: whether a step has one scale, each as often, or all of them.
        language_model: "frozen", "lora" or "all".
    """

    name: str
    samples: int
    text_tokens: int
    answer_tokens: int
    one_scale: bool
    language_model: str


STAGES = (
    TrainingStage("one: the projector, captions", 558_128, 20, 15, True, "frozen"),
    TrainingStage("two: LoRA of rank 128, instructions", 665_298, 250, 150, False, "lora"),
    TrainingStage("two: all of the language model", 665_298, 250, 150, False, "all"),
)
LORA_RANK = 128


def new_config(language_model: str) -> M3LlavaConfig:
    """SigLIP so400m with one of `LANGUAGE_MODELS`, as `m3-create` joins them.

    Raises:
        ValueError: it is not one of them.
    """
    if language_model not in LANGUAGE_MODELS:
        raise ValueError(f"language_model={language_model!r}: choose from {', '.join(LANGUAGE_MODELS)}.")
    return M3LlavaConfig(
        vision_config=SO400M, text_config=LANGUAGE_MODELS[language_model], image_token_id=LLAMA["vocab_size"] - 64
    )


def sample_flops(config: M3LlavaConfig, stage: TrainingStage, checkpointing: bool = True) -> dict[str, float]:
    """FLOPs of one sample of one picture, by part.

    Args:
        config: of the model.
        stage: how it is trained.
        checkpointing: whether the language model's layers are computed again in the backward.
    """
    seen = operations.vision(config, 1)
    tower, projector = (
        sum(op.flops * op.times for op in seen if (op.part == "projector") == wanted) for wanted in (False, True)
    )
    scales = config.visual_token_scales
    layers = products = head = 0.0
    for scale in scales:
        length = stage.text_tokens + scale
        for op in operations.language_model(config, 1, length, length):
            if op.name == "lm_head":  # which counts the last token's logits only
                head += op.flops * stage.answer_tokens
            elif op.name in operations.linear_layers(config.text_config):
                layers += op.flops * op.times
            else:  # attention's, both of whose factors have gradients
                products += op.flops * op.times
    if stage.one_scale:
        layers, products, head = (sum_ / len(scales) for sum_ in (layers, products, head))
    adapters = 0.0
    if stage.language_model == "lora":
        sizes = operations.linear_layers(config.text_config).values()
        per_token = 2 * LORA_RANK * sum(map(sum, sizes)) * config.text_config.num_hidden_layers
        adapters = (
            per_token * sum(stage.text_tokens + scale for scale in scales) / (len(scales) if stage.one_scale else 1)
        )
    again = int(checkpointing)
    passes = 3 if stage.language_model == "all" else 2
    return {
        "vision tower": float(tower),
        "projector": 3.0 * projector,
        "language model": (passes + again) * layers + (3 + again) * (products + adapters) + passes * head,
    }


def held_bytes(config: M3LlavaConfig, stage: TrainingStage, gpus: int) -> float:
    """What each of `gpus` processes holds of weights, gradients and the optimizer, sharded by FSDP or ZeRO-3."""
    model = model_without_weights(config)
    sizes = {"projector": 0, "vision_tower": 0, "language_model": 0}
    for name, parameter in model.named_parameters():
        part = "vision_tower" if "vision_tower." in name else "language_model"
        sizes["projector" if "multi_modal_projector." in name else part] += parameter.numel()
    trained = sizes["projector"]
    if stage.language_model == "all":
        trained += sizes["language_model"]
    frozen = sum(sizes.values()) - trained
    if stage.language_model == "lora":
        pairs = operations.linear_layers(config.text_config).values()
        trained += LORA_RANK * sum(map(sum, pairs)) * config.text_config.num_hidden_layers
    return (FROZEN_BYTES * frozen + TRAINED_BYTES * trained) / gpus


def costs(config: M3LlavaConfig, device: str, gpus: int, share_of_peak: float) -> list[dict[str, Any]]:
    """A row per stage: FLOPs of a sample and of all, GB per GPU, and hours.

    Args:
        config: of the model.
        device: a name of `DEVICES`.
        gpus: how many.
        share_of_peak: how much of the device's peak is reached.
    """
    peak = find_device(device, "bf16").peak
    rows = []
    for stage in STAGES:
        flops = sample_flops(config, stage)
        total = stage.samples * sum(flops.values())
        rows.append(
            {
                "stage": stage.name,
                "samples": stage.samples,
                "flops_per_sample": flops,
                "flops": total,
                "bytes_per_gpu": held_bytes(config, stage, gpus),
                "hours": total / (peak * share_of_peak * gpus) / 3600,
            }
        )
    return rows


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    language_model: Annotated[
        str, typer.Option(help=f"One of {', '.join(LANGUAGE_MODELS)}, with SigLIP so400m; or a created folder.")
    ] = "8b",
    device: Annotated[str, typer.Option(help="One of evaluation/devices.py.")] = "A100",
    gpus: Annotated[int, typer.Option(min=1, help="Over which weights are sharded.")] = 8,
    share_of_peak: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of its FLOPs that a GPU reaches.")] = 0.4,
    output: Annotated[Path | None, typer.Option(help="A JSON file for every figure.")] = None,
) -> None:
    """What the two stages of a new M3 cost: FLOPs, memory and time."""
    try:
        known = language_model in LANGUAGE_MODELS
        config = new_config(language_model) if known else load_config(language_model)
        rows = costs(config, device, gpus, share_of_peak)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    header = ["stage", "samples", "TFLOPs a sample", "EFLOPs in all", "GB per GPU", "hours"]
    body = [
        [
            row["stage"],
            f"{row['samples']:,}",
            f"{sum(row['flops_per_sample'].values()) / 1e12:.1f}",
            f"{row['flops'] / 1e18:.1f}",
            f"{row['bytes_per_gpu'] / 1e9:.1f}",
            f"{row['hours']:.1f}",
        ]
        for row in rows
    ]
    print(
        f"{language_model} on {gpus} x {device} at {share_of_peak:.0%} of its peak, scales {config.visual_token_scales}\n"
    )
    print(markdown_table(header, body))
    save({"language_model": language_model, "device": device, "gpus": gpus, "rows": rows}, output)


if __name__ == "__main__":
    app()
