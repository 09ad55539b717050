"""Scenes rendered once and kept in memory-mapped arrays, so that training does not wait for the renderer."""

import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mip.toybox.scenes import CLASSES, Scene, Split, Thing, compose, dress, random_scenes, render, shows_secondary

SIZE = 64
MOST_THINGS = 3


@dataclass(frozen=True)
class Scenery:
    """N scenes with captions.

    image_NHWC  uint8 RGB, 0-255
    owner_NHW   uint8, 0 on the background, i + 1 on the i-th thing
    names_NK    int8, index into CLASSES of each thing, -1 where there is none
    captions    classes and background, as every stage of the pipeline has them
    described   the same with the looks of some of the things, which teaches the base what colours are
    """

    image_NHWC: NDArray[np.uint8]
    owner_NHW: NDArray[np.uint8]
    names_NK: NDArray[np.int8]
    captions: list[str]
    described: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def _part(seed: int, count: int, shares: tuple[float, ...], split: Split) -> Scenery:
    image = np.empty((count, SIZE, SIZE, 3), np.uint8)
    owner = np.zeros((count, SIZE, SIZE), np.uint8)
    names = np.full((count, MOST_THINGS), -1, np.int8)
    captions, described = [], []
    rng = np.random.default_rng([seed, 1])
    for n, (scene, text) in enumerate(itertools.islice(random_scenes(seed, counts=shares, split=split), count)):
        drawn = render(scene, width=SIZE, height=SIZE)
        image[n] = drawn.image
        for k, (thing, mask) in enumerate(zip(scene.things, drawn.masks, strict=True)):
            owner[n][mask] = k + 1
            names[n, k] = CLASSES.index(thing.name)
        captions.append(text)
        described.append(_described(scene, rng))
    return Scenery(image, owner, names, captions, described)


def _described(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that tells the looks of each thing with probability 3/4."""
    phrases = [_phrase(thing) if rng.random() < 0.75 else thing.name for thing in scene.things]
    return compose(phrases, scene.background, template=int(rng.integers(3)))


def _phrase(thing: Thing) -> str:
    identity = thing.identity
    second = identity.secondary if shows_secondary(thing.name, identity) else identity.primary
    return dress(thing.name, identity.primary, second, identity.pattern)


def scenery(
    folder: Path,
    *,
    seed: int,
    count: int,
    split: Split = "train",
    shares: tuple[float, ...] = (0.12, 0.68, 0.2),
    workers: int = 2,
) -> Scenery:
    """`count` scenes, from `folder` if they were rendered before. Same seed, same bytes, with any number of workers."""
    part = 1000
    name = folder / f"{split}-{seed}-{count}-{'-'.join(map(str, shares))}"
    if not (name / "captions.txt").exists():
        name.mkdir(parents=True, exist_ok=True)
        sizes = [min(part, count - start) for start in range(0, count, part)]
        with ProcessPoolExecutor(workers) as pool:
            parts = list(
                pool.map(
                    _part,
                    [seed * 100_003 + i for i in range(len(sizes))],
                    sizes,
                    [shares] * len(sizes),
                    [split] * len(sizes),
                )
            )
        for array in ("image_NHWC", "owner_NHW", "names_NK"):
            np.save(name / f"{array}.npy", np.concatenate([getattr(p, array) for p in parts]))
        for lines in ("described", "captions"):  # the captions come last: with them the folder is complete
            finished = name / f"{lines}.txt.partial"
            finished.write_text("\n".join(line for p in parts for line in getattr(p, lines)) + "\n")
            os.replace(finished, name / f"{lines}.txt")
    arrays = {array: np.load(name / f"{array}.npy", mmap_mode="r") for array in ("image_NHWC", "owner_NHW", "names_NK")}
    texts = {lines: (name / f"{lines}.txt").read_text().splitlines() for lines in ("captions", "described")}
    return Scenery(*arrays.values(), **texts)
