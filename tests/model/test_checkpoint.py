"""Adapter files: what is read, what is written, and what is refused."""

import os
import subprocess

import pytest
import safetensors.torch
import torch

from mip.errors import CheckpointError
from mip.model.checkpoint import AdapterCheckpoint, export_official_bin, read_adapter, save_adapter


@pytest.fixture
def checkpoint(make_unet, make_adapter):
    return make_adapter(make_unet()).checkpoint({"steps": "7", "base_model": "tiny"})


def assert_same(one: AdapterCheckpoint, other: AdapterCheckpoint, **tolerance):
    for section in ("image_proj", "layers"):
        torch.testing.assert_close(dict(getattr(one, section)), dict(getattr(other, section)), **tolerance)


def test_what_is_saved_is_read_back_exactly_with_its_metadata(tmp_path, checkpoint):
    save_adapter(tmp_path / "a.safetensors", checkpoint)
    found = read_adapter(tmp_path / "a.safetensors")
    assert_same(found, checkpoint, rtol=0, atol=0)
    assert found.metadata == {
        "steps": "7",
        "base_model": "tiny",
        "format": "mip-adapter-1",
        "variant": "sdxl",
    }
    assert found.has_gate and found.variant.name == "sdxl"


def test_equal_adapters_have_equal_bytes(tmp_path, checkpoint):
    save_adapter(tmp_path / "a.safetensors", checkpoint)
    backwards = AdapterCheckpoint(
        image_proj=dict(reversed(checkpoint.image_proj.items())),
        layers=dict(reversed(checkpoint.layers.items())),
        metadata=dict(reversed(checkpoint.metadata.items())),
    )
    save_adapter(tmp_path / "b.safetensors", backwards)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_mode_honours_the_umask_and_nothing_else_is_left(tmp_path, checkpoint):
    before = os.umask(0o027)
    try:
        save_adapter(tmp_path / "a.safetensors", checkpoint)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, checkpoint, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(path, checkpoint)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_the_official_layout_is_in_half_precision_and_read_back(tmp_path, checkpoint):
    export_official_bin(tmp_path / "a.bin", checkpoint)
    loaded = torch.load(tmp_path / "a.bin", weights_only=True)
    assert set(loaded) == {"image_proj", "ip_adapter"}
    assert {t.dtype for section in loaded.values() for t in section.values()} == {torch.float16}
    assert_same(read_adapter(tmp_path / "a.bin"), checkpoint, check_dtype=False, rtol=1e-3, atol=1e-3)


def test_flat_safetensors_of_a_plain_ip_adapter_have_no_gate(tmp_path, make_unet, make_adapter):
    checkpoint = make_adapter(make_unet(), has_gate=False).checkpoint()
    flat = {f"image_proj.{k}": v for k, v in checkpoint.image_proj.items()}
    flat |= {f"ip_adapter.{k}": v for k, v in checkpoint.layers.items()}
    safetensors.torch.save_file(flat, tmp_path / "ip.safetensors")
    found = read_adapter(tmp_path / "ip.safetensors")
    assert not found.has_gate and found.metadata == {}
    torch.save(flat, tmp_path / "ip.bin")
    assert_same(read_adapter(tmp_path / "ip.bin"), found)


def refused(path, match, **kwargs):
    with pytest.raises(CheckpointError, match=match) as error:
        read_adapter(path, **kwargs)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_truncated_empty_and_missing_files_are_refused(tmp_path, checkpoint, name):
    path = tmp_path / name
    refused(path, "no such file")
    (export_official_bin if name == "a.bin" else save_adapter)(path, checkpoint)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100, 5, 0):
        path.write_bytes(whole[:length])
        refused(path, "cannot be read|not a plain file")


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return subprocess.call, (["touch", str(tmp_path / "ran")],)

    torch.save({"image_proj": Malicious(), "ip_adapter": {}}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "refused to unpickle")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("contents", "match"),
    [
        ([1, 2], "got a list"),
        ({"state_dict": {}}, "got entry 'state_dict'"),
        ({"image_proj": 3, "ip_adapter": {}}, "something else than tensors"),
        ({"image_proj": {}, "ip_adapter": {}}, "got layer keys"),
        ({"image_proj": {}, "ip_adapter": {"1.to_q.weight": torch.ones(1)}}, "1.to_q.weight"),
        ({"image_proj": {}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(1)}}, "image_proj"),
        (
            {
                "image_proj": {"proj.weight": torch.tensor(float("nan"))},
                "ip_adapter": {"1.to_k_ip.weight": torch.ones(1)},
            },
            "finite",
        ),
    ],
)
def test_files_with_other_contents_are_refused(tmp_path, contents, match):
    torch.save(contents, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", match)


def test_the_wrong_variant_is_refused(adapter_files):
    refused(adapter_files["sdxl"], "got a sdxl adapter, expected sdxl_plus", variant="sdxl_plus")
    assert read_adapter(adapter_files["sdxl_plus"], variant="sdxl_plus").variant.name == "sdxl_plus"
