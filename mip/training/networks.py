"""The frozen networks: where their weights are, what identifies them, and how a sample passes through them.

Every network sees the images or the text of one sample at a time, so that no value depends on what else is encoded.

X items   C, H, W latents   T text tokens   E context width   D encoder width
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from mip.config import Models
from mip.errors import ConfigError, ReferencesError
from mip.model.encoding import encode_texts, image_pixels, name_tokens
from mip.model.projection import Variant, variant_named
from mip.tables import file_hash

_Network = TypeVar("_Network", bound=nn.Module)
_TEXT_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")


def device_named(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. Raises ConfigError for `cuda` without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("got device cuda on a machine without a usable GPU; set it to auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Weights:
    """A local folder, or a repository of the hub at one commit."""

    name: str
    revision: str
    is_local: bool

    def identity(self, part: str) -> str:
        """What a result depends on: the bytes of the part's files, or repository and commit."""
        if not self.is_local:
            return f"{self.name}@{self.revision}/{part}"
        return file_hash(Path(self.name) / part)


def weights_at(name: str, *, marker: str) -> Weights:
    """A folder or repository that holds the file `marker`. Raises ConfigError where there is none."""
    if (Path(name) / marker).is_file():
        return Weights(name, revision="main", is_local=True)  # loaders ignore the revision of a folder
    if Path(name).exists() or len(Path(name).parts) != 2:
        raise ConfigError(
            f"got {name!r}, where there is no {marker}; give a folder that has it, or the id of a hub repository"
        )
    try:
        file = Path(hf_hub_download(name, marker))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"got {name!r}, which is no folder and cannot be had from the hub ({reason})") from None
    return Weights(name, revision=file.parts[file.parts.index("snapshots") + 1], is_local=False)


def base_weights(models: Models) -> Weights:
    """The base pipeline."""
    return weights_at(models.base, marker="model_index.json")


def image_encoder_weights(models: Models) -> Weights:
    """The image encoder; its files are in `models.image_encoder_subfolder`."""
    return weights_at(models.image_encoder, marker=str(Path(models.image_encoder_subfolder) / "config.json"))


@dataclass(frozen=True)
class Identity:
    """Hashes of everything the encodings depend on, apart from the sample itself."""

    images: str
    texts: str


def identify(models: Models) -> Identity:
    """Reads the weights' files but loads no network."""
    base, vision = base_weights(models), image_encoder_weights(models)
    setting = [
        *(models.variant, models.dtype, device_named(models.device).type, str(models.resolution)),
        *(module.__version__ for module in (torch, diffusers, transformers)),
    ]
    images = [*setting, base.identity("vae"), vision.identity(models.image_encoder_subfolder)]
    texts = [*setting, *(base.identity(part) for part in _TEXT_PARTS)]
    return Identity(*(hashlib.sha256("\0".join(parts).encode()).hexdigest() for parts in (images, texts)))


def weights_hash(models: Models) -> str:
    """Of the weights and settings behind an encoding, whatever the machine and the packages that made it."""
    base, vision = base_weights(models), image_encoder_weights(models)
    weights = [base.identity(part) for part in ("vae", *_TEXT_PARTS)]
    setting = [models.variant, models.dtype, str(models.resolution), vision.identity(models.image_encoder_subfolder)]
    return hashlib.sha256("\0".join([*setting, *weights]).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Text:
    """One text, as a prompt and as a name."""

    embedding_TE: Tensor
    pooled_D: Tensor
    words_T: (
        Tensor  # bool; all False for a text that cannot be a name (without tokens, or longer than the encoders read)
    )


@dataclass(frozen=True, eq=False)
class Encoders:
    """VAE (always float32), both text encoders and the image encoder, without gradients."""

    vae: AutoencoderKL
    tokenizers: Sequence[CLIPTokenizer]
    text_encoders: Sequence[CLIPTextModel | CLIPTextModelWithProjection]
    image_encoder: CLIPVisionModelWithProjection
    variant: Variant
    device: torch.device

    @classmethod
    def load(cls, models: Models) -> "Encoders":
        """Raises ConfigError for weights that are nowhere."""
        base, vision = base_weights(models), image_encoder_weights(models)
        device, dtype = device_named(models.device), getattr(torch, models.dtype)
        at, revision = base.name, base.revision

        def frozen(network: _Network) -> _Network:
            network.requires_grad_(False).eval()
            return network.to(device=device)

        # The SDXL autoencoder overflows in half precision.
        vae = AutoencoderKL.from_pretrained(at, revision=revision, subfolder="vae", torch_dtype=torch.float32)
        first = CLIPTextModel.from_pretrained(at, revision=revision, subfolder="text_encoder", dtype=dtype)
        second = CLIPTextModelWithProjection.from_pretrained(
            at, revision=revision, subfolder="text_encoder_2", dtype=dtype
        )
        image_encoder = CLIPVisionModelWithProjection.from_pretrained(
            vision.name, revision=vision.revision, subfolder=models.image_encoder_subfolder, dtype=dtype
        )
        assert isinstance(vae, AutoencoderKL)
        return cls(
            vae=frozen(vae),
            tokenizers=[
                CLIPTokenizer.from_pretrained(at, revision=revision, subfolder=part)
                for part in ("tokenizer", "tokenizer_2")
            ],
            text_encoders=[frozen(first), frozen(second)],
            image_encoder=frozen(image_encoder),
            variant=variant_named(models.variant),
            device=device,
        )

    @torch.no_grad()
    def latents(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each image's latents, in the UNet's units: float32, (X, C, H, W) each.

        Training draws mean + std * noise anew each time a sample comes by, as if the VAE were run then.
        """
        pixels_X3HW = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(
            0, 3, 1, 2
        )
        drawn: Any = self.vae.encode(pixels_X3HW.to(self.device, torch.float32) / 127.5 - 1)
        scale, shift = self._latent_frame()
        return ((drawn.latent_dist.mean - shift) * scale).cpu(), (drawn.latent_dist.std * scale).cpu()

    @property
    def _image_size(self) -> int:
        size = self.image_encoder.config.image_size
        assert isinstance(size, int)
        return size

    def _latent_frame(self) -> tuple[Tensor, Tensor]:
        config: Any = self.vae.config

        def channels(value: Sequence[float] | float) -> Tensor:
            return torch.tensor(value, device=self.device).reshape(-1, 1, 1)

        scale = channels(config.scaling_factor)
        if config.latents_std is not None and config.latents_mean is not None:
            return scale / channels(config.latents_std), channels(config.latents_mean)
        return scale, channels(config.shift_factor or 0.0)

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """What the adapter's projection reads, one an image: (X, D) or (X, S, D) by variant."""
        pixels_X3HW = image_pixels(images, size=self._image_size)
        return self.variant.features(self.image_encoder, pixels_X3HW.to(self.device, self.image_encoder.dtype)).cpu()

    @torch.no_grad()
    def absent_features(self) -> Tensor:
        """What stands for "no image", without the leading axis."""
        size = self._image_size
        blank_X3HW = torch.zeros(1, 3, size, size, device=self.device, dtype=self.image_encoder.dtype)
        return self.variant.absent_features(self.image_encoder, blank_X3HW)[0].cpu()

    @torch.no_grad()
    def text(self, text: str) -> Text:
        """Prompt embedding, pooled embedding and, where the text can be a name, its tokens."""
        embedding_XTE = encode_texts([text], tokenizers=self.tokenizers, text_encoders=self.text_encoders)
        tokenizer, encoder = self.tokenizers[-1], self.text_encoders[-1]
        ids_XT = tokenizer(
            [text], padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        pooled_XD = encoder(ids_XT.to(self.device)).text_embeds
        return Text(embedding_XTE[0].cpu(), pooled_XD[0].cpu(), self.words(text))

    def words(self, text: str) -> Tensor:
        """The last part of `text`, without a network."""
        try:
            return name_tokens([text], self.tokenizers)[0]
        except ReferencesError:
            return torch.zeros(self.tokenizers[0].model_max_length, dtype=torch.bool)
