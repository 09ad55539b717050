"""score: how well each object shows what its name says, and how little the objects look alike.

How the paper combines its three cosines is not published. Ours, with the raw terms kept so that another formula needs
no re-run: score = mean_i cos(text_i, image_i) - weight * max_{i<j} cos(image_i, image_j).
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import combinations, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mip.config import Score
from mip.data import openclip, parts
from mip.data.images import BLACK, cutout, load
from mip.data.openclip import Encoder
from mip.errors import ConfigError, DataError
from mip.tables import Row, file_hash, fingerprint, rejected

_CHUNK = 64  # samples that are scored together


class Reason(StrEnum):
    """Why `score` rejects a sample."""

    UNREADABLE = "unreadable"
    NOT_FINITE = "not_finite"


def score_shard(config: Score, *, samples_part: Path, out: Path) -> Path:
    """Score a shard's samples. Returns out/part-<shard>.parquet (kind scores)."""
    if "{}" not in config.template:
        raise ConfigError(f"got score.template {config.template!r}; expected one with {{}} for the class name")
    encoder = openclip.load(config.model)
    shard = parts.shard_name(samples_part)
    made_from = {
        "stage": "score",
        "params": fingerprint(config=config),
        "samples": file_hash(samples_part),
        "model": encoder.identity,
    }
    came = kept = 0
    texts: dict[str, NDArray[np.float32]] = {}
    with parts.PartWriter(out, shard=shard, kind="scores", made_from=made_from) as part:
        samples = parts.stream_rows(samples_part, "samples")
        while chunk := list(islice(samples, _CHUNK)):
            rows, dropped = _score(config, encoder, chunk, texts)
            part.keep(rows)
            part.reject(dropped)
            came, kept = came + len(chunk), kept + len(rows)
        part.check("sample", came=came, kept=kept)
    return parts.part_path(out, shard)


def finish(*, samples: Path, out: Path) -> Path:
    """Join the shards' rejected tables and check that no sample was lost. Returns `out`."""
    parts.finish(out, shards=[parts.shard_name(part) for part in parts.parts(samples)])
    parts.check_stage("sample", came=parts.count_rows(samples), kept=parts.count_rows(out), out=out)
    return out


def terms(
    texts: NDArray[np.float32], images: NDArray[np.float32], *, weight: float
) -> tuple[list[float], list[float], float]:
    """cos(text_i, image_i), cos(image_i, image_j) in the order of combinations, and the score.

    Rows of both (objects x width) are of length 1. A lone object has no look-alike term.
    """
    text_image = [float(t @ i) for t, i in zip(texts.astype(np.float64), images.astype(np.float64), strict=True)]
    image_image = [float(a @ b) for a, b in combinations(images.astype(np.float64), 2)]
    return text_image, image_image, float(np.mean(text_image)) - weight * max(image_image, default=0.0)


def _score(
    config: Score, encoder: Encoder, samples: Sequence[Row], texts: dict[str, NDArray[np.float32]]
) -> tuple[list[Row], list[Row]]:
    readable: list[Row] = []
    dropped: list[Row] = []

    def crops() -> Iterator[Image.Image]:
        for sample in samples:
            try:
                image = load(sample)
            except DataError as error:
                dropped.append(rejected("sample", sample["sample_id"], Reason.UNREADABLE, str(error)[:200]))
                continue
            readable.append(sample)
            yield from (cutout(image, rle=o["rle"], box=o["box"], fill=BLACK) for o in sample["objects"])

    features = encoder.encode_images(crops())
    unseen = sorted({o["label"] for sample in readable for o in sample["objects"]} - texts.keys())
    if unseen:
        encoded = encoder.encode_texts([config.template.replace("{}", name) for name in unseen])
        texts.update(zip(unseen, encoded, strict=True))
    rows: list[Row] = []
    start = 0
    for sample in readable:
        images = features[start : start + len(sample["objects"])]
        start += len(images)
        named = np.stack([texts[o["label"]] for o in sample["objects"]])
        text_image, image_image, score = terms(named, images, weight=config.weight)
        if np.isfinite(score):
            rows.append(
                {"sample_id": sample["sample_id"], "text_image": text_image, "image_image": image_image, "score": score}
            )
        else:
            dropped.append(rejected("sample", sample["sample_id"], Reason.NOT_FINITE, str(score)))
    return rows, dropped
