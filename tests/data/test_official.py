"""The public loader's flaws, each on its own and without recorded data; tests/parity has the whole."""

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from mip.data.official import (
    Annotation,
    LostObjects,
    NoValidBox,
    choose_boxes,
    cropped_box,
    cut_entity,
    draw_start,
    draw_view,
    dropped,
    fill_cavity,
    find_name,
    prepare,
    reference_pixels,
    top_left,
)

LEFT, RIGHT = (5.0, 10.0, 35.0, 50.0), (45.0, 10.0, 75.0, 50.0)


def annotated(*labels: str, boxes=(LEFT, RIGHT), logits=(0.9, 0.8), caption: str = "a cat and a dog") -> Annotation:
    content = {
        "text": caption,
        "original_size": [160, 120],
        "final_masks": [
            {"value": 0, "label": "background"},
            *({"label": n, "logit": s, "box": b} for n, s, b in zip(labels, logits, boxes, strict=True)),
        ],
    }
    return Annotation.of(content)


def segments(*values: int, boxes=(LEFT, RIGHT)) -> np.ndarray:
    """Each object fills its box but for a margin of two pixels."""
    mask_HW = np.zeros((60, 80), np.uint8)
    for value, (x1, y1, x2, y2) in zip(values, boxes, strict=True):
        mask_HW[int(y1) + 2 : int(y2) - 2, int(x1) + 2 : int(x2) - 2] = value
    return mask_HW


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (annotated("cat", "dog"), [0, 1]),
        (annotated("cat", "dog", logits=(0.4, 0.8)), [1, 0]),
        (annotated("cat", "dog", logits=(0.9, 0.3)), [0]),
        (annotated("Cat", "dog"), [1]),
        (annotated("ca", "dog"), [0, 1]),
        (annotated("a cat", "dog"), [1]),
        (annotated("cat", "dog", boxes=(LEFT, (6.0, 11.0, 35.0, 50.0))), [0]),
        (annotated("cat", "dog", boxes=(LEFT, (45.0, 10.0, 75.0, 19.0))), [0]),
    ],
)
def test_boxes_are_chosen_by_the_public_rules(annotation: Annotation, expected: list[int]):
    assert choose_boxes(annotation, segments(1, 2)) == expected


def test_the_lowest_value_is_taken_for_background():
    # Both boxes are full: the majority of the left one is its lowest value.
    mask_HW = np.full((60, 80), 7, np.uint8)
    mask_HW[20:30, 5:35] = 9
    assert choose_boxes(annotated("cat", boxes=(LEFT,), logits=(0.9,)), mask_HW) == [0]


def test_filling_loses_the_last_pixels_and_closes_holes():
    mask_HW = np.zeros((6, 6), np.bool_)
    mask_HW[1:5, 1:5] = True
    mask_HW[2, 2] = False
    expected_HW = np.zeros_like(mask_HW)
    expected_HW[1:4, 1:4] = True
    assert np.array_equal(fill_cavity(mask_HW), expected_HW)


def test_a_cropped_box_ends_with_its_last_pixel():
    outside_HW = np.ones((60, 60), np.uint8)
    outside_HW[10:31, 5:16] = 0
    assert cropped_box(outside_HW) is None  # 10 x 20 is not more than 200
    outside_HW[10:31, 16] = 0
    assert cropped_box(outside_HW) == (5, 10, 16, 30)
    assert cropped_box(np.ones_like(outside_HW)) is None


def test_an_odd_padding_leaves_one_pixel():
    alone_HW3 = cut_entity(np.zeros((60, 60, 3), np.uint8), np.ones((60, 60), np.bool_), (5, 10, 16, 30))
    assert alone_HW3.shape == (20, 19, 3) and (alone_HW3[:, 4:15] == 0).all() and (alone_HW3[:, 15:] == 255).all()


def test_rejected_boxes_constrain_the_crop_as_well():
    boxes = [LEFT, RIGHT]
    assert draw_start(Random(0), boxes, width=80, height=60) is None
    start = draw_start(Random(0), boxes[:1], width=80, height=60)
    assert start is not None and 0 <= start[0] <= 5 and start[1] == 0
    assert top_left(None, width=80, height=60, size=100) == (-20, -10)


def test_exactly_the_sum_of_the_rates_is_still_dropped():
    assert dropped(0.15) == (True, True) and dropped(0.1501) == (False, False)
    assert dropped(0.0499) == (True, False) and dropped(0.05) == (False, True)


def test_the_last_place_is_not_searched():
    assert find_name([1, 2, 3, 4], [2, 3]) == (1, 2)
    assert find_name([1, 2, 3, 4], [3, 4]) == (-1, 2)
    assert find_name([1, 2], []) == (0, 0)


@pytest.mark.parametrize("antialias", [True, False])
def test_reference_pixels_are_mirrored_and_cut(antialias: bool):
    alone_HW3 = np.random.default_rng(0).integers(0, 256, (226, 224, 3), np.uint8)
    plain, mirrored = (
        reference_pixels(alone_HW3, offset=(1, 0), is_mirrored=flag, antialias=antialias) for flag in (False, True)
    )
    assert plain.shape == (3, 224, 224) and torch.equal(plain.flip(-1), mirrored)
    # Nothing is resized here: the shorter side has the right length.
    expected = (alone_HW3[1, 0, 0] / 255 - 0.48145466) / 0.26862954
    assert float(plain[0, 0, 0]) == pytest.approx(expected, abs=1e-5)


def test_a_crop_of_the_right_size_uses_up_one_random_number():
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    _, offset = draw_view(generators[0], height=224, width=224)
    torch.rand(1, generator=generators[1])
    assert offset == (0, 0) and torch.equal(*(torch.rand(1, generator=g) for g in generators))


def test_a_sample_is_prepared_or_says_what_it_lacks():
    image, boxes = Image.new("RGBA", (80, 60)), ((5.0, 10.0, 30.0, 50.0), (33.0, 10.0, 58.0, 50.0))
    mask = Image.fromarray(segments(1, 2, boxes=boxes))

    def run(*labels: str, size: int = 60, caption: str = "a cat and a dog"):
        annotation = annotated(*labels, boxes=boxes, caption=caption)
        return prepare(annotation, image, mask, size=size, rng=Random(0), max_objects=2)

    assert [entity.name for entity in run("cat", "dog").entities] == ["cat", "dog"]
    with pytest.raises(NoValidBox):
        run("cat", "dog", caption="")
    with pytest.raises(LostObjects, match="got cat, cat"):
        run("cat", "cat")
    with pytest.raises(LostObjects, match="no object"):
        run("cat", "dog", size=20)
