"""The model card's template, and what is published of known checkpoints."""
