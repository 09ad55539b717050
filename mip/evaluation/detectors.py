"""Who finds the objects in a generated image, and how they are cut out of it.

Parameters choose the detector: a semantic segmentation model or a zero-shot detector, both networks of transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)

from mip.config import SegmentationDetector, ZeroShotDetector
from mip.data.images import WHITE, pad_square
from mip.errors import DataError
from mip.evaluation.encoders import load_network, load_processor

Mask = NDArray[np.bool_]

_NMS_IOU = 0.5  # two boxes of one class that overlap more are one object


@dataclass(frozen=True, eq=False)
class Detection:
    """An object that was found."""

    label: str
    score: float  # 0 to 1
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels; x2 and y2 are exclusive
    mask: Mask | None  # of the image's height and width


class Detector(Protocol):
    """Finds objects by the names of their classes."""

    def detect(self, images: Sequence[Image.Image], labels_per_image: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Every object of those classes, for each image; several of one class where there are several."""
        ...


def load_detector(config: SegmentationDetector | ZeroShotDetector, *, device: str, batch: int) -> Detector:
    """The detector that the parameters describe. Raises CheckpointError where its weights cannot be read."""
    if isinstance(config, SegmentationDetector):
        return Segmentation(config, device=device, batch=batch)
    return ZeroShot(config, device=device)


class Segmentation:
    """A semantic segmentation model: every connected region of a class that is large and sure enough is a detection.

    The score of a region is its mean probability times its share of the class's pixels in the image, so that of several
    regions of a class the main one ranks first.
    """

    def __init__(self, config: SegmentationDetector, *, device: str, batch: int) -> None:
        self.config, self.batch = config, batch
        self.processor = load_processor(AutoImageProcessor, config.model, backend="pil")
        self.model = load_network(AutoModelForSemanticSegmentation, config.model, device=device)
        self.classes = {label.lower(): number for number, label in self.model.config.id2label.items()}

    def detect(self, images: Sequence[Image.Image], labels_per_image: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """As the protocol says. Raises DataError for a class that the model does not know."""
        for labels in labels_per_image:
            if unknown := [label for label in labels if label.lower() not in self.classes]:
                known = ", ".join(sorted(self.classes))
                raise DataError(f"got class {unknown[0]!r}, which {self.config.model} does not know; it knows {known}")
        found: list[list[Detection]] = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            for image, logits_KHW in zip(part, self._logits(part), strict=True):
                found.append(self._regions(logits_KHW, image.size, labels_per_image[len(found)]))
        return found

    @torch.no_grad()
    def _logits(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values
        return self.model(pixels.to(device=self.model.device, dtype=self.model.dtype)).logits.float().cpu()

    def _regions(self, logits_KHW: Tensor, size: tuple[int, int], labels: Sequence[str]) -> list[Detection]:
        width, height = size
        logits_KYX = torch.nn.functional.interpolate(logits_KHW[None], size=(height, width), mode="bilinear")[0]
        probability_KYX = logits_KYX.softmax(dim=0).numpy()
        winner_YX = probability_KYX.argmax(axis=0)
        found = []
        for label in dict.fromkeys(labels):
            number = self.classes[label.lower()]
            of_class_YX = winner_YX == number
            for mask_YX, box in _components(of_class_YX, min_area=self.config.min_area * width * height):
                mean = float(probability_KYX[number][mask_YX].mean())
                if mean >= self.config.threshold:
                    found.append(Detection(label, mean * float(mask_YX.sum() / of_class_YX.sum()), box, mask_YX))
        return sorted(found, key=lambda detection: -detection.score)


class ZeroShot:
    """A zero-shot detector (OWLv2, Grounding DINO); it is asked for the names as they stand."""

    def __init__(self, config: ZeroShotDetector, *, device: str) -> None:
        self.config = config
        self.processor = load_processor(AutoProcessor, config.model)
        self.model = load_network(AutoModelForZeroShotObjectDetection, config.model, device=device)
        self.is_grounding = "grounding" in self.model.config.model_type

    def detect(self, images: Sequence[Image.Image], labels_per_image: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """As the protocol says; one image at a time, since each has names of its own."""
        pairs = zip(images, labels_per_image, strict=True)
        return [self._detect_one(image.convert("RGB"), list(dict.fromkeys(labels))) for image, labels in pairs]

    @torch.no_grad()
    def _detect_one(self, image: Image.Image, labels: list[str]) -> list[Detection]:
        asked = [label.lower() for label in labels]
        inputs = self.processor(images=[image], text=[asked], return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        sizes = [(image.height, image.width)]
        own: dict[str, Any] = {"input_ids": inputs["input_ids"]} if self.is_grounding else {"text_labels": [asked]}
        (result,) = self.processor.post_process_grounded_object_detection(
            outputs, threshold=self.config.threshold, target_sizes=sizes, **own
        )
        numbers = [nearest_label(text, asked) for text in result["text_labels"]]
        named = torch.tensor([number is not None for number in numbers], dtype=torch.bool)
        classes = torch.tensor([number for number in numbers if number is not None], dtype=torch.long)
        boxes, scores = result["boxes"].cpu().float()[named], result["scores"].cpu().float()[named]
        return [
            Detection(labels[int(classes[i])], float(scores[i]), _inside(boxes[i].tolist(), image.size), mask=None)
            for i in batched_nms(boxes, scores, classes, _NMS_IOU).tolist()
        ]


def nearest_label(text: str, labels: Sequence[str]) -> int | None:
    """Number of the label that shares most words with a grounding detector's answer; None where none shares any."""
    words = set(text.lower().split())
    shared = [len(words & set(label.split())) / len(words | set(label.split())) for label in labels]
    best = max(range(len(labels)), key=lambda number: shared[number], default=None)
    return best if best is not None and shared[best] > 0 else None


def crop(image: Image.Image, detection: Detection) -> Image.Image:
    """The object alone on a white square: cut to its mask if it has one, else to its box."""
    width, height = image.size
    x1, y1 = max(0, int(detection.box[0])), max(0, int(detection.box[1]))
    x2, y2 = min(width, max(x1 + 1, round(detection.box[2]))), min(height, max(y1 + 1, round(detection.box[3])))
    pixels = np.asarray(image.convert("RGB"))[y1:y2, x1:x2]
    if detection.mask is not None:
        pixels = np.where(detection.mask[y1:y2, x1:x2, None], pixels, np.uint8(WHITE))
    return pad_square(Image.fromarray(pixels), fill=WHITE)


def _components(mask_YX: Mask, *, min_area: float) -> list[tuple[Mask, tuple[float, float, float, float]]]:
    """Connected regions of at least that many pixels, with their boxes, the largest first."""
    count, numbers_YX, stats, _ = cv2.connectedComponentsWithStats(mask_YX.astype(np.uint8), connectivity=8)
    regions = []
    for number in sorted(range(1, count), key=lambda n: -stats[n, cv2.CC_STAT_AREA]):
        if stats[number, cv2.CC_STAT_AREA] >= min_area:
            x, y, w, h = (float(v) for v in stats[number, :4])
            regions.append((numbers_YX == number, (x, y, x + w, y + h)))
    return regions


def _inside(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    (x1, y1, x2, y2), (width, height) = box, size
    x1, y1 = min(max(x1, 0.0), width - 1.0), min(max(y1, 0.0), height - 1.0)
    return x1, y1, min(max(x2, x1 + 1), float(width)), min(max(y2, y1 + 1), float(height))
