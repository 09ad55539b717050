"""The judge's image encoders, and the cache that spares it from encoding an image twice."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from mip.errors import CheckpointError, DataError
from mip.tables import atomic, file_hash, fingerprint

Floats = NDArray[np.float32]

_log = logging.getLogger(__name__)
_IMAGENET_RESIZE = 256 / 224  # shorter side before the centre crop, over the crop


def pick_device(name: str) -> str:
    """The device that a parameter means; "auto" is an accelerator if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load_network(kind: Any, name: str, *, device: str) -> Any:
    """A network of transformers, by an Auto class and a local folder or hub id; ready to judge.

    Raises:
        CheckpointError: it cannot be loaded, or lacks weights (a pooling head excepted, which nothing here uses).
    """
    try:
        network, info = kind.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"got network {name!r}, which cannot be loaded: {_line(error)}") from None
    if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
        raise CheckpointError(f"got network {name!r} without weights for {missing[0]} and {len(missing) - 1} more")
    return network.eval().requires_grad_(False).to(device)


def load_processor(kind: Any, name: str, **options: str) -> Any:
    """What prepares the input of a network, from the same place. Raises CheckpointError."""
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"got {name!r} without a usable preprocessor_config.json: {_line(error)}") from None


class Vit:
    """A vision transformer of transformers; its CLS token, normalised."""

    def __init__(self, model: str, *, device: str, batch: int) -> None:
        self.model = load_network(AutoModel, model, device=device)
        processor: Any = load_processor(AutoImageProcessor, model, backend="pil")
        self.batch = batch
        # DINOv2 was configured for 518 pixels and is used at 224: what its processor says comes first.
        crop = getattr(processor, "crop_size", None)
        self.size = square_side((crop["height"], crop["width"]) if crop else self.model.config.image_size)
        self.mean, self.std = processor.image_mean, processor.image_std

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Floats:
        """Embeddings (X, D) of length 1."""
        parts = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            pixels = torch.stack([vit_pixels(image, size=self.size, mean=self.mean, std=self.std) for image in part])
            states_XSD = self.model(pixels.to(device=self.model.device, dtype=self.model.dtype)).last_hidden_state
            parts.append(torch.nn.functional.normalize(states_XSD[:, 0].float(), dim=-1).cpu().numpy())
        return np.concatenate(parts)


def square_side(size: int | Sequence[int]) -> int:
    """The side of a model's square input, which its configuration gives as one number or two."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise DataError(f"got a model for images of {size} pixels; expected one for square images")
    return sides.pop()


def vit_pixels(image: Image.Image, *, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """DINO's preprocessing (3, size, size): shorter side to 256/224 of `size` (bicubic), centre crop, normalised."""
    image = image.convert("RGB")
    shorter, scale = round(size * _IMAGENET_RESIZE), min(image.size)
    width, height = (shorter if side == scale else int(shorter * side / scale) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels_HW3 = np.asarray(resized, dtype=np.float32) / 255
    return torch.from_numpy((pixels_HW3 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).permute(2, 0, 1)


class FeatureCache:
    """Features of images by their hash, one file per encoder, kept from run to run.

    The file is written whole by `save`; what an encoder of other weights or versions wrote has another name.
    """

    def __init__(self, folder: Path, *, name: str, version: str) -> None:
        self.path = folder / f"{name}-{version}.npz"
        self._features = self._read()
        self._is_changed = False

    def encode(
        self,
        images: Mapping[str, Callable[[], Image.Image]],
        encode: Callable[[Sequence[Image.Image]], Floats],
        *,
        chunk: int,
    ) -> dict[str, Floats]:
        """Features of images by hash; only those that are not known are opened and encoded, `chunk` at a time."""
        missing = [key for key in images if key not in self._features]
        for start in range(0, len(missing), chunk):
            keys = missing[start : start + chunk]
            self._features.update(zip(keys, encode([images[key]() for key in keys]), strict=True))
            self._is_changed = True
        _log.info("%s: %d of %d images encoded", self.path.stem, len(missing), len(images))
        return {key: self._features[key] for key in images}

    def save(self) -> None:
        """Write what is new, whole or not at all."""
        if self._is_changed:
            keys = sorted(self._features)
            with atomic(self.path) as temporary, temporary.open("wb") as file:
                np.savez(file, keys=np.array(keys), features=np.stack([self._features[key] for key in keys]))
            self._is_changed = False

    def _read(self) -> dict[str, Floats]:
        if not self.path.exists():
            return {}
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return dict(zip(file["keys"].tolist(), file["features"], strict=True))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{self.path} is not readable ({error}); delete it, it is made anew") from None


def image_key(image: Image.Image) -> str:
    """Hash of an image's pixels, for images that lie in no file."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def version_of(*packages: ModuleType, **settings: Any) -> str:
    """Hash of what a network's output depends on: settings, content of local files that they name, packages."""
    versions = {package.__name__: package.__version__ for package in packages}
    return fingerprint(settings={key: _content(value) for key, value in settings.items()}, packages=versions)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _content(value: Any) -> Any:
    """A local path gives the hash of what lies there; anything else itself."""
    path = Path(value.removeprefix("local-dir:")) if isinstance(value, str) and value else None
    return file_hash(path) if path is not None and path.exists() else value
