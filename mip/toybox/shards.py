"""SA-1B shards of rendered scenes: tars of jpg and json with COCO run lengths, and the clutter that SA-1B has.

Masks carry no class. Beside the objects there are their parts, regions of background, tiny specks and loose outlines
of the same object. A stated share of the images has a defect that a good object quality score should find: a wrong
label, two objects that look alike, an object cut off by the border.
"""

import io
import json
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from pycocotools import mask as coco

from mip.tables import atomic, write_text
from mip.toybox.scenes import CLASSES, Mask, Rendering, Scene, compose, draw_identity, draw_scene, render

Defect = Literal["wrong_label", "look_alike", "cut_off"]
DEFECTS: tuple[Defect, ...] = ("wrong_label", "look_alike", "cut_off")
SIZES = ((128, 96), (96, 128), (112, 112))  # width, height
_COUNTS = (0.1, 0.6, 0.3)  # shares of scenes with one, two and three objects


@dataclass(frozen=True)
class Made:
    """One image of a shard with all that is written about it."""

    image_id: int
    scene: Scene
    rendering: Rendering
    labels: tuple[str, ...]
    defect: Defect | None


def make(seed: int, image_id: int, shares: dict[Defect, float]) -> Made:
    """Draw image `image_id`; `shares` is the part of all images that gets each defect."""
    rng = np.random.default_rng([seed, image_id])
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    side = min(width, height)
    number = int(rng.choice(3, p=_COUNTS)) + 1
    names = [CLASSES[i] for i in rng.permutation(len(CLASSES))[:number]]
    chosen = [draw_identity(rng, "train") for _ in names]
    draw, defect = rng.random(), None
    for candidate in DEFECTS:
        if 0 <= draw < shares[candidate] and number > 1:
            defect = candidate
        draw -= shares[candidate]
    if defect == "look_alike":
        chosen = [chosen[0]] * number
    scene = draw_scene(rng, names, chosen, aspect=(width / side, height / side))
    if defect == "cut_off":
        first = scene.things[0]
        moved = replace(
            first, x=-0.15 * first.half if first.x < 0.5 * width / side else width / side + 0.15 * first.half
        )
        scene = replace(scene, things=(moved, *scene.things[1:]))
    labels = names
    if defect == "wrong_label":
        others = [name for name in CLASSES if name not in names]
        labels = [others[int(rng.integers(len(others)))], *names[1:]]
    return Made(image_id, scene, render(scene, width=width, height=height), tuple(labels), defect)


def write_shard(folder: Path, *, number: int, seed: int, images: int, shares: dict[Defect, float]) -> None:
    """Write shards/sa_NNNNNN.tar, its labels and, for those who want to check a score, the planted defects."""
    name = f"sa_{number:06d}"
    lines, truth = [], []
    with (
        atomic(folder / "shards" / f"{name}.tar") as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for image_id in range(number * images + 1, (number + 1) * images + 1):
            made = make(seed, image_id, shares)
            annotations, label_rows = _annotate(made, np.random.default_rng([seed, image_id, 1]))
            height, width = made.rendering.image.shape[:2]
            stem = f"sa_{image_id}"
            header = {"image_id": image_id, "width": width, "height": height, "file_name": f"{stem}.jpg"}
            _add(tar, f"{stem}.jpg", _jpeg(made))
            _add(tar, f"{stem}.json", json.dumps({"image": header, "annotations": annotations}).encode())
            text = compose(made.labels, made.scene.background)
            lines.append(json.dumps({"image_id": stem, "caption": text, "labels": label_rows}))
            truth.append(json.dumps({"image_id": stem, "defect": made.defect}))
    write_text(folder / "labels" / f"{name}.labels.jsonl", "\n".join(lines) + "\n")
    write_text(folder / "truth" / f"{name}.jsonl", "\n".join(truth) + "\n")


def _jpeg(made: Made) -> bytes:
    flags = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(made.rendering.image, cv2.COLOR_RGB2BGR), flags)
    assert done
    return encoded.tobytes()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner and time stay zero: same seed, same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _annotate(made: Made, rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """SA-1B annotations in random order, and the labels of those that show a whole object."""
    height, width = made.rendering.image.shape[:2]
    objects = [(mask, label) for mask, label in zip(made.rendering.masks, made.labels, strict=True) if mask.sum() >= 8]
    masks: list[tuple[Mask, str | None, float]] = [(mask, label, rng.uniform(0.92, 1.0)) for mask, label in objects]
    masks += [(part, None, rng.uniform(0.85, 0.97)) for part in made.rendering.parts if part.sum() >= 8]
    masks += [(_loose(mask), None, rng.uniform(0.8, 0.9)) for mask, _ in objects if rng.random() < 0.3]
    taken = np.any([mask for mask, _ in objects] or [np.zeros((height, width), bool)], axis=0)
    masks.append((~taken, None, rng.uniform(0.88, 1.0)))
    horizon = np.zeros((height, width), bool)
    horizon[int(rng.uniform(0.3, 0.7) * height) :] = True
    masks.append((horizon & ~taken, None, rng.uniform(0.8, 0.95)))
    for x, y in rng.integers((0, 0), (width - 3, height - 3), (int(rng.integers(1, 4)), 2)):
        speck = np.zeros((height, width), bool)
        speck[y : y + 2, x : x + 2] = True
        masks.append((speck, None, rng.uniform(0.8, 0.9)))
    annotations, labels = [], []
    for place in rng.permutation(len(masks)):
        mask, label, iou = masks[int(place)]
        number = len(annotations) + 1
        annotations.append(_annotation(number, mask, iou, float(rng.uniform(0.92, 1.0))))
        if label is not None:
            labels.append({"object_id": str(number), "label": label, "logit": round(float(rng.uniform(0.35, 0.95)), 4)})
    return annotations, labels


def _loose(mask: Mask) -> Mask:
    """The same object with a margin, as a second mask of it."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)


def _annotation(number: int, mask: Mask, iou: float, stability: float) -> dict[str, Any]:
    counts = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert isinstance(counts, bytes)
    ys, xs = np.nonzero(mask)
    height, width = mask.shape
    box = [
        int(xs.min()),
        int(ys.min()),
        int(xs.max() - xs.min()),
        int(ys.max() - ys.min()),
    ]  # SA-1B's width is xmax - xmin
    return {
        "id": number,
        "segmentation": {"size": [height, width], "counts": counts.decode()},
        "bbox": box,
        "area": int(mask.sum()),
        "predicted_iou": round(iou, 6),
        "stability_score": round(stability, 6),
        "crop_box": [0, 0, width, height],
        "point_coords": [[int(xs[len(xs) // 2]), int(ys[len(ys) // 2])]],
    }
