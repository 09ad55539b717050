"""What the code imports is declared and pinned; what is pinned is consistent."""

import re
import sys
import tomllib
from collections.abc import Collection
from importlib.metadata import packages_distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.closure import ROOT, modules, third_party


def _pins(file: str) -> dict[str, str]:
    lines = (re.sub(r"\s*#.*", "", line).strip() for line in (ROOT / file).read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): version for name, version in pairs}


def _declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["engine"]]]


def _foreign(*packages: str, known: Collection[str]) -> list[str]:
    """Top-level names that these packages import and that no known distribution brings."""
    bringing = packages_distributions()
    names = third_party(set(modules(*packages))) - set(sys.stdlib_module_names)
    return sorted(name for name in names if not {canonicalize_name(one) for one in bringing[name]} & set(known))


def test_all_that_the_code_imports_is_pinned():
    assert _foreign("mip", "flows", "tasks", known=_pins("requirements.txt")) == []


def test_all_that_the_library_imports_is_declared():
    assert _foreign("mip", known=[canonicalize_name(requirement.name) for requirement in _declared()]) == []


def test_the_pins_satisfy_what_is_declared():
    pins = _pins("requirements.txt")
    wrong = [str(one) for one in _declared() if not one.specifier.contains(pins[canonicalize_name(one.name)])]
    assert wrong == []


def test_requirements_and_constraints_agree():
    constraints = _pins("constraints.txt")
    pins = _pins("requirements.txt")
    assert {name: constraints.get(name) for name in pins} == pins
