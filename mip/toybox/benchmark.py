"""A benchmark laid out as Concept101, of identities that no training has seen, and scenes to calibrate a judge on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from mip.errors import ConfigError
from mip.evaluation.benchmarks import read_concept101
from mip.tables import Row, atomic, write_json, write_table, write_text
from mip.toybox.scenes import (
    BACKGROUNDS,
    CLASSES,
    GREY,
    PLACES,
    STUDIO,
    Identity,
    Image,
    Rendering,
    Scene,
    Split,
    Thing,
    compose,
    draw_scene,
    identities,
    render,
)

PHOTOS = 4  # reference images of a concept
_PHOTO_SIZE = 128  # pixels
_BOX_FRAME = 800  # Concept101 gives boxes in the image resized to this shorter side
_PER_CLASS = 4  # concepts of each class
TEMPLATES = {  # by the number of objects
    2: ("a {0} and a {1} ", "a {0} next to a {1} "),
    3: ("a {0}, a {1} and a {2} ", "a photo of a {0}, a {1} and a {2} "),
}
CHECKS = ("right", "swapped", "blended", "missing")
_SCENES = 4  # of each combination
_SCENE_SIZE = 64  # pixels


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


def combinations(split: Split, seed: int, count: int, *, objects: int) -> list[tuple[Concept, ...]]:
    """Concepts of different classes that share no colour: what is to be told apart must differ."""
    rng = np.random.default_rng([seed, 8])
    known = sorted(concepts(split, seed), key=lambda concept: concept.name)
    usable = [
        group
        for group in itertools.combinations(known, objects)
        if len({concept.name for concept in group}) == objects
        and len({colour for c in group for colour in {c.identity.primary, c.identity.secondary}}) == 2 * objects
    ]
    if len(usable) < count:
        raise ConfigError(f"got {count} combinations of {objects} objects ({split}); there are {len(usable)}")
    chosen = [usable[i] for i in rng.permutation(len(usable))[:count]]
    return [tuple(group[i] for i in rng.permutation(objects)) for group in chosen]


def write_benchmark(folder: Path, *, split: Split, seed: int, count: int, objects: int) -> None:
    """Write dataset_multiconcept.json, prompts/, benchmark_dataset/ and json_data/ for `count` combinations."""
    places = [PLACES[background] for background in BACKGROUNDS]
    for turn in range(len(places)):
        turned = places[turn:] + places[:turn]
        lines = [template + place for place in turned for template in TEMPLATES[objects]]
        # The first prompts of a combination then differ in place and in wording.
        write_text(folder / "prompts" / f"toy_{turn}.txt", "\n".join(lines[::3] + lines[1::3] + lines[2::3]) + "\n")
    entries: list[list[dict[str, Any]]] = []
    used: dict[str, Concept] = {}
    for number, group in enumerate(combinations(split, seed, count, objects=objects)):
        used.update({concept.folder: concept for concept in group})
        entries.append(
            [
                *({"class_prompt": c.name, "instance_data_dir": f"./benchmark_dataset/{c.folder}"} for c in group),
                {"prompt_filename_compose": f"prompts/toy_{number % len(places)}.txt"},
            ]
        )
    write_json(folder / "dataset_multiconcept.json", entries)
    for concept in used.values():
        for photo in range(PHOTOS):
            _write_photo(folder, concept, photo, seed)


class Rendered(NamedTuple):
    """A benchmark's task and a scene for it."""

    task: Row
    scene: Scene


def _scenes_of(benchmark: Path, *, split: Split, seed: int, prompts: int = _SCENES) -> list[Rendered]:
    """Each combination's first prompts with scenes that show them right."""
    tasks, _ = read_concept101(
        benchmark, variant="official", prompts_per_combination=prompts, combinations=None, seed=seed
    )
    known = {concept.folder: concept.identity for concept in concepts(split, seed)}
    made: list[Rendered] = []
    for number, task in enumerate(tasks):
        rng = np.random.default_rng([seed, 9, number])
        names = [reference["name"] for reference in task["references"]]
        chosen = [known[reference["concept"]] for reference in task["references"]]
        background = next(b for b in BACKGROUNDS if task["prompt"].endswith(PLACES[b]))
        made.append(Rendered(task, draw_scene(rng, names, chosen, background=background)))
    return made


def write_calibration(folder: Path, benchmark: Path, *, split: Split, seed: int) -> None:
    """The tasks rendered right, with the identities of their references: images/<task_id>.png, tasks.parquet."""
    _write_scenes(folder, _scenes_of(benchmark, split=split, seed=seed), seed)


def write_checks(folder: Path, benchmark: Path, *, split: Split, seed: int) -> None:
    """The tasks rendered right and wrong, to examine a judge: checks-right, checks-swapped, ... under `folder`.

    Blended are objects that wear another's first colour in place of their own second one.
    """
    for kind in CHECKS:
        scenes = _scenes_of(benchmark, split=split, seed=seed)
        changed = [one._replace(scene=replace(one.scene, things=_changed(one.scene.things, kind))) for one in scenes]
        _write_scenes(folder / f"checks-{kind}", changed, seed)


def write_layouts(folder: Path, benchmark: Path, *, split: Split, seed: int, prompts: int) -> None:
    """Grey scenes that give the places of a task's objects and nothing of their looks, with their masks.

    images/<task_id>.png, masks/<task_id>.npz (masks_NYX, in the order of the references), tasks.parquet.
    """
    grey = Identity(GREY, GREY, "plain", stretch=1.0)
    scenes = [
        one._replace(scene=replace(one.scene, things=tuple(replace(t, identity=grey) for t in one.scene.things)))
        for one in _scenes_of(benchmark, split=split, seed=seed, prompts=prompts)
    ]
    for one, drawn in zip(scenes, _write_scenes(folder, scenes, seed), strict=True):
        with atomic(folder / "masks" / f"{one.task['task_id']}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, masks_NYX=np.stack(drawn.masks))


def _changed(things: tuple[Thing, ...], kind: str) -> tuple[Thing, ...]:
    """The things with what is wrong with them, if anything."""
    if kind == "right":
        return things
    if kind == "missing":
        return things[1:]
    changed = []
    for thing, other in zip(things, things[1:] + things[:1], strict=True):
        own, theirs = thing.identity, other.identity
        pattern = own.pattern if own.pattern != "plain" else "stripes"
        blend = replace(own, secondary=theirs.primary, pattern=pattern)
        changed.append(replace(thing, identity=theirs if kind == "swapped" else blend))
    return tuple(changed)


def _write_scenes(folder: Path, scenes: Sequence[Rendered], seed: int) -> list[Rendering]:
    drawn = [render(one.scene, width=_SCENE_SIZE, height=_SCENE_SIZE) for one in scenes]
    for one, rendering in zip(scenes, drawn, strict=True):
        _write_png(folder / "images" / f"{one.task['task_id']}.png", rendering.image)
    rows = [{**one.task, "references": [_movable(r, folder.parent) for r in one.task["references"]]} for one in scenes]
    write_table(folder / "tasks.parquet", "tasks", rows, {"toybox": str(seed)})
    return drawn


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
