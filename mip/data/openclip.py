"""The one place that loads open_clip models: labels, object scores, CLIP-T and CLIP-I all use it."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from mip.config import OpenClip
from mip.errors import CheckpointError

_LOCAL = "local-dir:"

T = TypeVar("T")
Features = NDArray[np.float32]  # rows x width, of length 1


class Encoder:
    """A CLIP model on its device. Features are float32 and normalised, whatever the device."""

    def __init__(self, model: nn.Module, preprocess: Any, tokenizer: Any, *, batch: int, device: torch.device) -> None:
        self.model, self.preprocess, self.tokenizer = model, preprocess, tokenizer
        self.batch, self.device = batch, device
        self.logit_scale = float(model.logit_scale.exp())  # pyright: ignore[reportCallIssue, reportArgumentType]
        self.identity = _weights_hash(model)

    def encode_images(self, images: Iterable[Image.Image]) -> Features:
        """Images x width. Images are RGB of any size; only one batch of them is held at a time."""
        prepared = (torch.stack([self.preprocess(image) for image in part]) for part in _slices(images, self.batch))
        return self._encode(self.model.encode_image, prepared)  # pyright: ignore[reportArgumentType]

    def encode_texts(self, texts: Iterable[str]) -> Features:
        """Texts x width. A text longer than the model's context is cut by its tokenizer."""
        prepared = (self.tokenizer(part) for part in _slices(texts, self.batch))
        return self._encode(self.model.encode_text, prepared)  # pyright: ignore[reportArgumentType]

    @torch.inference_mode()
    def _encode(self, encode: Any, batches: Iterator[torch.Tensor]) -> Features:
        rows = [encode(batch.to(self.device)).float() for batch in batches]
        if not rows:
            return np.empty((0, 0), np.float32)
        return nn.functional.normalize(torch.cat(rows), dim=-1).cpu().numpy()


def load(config: OpenClip) -> Encoder:
    """The model of ("ViT-B-32", "openai"), ("hf-hub:OWNER/NAME", null) or ("local-dir:PATH", null).

    The last ones are kept for the next call. A local folder holds open_clip_config.json, the weights and, where the
    configuration names a tokenizer, its files. Raises CheckpointError where open_clip finds no such model.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return _load(config.name, config.pretrained, batch=config.batch, device=device)


@lru_cache(maxsize=2)
def _load(name: str, pretrained: str | None, *, batch: int, device: str) -> Encoder:
    if name.startswith(_LOCAL) and not Path(name.removeprefix(_LOCAL), "open_clip_config.json").is_file():
        raise CheckpointError(f"got open_clip model {name!r}; expected a folder with open_clip_config.json and weights")
    try:
        loaded: Any = open_clip.create_model_from_pretrained(name, pretrained, device=device)
        model, preprocess = loaded
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        problem = " ".join(str(error).split())[:300]
        raise CheckpointError(f"open_clip cannot load {name!r} with weights {pretrained!r}: {problem}") from None
    model.eval().requires_grad_(False)
    return Encoder(model, preprocess, tokenizer, batch=batch, device=torch.device(device))


def _slices(items: Iterable[T], size: int) -> Iterator[list[T]]:
    waiting = iter(items)
    while part := list(islice(waiting, size)):
        yield part


def _weights_hash(model: nn.Module) -> str:
    """What lineage calls the model: a hash of its weights, wherever they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:32]
