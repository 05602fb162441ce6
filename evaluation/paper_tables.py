"""The paper's Tables 1 and 2, for checkpoints that are its own: percentages by lmms-eval's name of the task."""

from typing import Any


SCALES = (1, 9, 36, 144, 576)

# At 1, 9, 36, 144 and 576 tokens.
TABLE_1 = {
    "mmbench_en_dev": (59.5, 63.1, 64.8, 66.4, 65.9),
    "gqa": (52.6, 58.0, 60.3, 61.3, 61.9),
    "pope": (78.4, 83.4, 85.5, 87.0, 87.4),
    "vizwiz_vqa_val": (49.4, 51.9, 52.8, 53.1, 54.9),
    "seedbench": (50.1, 55.4, 58.0, 59.7, 60.6),
}
# The same, then the oracle's performance and its mean tokens.
TABLE_2 = {
    "textvqa_val": (38.92, 51.97, 58.71, 62.61, 63.13, 70.51, 31.39),
    "ai2d": (64.57, 66.77, 67.36, 68.07, 66.71, 76.36, 11.54),
    "chartqa": (31.04, 42.00, 50.24, 57.04, 58.96, 70.76, 41.78),
    "docvqa_val": (31.63, 43.52, 55.94, 66.48, 72.61, 81.73, 64.09),
    "mmbench_en_dev": (62.97, 67.35, 68.56, 69.50, 67.96, 74.35, 8.90),
    "pope": (83.38, 86.17, 87.29, 87.67, 87.20, 94.29, 6.08),
    "scienceqa_img": (71.19, 71.85, 72.11, 72.32, 72.46, 76.07, 7.43),
    "mmmu_val": (34.8, 35.2, 36.8, 36.1, 34.0, 50.44, 22.85),
}


def printed(config: dict[str, Any], task: str) -> dict[str, Any] | None:
    """What the paper prints for a task and a checkpoint, or None.

    Its two checkpoints are told by their shape: a language model of 4,096 wide and 32 layers, trained at the paper's scales,
    with tiles (LLaVA-NeXT-M3) or without (LLaVA-1.5-M3).
    """
    text = config.get("text_config", {})
    shape = text.get("hidden_size", 4096), text.get("num_hidden_layers", 32)
    if shape != (4096, 32) or sorted(config.get("trained_scales") or ()) != list(SCALES):
        return None
    number, table = (2, TABLE_2) if config.get("image_grid_pinpoints") else (1, TABLE_1)
    row = table.get(task.removesuffix("_static"))
    if row is None:
        return None
    result = {"table": number, "scores": dict(zip(map(str, SCALES), row[:5]))}
    if len(row) > 5:
        result["oracle"] = {"performance": row[5], "tokens": row[6]}
    return result
