"""Checksums of the features' files: a damaged file is named before a step is trained on it."""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mip.errors import DataError
from mip.tables import file_hash, write_json

_NAME = "checksums.json"


def write_checksums(folder: Path, names: Iterable[str]) -> Path:
    """Write the SHA-256 of these files beside them."""
    return write_json(folder / _NAME, {name: file_hash(folder / name) for name in names})


def read_checksums(folder: Path) -> dict[str, str]:
    """By file name. Raises DataError where there are none."""
    path = folder / _NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no {path}; run the features stage again") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); run the features stage again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged (no object); run the features stage again")
    return found


def verify(folder: Path, names: Iterable[str], checksums: Mapping[str, str]) -> None:
    """Read these files whole, once. Raises DataError with the name of the first that is missing or not as written."""

    def check(name: str) -> None:
        path = folder / name
        if not path.is_file():
            raise DataError(f"there is no {path}, which the features' index names; run the features stage again")
        if (found := file_hash(path)) != checksums.get(name):
            raise DataError(
                f"{path} is damaged: its SHA-256 is {found[:12]}..., not {str(checksums.get(name))[:12]}... as "
                f"{_NAME} says; delete it and run the features stage again"
            )

    # Hashing leaves Python's lock alone: several files at a time.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(check, names))
