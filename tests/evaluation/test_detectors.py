"""Detections from networks: regions, duplicates, boxes, crops."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
    SwinConfig,
)

from mip.config import SegmentationDetector, ZeroShotDetector
from mip.errors import CheckpointError, DataError
from mip.evaluation.detectors import Detection, Segmentation, crop, load_detector, nearest_label
from mip.evaluation.encoders import load_network

CAT, DOG = 1, 2


class _Painted(Segmentation):
    """A segmenter that sees what the test paints: class numbers by pixel."""

    painted_YX = np.zeros((16, 16), int)
    confidence = 20.0

    def _logits(self, images):
        one_hot_YXK = np.eye(4)[self.painted_YX] * self.confidence
        return torch.tensor(one_hot_YXK).permute(2, 0, 1)[None].float().expand(len(images), -1, -1, -1)


@pytest.fixture
def segmenter(networks: SimpleNamespace) -> _Painted:
    config = SegmentationDetector(kind="segmentation", model=networks.segmenter, threshold=0.5, min_area=0.02)
    return _Painted(config, device="cpu", batch=2)


@pytest.fixture
def painted(segmenter: _Painted) -> np.ndarray:
    """The picture to paint on."""
    segmenter.painted_YX = np.zeros((16, 16), int)
    return segmenter.painted_YX


def _see(segmenter: Segmentation, labels: list[str]) -> list[Detection]:
    return segmenter.detect([Image.new("RGB", (16, 16))], [labels])[0]


def test_a_region_becomes_a_detection_with_box_and_mask(segmenter: _Painted, painted: np.ndarray):
    painted[2:6, 3:9] = CAT
    (found,) = _see(segmenter, ["cat", "dog"])
    assert (found.label, found.box) == ("cat", (3, 2, 9, 6)) and found.score > 0.99
    assert found.mask is not None and found.mask.sum() == 24


def test_every_region_of_a_class_counts_the_largest_first(segmenter: _Painted, painted: np.ndarray):
    painted[0:3, 0:3] = CAT
    painted[8:14, 8:14] = CAT
    assert [found.box for found in _see(segmenter, ["cat"])] == [(8, 8, 14, 14), (0, 0, 3, 3)]


def test_small_regions_are_noise(segmenter: _Painted, painted: np.ndarray):
    painted[0, 0:5] = CAT
    assert _see(segmenter, ["cat"]) == []


def test_unsure_regions_are_noise(segmenter: _Painted, painted: np.ndarray):
    painted[0:8, 0:8] = CAT
    segmenter.confidence = 0.5
    assert _see(segmenter, ["cat"]) == []


def test_only_the_classes_that_are_asked_for_are_found(segmenter: _Painted, painted: np.ndarray):
    painted[0:8, 0:8] = DOG
    assert _see(segmenter, ["cat"]) == []


def test_a_class_that_the_segmenter_does_not_know_is_an_error(segmenter: _Painted):
    with pytest.raises(DataError, match=r"got class 'zebra'.* it knows background, cat, cup, dog"):
        _see(segmenter, ["zebra"])


def test_a_real_network_answers_for_images_of_any_size(networks: SimpleNamespace):
    config = SegmentationDetector(kind="segmentation", model=networks.segmenter, threshold=0.0, min_area=0.0)
    detector = load_detector(config, device="cpu", batch=2)
    images = [Image.new("RGB", size) for size in ((16, 16), (20, 30), (32, 8))]
    found = detector.detect(images, [["cat", "dog", "cup", "background"]] * 3)
    for image, of_image in zip(images, found, strict=True):
        assert of_image and all(d.mask is not None and d.mask.shape == image.size[::-1] for d in of_image)


def test_a_crop_shows_the_object_on_a_white_square():
    mask_YX = np.zeros((10, 10), bool)
    mask_YX[2:4, 1:7] = True
    mask_YX[3, 1] = False
    pixels = np.asarray(crop(Image.new("RGB", (10, 10), "red"), Detection("cat", 1.0, (1, 2, 7, 4), mask_YX)))
    assert pixels.shape == (6, 6, 3) and (pixels == (255, 0, 0)).all(axis=-1).sum() == 11
    assert (pixels[3, 0] == 255).all()


def test_without_a_mask_the_box_is_the_crop():
    image = crop(Image.new("RGB", (10, 10), "red"), Detection("cat", 1.0, (1.2, 2.0, 7.0, 20.0), None))
    assert image.size == (8, 8)


def test_a_grounding_answer_goes_to_the_label_that_shares_its_words():
    labels = ["wooden pot", "cat"]
    assert [nearest_label(text, labels) for text in ("pot", "cat", "wooden pot", "tree", "")] == [0, 1, 0, None, None]


@pytest.fixture
def owl(tmp_path: Path) -> str:
    """A random OWLv2 of the smallest size."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=16)
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Owlv2Config(
        text_config={**tower, "vocab_size": len(words), "max_position_embeddings": 16},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    Owlv2ForObjectDetection(config).save_pretrained(tmp_path / "owl")
    processor = Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    processor.save_pretrained(tmp_path / "owl")
    return str(tmp_path / "owl")


def test_a_zero_shot_detector_answers_with_boxes_inside_the_image(owl: str):
    detector = load_detector(ZeroShotDetector(kind="zero_shot", model=owl, threshold=0.0), device="cpu", batch=2)
    images = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (32, 32), "blue")]
    found = detector.detect(images, [["cat", "Dog"], ["cup"]])
    assert {d.label for d in found[0]} <= {"cat", "Dog"} and {d.label for d in found[1]} == {"cup"}
    for image, of_image in zip(images, found, strict=True):
        for one in of_image:
            x1, y1, x2, y2 = one.box
            assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height and one.mask is None


@pytest.fixture
def grounding(tmp_path: Path) -> str:
    """A random Grounding DINO of the smallest size."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage2", "stage3", "stage4"],  # pyright: ignore[reportCallIssue]
    )
    bert = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    config = GroundingDinoConfig(
        backbone_config=swin.to_dict(),
        text_config=bert.to_dict(),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        num_queries=5,
        encoder_n_points=1,
        decoder_n_points=1,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(tmp_path / "dino")
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 192})
    GroundingDinoProcessor(images, BertTokenizer(str(tmp_path / "vocab.txt"))).save_pretrained(tmp_path / "dino")
    return str(tmp_path / "dino")


def test_a_grounding_detector_answers_with_the_labels_that_were_asked_for(grounding: str):
    detector = load_detector(ZeroShotDetector(kind="zero_shot", model=grounding, threshold=0.0), device="cpu", batch=1)
    (found,) = detector.detect([Image.new("RGB", (40, 30), "red")], [["cat", "Dog"]])
    assert found and {one.label for one in found} <= {"cat", "Dog"}


def test_a_network_that_lacks_weights_is_refused(networks: SimpleNamespace, tmp_path: Path):
    folder = Path(shutil.copytree(networks.vit, tmp_path / "vit"))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if "layernorm.weight" not in key}, folder / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"without weights for layernorm.weight"):
        load_network(AutoModel, str(folder), device="cpu")


def test_weights_that_are_not_there_are_an_error_in_one_line(tmp_path: Path):
    config = ZeroShotDetector(kind="zero_shot", model=str(tmp_path / "nothing"), threshold=0.4)
    with pytest.raises(CheckpointError, match=r"cannot be loaded|usable"):
        load_detector(config, device="cpu", batch=1)
