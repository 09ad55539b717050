"""Drawing where the layout is given: late start, the oracle's masks, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image

from mip.config import Evaluate, Generate, Models
from mip.errors import ConfigError, DataError
from mip.evaluation.generation import generate_on_layouts
from mip.evaluation.layouts import Layouts
from mip.tables import read_rows, write_table
from tests.evaluation.conftest import SIDE, noise


@pytest.fixture
def layouts(index: Path, tmp_path: Path) -> Path:
    """Scenes with the first object on the left and the second on the right, as a source brings them."""
    masks_NYX = np.zeros((2, SIDE, SIDE), bool)
    masks_NYX[0, :, : SIDE // 2], masks_NYX[1, :, SIDE // 2 :] = True, True
    for name, table in (("layouts", "tasks"), ("layouts-validation", "validation_tasks")):
        folder = tmp_path / "index" / "source" / name
        tasks = read_rows(index / f"{table}.parquet", "tasks")
        (folder / "masks").mkdir(parents=True)
        (folder / "images").mkdir()
        for number, task in enumerate(tasks):
            noise(number, SIDE).save(folder / "images" / f"{task['task_id']}.png")
            np.savez(folder / "masks" / f"{task['task_id']}.npz", masks_NYX=masks_NYX)
        write_table(folder / "tasks.parquet", "tasks", tasks, {})
    return tmp_path / "index" / "source" / "layouts"


@pytest.fixture
def ddim(models: Models) -> Models:
    """The tiny base with a scheduler that can start late."""
    file = Path(models.base) / "scheduler" / "scheduler_config.json"
    DDIMScheduler(timestep_spacing="trailing").save_pretrained(file.parent)
    index = Path(models.base) / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "scheduler": ["diffusers", "DDIMScheduler"]}))
    return models


@pytest.fixture
def draw(
    ddim: Models,
    layouts: Path,
    generate_config: Generate,
    judge_config: Evaluate,
    adapter_files: dict[str, Path],
    tmp_path: Path,
):
    def run(method: str, scales: tuple[float, ...] = (1.0,)) -> np.ndarray:
        out = tmp_path / "out" / method
        generate_on_layouts(
            generate_config.model_copy(update={"steps": 10, "scales": scales}),
            method=method,
            models=ddim,
            judge=judge_config,
            index=layouts.parents[1],
            level=800,
            adapter=adapter_files["sdxl"],
            out=out,
            work=tmp_path / "work",
        )
        rows = read_rows(out / "images.parquet", "images")
        return np.stack([np.asarray(Image.open(out / row["path"])) for row in rows]).astype(int)

    return run


def test_only_steps_from_the_level_down_are_taken():
    late = Layouts(Path(), 800).late(DDIMScheduler(timestep_spacing="trailing"))
    late.set_timesteps(20)
    assert late.timesteps.tolist() == list(range(799, 0, -50))


def test_a_level_below_the_last_step_and_another_scheduler_are_refused():
    late = Layouts(Path(), 10).late(DDIMScheduler(timestep_spacing="trailing"))
    with pytest.raises(ConfigError, match="below the last"):
        late.set_timesteps(20)
    with pytest.raises(ConfigError, match="need a base with DDIMScheduler"):
        Layouts(Path(), 10).late(object())


def test_the_lower_the_level_the_more_of_the_scene_is_left(layouts: Path, ddim: Models):
    pipe = StableDiffusionXLPipeline.from_pretrained(ddim.base)
    assert isinstance(pipe, StableDiffusionXLPipeline)
    given = Layouts(layouts, 999)

    def latents(level: int, seed: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for _ in given.tasks]
        with torch.no_grad():
            return Layouts(layouts, level).latents(pipe, given.tasks, generators, steps=10)

    spreads = [float((latents(level, 0) - latents(level, 1)).std()) for level in (999, 600, 300, 99)]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 0.5 * spreads[0]


def test_a_scale_is_chosen_on_the_validation_layouts(draw, tmp_path: Path):
    draw("oracle", scales=(0.5, 1.0))
    choice = json.loads((tmp_path / "out" / "oracle" / "scale.json").read_text())
    assert [one["scale"] for one in choice["candidates"]] == [0.5, 1.0]
    assert all(one["tasks"] == 2 for one in choice["candidates"])


def test_the_oracle_takes_the_masks_in_place_of_the_words(draw, layouts: Path):
    oracle, nowhere = draw("oracle"), draw("base")
    assert np.abs(oracle - nowhere).max() > 0
    for file in (layouts / "masks").iterdir():
        np.savez(file, masks_NYX=np.zeros((2, SIDE, SIDE), bool))
    assert np.abs(draw("oracle") - nowhere).max() <= 1  # no reference may act anywhere


def test_the_oracle_needs_masks(draw, layouts: Path):
    for file in (layouts / "masks").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="needs the masks"):
        draw("oracle")


def test_regions_are_in_the_order_of_the_references(layouts: Path):
    given = Layouts(layouts, 800)
    first, second = given.regions(given.tasks[0])
    assert torch.equal(first + second, torch.ones(SIDE, SIDE)) and bool((first[:, : SIDE // 2] == 1).all())
