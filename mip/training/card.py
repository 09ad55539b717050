"""The page that lies beside trained weights: README.md and curve.png, the same bytes for the same run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from mip.config import Models, Train
from mip.tables import Row, atomic, write_text
from mip.training.progress import Progress
from mip.training.samples import last_grid

_PAGE = """\
# MIP-Adapter weights

`adapter.safetensors` lets an SDXL pipeline draw several subjects, each from reference images of its own, without mixing
them up (arXiv 2409.17920). It needs the base model and the image encoder named below.{average}

{facts}

![loss over optimizer steps](curve.png)
{samples}
## Made from

{made_from}

## Parameters

```yaml
{parameters}
```

## Licence

The code that made these weights is under the Apache License 2.0. The weights are not: they were trained from an
IP-Adapter, through the base model and on the samples named above, and inherit the terms of all of them. Before you
share or sell them, check:

- the base model's licence and its use restrictions;
- the licence of the IP-Adapter they start from, and of the image encoder;
- the terms of the images and captions that they were trained on: some data sets allow research only;
- whether people, brands or works that can be recognised are among these images.
"""
_AVERAGE = (
    " The weights are an\nexponential average over the steps, decay {decay}; those of the last step are kept apart."
)

_SAMPLES = """
Held-out samples after step {step}: their objects, the picture they come from, what the adapter draws of them at scale
{scale} (guidance {guidance}, {steps} steps).

![held-out samples, as they are and as they are drawn](samples/{file})
"""


def write_card(
    out: Path,
    *,
    config: Train,
    models: Models,
    progress: Progress,
    trained: int,
    hashes: Mapping[str, str],
) -> None:
    """Write out/README.md and out/curve.png; the page shows the last of out/samples, where there is one.

    Args:
        out: folder of adapter.safetensors.
        config: what was trained, as it was asked for.
        models: the frozen networks.
        progress: the complete run; the clock's share of it is left out.
        trained: number of trained parameters.
        hashes: of manifest, features, start, base and image_encoder: SHA-256 of files, or repository and commit.
    """
    draw_curve(out / "curve.png", progress.curve)
    encoder = "/".join(filter(None, (models.image_encoder, models.image_encoder_subfolder)))
    start = "/".join(filter(None, (models.ip_adapter, models.ip_adapter_weight)))
    made_from = [
        ("base model (its UNet)", models.base, hashes["base"]),
        ("image encoder", encoder, hashes["image_encoder"]),
        (f"starts from ({config.start})", start, hashes["start"]),
        ("training manifest", "", hashes["manifest"]),
        ("cached features", "", hashes["features"]),
    ]
    recent = _recent(progress.curve)
    facts = [
        ("variant", models.variant),
        ("resolution", f"{models.resolution} px"),
        ("trained parameters", f"{trained:,}"),
        ("optimizer steps", f"{progress.step:,}"),
        ("samples", f"{progress.step * config.batch:,} in batches of {config.batch}"),
        ("training loss", f"{_number(_mean(recent))}, mean from step {progress.step - len(recent) + 1} on"),
        ("validation loss before", _number(progress.validation_before)),
        ("validation loss", _number(progress.curve[-1]["validation_loss"])),
        ("skipped steps", _skipped(progress.skipped)),
    ]
    parameters = [f"{name}: {json.dumps(value)}" for name, value in config.model_dump(mode="json").items()]
    page = _PAGE.format(
        average="" if config.ema is None else _AVERAGE.format(decay=config.ema),
        facts=_table(("run", ""), facts),
        samples=_samples(out / "samples", config=config),
        made_from=_table(("", "name", "hash"), [(what, _code(name), _code(value)) for what, name, value in made_from]),
        parameters="\n".join(parameters),
    )
    write_text(out / "README.md", page)


def draw_curve(path: Path, curve: Sequence[Row]) -> Path:
    """Training and validation loss over optimizer steps: a PNG of 640 x 360 pixels. Steps without a loss are gaps."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    losses = [row["loss"] if math.isfinite(row["loss"]) else math.nan for row in curve]
    # Points where there is no room for a line.
    alone = "." if len(curve) < 30 else ""
    axes.plot([row["step"] for row in curve], losses, marker=alone, linewidth=0.8, color="#0072b2", label="training")
    validated = [(row["step"], row["validation_loss"]) for row in curve if row["validation_loss"] is not None]
    if validated:
        axes.plot(*zip(*validated, strict=True), marker="o", markersize=4, color="#d55e00", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}), atomic(path) as temporary:
        # No "Software" entry: the bytes should change with the picture only.
        figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
    return path


def _recent(curve: Sequence[Row]) -> list[float]:
    """Losses of the last twentieth of the run, at least one."""
    return [row["loss"] for row in curve[-max(1, len(curve) // 20) :]]


def _mean(losses: Sequence[float]) -> float | None:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else None


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.5f}"


def _skipped(steps: Sequence[str]) -> str:
    named = ", ".join(step.partition(":")[0] for step in steps[:10])
    return f"{len(steps)} without a finite loss: {named}{', ...' if len(steps) > 10 else ''}" if steps else "0"


def _samples(folder: Path, *, config: Train) -> str:
    grid = last_grid(folder)
    if grid is None or config.samples is None:
        return ""
    step = int(grid.stem.removeprefix("step-"))
    return _SAMPLES.format(**config.samples.model_dump(), step=step, file=grid.name)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
