"""What the public evaluation reads: the caption it scores and the reference image it generates from.

For comparison with recorded results. Ours are `mip.evaluation.benchmarks` (captions and cut photos) and
`mip.model.encoding` (the square). docs/parity.md lists what differs.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mip.evaluation.benchmarks import load_reference


def scored_caption(prompt: str) -> str:
    """The caption that the public scorer takes from the file `PROMPT_gen.png`: up to the first dot, and one dot."""
    return f"{prompt}_gen.png".partition(".")[0] + "."


def scored_files(prompts: Sequence[str]) -> list[str]:
    """Names of the images of one combination in order; an image of a repeated prompt overwrites the one before."""
    return list(dict.fromkeys(f"{prompt}_gen.png" for prompt in prompts))


def square_reference(path: Path, box: Sequence[float], *, size: int = 224) -> Image.Image:
    """A reference photo cut to its object, its longer side at `size` pixels, centred on a white square.

    Args:
        path: as `load_reference`.
        box: as `load_reference`.
        size: side of the square, pixels.

    Raises:
        DataError: as `load_reference`.
        ValueError: a cut so long that its shorter side would have no pixel.
    """
    cut = load_reference(path, box)
    width, height = (int(side * (size / max(cut.size))) for side in cut.size)
    fitted = cut.resize((width, height), Image.Resampling.BILINEAR)
    square = Image.new("RGB", (size, size), "white")
    square.paste(fitted, ((size - width) // 2, (size - height) // 2))
    return square
