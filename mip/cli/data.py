"""`mip data validate` and `mip data export`: own data in, a selection out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check data before it is used; publish a selection.")

Captions = Annotated[Path | None, typer.Option(help="COCO: the JSON of captions.")]
Images = Annotated[Path | None, typer.Option(help="COCO: the folder of images; else images/ beside the JSON.")]
Names = Annotated[
    Path | None, typer.Option(help="Subject dataset: the pickled list of names, where it lies elsewhere.")
]


@app.command()
def validate(
    path: Annotated[Path, typer.Argument(help="Own folder, COCO .json, subject dataset, SA-1B .tar or folder.")],
    images: Images = None,
    captions: Captions = None,
    names: Names = None,
) -> None:
    """List everything that could not be used, one line a problem; exit code 1 if there is any."""
    from mip.data.validate import validate as look

    found = look(path, images=images, captions=captions, names=names)
    for line in found.lines():
        print(line)
    counts = ", ".join(f"{number} {reason}" for reason, number in sorted(found.reasons.items()))
    print(
        f"{path} ({found.kind}): {found.images} images and {found.objects} objects can be used; "
        f"{found.reasons.total()} problems{f': {counts}' if counts else ''}"
    )
    if found.reasons:
        raise typer.Exit(1)


@app.command()
def export(
    manifest: Annotated[Path, typer.Argument(help="train.parquet or val.parquet of a manifest.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Write a manifest as a subject dataset: images, jsons, masks and the list of names, for the public code."""
    from mip.data.export import export as write

    done = write(manifest, out)
    print(f"wrote {out}: {done.samples} samples, {done.objects} objects, {done.overlapping} partly under another one")
