"""Where frozen networks are looked for, and what is said when they are not there."""

import pytest
import torch

from mip.config import Models
from mip.errors import CheckpointError, ConfigError
from mip.model.checkpoint import find_adapter
from mip.training.networks import base_weights, device_named, identify, image_encoder_weights


def test_a_base_that_is_nowhere_is_named(models: Models):
    with pytest.raises(ConfigError, match=r"data/no/such/base.*model_index\.json"):
        base_weights(models.model_copy(update={"base": "data/no/such/base"}))


def test_an_image_encoder_that_is_nowhere_is_named(models: Models):
    with pytest.raises(ConfigError, match=r"config\.json"):
        image_encoder_weights(models.model_copy(update={"image_encoder_subfolder": "elsewhere"}))


def test_an_ip_adapter_that_is_nowhere_is_named():
    with pytest.raises(CheckpointError, match=r"none\.bin.*no file.*weight_name"):
        find_adapter("none.bin", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error():
    with pytest.raises(ConfigError, match="cuda"):
        device_named("cuda")
    assert device_named("auto").type == "cpu"


def test_identity_follows_what_the_networks_see(models: Models):
    same, finer = (identify(models.model_copy(update={"resolution": size})) for size in (models.resolution, 32))
    assert same == identify(models)
    assert finer.images != same.images and finer.texts != same.images
