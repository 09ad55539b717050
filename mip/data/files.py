"""The files of a folder or a zip by relative name: none outside of it, none of an absurd size, nothing unpacked."""

import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Protocol

from mip.data.problems import Reason, Refused

_LARGEST = 1 << 28  # bytes of one file
_SMALL = 1 << 20  # bytes; below, a zip's member may be packed as tightly as it likes
_RATIO = 200  # of unpacked to packed bytes; images are packed already, JSON shrinks to a tenth


class Files(Protocol):
    """What a reader asks of a folder or a zip."""

    def names(self) -> list[str]:
        """Relative names of all files, sorted."""
        ...

    def read(self, name: str) -> bytes:
        """One file. Raises Refused."""
        ...


class FolderFiles:
    """A folder. Links that lead out of it are refused."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        return sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if not p.is_dir())

    def read(self, name: str) -> bytes:
        path = self.root / name
        try:
            if not is_inside(name) or not path.resolve().is_relative_to(self.root.resolve()):
                raise Refused(Reason.OUTSIDE, f"got {name[:200]!r}, which leads out of {self.root}")
            if not path.is_file():
                raise Refused(Reason.MISSING_FILE, f"there is no file {self.root}/{name[:200]}")
            if path.stat().st_size > _LARGEST:
                raise Refused(Reason.TOO_LARGE, f"got {name} of {path.stat().st_size} bytes, at most {_LARGEST}")
            return path.read_bytes()
        except (OSError, ValueError) as error:  # a name too long or with a zero byte, a file that may not be read
            raise Refused(Reason.BROKEN_FILE, f"got {name[:200]!r}: {type(error).__name__}") from None


class ZipFiles:
    """A zip; where all of it lies in one folder, that folder is left out of the names. Raises Refused."""

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise Refused(Reason.BROKEN_FILE, f"got {path}, which is no readable zip: {error}") from None
        members = [m for m in self._zip.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
        self.unsafe = sorted(m.filename for m in members if not is_inside(m.filename))
        members = [m for m in members if is_inside(m.filename)]
        tops = {m.filename.partition("/")[0] for m in members if "/" in m.filename}
        is_wrapped = len(tops) == 1 and all("/" in m.filename for m in members)
        within = f"{tops.pop()}/" if is_wrapped else ""
        self._members: dict[str, zipfile.ZipInfo] = {}
        self.repeated: set[str] = set()
        for member in members:
            name = member.filename.removeprefix(within)
            (self.repeated.add(name) if name in self._members else self._members.setdefault(name, member))

    def names(self) -> list[str]:
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        member = self._members.get(name)
        if member is None:
            raise Refused(Reason.MISSING_FILE, f"there is no file {name[:200]}")
        if name in self.repeated:
            raise Refused(Reason.DUPLICATE, f"the zip holds {name} more than once")
        size, packed = member.file_size, member.compress_size
        if size > _LARGEST or (size > _SMALL and size > _RATIO * packed):
            raise Refused(Reason.TOO_LARGE, f"got {name} of {size} bytes packed into {packed}")
        try:
            with self._zip.open(member) as file:
                return file.read(_LARGEST)  # the zip's own length and checksum are checked at the end
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
            raise Refused(Reason.BROKEN_FILE, f"got {name}: {type(error).__name__}: {error}") from None


def is_inside(name: str) -> bool:
    """True for a relative name that stays below its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
