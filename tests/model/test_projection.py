"""The two projections and the strategy that tells the variants apart."""

import pytest
import torch

from mip.errors import CheckpointError, ConfigError
from mip.model.projection import (
    ImageProjection,
    Resampler,
    detect_variant,
    load_projection,
    variant_named,
)


@pytest.fixture
def resampler():
    torch.manual_seed(0)
    return Resampler(feature_width=8, tokens=5, context_width=12, width=16, depth=2, heads=2, ff_width=24)


def test_image_projection_gives_normalised_tokens_for_any_leading_axes():
    tokens_XRE = ImageProjection(feature_width=6, tokens=4, context_width=12)(torch.randn(2, 3, 6))
    assert tokens_XRE.shape == (2, 3, 4, 12)
    torch.testing.assert_close(tokens_XRE.mean(dim=-1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_resampler_takes_any_leading_axes(resampler, leading):
    assert resampler(torch.randn(*leading, 7, 8)).shape == (*leading, 5, 12)


def test_resampler_ignores_the_order_of_the_features(resampler):
    features_BSD = torch.randn(1, 7, 8)
    torch.testing.assert_close(resampler(features_BSD), resampler(features_BSD.flip(1)), atol=1e-5, rtol=0)


def test_sizes_are_read_from_the_weights(resampler):
    loaded = load_projection(variant_named("sdxl_plus"), resampler.state_dict())
    features_BSD = torch.randn(1, 7, 8)
    assert torch.equal(loaded(features_BSD), resampler(features_BSD))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_half_precision_weights_are_loaded_in_float32(resampler):
    loaded = load_projection(variant_named("sdxl_plus"), resampler.half().state_dict())
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}


def test_every_missing_and_unexpected_key_is_named(resampler):
    state = {k: v for k, v in resampler.state_dict().items() if k not in ("norm_out.bias", "layers.1.0.to_out.weight")}
    state["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        load_projection(variant_named("sdxl_plus"), state)
    for expected in ("missing norm_out.bias", "missing layers.1.0.to_out.weight", "unexpected extra"):
        assert expected in str(error.value)


def test_the_variant_is_detected_by_its_keys(resampler):
    assert detect_variant(resampler.state_dict()).name == "sdxl_plus"
    state = ImageProjection(feature_width=6, tokens=4, context_width=12).state_dict()
    assert detect_variant(state).name == "sdxl"
    with pytest.raises(CheckpointError, match="ImageProjModel"):
        detect_variant({"weight": torch.zeros(1)})


def test_an_unknown_variant_is_refused():
    with pytest.raises(ConfigError, match="sdxl, sdxl_plus"):
        variant_named("sd15")


def test_no_image_is_a_zero_output_in_sdxl_and_zero_pixels_in_sdxl_plus(make_image_encoder):
    encoder = make_image_encoder()
    pixels_X3HW = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not variant_named("sdxl").absent_features(encoder, pixels_X3HW).any()
        plus = variant_named("sdxl_plus")
        expected_XSD = plus.features(encoder, torch.zeros_like(pixels_X3HW))
        torch.testing.assert_close(plus.absent_features(encoder, pixels_X3HW), expected_XSD)


@pytest.mark.parametrize("name", ["sdxl", "sdxl_plus"])
def test_features_and_absent_features_have_one_shape(make_image_encoder, name):
    encoder, variant = make_image_encoder(), variant_named(name)
    pixels_X3HW = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = variant.features(encoder, pixels_X3HW)
        assert variant.absent_features(encoder, pixels_X3HW).shape == features.shape
