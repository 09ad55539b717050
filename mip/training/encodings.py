"""One sample or one text, encoded, and the folder that keeps what was encoded before.

An encoding's key names its contents, the parameters, the networks and the code; nothing else has an influence on it.

A augmentations   C, H, W latents   N objects of one sample   V views (an object as it is, or mirrored)
"""

import hashlib
import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from mip.config import KINDS, Features, Kind, Models
from mip.data import images
from mip.data.images import ImageError, decode, decode_mask, read_bytes
from mip.model import encoding, projection
from mip.tables import Row, atomic, fingerprint
from mip.training import crops, networks
from mip.training.networks import Encoders, Text

log = logging.getLogger(__name__)
ABSENT = -1  # in a table of views: the crop shows too little of the object

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Unreadable:
    """A sample without an image, and why."""

    detail: str


@dataclass(frozen=True, eq=False)
class Prepared:
    """A sample's pictures, before any network."""

    pictures: Sequence[Image.Image]  # A crops
    views: Sequence[Image.Image]  # V references
    view_AN: NDArray[np.int32]  # number of the view, or ABSENT
    visible_AN: NDArray[np.float32]  # which part of the object is inside the crop
    masks_ANHW: NDArray[np.uint8]  # coverage, 0 to 255, at the pictures' resolution
    time_ids: Sequence[Sequence[int]]

    def encode(self, encoders: Encoders) -> Tensors:
        """mean, std (A, C, H, W); masks (A, N, H, W); views (V, ...); view, visible (A, N); time_ids (A, 6)."""
        mean_ACHW, std_ACHW = encoders.latents(self.pictures)
        height, width = mean_ACHW.shape[2:]
        small = [[_resized(mask, (width, height)) for mask in masks] for masks in self.masks_ANHW]
        return {
            "mean": mean_ACHW,
            "std": std_ACHW,
            "masks": torch.from_numpy(np.asarray(small)),
            "views": encoders.features(self.views) if self.views else encoders.absent_features()[None][:0],
            "view": torch.from_numpy(self.view_AN),
            "visible": torch.from_numpy(self.visible_AN),
            "time_ids": torch.tensor(self.time_ids, dtype=torch.int32),
        }


def draw(row: Row, augmentation: int, *, config: Features) -> tuple[crops.Crop, NDArray[np.bool_]]:
    """Where one augmentation of a sample looks, and which of its objects it mirrors."""
    rng, objects = crops.generator(config.seed, row["sample_id"], augmentation), row["objects"]
    boxes = [thing["box"] for thing in objects]
    cut = crops.draw_crop(rng, width=row["width"], height=row["height"], boxes=boxes)
    return cut, rng.random(len(objects)) < config.flip


def prepare(row: Row, image: Image.Image, *, config: Features, resolution: int) -> Prepared:
    """Crop and cut out an image of the row's size; every draw depends only on (seed, sample, augmentation)."""
    objects, size = row["objects"], (resolution, resolution)
    masks = [decode_mask(thing["rle"], width=image.width, height=image.height) for thing in objects]
    views: dict[tuple[int, bool], int] = {}
    view_AN = np.full((config.augmentations, len(objects)), ABSENT, np.int32)
    visible_AN = np.zeros(view_AN.shape, np.float32)
    cuts = []
    for augmentation in range(config.augmentations):
        cut, mirrored = draw(row, augmentation, config=config)
        cuts.append(cut)
        for place, mask in enumerate(masks):
            visible = visible_AN[augmentation, place] = crops.visible_share(mask, cut)
            if visible > 0 and visible >= config.min_visible:
                view = (place, bool(mirrored[place]))
                view_AN[augmentation, place] = views.setdefault(view, len(views))
    return Prepared(
        pictures=[crops.crop_image(image, cut, resolution=resolution) for cut in cuts],
        views=[
            crops.reference_image(image, rle=objects[place]["rle"], box=objects[place]["box"], is_mirrored=is_mirrored)
            for place, is_mirrored in views
        ],
        view_AN=view_AN,
        visible_AN=visible_AN,
        masks_ANHW=np.stack([np.stack([crops.crop_mask(mask, cut, size=size) for mask in masks]) for cut in cuts]),
        time_ids=[cut.time_ids(width=image.width, height=image.height, resolution=resolution) for cut in cuts],
    )


@dataclass(frozen=True, eq=False)
class _Partial(Encoders):
    """Encoders that leave kinds out: in their place stand tensors of no width, and no network runs."""

    cache: Sequence[Kind]

    def latents(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        if "latents" in self.cache:
            return super().latents(images)
        blocks = self.vae.config["block_out_channels"]
        side = images[0].width // 2 ** (len(blocks) - 1)  # the masks need it
        return torch.empty(len(images), 0, side, side), torch.empty(len(images), 0, side, side)

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        return super().features(images) if "images" in self.cache else torch.empty(len(images), 0)

    def text(self, text: str) -> Text:
        if "texts" in self.cache:
            return super().text(text)
        return Text(torch.empty(0, 0), torch.empty(0), self.words(text))


class EncodingCache:
    """Gives encodings by key, and makes the missing ones; the networks are loaded when the first of these comes."""

    def __init__(self, config: Features, *, models: Models, folder: Path) -> None:
        self.config, self.models, self.folder = config, models, folder
        identity, code = networks.identify(models), _code_hash()
        influences = config.model_dump(include={"augmentations", "flip", "min_visible", "seed"})
        made = [kind for kind in ("latents", "images") if kind in config.cache]
        self._image_key = {"networks": identity.images, "code": code, "parameters": influences, "made": made}
        self._text_key = {"networks": identity.texts, "code": code, "made": "texts" in config.cache}

    @property
    def key(self) -> str:
        """Of everything but the samples and texts."""
        return fingerprint(images=self._image_key, texts=self._text_key)

    @cached_property
    def _encoders(self) -> Encoders:
        log.info("loading the frozen networks")
        whole = Encoders.load(self.models)
        return whole if set(self.config.cache) == set(KINDS) else _Partial(**vars(whole), cache=self.config.cache)

    def samples(self, rows: Sequence[Row]) -> Iterator[Tensors | Unreadable]:
        """What `Prepared.encode` makes of each row, in order. Raises DataError for files that have moved."""
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for start in range(0, len(rows), self.config.batch):
                # Images are read and decoded in the background while the networks work on those before.
                for key, found in pool.map(self._prepared, rows[start : start + self.config.batch]):
                    yield self._keep(key, found.encode(self._encoders)) if isinstance(found, Prepared) else found

    def text(self, text: str) -> Tensors:
        """embedding (T, E), pooled (D), words (T; none is True for a text that cannot be a name)."""
        key = fingerprint(**self._text_key, text=text)
        if (found := self._read(key)) is not None:
            return found
        encoded = self._encoders.text(text)
        return self._keep(
            key, {"embedding": encoded.embedding_TE, "pooled": encoded.pooled_D, "words": encoded.words_T}
        )

    def absent(self) -> Tensors:
        """features: what stands for "no image"."""
        key = fingerprint(**self._image_key, absent=True)
        found = self._read(key)
        return found if found is not None else self._keep(key, {"features": self._encoders.absent_features()})

    def _prepared(self, row: Row) -> tuple[str, Tensors | Unreadable | Prepared]:
        data = read_bytes(Path(row["image_path"]), offset=row["image_offset"], size=row["image_size"])
        size = (row["width"], row["height"])
        shapes = [(thing["rle"], thing["box"]) for thing in row["objects"]]
        # The image's own bytes, not its path: a source that was made anew may have the same names.
        content = {
            "sample": row["sample_id"],
            "image": hashlib.sha256(data).hexdigest(),
            "size": size,
            "objects": shapes,
        }
        key = fingerprint(**self._image_key, **content)
        if (found := self._read(key)) is not None:
            return key, found
        try:
            image = decode(data, max_pixels=size[0] * size[1], size=size)
        except ImageError as error:
            return key, Unreadable(str(error))
        return key, prepare(row, image, config=self.config, resolution=self.models.resolution)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> Tensors | None:
        try:
            return load(self._path(key).read_bytes())
        except FileNotFoundError:
            return None
        except SafetensorError:
            log.warning("%s is damaged; it is encoded again", self._path(key))
            return None

    def _keep(self, key: str, tensors: Tensors) -> Tensors:
        save_tensors(self._path(key), tensors)
        return tensors


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file, whole or not at all; the same tensors give the same bytes."""
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _resized(mask_HW: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(mask_HW).resize(size, Image.Resampling.BOX))


def _code_hash() -> str:
    """Of the modules that decide what an encoding is: new code makes new encodings."""
    modules = (crops, encoding, images, networks, projection)
    sources = [inspect.getsource(part) for part in (*modules, draw, prepare, Prepared, _Partial)]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()
