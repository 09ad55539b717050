"""Encodes, while training, the kinds that the features were made without."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from mip.config import KINDS, Models
from mip.data.images import decode, read_bytes
from mip.errors import DataError
from mip.tables import Row, check_kind
from mip.training import crops
from mip.training.networks import Encoders, Text, weights_hash

_NAMES_KEPT = 128  # encoded texts in memory; 0.6 MB each at SDXL's size in float32


@dataclass(frozen=True, eq=False)
class Cut:
    """One augmentation's pictures, before any network; none of a kind that is cached."""

    picture: Sequence[Image.Image]  # one
    views: Sequence[Image.Image]  # one an object


class Live:
    """The networks that are needed, on the device of training."""

    def __init__(self, encoders: Encoders, *, kinds: frozenset[str]) -> None:
        self.kinds, self._encoders = kinds, encoders
        self.text = lru_cache(_NAMES_KEPT)(self._encode_text)

    @classmethod
    def of(cls, features: Path, *, models: Models) -> "Live | None":
        """What these features need; None where every kind is cached. Raises DataError for networks of other weights."""
        made_from = check_kind(features / "index.parquet", "features")
        if "cache" not in made_from:
            return None
        if made_from["weights"] != weights_hash(models):
            raise DataError(f"{features} was made with other networks than those at hand; run the features stage again")
        cached = made_from["cache"].split()
        encoders = Encoders.load(models)
        networks: dict[str, Sequence[nn.Module]] = {
            "latents": [encoders.vae],
            "images": [encoders.image_encoder],
            "texts": encoders.text_encoders,
        }
        for kind in cached:
            for network in networks[kind]:
                network.to("meta")  # never run: it need not take memory
        return cls(encoders, kinds=frozenset(kind for kind in KINDS if kind not in cached))

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self._encoders.vae.config["latent_channels"]

    def cut(self, source: Row, time_ids: Sequence[int]) -> Cut:
        """Read, decode and cut; needs no network, so that another thread may do it.

        Raises:
            DataError: an image that is no longer what it was when the features were made.
        """
        path, offset = source["image_path"], source["image_offset"]
        data = read_bytes(Path(path), offset=offset, size=source["image_size"])
        if hashlib.sha256(data).hexdigest() != source["image_sha256"]:
            raise DataError(f"{path} has changed at byte {offset} since it was encoded; run the features stage again")
        height, width, top, left, resolution, _ = time_ids
        image = decode(data, max_pixels=width * height, size=(width, height))
        crop = crops.Crop(left=left, top=top, side=min(width, height))
        return Cut(
            picture=[crops.crop_image(image, crop, resolution=resolution)] if "latents" in self.kinds else [],
            views=[
                crops.reference_image(image, rle=thing["rle"], box=thing["box"], is_mirrored=thing["mirrored"])
                for thing in (source["objects"] if "images" in self.kinds else [])
            ],
        )

    def latents(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation: (C, H, W) each."""
        mean_ACHW, std_ACHW = self._encoders.latents(cut.picture)
        return mean_ACHW[0], std_ACHW[0]

    def views(self, cut: Cut) -> list[Tensor]:
        """Features, one an object."""
        return list(self._encoders.features(cut.views))

    def _encode_text(self, text: str) -> Text:
        return self._encoders.text(text)
