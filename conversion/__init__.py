"""Original LLaVA and M3 checkpoints to folders that transformers loads: `m3-convert SRC DST`."""
