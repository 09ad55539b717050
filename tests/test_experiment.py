"""experiment/dvc.yaml and experiment/params.yaml agree with each other and with the code that they run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from mip.evaluation.experiment import load_plan
from mip.evaluation.methods import METHODS
from tests.closure import ROOT, closure
from tests.test_stages import _sources

PLAN = load_plan(ROOT / "params.yaml", ROOT / "experiment" / "params.yaml")
STAGES: dict[str, dict[str, Any]] = YAML(typ="safe").load((ROOT / "experiment" / "dvc.yaml").read_text())["stages"]


def _stage(name: str) -> dict[str, Any]:
    return STAGES[name].get("do", STAGES[name])


@pytest.mark.parametrize("name", STAGES)
def test_all_code_that_a_stage_imports_is_in_its_deps(name: str):
    module = _stage(name)["cmd"].split()[2]
    entries = _sources() if name == "benchmark" else []
    needed = {file.as_posix() for file in closure(Path(*module.split(".")).with_suffix(".py"), *entries)}
    listed = {path for path in _stage(name)["deps"] if path.endswith((".py", ".jinja", ".json")) and "data" != path[:4]}
    listed -= {path for path in listed if path.startswith(("reports/", "${"))}
    assert (sorted(needed - listed), sorted(listed - needed)) == ([], []), "(missing in dvc.yaml, no longer needed)"


def test_the_flows_that_stages_run_can_be_imported():
    """In a process of its own: Prefect takes over the log of the one that imports it."""
    modules = sorted({_stage(name)["cmd"].split()[2] for name in STAGES})
    names = [f"from {module} import {module.rpartition('.')[2]}" for module in modules]
    subprocess.run([sys.executable, "-c", "\n".join(names)], cwd=ROOT, check=True)


def test_every_parameter_that_a_stage_names_is_in_its_file():
    for name in STAGES:
        for entry in _stage(name)["params"]:
            for file, keys in entry.items() if isinstance(entry, dict) else [("params.yaml", [entry])]:
                content = YAML(typ="safe").load((ROOT / file).read_text())
                for key in keys or []:
                    place = content
                    for part in key.replace("${profile}", PLAN.experiment.profile).split("."):
                        if not part.startswith("${"):
                            place = place[part]


def test_a_control_draws_as_it_was_trained():
    for name, control in PLAN.experiment.controls.items():
        method = METHODS[name]
        assert (method.merge, method.gated is not False) == (control.merge, control.gated)
    assert PLAN.experiment.layouts.set in PLAN.experiment.sets
    assert set(PLAN.experiment.controls) <= set(PLAN.experiment.methods) <= set(METHODS)


def test_sets_methods_and_controls_are_those_of_the_parameters():
    plan = PLAN.experiment
    assert STAGES["benchmark"]["foreach"] == list(plan.sets)
    assert tuple(STAGES["control"]["foreach"]) == tuple(plan.controls)
    for part in plan.sets:
        assert tuple(STAGES[f"draw_{part}"]["foreach"]) == plan.methods
    assert tuple(STAGES["layouts"]["foreach"]) == plan.layouts.methods
    for part, methods in {**dict.fromkeys(plan.sets, plan.methods), "layouts": plan.layouts.methods}.items():
        folder = f"data/experiment/{part}/images/"
        assert [path for path in _stage(f"judge_{part}")["deps"] if path.startswith(folder)] == [
            f"{folder}{method}" for method in methods
        ]


def test_methods_are_known_and_a_trained_one_waits_for_its_adapter():
    adapters = {name: f"data/experiment/adapters/{name}/" for name in PLAN.experiment.controls}
    for stage in ("draw_pairs", "draw_triples", "layouts"):
        for name, item in STAGES[stage]["foreach"].items():
            own = adapters.get(name, "data/${profile}/adapter/")
            assert item["weights"].startswith(own) == METHODS[name].is_trained


def test_a_control_differs_from_the_profile_s_training_in_what_it_says_alone():
    own = PLAN.profile.train.model_dump()
    for name, control in PLAN.experiment.controls.items():
        assert PLAN.train(name).model_dump() == {**own, "merge": control.merge, "gated": control.gated}


def test_the_unselected_samples_are_as_many_and_no_score_decides():
    assert PLAN.profile.manifest.top_k is not None
    assert PLAN.unselected.top_k == PLAN.profile.manifest.top_k
    assert (PLAN.unselected.order, PLAN.unselected.threshold) == ("random", None)


def test_there_are_enough_tasks_for_the_claim():
    pairs, triples = (PLAN.experiment.sets[name] for name in ("pairs", "triples"))
    assert pairs.options["combinations"] >= 40
    assert pairs.options["combinations"] * pairs.prompts_per_combination >= 300
    assert triples.options["combinations"] * triples.prompts_per_combination >= 100
