"""What the public evaluation reads, without recorded data; tests/parity has the rest."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mip.evaluation.official import scored_caption, scored_files, square_reference


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("a cat.", "a cat."),
        ("a cat. ", "a cat."),
        ("a cat", "a cat_gen."),
        ("a cat. And a dog.", "a cat."),
    ],
)
def test_a_caption_ends_at_the_first_dot_of_the_file_name(prompt: str, caption: str):
    assert scored_caption(prompt) == caption


def test_a_repeated_prompt_has_one_image():
    assert scored_files(["a.", "b.", "a."]) == ["a._gen.png", "b._gen.png"]


def test_a_reference_is_cut_shrunk_and_centred_on_white(tmp_path: Path):
    Image.new("RGB", (1600, 800), "black").save(tmp_path / "photo.png")
    pixels_HW3 = np.asarray(square_reference(tmp_path / "photo.png", [100.9, 100.2, 1000.7, 550.4], size=100))
    assert pixels_HW3.shape == (100, 100, 3)
    assert (pixels_HW3[25:75] == 0).all() and (pixels_HW3[:25] == 255).all() and (pixels_HW3[75:] == 255).all()


def test_a_cut_that_is_too_long_fails(tmp_path: Path):
    Image.new("RGB", (1600, 800)).save(tmp_path / "photo.png")
    with pytest.raises(ValueError):
        square_reference(tmp_path / "photo.png", [0, 0, 1600, 3], size=224)
