"""How a command line names the sizes that pictures are cut into tiles by."""


def parse_pinpoints(text: str | None) -> list[list[int]] | None:
    """(height, width) pairs from HEIGHTxWIDTH+HEIGHTxWIDTH... Raises `ValueError` for another text."""
    if text is None:
        return None
    pairs = [part.split("x") for part in str(text).split("+")]
    if not all(len(pair) == 2 and all(edge.isdecimal() for edge in pair) for pair in pairs):
        raise ValueError(
            f"image_grid_pinpoints={text!r}: give HEIGHTxWIDTH in pixels, several joined by +, as 336x672+672x336."
        )
    return [[int(edge) for edge in pair] for pair in pairs]
