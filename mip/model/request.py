"""What a user asks for: references, one list per prompt, with regions."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mip.errors import ReferencesError


@dataclass(frozen=True, eq=False)
class Reference:
    """An object to be shown: its name, photos of it, and how strongly and where.

    Raises:
        ReferencesError: no name, no images, or a region that is not a height x width mask.
    """

    name: str
    """Noun phrase that the prompt uses for it, e.g. "denim jacket"."""
    images: Sequence[Image.Image]
    """One or more photos of this one object; their image tokens are averaged."""
    scale: float = 1.0
    """Strength; multiplied by the call's `scale`."""
    region: Tensor | None = None
    """float (height, width) >= 0 of any size, stretched over the image; where it is 0 the reference is absent."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ReferencesError(f"got the name {self.name!r}; give the noun that the prompt uses for the object")
        if isinstance(self.images, Image.Image) or not self.images:
            raise ReferencesError(f"got no list of images for {self.name!r}; give one or more, as a list")
        if self.region is not None and self.region.ndim != 2:
            shape = tuple(self.region.shape)
            raise ReferencesError(f"got a region of shape {shape} for {self.name!r}; give (height, width)")


def rows_per_prompt(
    references: Sequence[Reference] | Sequence[Sequence[Reference]] | None, prompts: int
) -> list[list[Reference]]:
    """One list of references per prompt; a flat list serves every prompt.

    Raises:
        ReferencesError: neither a flat list nor one list per prompt.
    """
    given = list(references or [])
    if all(isinstance(reference, Reference) for reference in given):
        return [cast(list[Reference], given)] * prompts
    if any(isinstance(reference, Reference) for reference in given) or len(given) != prompts:
        raise ReferencesError(
            f"got {len(given)} lists of references for {prompts} prompts; give one list per prompt, "
            "or one flat list for all"
        )
    rows = [list(row) for row in cast(Sequence[Sequence[Reference]], given)]
    if not all(isinstance(reference, Reference) for row in rows for reference in row):
        raise ReferencesError("got something else than a Reference in references; give Reference(name, [image])")
    return rows


def warn_of_absent_names(prompts: Sequence[str | Sequence[str] | None], rows: Sequence[Sequence[Reference]]) -> None:
    """Warn about each name that its prompt does not contain, as whole words in any case, the plural allowed.

    Args:
        prompts: the prompts for each text encoder: one, one per row, or None (embedded already: nothing is checked).
        rows: the references of each prompt.
    """
    given = [[text] * len(rows) if isinstance(text, str) else text for text in prompts if text is not None]
    for row, texts in zip(rows, zip(*given, strict=True), strict=False):
        for name in dict.fromkeys(reference.name for reference in row):
            words = r"\s+".join(map(re.escape, name.split()))
            if not any(re.search(rf"(?<!\w){words}(s|es)?(?!\w)", text, re.IGNORECASE) for text in texts):
                warnings.warn(
                    f"got a reference named {name!r} and the prompt {texts[0]!r}, which does not contain that name; "
                    "an object that the prompt does not ask for is seldom drawn: use the same noun in both",
                    stacklevel=4,  # the line that calls the pipeline, through torch's no_grad
                )


def region_masks(row: Sequence[Reference], latent_size: tuple[int, int]) -> Tensor | None:
    """Regions of one row (1, N, H, W) at the latent size, 1 where none is given; None if none has one."""
    if all(reference.region is None for reference in row):
        return None
    whole_HW = torch.ones(latent_size)
    return stacked([whole_HW if r.region is None else _resized(r.region, latent_size) for r in row], like=whole_HW)


def oracle_masks(row: Sequence[Reference], latent_size: tuple[int, int]) -> Tensor:
    """Regions of one row (1, N, H, W) at the latent size, as weights that replace the word maps.

    Raises:
        ReferencesError: a reference has no region.
    """
    if lacking := [reference.name for reference in row if reference.region is None]:
        raise ReferencesError(f"got oracle=True and no region for {', '.join(lacking)}; give every reference one")
    regions = [_resized(reference.region, latent_size) for reference in row if reference.region is not None]
    return stacked(regions, like=torch.ones(latent_size))


def stacked(tensors: Sequence[Tensor], *, like: Tensor) -> Tensor:
    """A batch of one row (1, N, ...); `like` gives the shape of an entry when there is none."""
    return torch.stack(list(tensors))[None] if tensors else like.new_zeros(1, 0, *like.shape)


def _resized(region_HW: Tensor, latent_size: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(region_HW.detach().cpu().float()[None], latent_size)[0]
