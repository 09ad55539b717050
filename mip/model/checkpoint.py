"""Adapter files: official `.bin`, IP-Adapter `.bin` and `.safetensors`, and our `.safetensors`. Nothing in them is run.

A layer key is "<i>.to_k_ip.weight", "<i>.to_v_ip.weight" or "<i>.text_to_weight.weight", where <i> is the position of
the layer in `unet.attn_processors` (self- and cross-attention both counted; the mid block comes last).
"""

import json
import os
import pickle
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mip.errors import CheckpointError
from mip.model.projection import Variant, detect_variant

FORMAT = "mip-adapter-1"
_SECTIONS = ("image_proj", "ip_adapter")
_LAYER_KEY = re.compile(r"\d+\.(to_k_ip|to_v_ip|text_to_weight)\.weight")
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True, eq=False)
class AdapterCheckpoint:
    """The contents of an adapter file.

    Raises:
        CheckpointError: entries that are not finite floating-point tensors, unknown layer keys, unknown projection.
    """

    image_proj: Mapping[str, Tensor]
    """State of the image projection."""
    layers: Mapping[str, Tensor]
    """State of the attention layers, by layer key."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Header of a safetensors file (variant, base model, encoder, steps, hashes); empty for `.bin`."""

    def __post_init__(self) -> None:
        unknown = [key for key in self.layers if not _LAYER_KEY.fullmatch(key)]
        if unknown or not self.layers:
            raise CheckpointError(
                f"got layer keys {', '.join(unknown[:4]) or '(none)'}; expected <number>.to_k_ip.weight, "
                "<number>.to_v_ip.weight and possibly <number>.text_to_weight.weight"
            )
        for key, tensor in (*self.image_proj.items(), *self.layers.items()):
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise CheckpointError(f"got {key} with values that are not finite floats; the file is damaged")
        detect_variant(self.image_proj)

    @property
    def variant(self) -> Variant:
        """Recognised by the projection's keys."""
        return detect_variant(self.image_proj)

    @property
    def has_gate(self) -> bool:
        """False for a plain IP-Adapter."""
        return any(".text_to_weight." in key for key in self.layers)


def find_adapter(source: str | Path, weight_name: str | None) -> Path:
    """An adapter's file: `source` itself, or `weight_name` in that folder or repository of the Hugging Face hub.

    Raises:
        CheckpointError: it cannot be had.
    """
    path = Path(source)
    if path.is_file():
        return path
    if weight_name is None:
        raise CheckpointError(f"got {source}, which is no file, and no weight_name; give the name of the file in it")
    if path.is_dir():
        return path / weight_name
    try:
        return Path(hf_hub_download(str(source), weight_name))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"got {source} with {weight_name}, neither here nor on the hub: {reason}") from error


def read_adapter(path: Path, *, variant: str | None = None) -> AdapterCheckpoint:
    """Read an adapter file of any of the known layouts.

    Args:
        path: `.safetensors`, or else a file written by torch.save.
        variant: raise unless the file is of this variant; None takes any.

    Raises:
        CheckpointError: unreadable, truncated, malicious or of another variant; one line.
    """
    path = Path(path)
    try:
        tensors, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})
        checkpoint = AdapterCheckpoint(**_sections(tensors), metadata=metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if variant is not None and checkpoint.variant.name != variant:
        raise CheckpointError(
            f"{path}: got a {checkpoint.variant.name} adapter, expected {variant}; give the other file"
        )
    return checkpoint


def save_adapter(path: Path, checkpoint: AdapterCheckpoint, *, dtype: torch.dtype = torch.float32) -> None:
    """Write our `.safetensors`, whole or not at all; the same contents give the same bytes.

    The header holds the checkpoint's metadata, plus `format` and `variant`.
    """
    tensors = {f"image_proj.{key}": t for key, t in checkpoint.image_proj.items()}
    tensors |= {f"ip_adapter.{key}": t for key, t in checkpoint.layers.items()}
    metadata = {**checkpoint.metadata, "format": FORMAT, "variant": checkpoint.variant.name}
    with _written_whole(path) as file:
        _write_safetensors(file, {key: t.detach().to("cpu", dtype) for key, t in tensors.items()}, metadata)


def export_official_bin(path: Path, checkpoint: AdapterCheckpoint) -> None:
    """Write the layout of the official code, in half precision, for use there; metadata has no place in it."""
    sections = {"image_proj": checkpoint.image_proj, "ip_adapter": checkpoint.layers}
    halved = {
        section: {key: t.detach().to("cpu", torch.float16).clone() for key, t in tensors.items()}
        for section, tensors in sections.items()
    }
    with _written_whole(path) as file:
        torch.save(halved, file)


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError("no such file; give the path of an adapter") from None
    except pickle.UnpicklingError:
        # torch's own message is a page that advises to switch the protection off.
        raise CheckpointError("not a plain file of tensors (refused to unpickle); do not trust it") from None
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:
        raise CheckpointError(f"cannot be read ({_first_line(error)}); is it whole?") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"got a {type(loaded).__name__}; expected dictionaries image_proj and ip_adapter")
    return loaded


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except FileNotFoundError:
        raise CheckpointError("no such file; give the path of an adapter") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({_first_line(error)}); is it whole?") from None


def _sections(loaded: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Split flat "section.key" names, or take two nested dictionaries."""
    if set(loaded) == set(_SECTIONS):
        found = {section: loaded[section] for section in _SECTIONS}
    else:
        found = {section: {} for section in _SECTIONS}
        for name, value in loaded.items():
            section, _, key = str(name).partition(".")
            if section not in _SECTIONS:
                raise CheckpointError(f"got entry {name!r}; expected only image_proj and ip_adapter")
            found[section][key] = value
    for section, tensors in found.items():
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise CheckpointError(f"got something else than tensors in {section}; expected a dictionary of tensors")
    return {"image_proj": found["image_proj"], "layers": found["ip_adapter"]}


def _write_safetensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    # The library writes the metadata in random order; two equal adapters must have equal hashes.
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name, tensor in sorted(tensors.items()):
        end = start + tensor.nbytes
        dtype = _SAFETENSORS_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for _, tensor in sorted(tensors.items()):
        file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


@contextmanager
def _written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when complete, with the mode that the umask allows."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        # `open`, unlike mkstemp, honours the umask.
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
