"""Table 9 of the paper, and the arithmetic of the tool it was made with: LLM-Viewer (Yuan et al., 2024, the paper's [66]).

Apart from `m3_evaluation.operations`, which is the package's own account. The rules are those of LLM-Viewer's public code
(github.com/hahnyuan/LLM-Viewer, `model_analyzer.py`), in other words: no vision tower; a vocabulary of 32000; scores of
attention are written and read; norms, sums and the activation have FLOPs, the activation by the hidden size and not by the
inner one; a sum reads one of its two inputs; the head counts one FLOP per multiplication and addition.
"""

from transformers.configuration_utils import PreTrainedConfig

from m3_evaluation.devices import Device, find_device
from m3_evaluation.operations import Operation, linear_layers, totals

from .measure import markdown_table


# Visual tokens -> TFLOPs, milliseconds, GB of "total memory", GB of "storing activation".
PRINTED = {
    576: (8.0, 58.1, 21.6, 3.8),
    144: (2.2, 19.5, 15.0, 0.7),
    36: (0.9, 18.0, 13.8, 0.3),
    9: (0.5, 17.7, 13.6, 0.2),
    1: (0.4, 17.6, 13.5, 0.1),
}
COLUMNS = ("TFLOPs", "milliseconds", "total memory, GB", "storing activation, GB")
PROMPT_TOKENS, VOCABULARY = 30, 32000
PRINTED_DEVICE, FITTING_DEVICE = "V100", "A6000"


def operations(text: PreTrainedConfig, tokens: int) -> list[Operation]:
    """The prefill of one prompt of `tokens` tokens in 16 bits, as LLM-Viewer counts it.

    Args:
        text: configuration of the language model.
    """
    part, hidden, heads = "language model", text.hidden_size, text.num_attention_heads
    keys = linear_layers(text)["k_proj"][1]
    layer = []
    for name, (size_in, size_out) in linear_layers(text).items():
        store = "cache_written" if name in ("k_proj", "v_proj") else "written"
        costs = {"weights": 2 * size_in * size_out, "read": 2 * tokens * size_in, store: 2 * tokens * size_out}
        layer.append(Operation(part, name, flops=2 * tokens * size_in * size_out, **costs))
    row, scores, flops = 2 * tokens * hidden, 2 * tokens**2 * heads, 2 * tokens**2 * hidden
    layer += [
        Operation(part, "scores", flops=flops, written=scores, cache_read=2 * 2 * tokens * keys),
        Operation(part, "weighted values", flops=flops, read=scores, written=row, cache_read=2 * tokens * keys),
        Operation(part, "softmax", flops=5 * tokens**2 * heads, read=scores, written=scores),
        *[Operation(part, "norm", flops=7 * tokens * hidden, read=row, written=row)] * 2,
        *[Operation(part, "residual sum", flops=tokens * hidden, read=row, written=row)] * 2,
        Operation(part, "activation", flops=2 * tokens * hidden, read=2 * row, written=row),
    ]
    head = hidden * VOCABULARY
    return [
        *layer * text.num_hidden_layers,
        Operation(part, "lm_head", flops=head, weights=2 * head, read=2 * hidden, written=2 * VOCABULARY),
    ]


def figures(sums: dict[str, float]) -> tuple[float, float, float, float]:
    """The four columns of Table 9 of `totals`, under the meaning that the paper's tool gives them.

    "Total memory" is all that is moved, and "storing activation" all that is written, over the whole prefill: neither is
    held at any moment.
    """
    return sums["flops"] / 1e12, 1e3 * sums["seconds"], sums["bytes"] / 1e9, sums["written_bytes"] / 1e9


def paper_figures(text: PreTrainedConfig, visual_tokens: int, device: Device) -> tuple[float, float, float, float]:
    """A row of Table 9 by the rules of the paper's tool."""
    return figures(totals(operations(text, visual_tokens + PROMPT_TOKENS), device))


def comparison(text: PreTrainedConfig, own: dict[str, dict[int, tuple]]) -> dict[str, dict[int, tuple]]:
    """Rows of Table 9 by who says so: the paper, its tool on both devices, and `own`, by device."""
    tool = {
        f"paper's tool, {device}": {n: paper_figures(text, n, find_device(device)) for n in PRINTED}
        for device in (PRINTED_DEVICE, FITTING_DEVICE)
    }
    return {"printed": PRINTED, **tool, **{f"this tool, {device}": rows for device, rows in own.items()}}


def table(compared: dict[str, dict[int, tuple]]) -> str:
    """The comparison in Markdown: for every figure what is printed, then each way with its difference."""
    ways = [way for way in compared if way != "printed"]
    lines = []
    for column, name in enumerate(COLUMNS):
        for tokens, row in PRINTED.items():
            printed = row[column]
            values = [compared[way][tokens][column] for way in ways]
            cells = [f"{value:.2f} ({round(100 * (value / printed - 1)):+d} %)" for value in values]
            lines.append([f"{name}, at {tokens}", printed, *cells])
    return markdown_table(["figure, at visual tokens", "printed", *ways], lines)
