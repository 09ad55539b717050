"""`mip doctor`: what is installed, which weights are found where, what is missing and how to get it."""

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from mip.cli.generate import trained_adapter
from mip.config import Models, load_profile

_PACKAGES = ("mip-adapter", "torch", "diffusers", "transformers", "accelerate", "open-clip-torch", "prefect", "dvc")


def doctor(
    profile: Annotated[str | None, typer.Option(help="Profile of the parameter file; else the active one.")] = None,
    params: Annotated[Path, typer.Option(help="Parameter file.")] = Path("params.yaml"),
) -> None:
    """Look around; exit code 1 if something that `mip generate` needs is missing."""
    import torch

    name, settings = load_profile(params, profile)
    console = Console()
    console.print(f"Python {platform.python_version()}, {sys.executable}", soft_wrap=True)
    installed = Table("package", "version")
    for package in _PACKAGES:
        installed.add_row(package, _version(package))
    console.print(installed)
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    console.print(f"GPU: {', '.join(gpus) or 'none, drawing runs on the CPU'}")

    console.print(f"Weights of profile {name}:")
    weights = Table("network", Column("where", overflow="fold"), "found")
    missing = []
    for part, place, file in _wanted(settings.models):
        found, how = _find(place, file)
        weights.add_row(part, place, found or "[red]missing[/red]")
        if not found:
            missing.append(f"{part}: {how}")
    console.print(weights)
    trained = trained_adapter(name)
    console.print(
        f"adapter trained here: {trained if trained.is_file() else f'none yet; dvc repro makes {trained}'}",
        soft_wrap=True,
    )
    for line in missing:
        console.print(f"missing {line}", soft_wrap=True)
    if missing:
        raise typer.Exit(1)


def _wanted(models: Models) -> list[tuple[str, str, str]]:
    """Network, folder or hub id, and a file that must be in it."""
    encoder = str(Path(models.image_encoder_subfolder) / "config.json")
    return [
        ("base", models.base, "model_index.json"),
        ("image encoder", models.image_encoder, encoder),
        ("IP-Adapter", models.ip_adapter, models.ip_adapter_weight or ""),
    ]


def _find(place: str, file: str) -> tuple[str, str]:
    """In which way it is there ("" if it is not), and what to do if it is missing. The network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(place) / file if file else Path(place)
    if path.is_file():
        return "here", ""
    if Path(place).exists():
        return "", f"there is no {path}; put the network's files there"
    if place.count("/") != 1 or place.startswith((".", "/")):
        return "", f"there is no {place}; correct `models` in the parameter file, or put the file there"
    cached = try_to_load_from_cache(place, file)
    if isinstance(cached, str):
        return "in the hub's cache", ""
    return "", f"not in the hub's cache; fetch it with `hf download {place}`, or it is fetched at the first use"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
