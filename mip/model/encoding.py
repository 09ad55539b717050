"""Entity names and reference images to what the adapter reads; shared by the pipeline and by training.

X items   T text tokens   E context width (both text encoders side by side)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase

from mip.errors import ReferencesError

Framing = Literal["pad", "centre_crop"]
"""How an image that is not square becomes square: padded with white, or cut as by the public inference code."""


def encode_texts(
    texts: Sequence[str], *, tokenizers: Sequence[PreTrainedTokenizerBase], text_encoders: Sequence[nn.Module]
) -> Tensor:
    """Encode texts alone, as SDXL does: penultimate hidden states of all encoders, side by side.

    Args:
        texts: X texts; "" is allowed and longer ones are cut.
        tokenizers: SDXL's two.
        text_encoders: SDXL's two, in the same order.

    Returns:
        phrase_XTE, in the encoders' dtype and on the device of the last of them.
    """
    states = []
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        ids_XT = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        output = encoder(ids_XT.to(get_module_execution_device(encoder)), output_hidden_states=True)
        states.append(output.hidden_states[-2])
    return torch.cat([state.to(states[-1].device) for state in states], dim=-1)


def name_tokens(names: Sequence[str], tokenizers: Sequence[PreTrainedTokenizerBase]) -> Tensor:
    """Where the tokens of each name lie when it is encoded alone: positions 1 to its number of tokens.

    Returns:
        words_XT, bool, on the CPU.

    Raises:
        ReferencesError: a name without tokens or too long, or tokenizers that count it differently.
    """
    length = tokenizers[0].model_max_length
    words_XT = torch.zeros(len(names), length, dtype=torch.bool)
    for words_T, name in zip(words_XT, names, strict=True):
        counts = {len(tokenizer(name, add_special_tokens=False).input_ids) for tokenizer in tokenizers}
        if len(counts) != 1:
            raise ReferencesError(
                f"got {name!r}, which the tokenizers cut into {sorted(counts)} tokens; they must agree"
            )
        (count,) = counts
        # BOS and EOS take two of the positions.
        if not 1 <= count <= length - 2:
            raise ReferencesError(f"got the name {name!r} of {count} tokens; give one of 1 to {length - 2} tokens")
        words_T[1 : count + 1] = True
    return words_XT


def encode_names(
    names: Sequence[str], *, tokenizers: Sequence[PreTrainedTokenizerBase], text_encoders: Sequence[nn.Module]
) -> tuple[Tensor, Tensor]:
    """Encode entity names, each alone.

    Returns:
        phrase_XTE and words_XT (bool), on one device.

    Raises:
        ReferencesError: as `name_tokens`.
    """
    words_XT = name_tokens(names, tokenizers)
    phrase_XTE = encode_texts(names, tokenizers=tokenizers, text_encoders=text_encoders)
    return phrase_XTE, words_XT.to(phrase_XTE.device)


def image_pixels(images: Sequence[Image.Image], *, size: int, framing: Framing = "pad") -> Tensor:
    """Prepare reference images for a CLIP image encoder.

    Args:
        images: any mode and size; turned as their EXIF says, transparency shown on white.
        size: side the encoder expects, pixels.
        framing: what happens to images that are not square.

    Returns:
        pixels_X3HW, float32, normalised as CLIP expects (0 is its mean colour), on the CPU.

    Raises:
        ReferencesError: unknown framing or an image without pixels.
    """
    if framing not in ("pad", "centre_crop"):
        raise ReferencesError(f"got framing={framing!r}; give 'pad' or 'centre_crop'")
    opaque = [_on_white(image) for image in images]
    if framing == "pad":
        opaque = [ImageOps.pad(image, (max(image.size), max(image.size)), color="white") for image in opaque]
    # Backed by PIL on purpose: the torchvision-backed default differs from published features by one gray level.
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return processor(opaque, return_tensors="pt").pixel_values


def _on_white(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ReferencesError(f"got an image of {image.size[0]} x {image.size[1]} pixels; give one with pixels")
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
