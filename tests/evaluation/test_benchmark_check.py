"""`mip benchmark`: everything that is wrong at once, and the table of tasks."""

import os
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from mip.cli import app
from mip.evaluation.benchmarks import Reason
from mip.evaluation.kinds import ADVICE, BENCHMARKS, Kind, look, problems, read_benchmark
from mip.evaluation.survey import Fault
from mip.tables import check_kind, read_rows
from tests.closure import ROOT

SHARED = Path(os.environ.get("MIP_SHARED", Path(__file__).parents[3] / "shared"))


@pytest.fixture
def run(mip):
    """`mip benchmark ...`."""
    return partial(mip, "benchmark")


@pytest.fixture
def folder(benchmark: Path, tmp_path: Path) -> Path:
    """A Concept101 folder to spoil."""
    return Path(shutil.copytree(benchmark, tmp_path / "benchmark"))


def test_a_whole_benchmark_ends_with_0_and_notes_what_is_not_cut(run, folder: Path):
    code, said, _ = run("check", "concept101", folder)
    assert code == 0 and said.endswith("6 tasks of 2 combinations can be used; 0 problems\n")
    assert "note: json_data/pet_cat1: no box for 1 of 2 photos" in said


def test_everything_that_is_wrong_is_listed_at_once(run, folder: Path):
    shutil.rmtree(folder / "benchmark_dataset" / "things_cup1")
    (folder / "benchmark_dataset" / "pet_dog1" / "0.png").write_bytes(b"no image")
    (folder / "json_data" / "pet_cat1" / "0.json").write_text('{"mask": [{"box": [900, 0, 950, 10]}]}')
    (folder / "prompts" / "both.txt").write_text("a {0} and a {2}\na {0}\n{0} and {1}\n")
    code, said, _ = run("check", "concept101", folder)
    assert code == 1 and "This benchmark is CustomConcept101" in said and "2 combinations" not in said
    for place, reason in {
        "benchmark_dataset/things_cup1": Reason.NO_IMAGES,
        "benchmark_dataset/pet_dog1/0.png": Reason.BROKEN_IMAGE,
        "json_data/pet_cat1/0.json": Reason.BAD_BOX,
        "entry 0, both.txt prompt 0": Fault.BAD_PLACEHOLDER,
        "entry 0, both.txt prompt 1": Fault.NOT_NAMED,
        "entry 1, both.txt prompt 1": Fault.NOT_NAMED,
    }.items():
        assert f"{place}: {reason}: " in said.replace("prompts/", "")


def test_faults_of_the_files_do_not_hide_those_of_the_photos(run, folder: Path):
    (folder / "prompts" / "both.txt").unlink()
    shutil.rmtree(folder / "benchmark_dataset" / "things_cup1")
    (folder / "benchmark_dataset" / "pet_dog1" / "notes.txt").write_text("x")
    code, said, _ = run("check", "concept101", folder)
    assert code == 1 and "0 tasks of 0 combinations can be used; 3 problems" in said
    assert "prompts/both.txt: missing_file" in said and "pet_dog1/notes.txt: not_an_image" in said


@pytest.mark.skipif(not (SHARED / "concept101").exists(), reason=f"no Concept101 in {SHARED}; set MIP_SHARED")
def test_the_published_prompts_have_only_the_known_errors_and_photos_are_asked_for_once_a_concept():
    survey = look(Kind.CONCEPT101, SHARED / "concept101", variant="official")
    assert survey.faults == [] and {row["reason"] for row in survey.dropped} == {Reason.NO_IMAGES}
    concepts = [row["id"] for row in survey.dropped]
    assert len(concepts) == len(set(concepts)) == 63
    assert [note.partition(",")[0] for note in survey.notes] == [f"entry {number}" for number in range(82, 89)]
    assert look(Kind.CONCEPT101, SHARED / "concept101", variant="corrected").notes == []


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.OWN])
def test_an_empty_folder_is_a_problem_and_a_missing_one_wrong_use(run, kind: Kind, tmp_path: Path):
    code, said, _ = run("check", kind, tmp_path)
    assert code == 1 and "missing_file" in said and BENCHMARKS[kind].published in said
    code, _, errors = run("check", kind, tmp_path / "nowhere")
    assert code == 2 and "there is no" in errors and BENCHMARKS[kind].published in errors


def test_wrong_use_is_one_line_and_2(run, folder: Path, tmp_path: Path):
    for arguments, message in (
        (("check", "own", folder), "expected a file"),
        (("check", "dreambooth", folder, "--variant", "corrected"), "take official"),
        (("tasks", "concept101", folder, folder / "prompts" / "both.txt"), "which exists"),
    ):
        code, _, errors = run(*arguments)
        assert code == 2 and message in errors and len(errors.strip().splitlines()) == 1
    shutil.rmtree(folder / "benchmark_dataset")
    code, _, errors = run("tasks", "concept101", folder, tmp_path / "tasks.parquet")
    assert code == 2 and "no task that can be used" in errors and not (tmp_path / "tasks.parquet").exists()


def test_the_table_of_tasks_is_that_of_the_reader(run, folder: Path, tmp_path: Path):
    out = tmp_path / "index" / "tasks.parquet"
    code, said, _ = run("tasks", "concept101", folder, out, "--seed", 5, "--prompts", 2, "--combinations", 1)
    assert code == 0 and said == f"wrote {out}: 2 tasks of 1 combinations, 0 left out\n"
    rows, _ = read_benchmark(
        Kind.CONCEPT101, folder, variant="official", prompts_per_combination=2, combinations=1, seed=5
    )
    assert read_rows(out, "tasks") == rows
    assert check_kind(out, "tasks") == {"benchmark": "concept101", "variant": "official", "seed": "5"}


def test_an_own_file_goes_the_same_way(run, tmp_path: Path):
    Image.new("RGB", (9, 9)).save(tmp_path / "tom.png")
    file = tmp_path / "own.yaml"
    file.write_text(
        "subjects: {tom: {name: cat, images: [tom.png]}}\ncombinations: [{subjects: [tom], prompts: [dog]}]"
    )
    code, said, _ = run("check", "own", file)
    assert code == 1 and "combinations.0.prompts.0: not_named: 'dog' lacks cat; " in said
    file.write_text(file.read_text().replace("[dog]", "[a cat]"))
    assert run("check", "own", file)[0] == 0
    assert run("tasks", "own", file, tmp_path / "tasks.parquet")[0] == 0


def test_every_reason_has_advice():
    assert set(ADVICE) == {*Reason, *Fault} and set(BENCHMARKS) == set(Kind)


def test_what_a_terminal_obeys_is_not_printed(folder: Path):
    (folder / "benchmark_dataset" / "pet_dog1" / "a\x1bb.txt").write_text("x")
    assert any("a?b.txt" in line for line in problems(look(Kind.CONCEPT101, folder, variant="official")))


def test_the_documented_file_and_commands_are_those_that_are_read(tmp_path: Path):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "photos" / "tom").mkdir(parents=True)
    for name in ("rex1.jpg", "rex2.jpg", "tom/1.jpg"):
        Image.new("RGB", (400, 500)).save(tmp_path / "photos" / name)
    (tmp_path / "own.yaml").write_text(shown)
    survey = look(Kind.OWN, tmp_path / "own.yaml", variant="official")
    assert problems(survey) == [] and len(survey.tasks) == 2
    for line in re.findall(r"^    mip (.*)$", page, re.MULTILINE):
        command: Any = typer.main.get_command(app)
        words = shlex.split(line)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)
    assert all(f"`{kind}`" in page for kind in Kind)
