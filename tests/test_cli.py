"""The command line, as a newcomer types it: the smoke profile's networks, errors in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mip.model.checkpoint import read_adapter, save_adapter
from mip.tables import file_hash
from tests.closure import ROOT

PLAIN = "data/toybox/base/ip_adapter/ip-adapter_toybox.safetensors"
SIZE = 64


@pytest.fixture
def run(mip, monkeypatch: pytest.MonkeyPatch):
    """`mip ...` in the project's root."""
    monkeypatch.chdir(ROOT)
    return mip


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / f"{name}.png" for name in ("red", "blue")}
    for name, path in files.items():
        Image.new("RGB", (40, 60), name).save(path)
    return files


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def _draw(run, out: Path, *options: object) -> Path:
    code, said, errors = run("generate", "--profile", "smoke", "--steps", 2, "-o", out, *options, "a ball and a cup")
    assert code == 0, errors
    return Path(said.split()[0])


def test_an_image_can_be_made_again_from_its_sidecar(run, photos: dict[str, Path], tmp_path: Path):
    refs = ("--ref", f"ball={photos['red']},{photos['blue']}", "--ref", f"cup={photos['blue']}")
    first = _draw(run, tmp_path / "first", *refs, "--seed", 7, "--num-images", 2)
    assert sorted(path.name for path in first.parent.iterdir()) == [
        f"00000{n}.{s}" for n in (7, 8) for s in ("json", "png")
    ]
    told = json.loads(first.with_suffix(".json").read_text())
    with Image.open(first) as image:
        assert image.size == (SIZE, SIZE) and json.loads(image.info["mip"]) == told
    assert [(one["name"], len(one["images"])) for one in told["references"]] == [("ball", 2), ("cup", 1)]
    assert told["prompt"] == "a ball and a cup" and told["num_inference_steps"] == 2 and told["versions"]["torch"]
    second = first.with_name("000008.png")
    again = _draw(run, tmp_path / "again", *_options(json.loads(second.with_suffix(".json").read_text())))
    np.testing.assert_array_equal(_pixels(second), _pixels(again))
    assert np.abs(_pixels(first) - _pixels(second)).mean() > 1


def _options(told: dict[str, Any]) -> list[object]:
    """The options that a sidecar tells; the adapter by its file, whose hash must be the same."""
    adapter = Path(told["adapter"]["path"])
    assert file_hash(ROOT / adapter) == told["adapter"]["sha256"]
    options: list[object] = ["--adapter", adapter]
    for reference in told["references"]:
        assert all(file_hash(Path(image["path"])) == image["sha256"] for image in reference["images"])
        options += ["--ref", f"{reference['name']}={','.join(image['path'] for image in reference['images'])}"]
    for name in ("seed", "scale", "width", "height"):
        options += [f"--{name}", told[name]]
    return [*options, "--guidance", told["guidance_scale"], "--negative-prompt", told["negative_prompt"]]


def test_references_and_their_scale_matter(run, photos: dict[str, Path], tmp_path: Path):
    ball = ("--ref", f"ball={photos['red']}")
    plain, none, strong = (
        _pixels(_draw(run, tmp_path / name, *options))
        for name, options in {"plain": (), "none": (*ball, "--scale", 0), "strong": (*ball, "--scale", 1.5)}.items()
    )
    assert np.abs(plain - none).max() <= 1 and np.abs(plain - strong).mean() > 1


def test_nothing_is_overwritten_unasked(run, tmp_path: Path):
    drawn = _draw(run, tmp_path)
    code, _, errors = run("generate", "--profile", "smoke", "-o", tmp_path, "a ball")
    assert code == 2 and f"got {drawn}, which exists" in errors
    assert _draw(run, tmp_path, "--overwrite", "--guidance", 1.5) == drawn
    assert json.loads(drawn.with_suffix(".json").read_text())["guidance_scale"] == 1.5


def test_training_free_takes_the_plain_weights_and_cropping_another_part(run, photos: dict[str, Path], tmp_path: Path):
    two = tmp_path / "two.png"
    Image.open(photos["red"]).resize((120, 40)).save(two)
    with Image.open(two) as image:
        image.paste("blue", (0, 0, 40, 40))
        image.save(two)
    ball = ("--training-free", "--ref", f"ball={two}", "--scale", 1.5)
    padded, cropped = (
        _draw(run, tmp_path / name, *ball, *more) for name, more in (("p", []), ("c", ["--centre-crop"]))
    )
    told = json.loads(padded.with_suffix(".json").read_text())
    assert told["adapter"] == {"path": "data/smoke/base/ip_adapter/ip-adapter_toybox.safetensors"} | {
        "sha256": file_hash(ROOT / PLAIN)
    }
    assert np.abs(_pixels(padded) - _pixels(cropped)).mean() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ref", "=x.png"], "expected NAME=IMAGE"),
        (["--ref", "ball"], "expected NAME=IMAGE"),
        (["--ref", "ball=nowhere.png"], "there is no file nowhere.png"),
        (["--profile", "best"], "got profile 'best'"),
        (["--adapter", "nowhere.bin"], "which is no file"),
        (["--adapter", PLAIN, "--training-free"], "give one"),
        (["--width", "60"], "give a multiple of 8"),
    ],
)
def test_a_wrong_request_is_one_line(run, tmp_path: Path, options: list[str], message: str):
    code, _, errors = run("generate", "-o", tmp_path / "out", *options, "a ball")
    assert code == 2 and message in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_inspect_tells_what_a_file_is_and_whether_it_fits(run):
    code, said, _ = run("inspect", PLAIN, "--base", "data/toybox/base/pipeline")
    assert code == 0 and "plain IP-Adapter" in said and "data/toybox/base/pipeline" in said
    code, _, errors = run("inspect", PLAIN, "--variant", "sdxl_plus")
    assert code == 2 and "expected sdxl_plus" in errors


def test_inspect_shows_metadata_whole_and_beside_what_it_counted(run, tmp_path: Path):
    file, said = tmp_path / "told.safetensors", {"parameters": "0" * 200, "variant": "mine"}
    save_adapter(file, replace(read_adapter(ROOT / PLAIN), metadata=said))
    _, shown, _ = run("inspect", file)
    assert "287,680" in shown and shown.count("0") >= 200 and "metadata: parameters" in shown and "…" not in shown


def test_an_adapter_of_another_base_is_refused(run, tmp_path: Path):
    config = json.loads((ROOT / "data/toybox/base/pipeline/unet/config.json").read_text())
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 32}))
    for command in (["inspect", PLAIN], ["convert", PLAIN, tmp_path / "x.safetensors"]):
        code, _, errors = run(*command, "--base", tmp_path)
        assert code == 2 and f"does not fit {tmp_path}" in errors and "to_k_ip" in errors
    assert not (tmp_path / "x.safetensors").exists()


def test_convert_there_and_back_keeps_every_tensor(run, tmp_path: Path):
    official, back = tmp_path / "official.bin", tmp_path / "back.safetensors"
    assert run("convert", PLAIN, official, "--to", "official")[0] == 0
    assert run("convert", official, back, "--steps", 5, "--encoder", "some/encoder")[0] == 0
    before, after = read_adapter(ROOT / PLAIN), read_adapter(back)
    assert after.metadata["steps"] == "5" and after.metadata["image_encoder"] == "some/encoder"
    for one, other in ((before.layers, after.layers), (before.image_proj, after.image_proj)):
        assert one.keys() == other.keys() and all(torch.equal(one[key].half(), other[key]) for key in one)
    code, _, errors = run("convert", PLAIN, official, "--to", "official")
    assert code == 2 and "which exists" in errors
    code, _, errors = run("convert", PLAIN, tmp_path / "x.bin")
    assert code == 2 and "ends in .safetensors" in errors


def test_doctor_finds_the_embedded_world_and_says_what_another_lacks(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    code, said, _ = run("doctor")
    assert code == 0 and "diffusers" in said and "missing" not in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, said, _ = run("doctor", "--profile", "sdxl")
    assert code == 1 and "hf download stabilityai/stable-diffusion-xl-base-1.0" in said


def test_help_does_not_load_torch():
    script = "import sys, mip.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
