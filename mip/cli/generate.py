"""`mip generate`: pictures from a prompt and named references."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mip.config import Paths, load_profile
from mip.errors import ConfigError, DataError, ReferencesError

if TYPE_CHECKING:
    from PIL import Image

    from mip.model.maps import RelevanceMaps

_MAP_SIDE = 512  # pixels


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; it uses the references' names.")],
    ref: Annotated[
        list[str] | None,
        typer.Option(help="NAME=IMAGE[,IMAGE...]: an object and one or more photos of it. Repeat for each object."),
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Profile whose networks draw; else the active one.")] = None,
    params: Annotated[Path, typer.Option(help="Parameter file.")] = Path("params.yaml"),
    adapter: Annotated[
        Path | None,
        typer.Option(help="Adapter file; else the one trained here, or else the plain IP-Adapter without training."),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Strength of the references; else the first of the profile's.", min=0.0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; the next ones count up.", min=0)] = 420,
    num_images: Annotated[int, typer.Option(help="Number of images.", min=1)] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; else the profile's.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; else the profile's.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw; else the profile's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; else the base's own size.", min=8)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; else the base's own size.", min=8)] = None,
    training_free: Annotated[bool, typer.Option(help="The plain IP-Adapter's weights, merged by position.")] = False,
    centre_crop: Annotated[bool, typer.Option(help="Crop photos to a square instead of padding them.")] = False,
    start: Annotated[float, typer.Option(help="Share of the steps from which on references act.")] = 0.0,
    end: Annotated[float, typer.Option(help="Share of the steps before which they act.")] = 1.0,
    maps: Annotated[bool, typer.Option("--maps", help="Also draw where each reference acted: SEED-maps.png.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the images.")] = Path("out"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images of the same seed.")] = False,
) -> None:
    """Draw; beside each SEED.png lies SEED.json with everything needed to make it again."""
    named = _parsed(ref or [])
    if maps and not named:
        raise ConfigError("got --maps and no --ref; give the objects whose places are to be drawn")
    name, settings = load_profile(params, profile)
    targets = {seed + n: out / f"{seed + n:06d}.png" for n in range(num_images)}
    if (taken := [path for path in targets.values() if path.exists()]) and not overwrite:
        raise ConfigError(f"got {taken[0]}, which exists; give another --seed or --out, or --overwrite")
    for option, pixels in (("--width", width), ("--height", height)):
        if pixels is not None and pixels % 8:
            raise ConfigError(f"got {option} {pixels}; give a multiple of 8")
    weights = _weights(adapter, training_free=training_free, trained=trained_adapter(name))

    import diffusers
    import torch
    import transformers

    from mip.evaluation.benchmarks import load_reference
    from mip.evaluation.painting import save_png
    from mip.loading import load_pipeline
    from mip.model.checkpoint import find_adapter
    from mip.model.pipeline import Reference
    from mip.tables import file_hash, write_json

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # of loading: two seconds
    references = [Reference(noun, [load_reference(path, None) for path in paths]) for noun, paths in named]
    file = weights
    if references and weights is None:
        file = find_adapter(settings.models.ip_adapter, settings.models.ip_adapter_weight)
    if references:
        kind = "the plain IP-Adapter, not trained" if weights is None else "MIP-Adapter"
        print(f"adapter: {file} ({kind})", file=sys.stderr)
    pipe = load_pipeline(settings.models, adapter=weights, has_references=bool(references))
    config = settings.generate
    drawn: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": config.negative_prompt if negative_prompt is None else negative_prompt,
        "num_inference_steps": steps or config.steps,
        "guidance_scale": config.guidance if guidance is None else guidance,
        "width": width,
        "height": height,
    }
    if scale is None:
        scale = config.scales[0] if config.scales else 1.0
    merged = {
        "scale": scale,
        "gated": False if training_free else None,
        "framing": "centre_crop" if centre_crop else "pad",
        "reference_start": start,
        "reference_end": end,
    }
    own: dict[str, Any] = {**merged, "references": references, "return_maps": maps} if references else {}
    made_from = {
        "profile": name,
        "models": settings.models.model_dump(mode="json"),
        "adapter": None if file is None else {"path": str(file), "sha256": file_hash(file)},
        "versions": {library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
        "references": [
            {"name": noun, "images": [{"path": str(path), "sha256": file_hash(path)} for path in paths]}
            for noun, paths in named
        ],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    out.mkdir(parents=True, exist_ok=True)
    with Progress(*columns, console=Console(stderr=True)) as bars:
        for own_seed, target in targets.items():
            bar = bars.add_task(target.name, total=drawn["num_inference_steps"])
            result = pipe(
                **drawn,
                **own,
                generator=torch.Generator().manual_seed(own_seed),
                callback_on_step_end=partial(_advance, bars, bar),
            )
            image = result.images[0]
            said = {**drawn, **merged, "seed": own_seed, "width": image.width, "height": image.height, **made_from}
            save_png(target, image, said)
            write_json(target.with_suffix(".json"), said)
            if maps:
                _save_maps(target.with_name(f"{target.stem}-maps.png"), image, result.maps[0], prompt)
    for target in targets.values():
        print(target)


def trained_adapter(profile: str) -> Path:
    """Where the profile's training leaves its weights."""
    return Paths(profile).adapter / "adapter.safetensors"


def _advance(bars: Progress, bar: TaskID, _pipe: object, _step: int, _time: object, tensors: dict[str, Any]) -> Any:
    bars.advance(bar)
    return tensors


def _save_maps(path: Path, image: "Image.Image", maps: "RelevanceMaps", prompt: str) -> None:
    """The image, and beside it where each reference acted."""
    from mip.evaluation.report import pictures
    from mip.visualize import overlay

    shown = pictures.fit(image, _MAP_SIDE)
    overlaid = [overlay(shown, map_HW) for map_HW in maps.mean_NHW]
    row = pictures.Row(prompt, (), (shown, *overlaid), ("", *maps.names))
    headers = ["Image", *(f"Reference {n + 1}" for n in range(len(overlaid)))]
    pictures.save(pictures.grid([row], headers=headers, cell=_MAP_SIDE), path)


def _parsed(given: list[str]) -> list[tuple[str, list[Path]]]:
    """Name and photos of each --ref. Raises ReferencesError, DataError."""
    named = []
    for one in given:
        name, mark, paths = one.partition("=")
        files = [Path(path.strip()) for path in paths.split(",") if path.strip()]
        if not mark or not name.strip() or not files:
            raise ReferencesError(f"got --ref {one!r}; expected NAME=IMAGE or NAME=IMAGE,IMAGE")
        if absent := [path for path in files if not path.is_file()]:
            raise DataError(f"got --ref {one!r}, and there is no file {absent[0]}; give the path of a photo")
        named.append((name.strip(), files))
    return named


def _weights(adapter: Path | None, *, training_free: bool, trained: Path) -> Path | None:
    """Our weights; None for the plain IP-Adapter. Raises ConfigError."""
    if training_free:
        if adapter is not None:
            raise ConfigError("got --adapter and --training-free, which takes the profile's IP-Adapter; give one")
        return None
    if adapter is not None and not adapter.is_file():
        raise ConfigError(f"got --adapter {adapter}, which is no file; give an adapter's .safetensors or .bin")
    return adapter if adapter is not None else trained if trained.is_file() else None
