"""Which files of the project a module needs: its imports and theirs, found in the source without running it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "tasks", "mip")


def module_file(name: str) -> Path | None:
    """The file of one of our modules or packages, relative to the root."""
    base = Path(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if (ROOT / path).is_file():
            return path
    return None


def module_name(file: Path) -> str:
    """The dotted name of a file, relative to the root."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(*packages: str) -> list[Path]:
    """All modules of these packages, relative to the root."""
    return sorted(path.relative_to(ROOT) for package in packages for path in (ROOT / package).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, except for type checking; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in _nodes(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def closure(*files: Path) -> set[Path]:
    """The files, all of our modules that they import, directly or not, and the data files that those name."""
    seen: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        if file.suffix == ".py":
            waiting += _packages_above(file)
            waiting += [path for name in imported(file) if (path := _ours(name))]
            waiting += _data_files(file)
    return {file for file in seen if file.suffix != ".py" or (ROOT / file).read_text().strip()}


def third_party(files: set[Path]) -> set[str]:
    """Top-level names that these files import from outside."""
    names = {name.partition(".")[0] for file in files if file.suffix == ".py" for name in imported(file)}
    return names - set(PACKAGES)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _nodes(child)


def _ours(name: str) -> Path | None:
    return module_file(name) if name.partition(".")[0] in PACKAGES else None


def _packages_above(file: Path) -> list[Path]:
    return [folder / "__init__.py" for folder in file.parents if (ROOT / folder / "__init__.py").is_file()]


def _data_files(file: Path) -> list[Path]:
    """Files beside the module, no code, whose names stand in it as strings."""
    strings = {node.value for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Constant)}
    beside = [path.relative_to(ROOT) for path in (ROOT / file).parent.iterdir() if path.is_file()]
    return [path for path in beside if path.suffix not in {".py", ".pyc"} and path.name in strings]
