"""The public loader, as `mip.data.official` repeats it: who survives and why, boxes, names, crops, random draws."""

import json
import re
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mip.data import official
from mip.data.official import Annotation, LostObjects, NoValidBox, Prepared
from tests.parity.golden import GOLDEN, Case, Ledger, cases, load_tokenizer, manifest, read_json

CROPS = 2e-3  # stored in float16
SAMPLES = GOLDEN / "subject_samples"


def records() -> Any:
    return read_json(manifest().get("data_records", "data/records.json"))


@cache
def first_seed() -> int:
    """Seed of the first sample; those that follow count up, also over rejected ones, which state none."""
    numbers = {case.params["sample"]: case.params["number"] for case in cases() if case.kind == "data filter"}
    bases = {stated_seed(case) - numbers[case.params["sample"]] for case in cases() if case.kind == "data"}
    assert len(bases) == 1, f"got first seeds {bases}; expected one that all samples count up from"
    return bases.pop()


def stated_seed(case: Case) -> int:
    found = re.search(r"\d+", case.params["python_seed"])
    assert found is not None
    return int(found[0])


def annotation_of(sample: str) -> Annotation:
    return Annotation.of(json.loads((SAMPLES / "jsons" / f"{sample}.json").read_text(encoding="utf-8")))


@cache
def prepared(sample: str, size: int, seed: int) -> Prepared:
    """As the public code does with files; raises what it swallows."""
    annotation, files = annotation_of(sample), [SAMPLES / kind / f"{sample}.png" for kind in ("images", "masks")]
    with Image.open(files[0]) as image, Image.open(files[1]) as segments:
        return official.prepare(
            annotation,
            image,
            segments,
            size=size,
            rng=Random(seed),
            max_objects=records()["constants"]["max_num_objects"],
        )


def outcome(sample: str, size: int, seed: int) -> tuple[Prepared | None, str]:
    """What is left, and else where the public code gives up."""
    try:
        return prepared(sample, size, seed), ""
    except NoValidBox:
        return None, "verify_keys (no valid box)"
    except LostObjects:
        return None, "post_verify"
    except (OSError, KeyError, ValueError) as error:
        return None, f"exception in verify_keys: {type(error).__name__}"


def start_of(sample: str, seed: int) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """Start of the square crop and the image's size; drawn also for samples that are rejected later."""
    with Image.open(SAMPLES / "images" / f"{sample}.png") as image:
        size = image.size
    return official.draw_start(Random(seed), annotation_of(sample).boxes, width=size[0], height=size[1]), size


def encoded(prompt: str, names: Sequence[str], part: str = "tokenizer") -> list[list[int]]:
    """Place and number of tokens of each name."""
    tokenizer = load_tokenizer(part)
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    return [list(official.find_name(ids, tokenizer(n, add_special_tokens=False).input_ids)) for n in names]


def check_record(record: dict[str, Any], found: Prepared, annotation: Annotation) -> None:
    """Compare everything that the record says of a survivor."""
    ours = {
        "bbox_selects": list(found.chosen),
        "selected_labels": [annotation.labels[place] for place in found.chosen],
        "crop_coords_top_left": list(found.top_left),
        "entity_names": [entity.name for entity in found.entities],
        "bboxes_after_crop": [list(entity.box) for entity in found.entities],
        "crop_resized_hw": [list(official.resized_shape(entity.alone_HW3)) for entity in found.entities],
        "original_size": list(annotation.original_size),
        "prompt": annotation.caption,
        "tokenizer_entity_index": encoded(annotation.caption, [entity.name for entity in found.entities]),
    }
    recorded = {key: record[key] for key in ours.keys() & record.keys()}
    assert {key: ours[key] for key in recorded} == recorded


def test_who_survives_and_why_not(filter_case: Case):
    record, sample = dict(filter_case.params), filter_case.params["sample"]
    seed = first_seed() + record["number"]
    found, reason = outcome(sample, record["size"], seed)
    if record["survives"]:
        assert found is not None, reason
        check_record(record, found, annotation_of(sample))
        return
    assert found is None and record["rejected_in"].startswith(reason) and reason
    if "bbox_selects" in record:
        with Image.open(SAMPLES / "masks" / f"{sample}.png") as segments:
            chosen = official.choose_boxes(annotation_of(sample), np.asarray(segments))
        assert chosen == record["bbox_selects"]
        assert [annotation_of(sample).labels[place] for place in chosen] == record["selected_labels"]
    if "crop_coords_top_left" in record:
        start, (width, height) = start_of(sample, seed)
        ours = official.top_left(start, width=width, height=height, size=record["size"])
        assert list(ours) == record["crop_coords_top_left"]


def channels_first(values_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return values_HW3.transpose(2, 0, 1)


def test_a_survivor_is_cut_as_recorded(data_case: Case, ledger: Ledger):
    params = data_case.params
    found = prepared(params["sample"], params["size"], stated_seed(data_case))
    check_record(dict(params), found, annotation_of(params["sample"]))
    ours: dict[str, Any] = {
        "image_u8": channels_first(found.image_HW3),
        "segmap_values_u8": found.segments_HW,
        "box_masks_u8": np.stack([entity.outside_HW for entity in found.entities]),
        "object_segmap_u8": np.stack([entity.mask_HW for entity in found.entities]),
        # A literal 512 in the public code, whatever the size.
        "bbox_norm": torch.tensor([entity.box for entity in found.entities]) / 512,
    }
    ours |= {f"entity{n}.padded_u8": channels_first(entity.alone_HW3) for n, entity in enumerate(found.entities)}
    for name in ours.keys() & set(data_case.outputs):
        ledger.compare(data_case, name, ours[name])


def test_what_the_encoder_reads_is_as_recorded(data_case: Case, ledger: Ledger):
    params = data_case.params
    found = prepared(params["sample"], params["size"], stated_seed(data_case))
    for n, entity in enumerate(found.entities):
        for name, antialias in ((f"entity{n}.clip_image", True), (f"entity{n}.clip_image_no_antialias", False)):
            if name in data_case.outputs:
                offset = tuple(params["random_crop_offset"][n])
                pixels = official.reference_pixels(
                    entity.alone_HW3, offset=offset, is_mirrored=False, antialias=antialias
                )
                ledger.compare(data_case, name, pixels, atol=CROPS)


def drawn_views(found: Prepared, seed: int) -> list[tuple[bool, list[int]]]:
    """Mirroring and offset of each entity, drawn in turn."""
    generator, views = torch.Generator().manual_seed(seed), []
    for entity in found.entities:
        height, width = official.resized_shape(entity.alone_HW3)
        is_mirrored, offset = official.draw_view(generator, height=height, width=width)
        views.append((is_mirrored, list(offset)))
    return views


def test_offsets_are_those_of_the_seed(data_case: Case):
    params, seed = data_case.params, stated_seed(data_case)
    views = drawn_views(prepared(params["sample"], params["size"], seed), seed)
    assert [offset for _, offset in views] == params["random_crop_offset"]


def test_mirrored_entities_are_those_of_the_seed(flip_case: Case, ledger: Ledger):
    record, seed = flip_case.params, first_seed() + flip_case.params["number"]
    found = prepared(record["sample"], record["size"], seed)
    views = drawn_views(found, seed)
    assert [is_mirrored for is_mirrored, _ in views] == record["flipped"]
    assert [offset for _, offset in views] == record["random_crop_offset"]
    assert list(found.top_left) == record["crop_coords_top_left"]
    for entity, (is_mirrored, (top, left)), mean in zip(found.entities, views, record["clip_image_mean"], strict=True):
        pixels = official.reference_pixels(
            entity.alone_HW3, offset=(top, left), is_mirrored=is_mirrored, antialias=True
        )
        # A mean of 150 thousand values in float32.
        assert float(pixels.mean()) == pytest.approx(mean, abs=1e-5)
        ledger.note(flip_case.kind, "clip_image_mean", abs(float(pixels.mean()) - mean), 1e-5)


def test_dropout_follows_the_recorded_draws(dropout_case: Case):
    record = dropout_case.params
    is_image, is_text = official.dropped(record["random_value"])
    assert (is_image, is_text) == (bool(record["drop_image_embed"]), record["prompt"] == "")
    assert encoded(record["prompt"], record["entity_names"]) == record["tokenizer_entity_index"]


def test_names_are_looked_up_as_recorded(lookup_case: Case):
    record = lookup_case.params
    if "input_ids" in record:
        name = load_tokenizer("tokenizer")(record["entity"], add_special_tokens=False).input_ids
        for ids in record["input_ids"]:
            assert list(official.find_name(ids, name)) == record["result"]
        return
    for part in ("tokenizer", "tokenizer_2"):
        (found,) = encoded(record["prompt"], [record["entity"]], part)
        assert found == record[f"index_len_{part}"]


def test_the_limits_are_the_recorded_ones(limits_case: Case):
    ours = {
        "area_min": official.AREA[0],
        "area_max": official.AREA[1],
        "ratio_min": official.RATIO[0],
        "ratio_max": official.RATIO[1],
        "score": official.MIN_LOGIT,
        "contained_ratio": official.MAX_CONTAINED,
        "fill_bbox_ratio": official.MIN_FILL,
        "max_values_in_box": official.VALUES[1],
        "min_box_area_after_crop": official.MIN_CROPPED_AREA,
    }
    # How many objects are kept is an argument.
    assert ours == {key: value for key, value in limits_case.params.items() if key != "max_num_objects"}
