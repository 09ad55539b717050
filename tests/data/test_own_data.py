"""Own data through ingest, extract and construct, and out again as a subject dataset."""

import json
import pickle
import pickletools
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mip.config import Ingest
from mip.data import images, masks, samples, sources
from mip.data.export import NAMES, export
from mip.errors import ConfigError, DataError, SchemaError
from mip.tables import Row, file_hash, read_rows, write_table
from mip.toybox.shards import DEFECTS, make
from tests.closure import ROOT
from tests.data import worlds


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points of this checkout, whatever is installed."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mip.sources"]
    known = [EntryPoint(name, value, "mip.sources") for name, value in named.items()]
    monkeypatch.setattr(sources, "entry_points", lambda group: known)


@dataclass(frozen=True)
class Run:
    """What the first stages made of a source."""

    root: Path
    samples: list[Row]
    rejected: dict[str, list[Row]]  # by stage

    @property
    def objects(self) -> dict[str, dict[str, tuple[str, float]]]:
        """Caption -> label -> run lengths and logit."""
        return {s["caption"]: {o["label"]: (o["rle"], o["logit"]) for o in s["objects"]} for s in self.samples}


def _run(kit, root: Path, source: str, options: dict[str, Any]) -> Run:
    benchmark = worlds.write_concept101(root / "benchmark")
    config = Ingest.model_validate(
        {
            "source": source,
            "options": {"shard_size": 10} | options,
            "benchmark": str(benchmark),
            "benchmark_kind": "concept101",
            "validation": None,
            "validation_kind": "concept101",
            "benchmark_name": "test",
            "prompts_per_combination": 1,
            "combinations": None,
            "validation_prompts_per_combination": 1,
            "validation_combinations": None,
            "variant": "official",
            "seed": 1,
        }
    )
    index = sources.ingest(config, out=root / "index", work=root / "work")
    labels = index / "source" / "labels"
    for part in sorted(index.glob("part-*.parquet")):
        found = masks.extract_shard(kit.extract(max_pixels=100_000), index_part=part, out=root / "masks")
        inputs = {"index_part": part, "masks_part": found, "labels_folder": labels}
        samples.construct_shard(kit.construct(), **inputs, out=root / "samples")
    masks.finish(index=index, out=root / "masks")  # checks that no image got lost
    samples.finish(index=index, out=root / "samples")
    rejected = {s: read_rows(root / s / "rejected.parquet", "rejected") for s in ("index", "masks", "samples")}
    return Run(root, read_rows(root / "samples", "samples"), rejected)


def _zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for name, data in worlds.subject_files().items():
            archive.writestr(f"subject_dataset_10k/{name}", data)
    return folder.with_suffix(".zip")


def _coco(folder: Path) -> dict[str, Any]:
    worlds.write_coco(folder)
    return {"annotations": str(folder / "instances.json"), "images": str(folder / "images"), "captions": None}


SOURCES: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "own": ("own", lambda folder: {"folder": str(worlds.write_own(folder))}),
    "coco": ("coco", _coco),
    "subject dataset": (
        "subject10k",
        lambda folder: {"path": str(worlds.write_files(folder, worlds.subject_files())), "names": None},
    ),
    "subject dataset in a zip": ("subject10k", lambda folder: {"path": str(_zipped(folder)), "names": None}),
}


@pytest.mark.parametrize("case", SOURCES)
def test_every_source_goes_through_the_stages_unchanged(kit, tmp_path: Path, case: str):
    source, bring = SOURCES[case]
    run = _run(kit, tmp_path / "run", source, bring(tmp_path / "d"))
    assert run.rejected == {"index": [], "masks": [], "samples": []}
    for name, sample in zip("ab", run.samples, strict=True):
        assert {o["label"]: o["rle"] for o in sample["objects"]} == {
            label: worlds.rle(name, place) for place, label in enumerate(worlds.LABELS[name])
        }
        assert np.array_equal(np.asarray(images.load(sample)), np.asarray(worlds.picture(name)))
        assert sample["caption"] == ("a ball and a cup", "a star and a fish")["ab".index(name)]


def test_what_is_made_does_not_depend_on_where_the_data_stay(kit, tmp_path: Path):
    folder = worlds.write_own(tmp_path / "d")
    run = _run(kit, tmp_path / "run", "own", {"folder": str(folder)})
    hashed = file_hash(run.root / "index" / "source")
    folder.rename(tmp_path / "moved")
    assert images.load(run.samples[0]).size == worlds.SIZE
    again = _run(kit, tmp_path / "again", "own", {"folder": str(tmp_path / "moved")})
    assert file_hash(again.root / "index" / "source") == hashed


def test_pictures_are_spread_over_shards_of_the_stated_size(kit, tmp_path: Path):
    options = {"folder": str(worlds.write_own(tmp_path / "d")), "shard_size": 1}
    run = _run(kit, tmp_path / "run", "own", options)
    assert [sample["shard"] for sample in run.samples] == ["000000", "000001"]


def test_what_is_wrong_is_counted_once_and_the_rest_is_kept(kit, tmp_path: Path):
    rows = worlds.own_rows()
    rows[0].update(label="", score=7)  # two things are wrong with one object
    rows.append({"image": "none.png", "label": "ball", "rle": "x"})
    run = _run(kit, tmp_path / "run", "own", {"folder": str(worlds.write_own(tmp_path / "d", rows))})
    assert [(row["unit"], row["id"], row["reason"]) for row in run.rejected["index"]] == [
        ("object", "metadata.jsonl: row 1", "bad_label"),
        ("image", "images/none.png", "missing_file"),
    ]
    assert [sample["image_id"] for sample in run.samples] == ["b"]
    assert kit.reasons(run.rejected["samples"], "image") == ["too_few_objects"]


def test_a_source_of_which_nothing_can_be_used_is_an_error(kit, tmp_path: Path):
    folder = worlds.write_own(tmp_path / "d", [{"image": "none.png", "label": "x", "rle": "x"}])
    with pytest.raises(DataError, match="no image of the source can be used; `mip data validate`"):
        _run(kit, tmp_path / "run", "own", {"folder": str(folder)})


@pytest.mark.parametrize("case", SOURCES)
def test_an_unknown_option_is_an_error_that_names_it(case: str):
    with pytest.raises(ConfigError, match="foldr"):
        sources.create(SOURCES[case][0], {"foldr": "x"})


def test_rendered_scenes_as_coco_become_samples(kit, tmp_path: Path):
    scenes = [made for n in range(40) if len((made := make(3, n, dict.fromkeys(DEFECTS, 0.0))).labels) == 2][:8]
    names = sorted({label for made in scenes for label in made.labels})
    (tmp_path / "images").mkdir()
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
    }
    for made in scenes:
        height, width = made.rendering.image.shape[:2]
        Image.fromarray(made.rendering.image).save(tmp_path / "images" / f"{made.image_id}.png")
        content["images"].append(
            {"id": made.image_id, "file_name": f"{made.image_id}.png", "width": width, "height": height}
        )
        for mask, label in zip(made.rendering.masks, made.labels, strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]),
                    "image_id": made.image_id,
                    "category_id": names.index(label),
                    "segmentation": {"size": [height, width], "counts": images.encode_mask(mask)},
                }
            )
    (tmp_path / "scenes.json").write_text(json.dumps(content))
    options = {"annotations": str(tmp_path / "scenes.json"), "images": str(tmp_path / "images"), "captions": None}
    run = _run(kit, tmp_path / "run", "coco", options)
    true = {str(made.image_id): made for made in scenes}
    assert len(run.samples) >= 4 and not run.rejected["index"] and not run.rejected["masks"]
    for sample in run.samples:
        made = true[sample["image_id"]]
        assert {o["label"]: o["rle"] for o in sample["objects"]} == {
            label: images.encode_mask(mask) for mask, label in zip(made.rendering.masks, made.labels, strict=True)
        }


# Export --------------------------------------------------------------------------------------------------------------


def _manifest(path: Path, rows: list[Row]) -> Path:
    added = {"text_image": [1.0], "image_image": [0.0], "score": 1.0, "rank": 1, "phash": "0", "weight": 1.0}
    return write_table(path, "manifest", [{**row, **added, "models": "{}"} for row in rows], {})


def test_what_is_exported_is_read_back_as_it_was(kit, tmp_path: Path):
    before = _run(kit, tmp_path / "run", "own", {"folder": str(worlds.write_own(tmp_path / "d"))})
    out = tmp_path / "published"
    done = export(_manifest(tmp_path / "train.parquet", before.samples), out)
    assert (done.samples, done.objects, done.overlapping) == (2, 4, 0)
    after = _run(kit, tmp_path / "again", "subject10k", {"path": str(out), "names": None})
    assert after.rejected == {"index": [], "masks": [], "samples": []}
    assert after.objects == before.objects
    for one, other in zip(before.samples, after.samples, strict=True):
        assert np.array_equal(np.asarray(images.load(one)), np.asarray(images.load(other)))
        assert [o["box"] for o in one["objects"]] == [o["box"] for o in other["objects"]]


def test_an_export_has_the_released_layout(kit, tmp_path: Path):
    run = _run(kit, tmp_path / "run", "own", {"folder": str(worlds.write_own(tmp_path / "d"))})
    out = tmp_path / "published"
    export(_manifest(tmp_path / "train.parquet", run.samples), out)
    names = pickle.loads((out / NAMES).read_bytes())
    assert names == ["000000-a", "000000-b"]
    protocols = [opcode.proto for opcode, _, _ in pickletools.genops((out / NAMES).read_bytes())]
    assert max(protocols) <= 4
    content = json.loads((out / "jsons" / "000000-a.json").read_text())
    assert content["text"] == "a ball and a cup" and content["original_size"] == [64, 48]
    assert content["final_masks"][0] == {"value": 0, "label": "background"}
    first = content["final_masks"][1]
    assert first == {"value": 1, "label": "ball", "logit": 0.9, "box": [4.0, 4.0, 28.0, 40.0]}
    with Image.open(out / "masks" / "000000-a.png") as mask, Image.open(out / "images" / "000000-a.png") as image:
        assert (mask.mode, image.mode, mask.size) == ("L", "RGB", image.size)
        assert np.array_equal(np.asarray(mask), worlds.mask("a"))


def _overlapping(run: Run, boxes: list[tuple[int, int, int, int]]) -> list[Row]:
    row = run.samples[0]
    things = []
    for thing, (x1, y1, x2, y2) in zip(row["objects"], boxes, strict=True):
        mask = np.zeros((row["height"], row["width"]), np.bool_)
        mask[y1:y2, x1:x2] = True
        things.append({**thing, "rle": images.encode_mask(mask), "area": int(mask.sum()), "box": [x1, y1, x2, y2]})
    return [{**row, "objects": things}]


def test_of_overlapping_objects_the_smaller_one_is_on_top(kit, tmp_path: Path):
    run = _run(kit, tmp_path / "run", "own", {"folder": str(worlds.write_own(tmp_path / "d"))})
    rows = _overlapping(run, [(10, 10, 20, 20), (0, 0, 40, 40)])
    assert export(_manifest(tmp_path / "train.parquet", rows), tmp_path / "out").overlapping == 1
    levels = np.asarray(Image.open(tmp_path / "out" / "masks" / "000000-a.png"))
    assert (levels == 1).sum() == 100 and (levels == 2).sum() == 1500


def test_an_export_that_fails_leaves_nothing(kit, tmp_path: Path):
    run = _run(kit, tmp_path / "run", "own", {"folder": str(worlds.write_own(tmp_path / "d"))})
    rows = _overlapping(run, [(0, 0, 20, 20), (0, 0, 20, 20)])
    with pytest.raises(DataError, match="lies wholly under others"):
        export(_manifest(tmp_path / "train.parquet", [run.samples[1], *rows]), tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    with pytest.raises(SchemaError, match="expected 'manifest'"):
        export(tmp_path / "run" / "index" / "tasks.parquet", tmp_path / "out")
    with pytest.raises(DataError, match="which exists"):
        export(tmp_path / "train.parquet", tmp_path / "run")


# The command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(mip):
    return partial(mip, "data")


def test_validate_ends_with_0_for_clean_data_1_for_problems_and_2_for_wrong_use(call, tmp_path: Path):
    folder = worlds.write_own(tmp_path / "d")
    code, said, _ = call("validate", folder)
    assert code == 0 and said == f"{folder} (own): 2 images and 4 objects can be used; 0 problems\n"
    rows = worlds.own_rows()
    rows[2]["label"] = rows[3]["label"] = ""
    worlds.write_rows(folder, rows)
    code, said, _ = call("validate", folder)
    assert code == 1 and "metadata.jsonl: row 3: bad_label: got label None; expected" in said
    assert said.splitlines()[-1].endswith("3 problems: 2 bad_label, 1 no_annotations")
    for wrong in ([tmp_path / "none"], [tmp_path], [folder, "--names", folder]):
        code, said, errors = call("validate", *wrong)
        assert code == 2 and not said and len(errors.strip().splitlines()) == 1, errors
    assert call("validate")[0] == 2


def test_export_says_what_it_wrote_and_refuses_in_one_line(kit, call, tmp_path: Path):
    run = _run(kit, tmp_path / "run", "own", {"folder": str(worlds.write_own(tmp_path / "d"))})
    table = _manifest(tmp_path / "train.parquet", run.samples)
    code, said, _ = call("export", table, tmp_path / "out")
    assert code == 0 and "2 samples, 4 objects, 0 partly under another one" in said
    code, _, errors = call("export", table, tmp_path / "out")
    assert code == 2 and "which exists" in errors and len(errors.strip().splitlines()) == 1
    assert call("validate", tmp_path / "out")[0] == 0
