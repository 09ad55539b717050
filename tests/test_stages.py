"""A stage has one name and one set of files, wherever it is mentioned; its deps are all the code that it runs."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from mip.config import METHODS, STAGES, Paths, Profile, load_profile
from tests.closure import ROOT, closure

PROFILES = ("toybox", "smoke", "smoke_plus", "sdxl", "sdxl_plus")
SECTIONS = set(Profile.model_fields) - {"engine"}  # the engine changes no output


def _yaml(name: str) -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / name).read_text())


def _stage(name: str) -> dict[str, Any]:
    stage = _yaml("dvc.yaml")["stages"][name]
    return stage.get("do", stage)


def _sources() -> list[Path]:
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mip.sources"]
    return [Path(*entry.partition(":")[0].split(".")).with_suffix(".py") for entry in entries.values()]


def _filled(paths: list[str], profile: str) -> set[str]:
    return {path.replace("${profile}", profile) for path in paths}


def test_dvc_and_config_name_the_same_stages():
    assert tuple(_yaml("dvc.yaml")["stages"]) == STAGES


def test_parameters_name_the_same_stages():
    assert {name for name in SECTIONS if name != "models"} == set(STAGES)


@pytest.mark.parametrize("package", ["flows", "tasks"])
def test_every_stage_has_a_module_of_its_name(package: str):
    assert [stage for stage in STAGES if not (ROOT / package / f"{stage}.py").is_file()] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_the_flow_of_its_name(stage: str):
    command = _stage(stage)["cmd"]
    assert command.removesuffix(" ${key}") == f"python -m flows.{stage}"


def test_generate_runs_every_method():
    assert tuple(_yaml("dvc.yaml")["stages"]["generate"]["foreach"]) == METHODS


@pytest.mark.parametrize("stage", STAGES)
def test_all_code_that_a_stage_imports_is_in_its_deps(stage: str):
    entries = _sources() if stage == "ingest" else []
    needed = {file.as_posix() for file in closure(Path(f"flows/{stage}.py"), *entries)}
    listed = {path for path in _stage(stage)["deps"] if "${" not in path}
    assert (sorted(needed - listed), sorted(listed - needed)) == ([], []), "(missing in dvc.yaml, no longer needed)"


@pytest.mark.parametrize("stage", STAGES)
def test_all_parameters_that_a_stage_reads_are_listed(stage: str):
    listed = {name.removeprefix("${profile}.") for name in _stage(stage)["params"] if name != "profile"}
    assert _sections_read(stage) == listed
    assert "profile" in _stage(stage)["params"]


def _sections_read(stage: str) -> set[str]:
    """Sections that the flow takes of `profile`; all of them where it hands the whole on."""
    tree = ast.parse((ROOT / "flows" / f"{stage}.py").read_text())
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_profile(node.value)]
    handed_on = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "profile"]
    if len(handed_on) > len(read):
        return SECTIONS - {"report"} if stage == "evaluate" else SECTIONS
    return {node.attr for node in read}


def _is_profile(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "profile"


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "report"])
def test_all_data_that_a_stage_reads_is_in_its_deps(stage: str):
    listed = {path for path in _stage(stage)["deps"] if "${profile}" in path}
    assert listed == _data_read(stage)


def test_the_report_depends_on_the_outputs_of_all_other_stages():
    listed = {path for path in _stage("report")["deps"] if "${" in path}
    assert listed == {place for stage in STAGES if stage != "report" for place in _places(stage)}


def test_only_our_own_images_wait_for_the_adapter():
    weights = {method: item["weights"] for method, item in _yaml("dvc.yaml")["stages"]["generate"]["foreach"].items()}
    assert {method for method, path in weights.items() if path.startswith("data/${profile}/adapter/")} == {"mip"}
    assert all(path.startswith("data/${profile}/index/") for method, path in weights.items() if method != "mip")
    assert "${item.weights}" in _stage("generate")["deps"]


def _data_read(stage: str) -> set[str]:
    """Places of other stages that the flow names as attributes of `paths`, and the networks where it runs any."""
    source = (ROOT / "flows" / f"{stage}.py").read_text()
    named = {f"data/${{profile}}/{name}" for name in re.findall(r"\bpaths\.(\w+)", source)}
    others = {place for other in STAGES if other != stage for place in _places(other)}
    read = {place for place in others if any(place == name or place.startswith(f"{name}/") for name in named)}
    if stage == "generate":
        read -= set(_places("train"))  # only for the method that uses it
    return read | ({"data/${profile}/base"} if "runs_torch=" in source else set())


def _places(stage: str) -> list[str]:
    """The stage's outputs, of every method."""
    places = (out.replace("${key}", method) for out in _outs(stage) for method in METHODS)
    return list(dict.fromkeys(places))


def _outs(stage: str) -> list[str]:
    return [*_stage(stage).get("outs", []), *_stage(stage).get("metrics", [])]


def test_paths_of_the_code_are_the_outputs_of_dvc():
    paths = Paths("p")
    expected = {
        "ingest": {paths.index},
        "extract": {paths.masks},
        "construct": {paths.samples},
        "score": {paths.scores},
        "manifest": {paths.manifest},
        "features": {paths.features},
        "train": {paths.adapter},
        "generate": {paths.images / "${key}"},
        "evaluate": {paths.metrics, paths.reports / "per_task.parquet", paths.reports / "per_combination.parquet"},
        "report": {paths.reports / "report.md", paths.reports / "report.html", paths.reports / "figures"},
    }
    assert {stage: _filled(_outs(stage), "p") for stage in STAGES} == {
        stage: {path.as_posix() for path in files} for stage, files in expected.items()
    }


def test_no_two_stages_write_the_same_place():
    outs = sorted(out for stage in STAGES for out in _outs(stage))
    assert len(outs) == len(set(outs))
    assert not any(b.startswith(f"{a}/") for a in outs for b in outs)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_is_complete_and_valid(profile: str):
    name, _ = load_profile(ROOT / "params.yaml", profile)
    assert name == profile


def test_parameters_hold_no_other_profiles():
    assert set(_yaml("params.yaml")) == {"profile", *PROFILES}


def test_parameters_use_no_anchors():
    # with them `dvc exp run -S` is ignored without a word
    text = (ROOT / "params.yaml").read_text()
    assert not any(line.lstrip().startswith("<<:") or ": &" in line or ": *" in line for line in text.splitlines())


@pytest.mark.parametrize("profile", ["sdxl", "sdxl_plus"])
def test_the_paper_s_profiles_carry_its_training(profile: str):
    params = load_profile(ROOT / "params.yaml", profile)[1]
    assert params.models.variant == profile
    assert params.models.resolution == 512
    train = params.train
    assert (train.steps, train.batch, train.learning_rate, train.weight_decay) == (12000, 32, 1e-4, 0.01)
    assert (train.drop_image, train.drop_text, train.drop_both) == (0.05, 0.05, 0.05)
    assert params.generate.scales == ((0.75,) if profile == "sdxl" else (0.65,))
    assert (params.generate.steps, params.ingest.seed, params.ingest.prompts_per_combination) == (30, 420, 12)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_s_own_folders_are_named_in_it(profile: str):
    block = YAML(typ="safe").load((ROOT / "params.yaml").read_text())[profile]
    strings = [text for text in _strings(block) if "data/" in text]
    assert all(f"data/{profile}/" in text for text in strings)


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_a_folder_for_its_networks(profile: str):
    base = ROOT / "data" / profile / "base"
    assert base.is_dir() or base.is_symlink()
