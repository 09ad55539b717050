"""The square crop and the reference image."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mip.data.images import encode_mask, mask_box
from mip.training.crops import Crop, crop_image, crop_mask, draw_crop, generator, reference_image, visible_share

sizes = st.integers(1, 60)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, int, list[list[float]]]:
    width, height = draw(sizes), draw(sizes)

    def box() -> list[float]:
        x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        return [x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))]

    return width, height, [box() for _ in range(draw(st.integers(1, 4)))]


@given(scenes(), st.integers(0, 99))
def test_crop_is_the_largest_square_inside_the_image(scene: tuple[int, int, list[list[float]]], seed: int):
    width, height, boxes = scene
    crop = draw_crop(generator(seed), width=width, height=height, boxes=boxes)
    assert crop.side == min(width, height)
    assert 0 <= crop.left <= width - crop.side
    assert 0 <= crop.top <= height - crop.side


@given(scenes(), st.integers(0, 99))
def test_crop_holds_all_boxes_wherever_a_square_of_its_size_can(scene: tuple[int, int, list[list[float]]], seed: int):
    width, height, boxes = scene
    crop = draw_crop(generator(seed), width=width, height=height, boxes=boxes)
    x1, x2, y1, y2 = (f(b[i] for b in boxes) for i, f in ((0, min), (2, max), (1, min), (3, max)))
    if x2 - x1 <= crop.side and y2 - y1 <= crop.side:
        assert crop.left <= x1 and x2 <= crop.left + crop.side
        assert crop.top <= y1 and y2 <= crop.top + crop.side


def test_boxes_too_far_apart_are_centred_on():
    crop = draw_crop(generator(0), width=100, height=20, boxes=[[10, 0, 20, 10], [60, 0, 70, 10]])
    assert crop == Crop(left=30, top=0, side=20)


def test_crops_reach_every_place_that_holds_the_boxes():
    drawn = {draw_crop(generator(seed), width=14, height=10, boxes=[[3, 0, 12, 9]]).left for seed in range(60)}
    assert drawn == {2, 3}


def test_original_size_and_crop_are_in_the_stored_images_pixels():
    crop = Crop(left=40, top=0, side=100)
    assert crop.time_ids(width=150, height=100, resolution=512) == (100, 150, 0, 40, 512, 512)


def test_crop_shows_its_part_of_the_image():
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 10:] = 200
    shown = np.asarray(crop_image(Image.fromarray(pixels), Crop(left=10, top=0, side=20), resolution=8))
    assert shown.shape == (8, 8, 3)
    assert (shown == 200).all()


def test_shrinking_a_crop_averages_instead_of_skipping_pixels():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    shown = np.asarray(crop_image(Image.fromarray(stripes), Crop(0, 0, 64), resolution=8)).astype(int)
    assert abs(shown - 127).max() < 12


def test_mask_is_cropped_with_the_image():
    mask = np.zeros((20, 30), np.bool_)
    mask[0:10, 10:20] = True
    crop = Crop(left=10, top=0, side=20)
    assert crop_mask(mask, crop, size=(2, 2)).tolist() == [[255, 0], [0, 0]]
    assert visible_share(mask, crop) == 1
    assert visible_share(mask, Crop(left=15, top=0, side=10)) == 0.5


def test_draws_depend_on_the_seed_and_the_names_only():
    assert generator(1, "a", 0).random() == generator(1, "a", 0).random()
    assert len({generator(*key).random() for key in ((1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0))}) == 4


def test_reference_is_the_object_alone_on_a_white_square():
    mask = np.zeros((10, 10), np.bool_)
    mask[2:8, 3:6] = True
    mask[2, 3] = False
    rle = encode_mask(mask)
    image = Image.fromarray(np.full((10, 10, 3), 7, np.uint8))
    shown = np.asarray(reference_image(image, rle=rle, box=mask_box(rle, width=10, height=10), is_mirrored=False))
    assert shown.shape == (6, 6, 3)
    assert (shown[..., 0] == 7).sum() == mask.sum()
    assert set(np.unique(shown)) == {7, 255}


def test_mirrored_reference_is_the_other_one_turned_round():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (10, 10, 3), np.uint8))
    rle = encode_mask(np.ones((10, 10), np.bool_))
    plain, mirrored = (
        np.asarray(reference_image(image, rle=rle, box=[1, 1, 9, 9], is_mirrored=flag)) for flag in (False, True)
    )
    assert (plain[:, ::-1] == mirrored).all()
