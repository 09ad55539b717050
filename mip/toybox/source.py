"""The toybox as a source: it renders its shards and its benchmarks, and is then read like any folder of SA-1B tars."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mip.config import Section
from mip.data.sources import Indexed, Shard, index_tar, tar_shards
from mip.toybox.benchmark import write_benchmark, write_calibration, write_checks, write_layouts
from mip.toybox.scenes import Split
from mip.toybox.shards import write_shard

Share = Annotated[float, Field(ge=0, le=1)]


class ToyboxOptions(Section):
    """`ingest.options` of the toybox."""

    seed: NonNegativeInt
    shards: PositiveInt
    images_per_shard: PositiveInt
    wrong_label: Share  # of all images
    look_alike: Share
    cut_off: Share
    objects: Literal[2, 3]  # in a combination of the benchmark
    combinations: PositiveInt
    validation_combinations: PositiveInt


class Toybox:
    """Renders on `prepare`; same options, same bytes."""

    Options: ClassVar[type[Section]] = ToyboxOptions

    def __init__(self, options: ToyboxOptions) -> None:
        self.options = options

    def prepare(self, folder: Path) -> None:
        chosen = self.options
        shares = {"wrong_label": chosen.wrong_label, "look_alike": chosen.look_alike, "cut_off": chosen.cut_off}
        for number in range(chosen.shards):
            write_shard(folder, number=number, seed=chosen.seed, images=chosen.images_per_shard, shares=shares)  # pyright: ignore[reportArgumentType]
        counts: dict[Split, int] = {"benchmark": chosen.combinations, "validation": chosen.validation_combinations}
        for split, count in counts.items():
            write_benchmark(folder / split, split=split, seed=chosen.seed, count=count, objects=chosen.objects)
        write_calibration(folder / "calibration", folder / "validation", split="validation", seed=chosen.seed)
        write_checks(folder, folder / "benchmark", split="benchmark", seed=chosen.seed)
        write_layouts(folder / "layouts", folder / "benchmark", split="benchmark", seed=chosen.seed, prompts=4)
        write_layouts(
            folder / "layouts-validation", folder / "validation", split="validation", seed=chosen.seed, prompts=1
        )

    def shards(self, folder: Path) -> list[Shard]:
        return tar_shards(folder / "shards")

    def index(self, shard: Shard, *, source: str) -> Indexed:
        return index_tar(shard, source=source)
