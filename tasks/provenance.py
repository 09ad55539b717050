"""Where numbers come from: commit, parameters, inputs, packages, device."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mip.config import Profile, Section
from mip.tables import file_hash, fingerprint

_PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "pillow")


def provenance(profile: Profile, *, inputs: Sequence[Path], beside: Section | None = None) -> dict[str, Any]:
    """The `provenance` of metrics.json (DESIGN.md); parameters that cannot change a number are not hashed.

    `beside` are parameters that decided the numbers together with the profile's.
    """
    return {
        "benchmark": profile.ingest.benchmark_name,
        "variant": profile.ingest.variant,
        "seed": profile.ingest.seed,
        "git": _commit(),
        "params": fingerprint(
            params=profile.model_dump(mode="json", exclude={"engine", "report"}),
            **({} if beside is None else {"beside": beside.model_dump(mode="json")}),
        ),
        "inputs": {path.as_posix(): file_hash(path) for path in inputs},
        "packages": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "device": _device(profile.evaluate.device),
    }


def _commit() -> str:
    """The commit, with "+" where code or parameters differ from it; "" outside a repository."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return ""
    own = ["mip", "flows", "tasks", "params.yaml", "dvc.yaml", "experiment"]
    status = subprocess.run(["git", "status", "--porcelain", "--", *own], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if status.stdout else "")


def _device(device: str) -> str:
    if device == "cpu" or not torch.cuda.is_available():
        return f"cpu ({platform.machine()})"
    return torch.cuda.get_device_name()
