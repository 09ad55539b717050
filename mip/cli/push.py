"""`mip push`: trained weights as a folder for the Hugging Face Hub; uploaded only when asked."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from mip.errors import ConfigError, DataError

FILES = ("adapter.safetensors", "README.md", "training.json", "curve.png")


def push(
    folder: Annotated[Path, typer.Argument(help="Results of a training: adapter.safetensors and what lies beside it.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    upload: Annotated[
        str | None,
        typer.Option(help="OWNER/NAME on the hub: also upload the folder there. A repository it makes is private."),
    ] = None,
) -> None:
    """Prepare a folder for the hub; without --upload nothing leaves this machine."""
    prepare(folder, target)
    print(f"wrote {target}: read README.md, above all its licence section, before you share it")
    if upload is not None:
        _upload(target, upload)
        print(f"uploaded it to {upload}")


def prepare(folder: Path, target: Path) -> Path:
    """Copy the weights, their page with the hub's front matter, their totals, curve and samples to `target`.

    Raises:
        DataError: a file that training writes is not there.
        CheckpointError: an adapter that cannot be read.
        ConfigError: `target` exists.
    """
    from mip.model.checkpoint import read_adapter

    if target.exists():
        raise ConfigError(f"got target {target}, which exists; give another name, or remove it")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise DataError(f"got {folder}, which lacks {', '.join(missing)}; give the folder that training wrote")
    adapter = read_adapter(folder / "adapter.safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written whole: beside the target, then renamed.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
        prepared = Path(place) / target.name
        prepared.mkdir()
        for name in FILES:
            shutil.copyfile(folder / name, prepared / name)
        if (folder / "samples").is_dir():  # the page shows the last of them
            shutil.copytree(folder / "samples", prepared / "samples")
        page = (folder / "README.md").read_text(encoding="utf-8")
        (prepared / "README.md").write_text(front_matter(adapter.metadata) + page, encoding="utf-8")
        prepared.rename(target)
    return target


def front_matter(metadata: Mapping[str, str]) -> str:
    """The hub's YAML block. The base is named where it is a hub id; a folder of this machine says nothing there."""
    base = metadata.get("base_model", "")
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()
    return "\n".join(
        [
            "---",
            *([f"base_model: {base}", "base_model_relation: adapter"] if is_hub_id else []),
            "license: other",
            "license_name: see-licence-section",
            "library_name: diffusers",
            "pipeline_tag: text-to-image",
            "tags: [mip-adapter, ip-adapter, stable-diffusion-xl]",
            "---",
            "",
            "",
        ]
    )


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload MIP-Adapter weights")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"got --upload {repository}, which failed: {reason}; the folder {folder} is complete: check the name and "
            "`hf auth login`, then upload it with `hf upload`"
        ) from None
