"""The report of a small invented profile."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from PIL import Image

from mip.config import Paths, Profile, load_profile
from mip.errors import DataError, SchemaError
from mip.evaluation import report
from mip.evaluation.report import breakdowns, figures, findings, pictures
from mip.evaluation.report import page as pages
from mip.tables import Row, read_rows, write_table
from tests.evaluation.fake_profile import rewrite_json, write_profile

HOSTILE = " <script>alert('x')</script> | `b` [l](http://x.test)"
ORDER = [anchor for anchor, _ in pages._CONTENTS]


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile(Path(__file__).parents[2] / "params.yaml", "toybox")[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, profile: Profile) -> Paths:
    """A report that tests only read; its prompts try to break out of the page."""
    paths = write_profile(tmp_path_factory.mktemp("profile"), prompt_suffix=HOSTILE)
    report.write(profile.report, paths=paths, profile=profile)
    return paths


@pytest.fixture
def copied(written: Paths, tmp_path: Path) -> Paths:
    """The same profile, free to be damaged."""
    shutil.copytree(written.reports.parent.parent, tmp_path, dirs_exist_ok=True)
    return Paths("toybox", tmp_path)


@pytest.fixture
def one_picture(profile: Profile) -> Profile:
    """The profile with the smallest report."""
    return profile.model_copy(update={"report": profile.report.model_copy(update={"tasks": 1, "worst": 1})})


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are blank: drawing them takes most of the time."""

    def blank(draw: object, path: Path) -> tuple[Path, Path]:
        dark = path.with_name(f"{path.stem}-dark.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (path, dark):
            Image.new("RGB", (2, 2)).save(file)
        return path, dark

    monkeypatch.setattr(figures, "save", blank)


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(written: Paths) -> _Page:
    return _Page((written.reports / "report.html").read_text())


def test_the_page_reaches_for_nothing_outside_itself(page: _Page):
    targets = [
        value for _, attributes in page.tags for name in ("src", "href", "srcset") if (value := attributes.get(name))
    ]
    assert targets and all(target.startswith(("data:image/", "#")) for target in targets)
    assert not page.all("link") and not page.all("iframe")


def test_the_page_forbids_the_browser_to_load_anything(page: _Page):
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies and str(policies[0]).startswith("default-src 'none'; img-src data:")


def test_a_prompt_cannot_add_markup_to_the_page(written: Paths, page: _Page):
    assert len(page.all("script")) == 1
    assert "&lt;script&gt;alert" in (written.reports / "report.html").read_text()


def test_a_prompt_cannot_add_markup_or_cells_to_the_markdown(written: Paths):
    text = (written.reports / "report.md").read_text()
    assert "<script" not in text and "[l](" not in text
    row = next(line for line in text.splitlines() if "alert" in line and line.startswith("| "))
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_every_image_has_a_text_for_those_who_do_not_see_it(page: _Page):
    assert page.all("img") and all(image.get("alt") for image in page.all("img"))


def test_every_heading_of_a_table_says_what_it_heads(page: _Page):
    assert page.all("th") and all(heading.get("scope") for heading in page.all("th"))


def test_wide_blocks_scroll_within_themselves_and_by_keyboard(page: _Page):
    scrolling = [div for div in page.all("div") if "scroll" in (div.get("class") or "").split()]
    assert all(div.get("tabindex") == "0" and div.get("aria-label") for div in scrolling)
    assert len(scrolling) >= len(page.all("table")) - 1


def test_blocks_stand_in_their_order(page: _Page):
    assert [section.get("id") for section in page.all("section")] == ORDER


def test_every_relative_link_of_the_markdown_leads_to_a_file(written: Paths):
    text = (written.reports / "report.md").read_text()
    links = re.findall(r'(?<!\\)\]\(([^)]+)\)|(?:src|srcset)="([^"]+)"', text)
    assert len(links) > 10
    assert all((written.reports / (one or other)).is_file() for one, other in links)


def test_every_figure_is_in_the_markdown(written: Paths):
    text = (written.reports / "report.md").read_text()
    assert all(f"figures/{file.name}" in text for file in (written.reports / "figures").iterdir())


def test_numbers_carry_command_file_and_hash(written: Paths):
    text = (written.reports / "report.md").read_text()
    assert re.search(r"\| Metrics \| `dvc repro evaluate` \| `reports/toybox/metrics.json` \| `[0-9a-f]{64}` \|", text)
    assert "| Pictures | `dvc repro generate@mip` | `data/toybox/images/mip/images.parquet` |" in text


def test_every_reason_of_every_stage_is_counted(written: Paths):
    text = (written.reports / "report.md").read_text()
    for row in (
        "ingest | image | broken image | 2",
        "construct | sample | too few objects | 10",
        "manifest | sample | below rank | 20",
    ):
        assert f"| {row} |" in text


def _rows(paths: Paths) -> list[tuple[Row, Row]]:
    """Every task with its verdict on the trained merge."""
    tasks = read_rows(paths.index / "tasks.parquet", "tasks")
    verdicts = {(r["method"], r["task_id"]): r for r in read_rows(paths.reports / "per_task.parquet", "per_task")}
    return [(task, verdicts["mip", task["task_id"]]) for task in tasks]


def test_the_table_of_categories_has_the_numbers_of_the_judged_tasks(written: Paths):
    text = (written.reports / "report.md").read_text()
    for category, names in {
        "pet+toy": ["toy+pet"],
        "toy+toy": ["toy+toy"],
        "every category": ["toy+pet", "toy+toy"],
    }.items():
        rows = [(task["combination"], row) for task, row in _rows(written) if task["category"] in names]
        combinations = sorted({combination for combination, _ in rows})
        expected = [
            fmean(fmean(float(row[key]) for c, row in rows if c == combination) for combination in combinations)
            for key in ("confused", "presence", "detect_and_compare", "identity_margin")
        ]
        line = next(
            x for x in text.splitlines() if x.startswith(f"| {category} | Weighted merge, trained | {len(rows)} |")
        )
        cells = line.split(" | ")[3:]
        assert [cell.partition(" (")[0] for cell in cells] == [f"{value:.3f}" for value in expected]


def test_the_page_has_the_categories_and_says_what_the_measures_are(written: Paths):
    html = (written.reports / "report.html").read_text()
    section = html[html.index('<section id="breakdown">') :].partition("</section>")[0]
    assert '<th scope="row">pet+toy</th>' in section and '<th scope="row">every category</th>' in section
    assert "D&amp;C (detect and compare, of MuDI) is 1 less" in section and "ID margin (ID-Conf of UMO) is" in section
    assert section.count("Whose look objects wear") == 2


def test_the_matrix_of_classes_counts_the_looks_that_objects_wear(written: Paths):
    text = (written.reports / "report.md").read_text()
    block = text.partition("### Whose look objects wear: Weighted merge, trained (MIP)")[2].partition("\n#")[0]
    lines = [line.strip("| ").split(" | ") for line in block.splitlines() if line.startswith("| ")]
    names = lines[0][1:]
    assert names == [*sorted({r["name"] for task, _ in _rows(written) for r in task["references"]}), "missing"]
    wanted = {(asked, look): 0 for asked in names[:-1] for look in names}
    for task, row in _rows(written):
        first, second = (reference["name"] for reference in task["references"])
        wanted[first, second if row["leaked"] else first] += 1
        wanted[second, "missing" if row["presence"] < 1 else second] += 1
    shown = {(line[0], name): int(count) for line in lines[2:] for name, count in zip(names, line[1:], strict=True)}
    assert shown == wanted and len({look for (asked, look), n in wanted.items() if n and asked != look}) > 1


@pytest.mark.usefixtures("no_charts")
def test_with_many_classes_the_matrix_shows_those_that_go_wrong_most(
    copied: Paths, one_picture: Profile, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(breakdowns, "CLASSES", 2)
    report.write(one_picture.report, paths=copied, profile=one_picture)
    text = (copied.reports / "report.md").read_text()
    assert "The 2 of 8 classes that are missing or exchanged most." in text and " others | missing |" in text


@pytest.mark.usefixtures("no_charts")
def test_a_benchmark_of_single_references_has_nothing_to_break_down(copied: Paths, one_picture: Profile):
    path = copied.reports / "per_task.parquet"
    blank = dict.fromkeys(("confused", "swapped", "leak", "leaked", "detect_and_compare", "identity_margin"))
    write_table(path, "per_task", [row | blank for row in read_rows(path, "per_task")], {})
    judge = {"leak_threshold": 0.1, "same_class_tasks": 0, "single_reference_tasks": 12}
    made = json.loads(copied.metrics.read_text())["provenance"]
    rewrite_json(copied.metrics, provenance={**made, "judge": judge})
    report.write(one_picture.report, paths=copied, profile=one_picture)
    text = (copied.reports / "report.md").read_text()
    assert "There is nothing to break down" in text
    assert "Of the 12 tasks, 12 have one reference: confusion does not cover them." in text


def test_the_papers_table_is_marked_as_another_world(written: Paths):
    text = (written.reports / "report.md").read_text()
    assert "## Another world: Table 1 of the paper" in text
    assert "Do not compare these numbers" in text and "| SSR-Encoder | no | 0.7363 | 0.6895 | 0.3970 |" in text


def test_the_same_inputs_give_the_same_bytes(written: Paths, copied: Paths, profile: Profile):
    report.write(profile.report, paths=copied, profile=profile)
    names = ["report.md", "report.html", *(f"figures/{file.name}" for file in (written.reports / "figures").iterdir())]
    assert all((written.reports / name).read_bytes() == (copied.reports / name).read_bytes() for name in names)


@pytest.mark.usefixtures("no_charts")
def test_absent_times_and_maps_and_scales_are_said_to_be_absent(copied: Paths, one_picture: Profile):
    shutil.rmtree(copied.timings)
    for method in ("training_free", "mip"):
        shutil.rmtree(copied.images / method / "maps")
        (copied.images / method / "scale.json").unlink()
    report.write(one_picture.report, paths=copied, profile=one_picture)
    text = (copied.reports / "report.md").read_text()
    assert "No stage has left its time on this machine" in text
    assert "No method kept relevance maps" in text
    assert "No choice is recorded for Weighted merge, untrained, Weighted merge, trained." in text


@pytest.mark.parametrize(
    "missing",
    [
        "reports/toybox/metrics.json",
        "reports/toybox/per_task.parquet",
        "reports/toybox/per_combination.parquet",
        "data/toybox/index/tasks.parquet",
        "data/toybox/images/mip/images.parquet",
        "data/toybox/images/mip/000-00.png",
        "data/toybox/adapter/curve.parquet",
        "data/toybox/manifest/funnel.json",
        "data/toybox/masks/rejected.parquet",
        "data/toybox/manifest/accepted.png",
    ],
)
def test_a_missing_input_is_named_and_leaves_the_old_page(copied: Paths, one_picture: Profile, missing: str):
    before = (copied.reports / "report.html").read_bytes()
    (copied.reports.parent.parent / missing).unlink()
    with pytest.raises(DataError, match=re.escape(Path(missing).name)):
        report.write(one_picture.report, paths=copied, profile=one_picture)
    assert (copied.reports / "report.html").read_bytes() == before


def test_metrics_of_another_version_are_refused(copied: Paths, one_picture: Profile):
    rewrite_json(copied.metrics, schema_version=2)
    with pytest.raises(SchemaError, match="schema_version 2; expected 1"):
        report.write(one_picture.report, paths=copied, profile=one_picture)


@pytest.mark.usefixtures("no_charts")
def test_a_method_of_the_users_own_is_shown_under_its_name(copied: Paths, one_picture: Profile):
    shutil.copytree(copied.images / "mip", copied.images / "mine")
    methods = json.loads(copied.metrics.read_text())["methods"]
    rewrite_json(copied.metrics, methods={**methods, "mine": {**methods["mip"], "sparkle": methods["mip"]["clip_t"]}})
    report.write(one_picture.report, paths=copied, profile=one_picture)
    text = (copied.reports / "report.md").read_text()
    assert "Weighted merge, trained (MIP) | mine |" in text and "| sparkle  | not measured |" in text


def test_the_report_needs_no_network_library():
    code = "import sys, mip.evaluation.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def _metrics(ours: tuple[float, float, float], theirs: tuple[float, float, float]) -> Mapping[str, Any]:
    def entry(values: tuple[float, float, float]) -> dict[str, Any]:
        return {"confused_present": dict(zip(("value", "low", "high"), values, strict=True)) | {"n": 40}}

    return {"methods": {"mip": entry(ours), "ip_adapter_concat": entry(theirs)}}


def test_apart_intervals_are_an_answer():
    said = findings.headline(_metrics((0.2, 0.1, 0.3), (0.6, 0.5, 0.7)))
    assert "20 % (95 % interval 10 to 30 %)" in said and "less confusion with the merge" in said


def test_a_worse_merge_is_called_worse():
    assert "more confusion with the merge" in findings.headline(_metrics((0.6, 0.5, 0.7), (0.2, 0.1, 0.3)))


def test_overlapping_intervals_settle_nothing():
    said = findings.headline(_metrics((0.4, 0.2, 0.6), (0.6, 0.5, 0.7)))
    assert "does not settle" in said and "less confusion" not in said


def test_a_run_without_the_compared_methods_claims_nothing():
    assert "does not answer" in findings.headline({"methods": {"base": {}}})


def test_no_best_method_is_marked_where_they_saw_different_tasks():
    content = _metrics((0.2, 0.1, 0.3), (0.6, 0.5, 0.7))
    (row,) = findings.table(content, ["ip_adapter_concat", "mip"])
    assert not any(value.is_best for value in row.values if value)


def test_small_images_are_enlarged_by_a_whole_factor_without_smoothing():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 0, 0))
    enlarged = pictures.fit(image, 7)
    assert enlarged.size == (6, 3) and sorted(enlarged.getcolors() or []) == [(9, (0, 0, 0)), (9, (255, 0, 0))]
