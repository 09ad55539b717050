import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from mip.data.images import (
    BLACK,
    WHITE,
    ImageError,
    ImageReason,
    RleError,
    check_rle,
    cutout,
    decode,
    decode_mask,
    encode_mask,
    is_safe_name,
    mask_area,
    mask_box,
    pad_square,
    read_bytes,
    run_lengths,
)
from mip.errors import DataError


def _random_mask(seed: int, height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).random((height, width))
    return coarse > 0.5 if seed % 2 else (np.add.outer(np.arange(height), np.arange(width)) % 17) < 5


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_agree_with_the_mask(seed: int):
    mask = _random_mask(seed, 23 + seed, 31)
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(int)))
    runs = run_lengths(encode_mask(mask))
    assert np.array_equal(np.cumsum(runs)[:-1], changes)
    assert runs.sum() == mask.size


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_survives_encoding(seed: int):
    mask = _random_mask(seed, 19, 40)
    assert np.array_equal(decode_mask(encode_mask(mask), width=40, height=19), mask)


def test_area_and_box_come_from_the_run_lengths():
    mask = np.zeros((10, 20), np.bool_)
    mask[2:5, 7:19] = True
    counts = encode_mask(mask)
    assert mask_area(counts, width=20, height=10) == 36
    assert mask_box(counts, width=20, height=10) == [7, 2, 19, 5]


@pytest.mark.parametrize("counts", ["", "abc\x7f", "!!", "oooo", "é", "PPPPPPPPPPPP0"])
def test_counts_that_are_no_run_lengths_are_refused(counts: str):
    with pytest.raises(RleError):
        check_rle(counts, width=10, height=10)


def test_counts_of_another_size_are_refused():
    counts = encode_mask(np.ones((10, 10), np.bool_))
    with pytest.raises(RleError, match="expected 10 x 11"):
        check_rle(counts, width=10, height=11)


def test_a_run_length_bomb_is_refused_before_it_is_decoded():
    bomb = coco.frPyObjects({"size": [30000, 30000], "counts": [450_000_000, 450_000_000]}, 30000, 30000)  # pyright: ignore
    with pytest.raises(RleError):
        decode_mask(bomb["counts"].decode(), width=64, height=64)  # pyright: ignore


def test_a_negative_run_is_refused():
    with pytest.raises(RleError):
        check_rle(chr(48 + 0b10000) + "T3", width=2, height=2)


def test_a_decompression_bomb_is_refused_unread():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(ImageError) as caught:
        decode(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT", max_pixels=10_000)
    assert caught.value.reason == ImageReason.TOO_LARGE


def test_an_image_over_the_limit_is_refused(kit):
    with pytest.raises(ImageError) as caught:
        decode(kit.jpeg(), max_pixels=64 * 64 - 1)
    assert caught.value.reason == ImageReason.TOO_LARGE


@pytest.mark.parametrize("keep", [0, 3, 100, 600])
def test_a_truncated_image_is_refused(kit, keep: int):
    with pytest.raises(ImageError) as caught:
        decode(kit.jpeg()[:keep], max_pixels=10_000)
    assert caught.value.reason == ImageReason.BROKEN


def test_an_image_of_another_size_than_stated_is_refused(kit):
    with pytest.raises(ImageError) as caught:
        decode(kit.jpeg(), max_pixels=10_000, size=(64, 65))
    assert caught.value.reason == ImageReason.WRONG_SIZE


def test_a_reduced_image_is_smaller_and_its_full_size_is_still_checked(kit):
    image = decode(kit.jpeg(size=(128, 96)), max_pixels=100_000, reduced=1, size=(128, 96))
    assert image.size == (16, 12)


def test_exif_rotation_is_applied():
    image, exif, buffer = Image.new("RGB", (40, 20)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.save(buffer, format="JPEG", exif=exif)
    assert decode(buffer.getvalue(), max_pixels=10_000, size=(20, 40)).size == (20, 40)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_every_mode_becomes_rgb(mode: str):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, format="JPEG")
    assert decode(buffer.getvalue(), max_pixels=100).mode == "RGB"


def test_reading_behind_the_end_of_a_file_is_an_error(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", offset=1, size=3) == b"234"
    with pytest.raises(DataError, match="got 2 bytes at 3, expected 3"):
        read_bytes(tmp_path / "a", offset=3, size=3)
    with pytest.raises(DataError, match="none below 0"):
        read_bytes(tmp_path / "a", offset=-1, size=3)
    with pytest.raises(DataError, match="no file"):
        read_bytes(tmp_path, offset=0, size=1)


@pytest.mark.parametrize("fill", [BLACK, WHITE])
def test_a_cutout_shows_the_mask_alone_on_a_centred_square(fill: int):
    image = Image.new("RGB", (20, 10), (10, 20, 30))
    mask = np.zeros((10, 20), np.bool_)
    mask[3, 4:9] = True
    mask[4, 4] = True  # the box is 5 x 2: three rows of padding, one above and two below
    pixels = np.asarray(cutout(image, rle=encode_mask(mask), box=[4, 3, 9, 5], fill=fill))
    expected = np.full((5, 5, 3), fill, np.uint8)
    expected[1, :] = expected[2, 0] = (10, 20, 30)
    assert np.array_equal(pixels, expected)


def test_the_odd_pixel_of_a_padding_is_right_or_below():
    square = np.asarray(pad_square(Image.new("RGB", (2, 5), "black"), fill=WHITE))
    assert [bool((square[:, x] == 0).all()) for x in range(5)] == [False, True, True, False, False]


def test_a_cutout_of_an_empty_box_is_an_error():
    mask = np.ones((10, 20), np.bool_)
    with pytest.raises(DataError, match="x1 < x2"):
        cutout(Image.new("RGB", (20, 10)), rle=encode_mask(mask), box=[4, 3, 4, 5], fill=BLACK)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "-rf", "a b", "a\n", "x" * 200, "é"])
def test_unsafe_names_are_known(name: str):
    assert not is_safe_name(name)
