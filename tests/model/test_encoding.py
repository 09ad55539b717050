"""Names and images become what the adapter reads."""

import pytest
import torch
from PIL import Image

from mip.errors import ReferencesError
from mip.model.encoding import encode_names, encode_texts, image_pixels, name_tokens

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@pytest.fixture
def towers(build_pipeline):
    pipe = build_pipeline()
    return {
        "tokenizers": (pipe.tokenizer, pipe.tokenizer_2),
        "text_encoders": (pipe.text_encoder, pipe.text_encoder_2),
    }


def levels(pixels_3HW):
    return ((pixels_3HW * DEVIATION + MEAN) * 255).round()


def test_name_tokens_follow_bos(tokenizer):
    words_XT = name_tokens(["cat", "dog", "cat dog"], [tokenizer])
    assert [words_T.nonzero().flatten().tolist() for words_T in words_XT] == [[1], [1, 2, 3], [1, 2, 3, 4]]


@pytest.mark.parametrize("name", ["", "   ", "x" * 200])
def test_names_without_tokens_or_too_long_are_refused(tokenizer, name):
    with pytest.raises(ReferencesError, match="give one of 1 to 75 tokens"):
        name_tokens([name], [tokenizer])


def test_names_are_encoded_as_the_pipeline_encodes_a_prompt(build_pipeline, towers):
    with torch.no_grad():
        phrase_XTE, words_XT = encode_names(["cat", "dog"], **towers)
        prompt_XTE, *_ = build_pipeline().encode_prompt(["cat", "dog"], do_classifier_free_guidance=False)
    torch.testing.assert_close(phrase_XTE, prompt_XTE)
    assert words_XT.shape == phrase_XTE.shape[:2]


def test_a_name_is_encoded_alone_whatever_stands_beside_it(towers):
    with torch.no_grad():
        together_XTE, alone_XTE = encode_texts(["cat", ""], **towers), encode_texts(["cat"], **towers)
    torch.testing.assert_close(together_XTE[:1], alone_XTE)


def test_a_wide_image_is_padded_with_white_or_cut():
    image = Image.new("RGB", (64, 32), "black")
    padded_3HW = levels(image_pixels([image], size=16)[0])
    assert bool((padded_3HW[:, :3] == 255).all()) and bool((padded_3HW[:, 6:10] == 0).all())
    assert not levels(image_pixels([image], size=16, framing="centre_crop")[0]).any()


def test_transparency_becomes_white():
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert bool((levels(image_pixels([image], size=16)[0]) == 255).all())


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 8, 16))
    image.getexif()[0x0112] = 6  # stored turned: the left half is to be shown on top
    pixels_3HW = levels(image_pixels([image], size=16)[0])
    assert pixels_3HW[:, 1].max() < 10 and pixels_3HW[:, 14].min() > 245


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_any_mode_is_taken(mode):
    assert image_pixels([Image.new("RGB", (16, 16), "gray").convert(mode)], size=16).shape == (1, 3, 16, 16)


def test_unknown_framing_and_empty_images_are_refused():
    with pytest.raises(ReferencesError, match="framing='stretch'"):
        image_pixels([], size=16, framing="stretch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ReferencesError, match="0 x 4 pixels"):
        image_pixels([Image.new("RGB", (0, 4))], size=16)
