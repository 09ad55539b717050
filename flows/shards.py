"""Stages that work shard by shard: what a killed run had finished is found again.

Shards are written to .work/<profile>/<stage>/<fingerprint>/ and the folder becomes the stage's output in one step at
the end. DVC deletes outputs before a stage runs, so they cannot be what a stage resumes from.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mip.config import Section
from mip.tables import file_hash, fingerprint

FINISHED = "rejected.parquet"  # a stage writes it last


def work_folder(parent: Path, *, config: Section, inputs: Sequence[Path]) -> Path:
    """The folder of an unfinished run of the same code, parameters and inputs, or a new one; others are deleted."""
    made_from = fingerprint(config=config, code=_code(), inputs=[file_hash(path) for path in inputs])
    folder = parent / made_from
    if parent.exists():
        for other in parent.iterdir():
            if other != folder:
                shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def missing_from(work: Path, parts: Sequence[Path]) -> list[Path]:
    """The input parts whose output does not stand in the work folder yet."""
    return [part for part in parts if not (work / part.name).exists()]


def is_finished(work: Path) -> bool:
    """Whether only the move to the output is left to do."""
    return (work / FINISHED).exists()


def publish(work: Path, *, out: Path) -> Path:
    """Make the work folder the stage's output."""
    if out.exists():
        shutil.rmtree(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(work, out)  # a rename where both are on one file system
    return out


def _code() -> list[str]:
    """Hashes of the modules of mip that this process has loaded."""
    modules = (module for name, module in sorted(sys.modules.items()) if name.partition(".")[0] == "mip")
    return [file_hash(Path(file)) for module in modules if (file := getattr(module, "__file__", None))]
