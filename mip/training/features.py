"""Everything frozen, computed once: latents, image features and text embeddings of a manifest's samples.

Each sample and each text is encoded on its own and kept (see `encodings`), so that a changed manifest encodes only
what is new, a killed run goes on where it was, and the output's bytes depend on neither.

Output: `<split>-<number>.safetensors` (mean, std, masks, views), `texts-<number>.safetensors` (embedding, pooled,
words), `absent.safetensors` (features of no image), index.parquet (kind features), rejected.parquet, and checksums.json
of what training reads beside the index. A kind of tensor that is not to be cached has no width; what training needs to
encode it itself is in live.parquet (latents and images) and texts.parquet.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from mip.config import KINDS, Features, Models
from mip.data.images import read_bytes
from mip.tables import Row, check_conservation, file_hash, fingerprint, read_table, rejected, write_table
from mip.training.checksums import write_checksums
from mip.training.encodings import ABSENT, EncodingCache, Tensors, Unreadable, draw, save_tensors
from mip.training.networks import weights_hash

SPLITS = ("train", "val")


class Reason(StrEnum):
    """Why an object or a whole augmentation is not in the features."""

    UNREADABLE_IMAGE = "unreadable_image"
    UNUSABLE_NAME = "unusable_name"  # no tokens, or more than the text encoders read
    OUTSIDE_CROP = "outside_crop"
    NO_OBJECT = "no_object"  # an augmentation of which no object is left


def encode(config: Features, *, models: Models, manifest: Path, out: Path, work: Path) -> Path:
    """Encode the samples of `manifest` (a folder with train.parquet and val.parquet) and write them to `out`.

    `work` keeps what was encoded before; to delete it costs only time.

    Raises:
        ConfigError: networks that are nowhere.
        DataError: a manifest or images that are not where they should be.
    """
    encodings = EncodingCache(config, models=models, folder=work / "encodings")
    tables = {split: read_table(manifest / f"{split}.parquet", "manifest") for split in SPLITS}
    made_from = {
        "manifest": fingerprint(**{split: file_hash(manifest / f"{split}.parquet") for split in SPLITS}),
        "networks": encodings.key,
        "parameters": fingerprint(features=config, models=models),
    }
    for old in (*out.glob("*.parquet"), *out.glob("*.json"), *out.glob("*.safetensors")):
        old.unlink()
    left_out = set(KINDS) - set(config.cache)
    if left_out:
        made_from |= {"cache": " ".join(sorted(config.cache)), "weights": weights_hash(models)}
    texts = _write_texts(tables, encodings, config=config, out=out)
    if "texts" in left_out:
        write_table(out / "texts.parquet", "texts", [{"text": text} for text in texts], made_from)
    index, live, dropped = [], [], []
    objects = 0
    for split, table in tables.items():
        for start in range(0, table.num_rows, config.shard):
            rows = table.slice(start, config.shard).to_pylist()
            objects += sum(len(row["objects"]) for row in rows)
            shard = _Shard(split, number=start // config.shard, texts=texts)
            for row, sample in zip(rows, encodings.samples(rows), strict=True):
                for augmentation in range(config.augmentations):
                    shard.add(row, sample, augmentation)
                shard.close(sample)
            shard.write(out)
            index += shard.index
            if left_out & {"latents", "images"}:
                live += _sources(shard, rows, config=config)
            dropped += shard.dropped
    came = sum(table.num_rows for table in tables.values()) * config.augmentations
    check_conservation("augmentation", came, len(index), dropped)
    check_conservation("object", objects * config.augmentations, sum(len(row["names"]) for row in index), dropped)
    save_tensors(out / "absent.safetensors", encodings.absent())
    write_table(out / "rejected.parquet", "rejected", dropped, made_from)
    if left_out & {"latents", "images"}:
        write_table(out / "live.parquet", "live", live, made_from)
    checked = ("*.safetensors", "live.parquet", "texts.parquet")
    write_checksums(out, sorted(path.name for pattern in checked for path in out.glob(pattern)))
    # The index comes last: a folder that has one is complete.
    write_table(out / "index.parquet", "features", index, made_from)
    return out


@dataclass(frozen=True)
class _Known:
    """What a text is called in the index, and whether it can name an object."""

    number: int
    is_name: bool


def _write_texts(
    tables: Mapping[str, pa.Table], encodings: EncodingCache, *, config: Features, out: Path
) -> dict[str, _Known]:
    """Every caption and label once, and "" as number 0: what the caption becomes when training drops it."""
    texts = {""}
    for table in tables.values():
        texts.update(table["caption"].to_pylist())
        texts.update(table["objects"].combine_chunks().flatten().field("label").to_pylist())
    ordered = sorted(texts)
    known = {}
    for start in range(0, len(ordered), config.shard):
        part = ordered[start : start + config.shard]
        encoded = [encodings.text(text) for text in part]
        for number, (text, tensors) in enumerate(zip(part, encoded, strict=True), start=start):
            known[text] = _Known(number, is_name=bool(tensors["words"].any()))
        joined = {name: torch.stack([tensors[name] for tensors in encoded]) for name in encoded[0]}
        save_tensors(out / f"texts-{start // config.shard:05d}.safetensors", joined)
    return known


class _Shard:
    """One output file and its rows of the index."""

    def __init__(self, split: str, *, number: int, texts: Mapping[str, _Known]) -> None:
        self.split, self.name, self.texts = split, f"{split}-{number:05d}.safetensors", texts
        self.index: list[Row] = []
        self.dropped: list[Row] = []
        self.kept: list[Sequence[int]] = []  # places of the objects of each row of the index
        self._parts: dict[str, list[Tensor]] = {"mean": [], "std": [], "masks": [], "views": []}

    def add(self, row: Row, sample: Tensors | Unreadable, augmentation: int) -> None:
        """Take over one augmentation, without the objects that it cannot have."""
        identity = f"{row['sample_id']}/{augmentation}"
        kept = []
        for place, thing in enumerate(row["objects"]):
            objection = self._objection(thing["label"], sample, augmentation, place)
            if objection is None:
                kept.append(place)
            else:
                self.dropped.append(rejected("object", f"{identity}/{thing['object_id']}", *objection))
        if isinstance(sample, Unreadable):
            self.dropped.append(rejected("augmentation", identity, Reason.UNREADABLE_IMAGE, sample.detail))
        elif not kept:
            self.dropped.append(rejected("augmentation", identity, Reason.NO_OBJECT))
        else:
            self._take(row, sample, augmentation, kept)

    def close(self, sample: Tensors | Unreadable) -> None:
        """To be called after the last augmentation of a sample: they share its views."""
        if not isinstance(sample, Unreadable):
            self._parts["views"] += sample["views"].unbind()

    def write(self, out: Path) -> None:
        """A shard without a row has no file."""
        if self.index:
            save_tensors(out / self.name, {name: torch.stack(parts) for name, parts in self._parts.items()})

    def _objection(
        self, label: str, sample: Tensors | Unreadable, augmentation: int, place: int
    ) -> tuple[Reason, str] | None:
        if isinstance(sample, Unreadable):
            return Reason.UNREADABLE_IMAGE, sample.detail
        if not self.texts[label].is_name:
            return Reason.UNUSABLE_NAME, repr(label)
        if sample["view"][augmentation, place] == ABSENT:
            return Reason.OUTSIDE_CROP, f"{float(sample['visible'][augmentation, place]):.3f} of it is visible"
        return None

    def _take(self, row: Row, sample: Tensors, augmentation: int, kept: Sequence[int]) -> None:
        self.kept.append(kept)
        first_view, first_mask = len(self._parts["views"]), len(self._parts["masks"])
        self.index.append(
            {
                "split": self.split,
                "sample_id": row["sample_id"],
                "augmentation": augmentation,
                "shard": self.name,
                "row": len(self._parts["mean"]),
                "weight": row["weight"],
                "caption": self.texts[row["caption"]].number,
                "names": [self.texts[row["objects"][place]["label"]].number for place in kept],
                "views": [first_view + int(sample["view"][augmentation, place]) for place in kept],
                "masks": [first_mask + number for number in range(len(kept))],
                "time_ids": sample["time_ids"][augmentation].tolist(),
            }
        )
        self._parts["masks"] += [sample["masks"][augmentation, place] for place in kept]
        self._parts["mean"].append(sample["mean"][augmentation])
        self._parts["std"].append(sample["std"][augmentation])


def _sources(shard: _Shard, rows: Sequence[Row], *, config: Features) -> list[Row]:
    """What training needs to cut and encode a shard's augmentations itself."""
    samples = {row["sample_id"]: row for row in rows}
    hashes = {identity: _image_hash(samples[identity]) for identity in {row["sample_id"] for row in shard.index}}
    sources = []
    for entry, kept in zip(shard.index, shard.kept, strict=True):
        row = samples[entry["sample_id"]]
        _, mirrored_N = draw(row, entry["augmentation"], config=config)
        things = [(row["objects"][place], bool(mirrored_N[place])) for place in kept]
        objects = [{"rle": thing["rle"], "box": thing["box"], "mirrored": mirrored} for thing, mirrored in things]
        image = {name: row[name] for name in ("image_path", "image_offset", "image_size")}
        sources.append({**image, "image_sha256": hashes[entry["sample_id"]], "objects": objects})
    return sources


def _image_hash(row: Row) -> str:
    data = read_bytes(Path(row["image_path"]), offset=row["image_offset"], size=row["image_size"])
    return hashlib.sha256(data).hexdigest()
