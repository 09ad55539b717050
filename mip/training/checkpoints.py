"""Training states on disk: written whole, checked when read, the last few kept."""

import hashlib
import io
import logging
import re
from pathlib import Path
from typing import Any

import torch

from mip.tables import atomic

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})-([0-9a-f]{16})\.pt")


def save_state(folder: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
    """Write the state after `step` optimizer steps, then remove all but the last `keep`.

    The name holds the hash of the contents, so that a damaged file is never taken for a state.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    path = folder / f"step-{step:08d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
    with atomic(path) as temporary:
        temporary.write_bytes(data)
    for old in _states(folder)[:-keep]:
        old.unlink()
    return path


def load_state(folder: Path, *, device: torch.device) -> dict[str, Any] | None:
    """The newest state that is whole, or None. Damaged ones are removed."""
    for path in reversed(_states(folder)):
        data = path.read_bytes()
        match = _NAME.fullmatch(path.name)
        assert match is not None
        if hashlib.sha256(data).hexdigest()[:16] == match[2]:
            return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        log.warning("%s is damaged; removing it and going back to the state before it", path)
        path.unlink()
    return None


def _states(folder: Path) -> list[Path]:
    """By step, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
