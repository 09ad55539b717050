"""Metrics, preprocessing, reference crops and scored captions against the public evaluation."""

import re
from collections import defaultdict
from typing import Any

import numpy as np
import open_clip
import pytest
from transformers import ViTImageProcessorPil

from mip.data.official import find_name
from mip.evaluation.benchmarks import read_concept101
from mip.evaluation.encoders import vit_pixels
from mip.evaluation.metrics import clip_t, reference_likeness
from mip.evaluation.official import scored_caption, scored_files, square_reference
from tests.parity.golden import SHARED, Case, Ledger, load_tokenizer, photograph, photograph_path

SCORES = 1e-6
PIXELS = 0.02  # one gray level, normalised
IMAGENET = ViTImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


def test_the_published_metrics_agree(scores_case: Case, ledger: Ledger):
    recorded = {name: tensor.numpy() for name, tensor in scores_case.tensors.items()}
    text, deviation, image, dino = [], [], [], []
    for c in range(scores_case.params["combinations"]):
        scores = clip_t(recorded[f"comb{c}.gen_clip"], recorded[f"comb{c}.prompt_clip"])
        text.append(scores.mean())
        deviation.append(scores.std())
        for kind, values in (("clip", image), ("dino", dino)):
            names = sorted(name for name in recorded if re.fullmatch(rf"comb{c}\.ref\d+_{kind}", name))
            photos = [recorded[name] for name in names]
            values.append(reference_likeness(recorded[f"comb{c}.gen_{kind}"], photos).mean(axis=0))
    ledger.compare(scores_case, "clip_t_per_comb", text, atol=SCORES)
    ledger.compare(scores_case, "clip_t_std_per_comb", deviation, atol=SCORES)
    ledger.compare(scores_case, "clip_i_per_comb_entity", image, atol=SCORES)
    ledger.compare(scores_case, "dino_per_comb_entity", dino, atol=SCORES)
    final = [np.mean(text), np.mean([values.mean() for values in image]), np.mean([values.mean() for values in dino])]
    ledger.compare(scores_case, "final", final, atol=SCORES)


def test_encoders_see_the_published_pixels(preprocess_case: Case, ledger: Ledger):
    photo, side = photograph(preprocess_case.params["image"]), preprocess_case.tensors["clip"].shape[-1]
    transform: Any = open_clip.image_transform(side, is_train=False)
    ledger.compare(preprocess_case, "clip", transform(photo), atol=PIXELS)
    pixels = vit_pixels(photo, size=side, mean=IMAGENET.image_mean, std=IMAGENET.image_std)
    ledger.compare(preprocess_case, "dino", pixels, atol=PIXELS)


def test_references_are_cut_as_published(crop_case: Case, ledger: Ledger):
    for name, box in crop_case.params["boxes"].items():
        side = crop_case.tensors[name].shape[0]
        square = square_reference(photograph_path(name), box, size=side)
        ledger.compare(crop_case, name, np.asarray(square), atol=1)


def test_names_are_found_in_the_prompt_of_the_crops(crop_case: Case):
    params = crop_case.params
    assert places(params["prompt"], params["entity_names"]) == params["entity_indexes"]


@pytest.fixture(scope="module")
def tasks() -> list[dict[str, Any]]:
    """Of the published benchmark as it is."""
    folder = SHARED / "concept101"
    if not folder.is_dir():
        pytest.skip(f"no Concept101 in {SHARED}; set MIP_SHARED to its parent")
    official, dropped = read_concept101(
        folder, variant="official", prompts_per_combination=10**6, combinations=None, seed=420, needs_images=False
    )
    assert dropped == []
    return official


def test_prompts_and_captions_are_the_published_ones_in_order(prompts_case: Case, tasks: list[dict[str, Any]]):
    rows = prompts_case.params["rows"]
    assert len(tasks) == len(rows) == prompts_case.params["total"]
    for task, row in zip(tasks, rows, strict=True):
        expected = [row[key] for key in ("comb_idx", "prompt", "evaluated_caption", "entity_names", "concepts")]
        references = task["references"]
        ours = [task["combination"], task["prompt"], task["caption"]]
        assert [*ours, [r["name"] for r in references], [r["concept"] for r in references]] == expected


def test_captions_come_from_file_names(prompts_case: Case):
    rows = prompts_case.params["rows"]
    assert [scored_caption(row["prompt"]) for row in rows] == [row["evaluated_caption"] for row in rows]
    changed = sum(row["prompt"] != scored_caption(row["prompt"]) for row in rows)
    assert changed == prompts_case.params["changed_captions"]
    by_combination = defaultdict(list)
    for row in rows:
        by_combination[row["comb_idx"]].append(row["prompt"])
    assert len(by_combination) == prompts_case.params["combinations"]
    assert sum(len(scored_files(of)) for of in by_combination.values()) == prompts_case.params["unique_files"]


def test_names_are_found_in_the_published_prompts(prompts_case: Case):
    for row in prompts_case.params["rows"]:
        assert places(row["prompt"], row["entity_names"]) == row["entity_indexes"]


def places(prompt: str, names: list[str]) -> list[list[int]]:
    """Place and number of tokens of each name; the public benchmark gives (1, 1) for one that is not there."""
    tokenizer = load_tokenizer("tokenizer")
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    found = [find_name(ids, tokenizer(name, add_special_tokens=False).input_ids) for name in names]
    return [[1, 1] if place < 0 else [place, length] for place, length in found]
