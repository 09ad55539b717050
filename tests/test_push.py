"""`mip push`: what it prepares, and that it uploads only when asked."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from mip.cli import main
from mip.cli.push import front_matter
from mip.model.checkpoint import read_adapter, save_adapter
from tests.closure import ROOT

PLAIN = ROOT / "data/toybox/base/ip_adapter/ip-adapter_toybox.safetensors"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What training leaves, in small."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(folder / "adapter.safetensors", read_adapter(PLAIN))
    (folder / "README.md").write_text("# MIP-Adapter weights\n")
    (folder / "training.json").write_text(json.dumps({"steps": 1}))
    (folder / "curve.png").write_bytes(b"picture")
    (folder / "adapter-raw.safetensors").write_bytes(b"kept at home")
    return folder


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls to the hub, which is not reached."""
    calls: list[dict[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append({"made": name, **options})

        def upload_folder(self, **options: Any) -> None:
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


@pytest.fixture
def push(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `mip push ...`; gives exit code and what it says."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mip", "push", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return call


def test_folder_holds_weights_page_totals_and_curve_and_stays_here(
    push: Callable[..., tuple[int, str]], trained: Path, uploads: list[dict[str, Any]], tmp_path: Path
):
    code, said = push(trained, tmp_path / "hub")
    assert code == 0, said
    names = ["README.md", "adapter.safetensors", "curve.png", "training.json"]
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == names
    for name in names[1:]:
        assert (tmp_path / "hub" / name).read_bytes() == (trained / name).read_bytes()
    assert uploads == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".hub")]


def test_page_has_front_matter_that_the_hub_reads(push: Callable[..., tuple[int, str]], trained: Path, tmp_path: Path):
    push(trained, tmp_path / "hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.text.strip() == "# MIP-Adapter weights"
    assert card.data.to_dict()["license"] == "other" and "mip-adapter" in card.data.to_dict()["tags"]


def test_only_a_base_on_the_hub_is_named():
    assert "base_model: some/base\n" in front_matter({"base_model": "some/base"})
    for local in ("data/sdxl/base/pipeline", "/a/b", ""):
        assert "base_model" not in front_matter({"base_model": local})


def test_upload_goes_to_a_private_repository(
    push: Callable[..., tuple[int, str]], trained: Path, uploads: list[dict[str, Any]], tmp_path: Path
):
    code, said = push(trained, tmp_path / "hub", "--upload", "some/adapter")
    assert code == 0, said
    made, sent = uploads
    assert made == {"made": "some/adapter", "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("some/adapter", tmp_path / "hub")


def test_incomplete_results_and_an_existing_target_are_errors(
    push: Callable[..., tuple[int, str]], trained: Path, tmp_path: Path
):
    assert push(trained, trained)[0] == 2
    (trained / "curve.png").unlink()
    code, said = push(trained, tmp_path / "hub")
    assert code == 2 and "lacks curve.png" in said
    assert not (tmp_path / "hub").exists()
