"""Original LLaVA and M3 checkpoints to folders that transformers loads: `python -m conversion SRC DST`."""
