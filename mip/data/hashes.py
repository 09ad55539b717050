"""Perceptual hashes: images that look the same have hashes that differ in few bits."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from PIL import Image

BITS = 64
_SIDE = 32  # pixels to which an image is reduced
_LOW = 8  # frequencies kept on each axis: 8 x 8 bits


def _cosines() -> np.ndarray:
    """The lowest rows of the DCT-II, without their scale, which the signs below do not need."""
    frequency, place = np.arange(_LOW)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))


_DCT = _cosines()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: which of the lowest spatial frequencies of the gray image are above their median."""
    gray = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
    # Rounded, so that the last bits of a sum decide nothing on another processor.
    low = np.round(_DCT @ gray @ _DCT.T, 6).ravel()
    bits = low > np.median(low[1:])  # the first is the brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@dataclass
class NearHashes:
    """Finds a hash at most `distance` bits away. Exact, and no search over all of them.

    Two hashes that differ in d bits agree in one of any d + 1 bands of bits: only hashes that share one are compared.
    """

    distance: int
    _bands: list[dict[int, list[tuple[int, str]]]] = field(init=False)

    def __post_init__(self) -> None:
        self._bands = [{} for _ in range(min(self.distance + 1, BITS))]

    def find(self, value: int) -> tuple[str, int] | None:
        """The name of the first hash put in of those nearest, and its distance in bits; None where none is near."""
        best: tuple[str, int] | None = None
        for band, key in zip(self._bands, self._keys(value), strict=True):
            for other, name in band.get(key, ()):
                bits = (value ^ other).bit_count()
                if bits <= self.distance and (best is None or bits < best[1]):
                    best = (name, bits)
        return best

    def add(self, value: int, name: str) -> None:
        """Put in a hash under a name."""
        for band, key in zip(self._bands, self._keys(value), strict=True):
            band.setdefault(key, []).append((value, name))

    def _keys(self, value: int) -> Iterator[int]:
        edges = [BITS * band // len(self._bands) for band in range(len(self._bands) + 1)]
        for low, high in pairwise(edges):
            yield (value >> low) & ((1 << (high - low)) - 1)
