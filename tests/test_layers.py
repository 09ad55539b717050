"""Imports point one way: flows -> tasks -> mip, and nothing in mip knows the embedded world or the engine."""

from pathlib import Path

import pytest

from tests.closure import ROOT, closure, imported, module_name, modules, third_party

LIGHT = ("ingest", "extract", "manifest")


def _importing(*packages: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{file} imports {name}"
        for file in modules(*packages)
        for name in sorted(imported(file))
        if any(name == top or name.startswith(f"{top}.") for top in forbidden)
    ]


def test_mip_imports_neither_flows_nor_tasks():
    assert _importing("mip", forbidden=("flows", "tasks")) == []


def test_mip_knows_neither_prefect_nor_dvc():
    assert _importing("mip", forbidden=("prefect", "prefect_dask", "dvc", "dask", "distributed")) == []


def test_tasks_do_not_import_flows():
    assert _importing("tasks", forbidden=("flows",)) == []


def test_config_imports_of_ours_only_the_errors():
    assert {name for name in imported(Path("mip/config.py")) if name.startswith("mip.")} == {
        "mip.errors",
        "mip.errors.ConfigError",
    }


def test_inside_mip_nothing_below_imports_what_is_above():
    above = {
        "model": ("mip.data", "mip.training", "mip.evaluation"),
        "training": ("mip.evaluation",),
        "data": ("mip.training", "mip.model"),
        "evaluation": ("mip.training",),
    }
    assert [line for package, names in above.items() for line in _importing(f"mip/{package}", forbidden=names)] == []


def test_the_embedded_world_is_named_nowhere_else_in_mip():
    elsewhere = [file for file in modules("mip") if not file.is_relative_to("mip/toybox")]
    assert [str(file) for file in elsewhere if "toybox" in (ROOT / file).read_text().lower()] == []


@pytest.mark.parametrize("stage", LIGHT)
def test_a_light_stage_needs_no_torch(stage: str):
    sources = [Path("mip/toybox/source.py")] if stage == "ingest" else []
    heavy = {"torch", "torchvision", "transformers", "diffusers", "open_clip", "accelerate"}
    assert third_party(closure(Path("flows") / f"{stage}.py", *sources)) & heavy == set()


def test_every_folder_with_code_is_a_package():
    folders = {file.parent for file in modules("mip", "flows", "tasks")}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []


def test_modules_have_distinct_names():
    names = [module_name(file) for file in modules("mip", "flows", "tasks")]
    assert len(names) == len(set(names))
