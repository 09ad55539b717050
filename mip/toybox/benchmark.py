"""A benchmark laid out as Concept101, of identities that no training has seen, and scenes to calibrate a judge on."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mip.evaluation.benchmarks import read_concept101
from mip.tables import Row, atomic, write_json, write_table, write_text
from mip.toybox.scenes import (
    BACKGROUNDS,
    CLASSES,
    PLACES,
    STUDIO,
    Identity,
    Image,
    Scene,
    Split,
    compose,
    draw_scene,
    identities,
    render,
)

PHOTOS = 4  # reference images of a concept
_PHOTO_SIZE = 128  # pixels
_BOX_FRAME = 800  # Concept101 gives boxes in the image resized to this shorter side
_PER_CLASS = 4  # concepts of each class
TEMPLATES = ("a {0} and a {1} ", "a {0} next to a {1} ")


@dataclass(frozen=True)
class Concept:
    """One identity of one class; `folder` names it."""

    folder: str
    name: str
    identity: Identity


def concepts(split: Split, seed: int) -> list[Concept]:
    """The split's concepts, `_PER_CLASS` of each class, of identities as different as the split has."""
    rng = np.random.default_rng([seed, 7])
    pool = list(identities(split))
    order = [pool[i] for i in rng.permutation(len(pool))]
    made = []
    for number in range(_PER_CLASS):
        for kind, name in enumerate(CLASSES):
            identity = order[(number * len(CLASSES) + kind) % len(order)]
            made.append(
                Concept(f"toy_{name}{number + 1}", name, replace(identity, stretch=float(rng.uniform(0.9, 1.1))))
            )
    return made


def pairs(split: Split, seed: int, count: int) -> list[tuple[Concept, Concept]]:
    """Pairs of different classes whose two colours are all different: what is to be told apart must differ."""
    rng = np.random.default_rng([seed, 8])
    known = concepts(split, seed)
    usable = [
        (a, b)
        for a in known
        for b in known
        if a.name < b.name
        and not {a.identity.primary, a.identity.secondary} & {b.identity.primary, b.identity.secondary}
    ]
    chosen = [usable[i] for i in rng.permutation(len(usable))[:count]]
    return [(b, a) if rng.random() < 0.5 else (a, b) for a, b in chosen]


def write_benchmark(folder: Path, *, split: Split, seed: int, combinations: int) -> None:
    """Write dataset_multiconcept.json, prompts/, benchmark_dataset/ and json_data/ for the split's identities."""
    places = [PLACES[background] for background in BACKGROUNDS]
    for turn in range(len(places)):
        turned = places[turn:] + places[:turn]
        lines = [template + place for place in turned for template in TEMPLATES]
        # The first prompts of a combination then differ in place and in wording.
        write_text(folder / "prompts" / f"toy_{turn}.txt", "\n".join(lines[::3] + lines[1::3] + lines[2::3]) + "\n")
    entries: list[list[dict[str, Any]]] = []
    used: dict[str, Concept] = {}
    for number, pair in enumerate(pairs(split, seed, combinations)):
        used.update({concept.folder: concept for concept in pair})
        entries.append(
            [
                *({"class_prompt": c.name, "instance_data_dir": f"./benchmark_dataset/{c.folder}"} for c in pair),
                {"prompt_filename_compose": f"prompts/toy_{number % len(places)}.txt"},
            ]
        )
    write_json(folder / "dataset_multiconcept.json", entries)
    for concept in used.values():
        for photo in range(PHOTOS):
            _write_photo(folder, concept, photo, seed)


def write_calibration(folder: Path, benchmark: Path, *, split: Split, seed: int) -> None:
    """The tasks rendered right, with the identities of their references: images/<task_id>.png, tasks.parquet."""
    tasks, _ = read_concept101(benchmark, variant="official", prompts_per_combination=4, combinations=None, seed=seed)
    known = {concept.folder: concept.identity for concept in concepts(split, seed)}
    for number, task in enumerate(tasks):
        rng = np.random.default_rng([seed, 9, number])
        names = [reference["name"] for reference in task["references"]]
        chosen = [known[reference["concept"]] for reference in task["references"]]
        background = next(b for b in BACKGROUNDS if task["prompt"].endswith(PLACES[b]))
        scene = draw_scene(rng, names, chosen, background=background)
        _write_png(folder / "images" / f"{task['task_id']}.png", render(scene, width=64, height=64).image)
    rows = [{**task, "references": [_movable(r, folder.parent) for r in task["references"]]} for task in tasks]
    write_table(folder / "tasks.parquet", "tasks", rows, {"toybox": str(seed)})


def _movable(reference: Row, root: Path) -> Row:
    """With paths relative to the folder above the calibration scenes: the whole of it may be moved."""
    return {**reference, "images": [Path(image).relative_to(root).as_posix() for image in reference["images"]]}


def _write_photo(folder: Path, concept: Concept, number: int, seed: int) -> None:
    rng = np.random.default_rng([seed, 10, CLASSES.index(concept.name), int(concept.folder[-1]), number])
    scene: Scene = draw_scene(rng, [concept.name], [concept.identity], background=STUDIO)
    scene = replace(scene, things=(replace(scene.things[0], half=float(rng.uniform(0.22, 0.32)), x=0.5, y=0.5),))
    drawn = render(scene, width=_PHOTO_SIZE, height=_PHOTO_SIZE)
    _write_png(folder / "benchmark_dataset" / concept.folder / f"{number}.png", drawn.image)
    ys, xs = np.nonzero(drawn.masks[0])
    ratio = _BOX_FRAME / _PHOTO_SIZE
    box = [float(edge * ratio) for edge in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
    masks = [{"value": 0, "label": "background"}, {"value": 1, "label": concept.name, "logit": 0.9, "box": box}]
    write_json(
        folder / "json_data" / concept.folder / f"{number}.json",
        {"caption": compose([concept.name], "wall"), "mask": masks},
    )


def _write_png(path: Path, image: Image) -> None:
    done, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert done
    with atomic(path) as temporary:
        temporary.write_bytes(encoded.tobytes())
