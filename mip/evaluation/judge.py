"""The judge: networks that no other part of the pipeline uses, asked about images and remembered by image hash."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from mip.config import Evaluate
from mip.data import openclip
from mip.data.images import WHITE, decode_mask, encode_mask, pad_square
from mip.errors import DataError
from mip.evaluation.benchmarks import load_reference
from mip.evaluation.breakdown import detect_and_compare, identity_margin, likeness
from mip.evaluation.confusion import (
    Array,
    Matching,
    Verdict,
    excess,
    has_same_class,
    judge,
    leak_threshold,
    match,
    reference_similarity,
    similarity,
)
from mip.evaluation.detectors import Detection, Detector, Mask, crop, load_detector
from mip.evaluation.encoders import FeatureCache, Floats, Vit, pick_device, version_of
from mip.tables import Row, check_kind, file_hash, read_rows, write_json, write_table

# Scenes rendered in a known way, and the verdict that each deserves.
CHECKS: Mapping[str, Callable[[Verdict], bool]] = {
    "right": lambda verdict: not verdict.is_confused,
    "swapped": lambda verdict: verdict.has_all and verdict.is_swapped,
    "blended": lambda verdict: verdict.has_all and (verdict.is_leaked or verdict.is_swapped),
    "missing": lambda verdict: not verdict.has_all,
}

Opener = Callable[[], Image.Image]


@dataclass(frozen=True)
class Drawn:
    """A task and the image that was drawn for it."""

    task: Row
    path: Path
    sha256: str

    @property
    def names(self) -> list[str]:
        """Classes of the references."""
        return [reference["name"] for reference in self.task["references"]]

    def open(self) -> Image.Image:
        """The image in RGB."""
        return _open(self.path)


@dataclass(frozen=True, eq=False)
class Finding:
    """What was found in one image, and how alike it is to the references."""

    detections: tuple[Detection, ...]
    matching: Matching
    s_NN: Array
    g_NN: Array
    detect_and_compare: float
    identity_margin: float

    def verdict(self, threshold: float) -> Verdict:
        """The verdict with this threshold of leaking."""
        return judge(self.s_NN, self.g_NN, extra=len(self.matching.extra), threshold=threshold)

    def masks_NYX(self) -> Mask | None:
        """Mask of each reference's object, empty where it was not found; None where the detector gives no masks."""
        masks = [None if number is None else self.detections[number].mask for number in self.matching.chosen]
        shape = next((mask.shape for mask in masks if mask is not None), None)
        if shape is None or any(n is not None and m is None for n, m in zip(self.matching.chosen, masks, strict=True)):
            return None
        return np.stack([np.zeros(shape, bool) if mask is None else mask for mask in masks])


class Judge:
    """Answers from networks, each loaded when it is first needed; `cache` keeps what they said from run to run."""

    def __init__(self, config: Evaluate, *, cache: Path) -> None:
        self.config, self.cache = config, cache
        self.device = pick_device(config.device)

    def clip_text(self, drawn: Sequence[Drawn]) -> Floats:
        """CLIP features (X, D) of what each image is compared with."""
        texts = [one.task["caption"] or one.task["prompt"] for one in drawn]
        unique = list(dict.fromkeys(texts))
        features = dict(zip(unique, self._clip.encode_texts(unique), strict=True))
        return np.stack([features[text] for text in texts])

    def clip_images(self, images: Mapping[str, Opener]) -> dict[str, Floats]:
        """CLIP features of whole images, by the images' hashes."""
        return self._encoded(self._clip_cache, images, self._clip.encode_images)

    def dino_images(self, images: Mapping[str, Opener]) -> dict[str, Floats]:
        """DINO features of whole images, by the images' hashes."""
        return self._encoded(self._dino_cache, images, lambda part: self._dino.encode_images(part))

    def findings(self, drawn: Sequence[Drawn]) -> list[Finding | None]:
        """What is found in each image; None where two references have one class."""
        judged = [one for one in drawn if not has_same_class(one.names)]
        detections = self._detect(judged)
        crops: dict[str, Opener] = {}
        references: dict[str, Opener] = {}
        matchings = {}
        for one in judged:
            found = detections[one.task["task_id"]]
            matching = match([d.label for d in found], [d.score for d in found], one.names)
            matchings[one.task["task_id"]] = matching
            crops |= {_crop_key(one, n): partial(_crop, one.path, detection) for n, detection in enumerate(found)}
            for reference in one.task["references"]:
                references |= reference_crops(reference)
        features = self._encoded(self._crop_cache, crops, lambda part: self._appearance.encode_images(part))
        known = self._encoded(self._look_cache, references, lambda part: self._appearance.encode_images(part))
        findings: dict[str, Finding] = {}
        for one in judged:
            chosen, found = matchings[one.task["task_id"]].chosen, detections[one.task["task_id"]]
            looks = [np.stack([known[key] for key in reference_crops(r)]) for r in one.task["references"]]
            found_features = [features[_crop_key(one, n)] for n in range(len(found))]
            findings[one.task["task_id"]] = Finding(
                detections=tuple(found),
                matching=matchings[one.task["task_id"]],
                s_NN=similarity([None if n is None else found_features[n] for n in chosen], looks),
                g_NN=reference_similarity(looks),
                detect_and_compare=detect_and_compare(found_features, looks),
                identity_margin=identity_margin(likeness(found_features, looks), [n is not None for n in chosen]),
            )
        return [findings.get(one.task["task_id"]) for one in drawn]

    def leak_threshold(self, index: Path) -> float:
        """The threshold of the parameters, or that of the calibration scenes (of the parameters, else of the source).

        Raises:
            DataError: there is neither.
        """
        if self.config.leak_threshold is not None:
            return self.config.leak_threshold
        given = self.config.calibration
        folder = Path(given) if given is not None else index / "source" / "calibration"
        if not folder.is_dir():
            raise DataError(
                f"there are no calibration scenes in {folder}; set evaluate.leak_threshold or evaluate.calibration"
            )
        found = [finding for finding in self.findings(rendered_scenes(folder)) if finding is not None]
        return leak_threshold(excess(finding.s_NN, finding.g_NN) for finding in found)

    def errors(self, index: Path, threshold: float) -> dict[str, float]:
        """Share of the source's checks that are judged wrong, by kind (`CHECKS`); empty where it brings none.

        Each has one right answer: nothing to blame, swapped, leaked but not missing, missing.
        """
        wrong = {}
        for kind, is_right in CHECKS.items():
            folder = index / "source" / f"checks-{kind}"
            if folder.is_dir():
                found = [finding for finding in self.findings(rendered_scenes(folder)) if finding is not None]
                wrong[kind] = float(np.mean([not is_right(finding.verdict(threshold)) for finding in found]))
        return wrong

    def versions(self) -> dict[str, str]:
        """What each network's answers depend on, as hashes."""
        appearance = version_of(torch, transformers, model=self.config.appearance)
        return {
            "clip": self._clip_version,
            "dino": self._dino_version,
            "detector": self._detector_version,
            "appearance": appearance,
        }

    def _detect(self, drawn: Sequence[Drawn]) -> dict[str, list[Detection]]:
        """Detections by task; those that are not known are made, a batch at a time."""
        path = self.cache / f"detections-{self._detector_version}.json"
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        missing = list({_detection_key(one): one for one in drawn if _detection_key(one) not in known}.values())
        for start in range(0, len(missing), self.config.batch):
            part = missing[start : start + self.config.batch]
            found = self._detector.detect([one.open() for one in part], [one.names for one in part])
            known |= {
                _detection_key(one): [_packed(d) for d in of_one] for one, of_one in zip(part, found, strict=True)
            }
        if missing:
            write_json(path, known)
        return {one.task["task_id"]: [_unpacked(d) for d in known[_detection_key(one)]] for one in drawn}

    def _encoded(
        self, features: FeatureCache, images: Mapping[str, Opener], encode: Callable[[Sequence[Image.Image]], Floats]
    ) -> dict[str, Floats]:
        encoded = features.encode(images, encode, chunk=self.config.batch)
        features.save()
        return encoded

    @cached_property
    def _clip(self) -> openclip.Encoder:
        return openclip.load(self.config.clip)  # pyright: ignore[reportArgumentType]  # frozen, so hashable

    @cached_property
    def _dino(self) -> Vit:
        return Vit(self.config.dino, device=self.device, batch=self.config.batch)

    @cached_property
    def _appearance(self) -> Vit:
        return Vit(self.config.appearance, device=self.device, batch=self.config.batch)

    @cached_property
    def _detector(self) -> Detector:
        return load_detector(self.config.detector, device=self.device, batch=self.config.batch)

    @cached_property
    def _clip_version(self) -> str:
        return version_of(torch, weights=self._clip.identity, name=self.config.clip.name)

    @cached_property
    def _dino_version(self) -> str:
        return version_of(torch, transformers, model=self.config.dino)

    @cached_property
    def _detector_version(self) -> str:
        return version_of(torch, transformers, **self.config.detector.model_dump())

    @cached_property
    def _clip_cache(self) -> FeatureCache:
        return FeatureCache(self.cache, name="clip", version=self._clip_version)

    @cached_property
    def _dino_cache(self) -> FeatureCache:
        return FeatureCache(self.cache, name="dino", version=self._dino_version)

    @cached_property
    def _look_cache(self) -> FeatureCache:
        return FeatureCache(
            self.cache, name="references", version=version_of(torch, transformers, model=self.config.appearance)
        )

    @cached_property
    def _crop_cache(self) -> FeatureCache:
        # A crop is known by its image and its number among the detections, so it depends on the detector too.
        version = version_of(torch, transformers, model=self.config.appearance, detector=self._detector_version)
        return FeatureCache(self.cache, name="crops", version=version)


def rendered_scenes(folder: Path) -> list[Drawn]:
    """Scenes that a source brings, with their references.

    The references' paths may be relative to the folder or to the one above it.

    Raises:
        DataError: an image is missing.
    """
    drawn = []
    for task in read_rows(folder / "tasks.parquet", "tasks"):
        path = folder / "images" / f"{task['task_id']}.png"
        if not path.exists():
            raise DataError(
                f"there is no {path}, which {folder / 'tasks.parquet'} names; give the scene or leave it out"
            )
        references = [
            {**reference, "images": [_located(image, folder) for image in reference["images"]]}
            for reference in task["references"]
        ]
        drawn.append(Drawn({**task, "references": references}, path, file_hash(path)))
    return drawn


def locate_tasks(folder: Path, like: Path, out: Path) -> Path:
    """Write out/tasks.parquet: the tasks of rendered scenes, with their references' files where they are.

    `like` is the index of the benchmark whose tasks they are.
    """
    tasks = [scene.task for scene in rendered_scenes(folder)]
    return write_table(out / "tasks.parquet", "tasks", tasks, check_kind(like / "tasks.parquet", "tasks"))


def reference_photos(reference: Row) -> dict[str, Opener]:
    """Whole photos of a reference by their hashes."""
    return {_hash(image): partial(load_reference, Path(image), None) for image in reference["images"]}


def reference_crops(reference: Row) -> dict[str, Opener]:
    """The reference's object, cut from each of its photos on a white square."""
    pairs = zip(reference["images"], reference["boxes"] or [[]] * len(reference["images"]), strict=True)
    return {f"{_hash(image)} {json.dumps(box)}": partial(_reference_crop, Path(image), box) for image, box in pairs}


@cache
def _hash(path: str) -> str:
    if not Path(path).is_file():
        raise DataError(f"there is no reference photo {path}; run ingest again, or put it there")
    return file_hash(Path(path))


def _located(image: str, folder: Path) -> str:
    places = (folder / image, folder.parent / image, Path(image))
    return next((place.as_posix() for place in places if place.is_file()), image)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _crop(path: Path, detection: Detection) -> Image.Image:
    return crop(_open(path), detection)


def _reference_crop(path: Path, box: Sequence[float]) -> Image.Image:
    return pad_square(load_reference(path, box), fill=WHITE)


def _crop_key(one: Drawn, number: int) -> str:
    return f"{_detection_key(one)} {number}"


def _detection_key(one: Drawn) -> str:
    return f"{one.sha256} {json.dumps(one.names)}"


def _packed(detection: Detection) -> dict[str, Any]:
    mask = detection.mask
    rle = None if mask is None else {"height": mask.shape[0], "width": mask.shape[1], "counts": encode_mask(mask)}
    return {**asdict(detection), "mask": rle}


def _unpacked(packed: Mapping[str, Any]) -> Detection:
    rle = packed["mask"]
    mask = None if rle is None else decode_mask(rle["counts"], width=rle["width"], height=rle["height"])
    return Detection(packed["label"], packed["score"], tuple(packed["box"]), mask)
