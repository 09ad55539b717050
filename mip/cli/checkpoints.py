"""`mip inspect` and `mip convert`: what an adapter file holds, and the other layout."""

from collections import Counter
from dataclasses import replace
from enum import StrEnum
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mip.errors import CheckpointError

if TYPE_CHECKING:  # torch takes seconds to import, which --help need not wait for
    from torch import Tensor

    from mip.model.checkpoint import AdapterCheckpoint


class Layout(StrEnum):
    """What `convert` writes."""

    SAFETENSORS = "safetensors"
    OFFICIAL = "official"


File = Annotated[Path, typer.Argument(help="Adapter file: official or IP-Adapter .bin, or .safetensors.")]
Variant = Annotated[str | None, typer.Option(help="Refuse the file unless it is of this variant: sdxl or sdxl_plus.")]
Base = Annotated[
    str | None,
    typer.Option(help="Base model (folder or hub id) whose UNet it must fit; only its configuration is read."),
]


def inspect(file: File, variant: Variant = None, base: Base = None) -> None:
    """Say what an adapter file is; nothing in it is run."""
    from mip.model.checkpoint import read_adapter

    checkpoint = read_adapter(file, variant=variant)
    if base is not None:
        _check_fit(checkpoint, file, base)
    indices = sorted({int(key.split(".")[0]) for key in checkpoint.layers})
    keys = [tensor for key, tensor in checkpoint.layers.items() if key.endswith("to_k_ip.weight")]
    widths = Counter(tensor.shape[0] for tensor in keys)
    tensors = _tensors(checkpoint)
    facts = {
        "variant": checkpoint.variant.name,
        "kind": "MIP-Adapter" if checkpoint.has_gate else "plain IP-Adapter (no text_to_weight)",
        "layers": f"{len(indices)}, positions {indices[0]} to {indices[-1]}",
        "channels": ", ".join(f"{count} x {width}" for width, count in sorted(widths.items())),
        "context width": ", ".join(map(str, sorted({tensor.shape[1] for tensor in keys}))),
        "dtypes": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
        "parameters": f"{sum(t.numel() for t in tensors):,}",
        **({"fits": base} if base is not None else {}),
    }
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a hash that is cut is none
    for name, value in facts.items():
        table.add_row(name, value)
    table.add_section()
    for name, value in sorted(checkpoint.metadata.items()):
        table.add_row(f"metadata: {name}", value)
    Console().print(table)


def convert(
    file: File,
    target: Annotated[Path, typer.Argument(help="File to write.")],
    to: Annotated[
        Layout, typer.Option(help="Ours with metadata, or the .bin of the public code.")
    ] = Layout.SAFETENSORS,
    variant: Variant = None,
    base: Base = None,
    encoder: Annotated[str | None, typer.Option(help="Image encoder, for the metadata.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, for the metadata.", min=0)] = None,
    manifest: Annotated[str | None, typer.Option(help="Hash of the training manifest, for the metadata.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target.")] = False,
) -> None:
    """Write an adapter in another layout; every tensor keeps its values (the official layout is in half precision)."""
    import torch

    from mip.model.checkpoint import export_official_bin, read_adapter, save_adapter

    if target.exists() and not overwrite:
        raise CheckpointError(f"got target {target}, which exists; give another name, or --overwrite")
    wanted = ".safetensors" if to is Layout.SAFETENSORS else ".bin"
    if target.suffix != wanted:
        raise CheckpointError(f"got target {target} for the layout {to}; expected a name that ends in {wanted}")
    if not target.parent.is_dir():
        raise CheckpointError(f"got target {target} in a folder that does not exist; make it first")
    checkpoint = read_adapter(file, variant=variant)
    if base is not None:
        _check_fit(checkpoint, file, base)
    told = {"base_model": base, "image_encoder": encoder, "steps": steps, "manifest": manifest}
    known = {name: str(value) for name, value in told.items() if value is not None}
    checkpoint = replace(checkpoint, metadata={**checkpoint.metadata, **known})
    if to is Layout.SAFETENSORS:
        # The file's own precision, or the smallest that holds all of a file of several: nothing is lost.
        save_adapter(target, checkpoint, dtype=reduce(torch.promote_types, {t.dtype for t in _tensors(checkpoint)}))
    else:
        export_official_bin(target, checkpoint)
    print(f"wrote {target}: {checkpoint.variant.name}, {len(checkpoint.layers)} layer tensors")


def _tensors(checkpoint: "AdapterCheckpoint") -> "list[Tensor]":
    return [*checkpoint.image_proj.values(), *checkpoint.layers.values()]


def _check_fit(checkpoint: "AdapterCheckpoint", file: Path, base: str) -> None:
    """Every missing or unexpected key is named. Raises CheckpointError."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from mip.model.adapter import MIPAdapter

    try:
        config = UNet2DConditionModel.load_config(base, subfolder="unet")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"got base {base!r}, whose UNet configuration cannot be read: {reason}") from None
    with torch.device("meta"):  # shapes without weights: the full SDXL in a second
        unet = UNet2DConditionModel.from_config(config)  # pyright: ignore[reportArgumentType]
    assert isinstance(unet, UNet2DConditionModel)
    try:
        MIPAdapter.from_checkpoint(checkpoint, unet)
    except CheckpointError as error:
        raise CheckpointError(f"{file} does not fit {base}: {error}") from None
