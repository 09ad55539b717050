"""The renderer: what a caption says, what it keeps to itself, and that a seed decides every byte."""

import itertools

import numpy as np

from mip.toybox.scenes import (
    CLASSES,
    COLOURS,
    PATTERNS,
    Scene,
    Thing,
    draw_identity,
    draw_scene,
    identities,
    random_scenes,
    render,
)


def first_scenes(count: int) -> list[tuple[Scene, str]]:
    return list(itertools.islice(random_scenes(3, counts=(1, 1, 1), split="train"), count))


def test_the_same_seed_renders_the_same_bytes():
    once, again = (
        b"".join(render(s, width=64, height=48).image.tobytes() for s, _ in first_scenes(8)) for _ in range(2)
    )
    assert once == again


def test_a_caption_names_every_class_and_no_identity():
    for scene, caption in first_scenes(60):
        words = set(caption.replace(",", "").split())
        assert {thing.name for thing in scene.things} <= words
        assert not words & {*COLOURS, *PATTERNS}


def test_the_splits_share_no_identity():
    of = {
        split: {(i.primary, i.secondary, i.pattern) for i in identities(split)}
        for split in ("train", "validation", "benchmark")
    }
    assert (
        not of["train"] & of["benchmark"]
        and not of["train"] & of["validation"]
        and not of["validation"] & of["benchmark"]
    )
    assert sum(map(len, of.values())) == len(COLOURS) * (len(COLOURS) - 1) * len(PATTERNS)


def test_held_out_identities_use_every_colour():
    for split in ("validation", "benchmark"):
        assert {i.primary for i in identities(split)} == set(COLOURS)


def test_masks_are_the_pixels_that_an_identity_changes():
    rng = np.random.default_rng(0)
    for name in CLASSES:
        scene = draw_scene(rng, [name], [draw_identity(rng, "train")], background="sand")
        drawn = render(scene, width=64, height=64)
        empty = render(Scene("sand", (), scene.texture_seed), width=64, height=64).image
        changed = (drawn.image.astype(int) != empty).any(axis=-1)
        # A border pixel less than half covered changes, too, and is not the object's.
        assert (drawn.masks[0] & ~changed).sum() <= 2
        assert drawn.masks[0].sum() > 0.7 * changed.sum()


def test_a_later_thing_covers_an_earlier_one():
    who = identities("train")[0]
    scene = Scene(
        "wall", (Thing("ball", who, 0.5, 0.5, 0.3, 0.0), Thing("star", who, 0.5, 0.5, 0.2, 0.0)), texture_seed=1
    )
    under, over = render(scene, width=64, height=64).masks
    assert (under & over).sum() < 0.05 * over.sum()  # a pixel of which each covers just half is of both
    alone = render(Scene("wall", scene.things[:1], 1), width=64, height=64).masks[0]
    assert under.sum() < alone.sum() - 0.9 * over.sum()


def test_boxes_of_drawn_things_do_not_overlap():
    for scene, _ in first_scenes(40):
        masks = render(scene, width=64, height=64).masks
        assert np.sum(masks, axis=0).max() <= 1
