import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from mip.config import Ingest, Section
from mip.data import sources
from mip.data.images import load
from mip.data.indexing import Indexed, Reason, Shard, index_tar, tar_shards
from mip.data.sources import Folder, FolderOptions, Sa1b, Sa1bOptions
from mip.errors import ConfigError, DataError
from mip.tables import read_rows
from tests.data.worlds import write_concept101


def _index(path: Path) -> Indexed:
    return index_tar(Shard("sa_0", (path,)), source="sa1b")


def test_members_in_any_order_and_in_a_folder_are_paired(kit, tmp_path: Path):
    one, two = kit.pair("sa_1"), kit.pair("sa_2")
    files = {
        "d/sa_2.json": two["sa_2.json"],
        "./sa_1.jpg": one["sa_1.jpg"],
        "d/e/sa_1.json": one["sa_1.json"],
        "sa_2.jpg": two["sa_2.jpg"],
    }
    indexed = _index(kit.write_tar(tmp_path / "sa_0.tar", files))
    assert [row["image_id"] for row in indexed.rows] == ["sa_1", "sa_2"]
    assert indexed.rejected == []


def test_an_image_is_read_in_place_by_its_byte_range(kit, tmp_path: Path):
    (row,) = _index(kit.write_tar(tmp_path / "sa_0.tar", {"x.JSON": kit.sa1b_json(), "x.JPG": kit.jpeg()})).rows
    assert load(row).size == (kit.side, kit.side)
    assert json.loads(Path(row["annotation_path"]).read_bytes()[row["annotation_offset"] :][: row["annotation_size"]])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"sa_1.jpg": b"x"}, Reason.MISSING_ANNOTATION),
        ({"sa_1.json": b"{}"}, Reason.MISSING_IMAGE),
        ({"sa_1.jpg": b"", "sa_1.json": b"{}"}, Reason.EMPTY_FILE),
        ({"sa_1.jpg": b"x", "sa_1.json": b"{not json"}, Reason.BAD_JSON),
        ({"sa_1.jpg": b"x", "sa_1.json": b"[" * 100_000}, Reason.BAD_JSON),
        ({"sa_1.jpg": b"x", "sa_1.json": b"[]"}, Reason.BAD_HEADER),
        ({"sa_1.jpg": b"x", "sa_1.json": b"{}"}, Reason.BAD_HEADER),
        ({"sa_1.jpg": b"x", "sa_1.json": b'{"image": {"width": "64", "height": 64}}'}, Reason.BAD_HEADER),
        ({"sa_1.jpg": b"x", "sa_1.json": b'{"image": {"width": -64, "height": 64}}'}, Reason.BAD_HEADER),
        ({"sa_1.jpg": b"x", "sa_1.json": b'{"image": {"width": true, "height": 64}}'}, Reason.BAD_HEADER),
        ({"sa_1.jpg": b"x", "a/sa_1.jpg": b"y"}, Reason.DUPLICATE_ID),
        ({"readme.txt": b"x"}, Reason.UNKNOWN_FILE),
        ({"a b.jpg": b"x"}, Reason.UNSAFE_NAME),
        ({"../sa_1.jpg": b"x"}, Reason.UNSAFE_NAME),
        ({"/etc/sa_1.jpg": b"x"}, Reason.UNSAFE_NAME),
    ],
)
def test_a_bad_member_is_rejected_with_its_reason_and_the_rest_is_kept(kit, tmp_path: Path, files, reason: Reason):
    indexed = _index(kit.write_tar(tmp_path / "sa_0.tar", files | kit.pair("sa_9")))
    assert reason in kit.reasons(indexed.rejected)
    assert [row["image_id"] for row in indexed.rows] == ["sa_9"]


def test_a_huge_annotation_is_rejected_unread(kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mip.data.indexing._MAX_ANNOTATION", 10)
    indexed = _index(kit.write_tar(tmp_path / "sa_0.tar", kit.pair("sa_1")))
    assert kit.reasons(indexed.rejected) == [Reason.TOO_LARGE]


def test_a_link_in_a_tar_is_rejected(kit, tmp_path: Path):
    path = kit.write_tar(tmp_path / "sa_0.tar", kit.pair("sa_1"))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("sa_2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    indexed = _index(path)
    assert (kit.reasons(indexed.rejected), len(indexed.rows)) == ([Reason.NOT_A_FILE], 1)


def test_a_shard_cut_in_the_middle_keeps_what_is_whole(kit, tmp_path: Path):
    files = kit.pair("sa_1") | kit.pair("sa_2", seed=1) | kit.pair("sa_3", seed=2)
    path = kit.write_tar(tmp_path / "sa_0.tar", files)
    whole = _index(path)
    cut = whole.rows[1]["image_offset"] + 100
    path.write_bytes(path.read_bytes()[:cut])
    indexed = _index(path)
    assert indexed.rows == whole.rows[:1]
    assert kit.reasons(indexed.rejected) == [Reason.TRUNCATED_SHARD, Reason.MISSING_ANNOTATION]


def test_a_member_cut_short_is_rejected_though_its_partner_is_there(kit, tmp_path: Path):
    files = kit.pair("sa_1")
    path = kit.write_tar(tmp_path / "sa_0.tar", {name: files[name] for name in ("sa_1.json", "sa_1.jpg")})
    path.write_bytes(path.read_bytes()[: _index(path).rows[0]["image_offset"] + 10])
    assert kit.reasons(_index(path).rejected) == [Reason.TRUNCATED_SHARD, Reason.CUT_OFF]


def test_a_shard_cut_between_two_members_is_noticed(kit, tmp_path: Path):
    path = kit.write_tar(tmp_path / "sa_0.tar", kit.pair("sa_1") | kit.pair("sa_2"))
    path.write_bytes(path.read_bytes()[: _index(path).rows[1]["image_offset"] - 512])
    indexed = _index(path)
    assert (kit.reasons(indexed.rejected), len(indexed.rows)) == ([Reason.TRUNCATED_SHARD], 1)


def test_a_damaged_header_in_the_middle_is_noticed(kit, tmp_path: Path):
    path = kit.write_tar(tmp_path / "sa_0.tar", kit.pair("sa_1") | kit.pair("sa_2"))
    data = bytearray(path.read_bytes())
    start = _index(path).rows[1]["image_offset"] - 512
    data[start : start + 512] = b"x" * 512
    path.write_bytes(data)
    indexed = _index(path)
    assert (kit.reasons(indexed.rejected), len(indexed.rows)) == ([Reason.TRUNCATED_SHARD], 1)


@pytest.mark.parametrize("content", [b"", None])
def test_an_empty_shard_is_rejected(kit, tmp_path: Path, content: bytes | None):
    path = kit.write_tar(tmp_path / "sa_0.tar", {})
    if content is not None:
        path.write_bytes(content)
    assert kit.reasons(_index(path).rejected, "shard") == [Reason.EMPTY_SHARD]


@pytest.mark.parametrize("content", [b"no tar at all" * 100, b"\x1f\x8b compressed"])
def test_what_is_no_tar_is_rejected(kit, tmp_path: Path, content: bytes):
    path = tmp_path / "sa_0.tar"
    path.write_bytes(content)
    assert kit.reasons(_index(path).rejected) == [Reason.BAD_SHARD]


def test_the_size_is_found_wherever_it_stands_in_the_annotation(kit, tmp_path: Path):
    content = json.loads(kit.sa1b_json([kit.annotation(n) for n in range(40)]))
    late = json.dumps({"annotations": content["annotations"], "image": content["image"]}).encode()
    indexed = _index(kit.write_tar(tmp_path / "sa_0.tar", {"a.jpg": b"x", "a.json": late}))
    assert (indexed.rows[0]["width"], indexed.rows[0]["height"]) == (kit.side, kit.side)


def test_sa1b_lists_its_shards_by_name(kit, tmp_path: Path):
    for name in ("sa_2", "sa_1"):
        kit.write_tar(tmp_path / f"{name}.tar", {})
    assert [s.name for s in Sa1b(Sa1bOptions(folder=tmp_path)).shards(tmp_path / "x")] == ["sa_1", "sa_2"]


def test_an_unsafe_shard_name_is_an_error(kit, tmp_path: Path):
    kit.write_tar(tmp_path / "a b.tar", {})
    with pytest.raises(DataError, match="rename"):
        tar_shards(tmp_path)


def _folder(root: Path, size: int = 2) -> tuple[Folder, list[Shard]]:
    source = Folder(FolderOptions(folder=root, shard_size=size))
    return source, source.shards(root)


def _write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_a_folder_keeps_pairs_of_subfolders_in_one_shard(kit, tmp_path: Path):
    for stem in "abcde":
        files = kit.pair(stem)
        _write(tmp_path, {f"images/{stem}.jpg": files[f"{stem}.jpg"], f"jsons/{stem}.json": files[f"{stem}.json"]})
    source, shards = _folder(tmp_path)
    rows = [[row["image_id"] for row in source.index(shard, source="folder").rows] for shard in shards]
    assert rows == [["a", "b"], ["c", "d"], ["e"]]


def test_links_out_of_a_folder_and_into_nothing_are_rejected(kit, tmp_path: Path):
    root = tmp_path / "root"
    _write(root, kit.pair("a"))
    (tmp_path / "secret.json").write_bytes(kit.sa1b_json())
    (root / "b.json").symlink_to(tmp_path / "secret.json")
    (root / "c.json").symlink_to(tmp_path / "nothing")
    source, shards = _folder(root, size=10)
    indexed = source.index(shards[0], source="folder")
    assert (kit.reasons(indexed.rejected), len(indexed.rows)) == ([Reason.OUTSIDE, Reason.NOT_A_FILE], 1)


def test_a_missing_folder_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="no folder"):
        _folder(tmp_path / "none")
    with pytest.raises(DataError, match="no folder"):
        tar_shards(tmp_path / "none")


# The registry and the stage ----------------------------------------------------------------------------------------


class _MadeOptions(Section):
    images: int


class _Made:
    """A source that renders, as the embedded world does."""

    Options: ClassVar[type[Section]] = _MadeOptions

    def __init__(self, options: _MadeOptions) -> None:
        self.options = options

    def prepare(self, folder: Path) -> None:
        (folder / "shards").mkdir()
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, format="JPEG")
        text = json.dumps({"image": {"width": 8, "height": 8}, "annotations": []}).encode()
        with tarfile.open(folder / "shards" / "m.tar", "w") as tar:
            for number in range(self.options.images):
                for name, data in ((f"{number}.jpg", buffer.getvalue()), (f"{number}.json", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        for name in ("benchmark", "validation"):
            write_concept101(folder / name)

    def shards(self, folder: Path) -> list[Shard]:
        return tar_shards(folder / "shards")

    def index(self, shard: Shard, *, source: str) -> Indexed:
        return index_tar(shard, source=source)


def _config(source: str, options: dict[str, Any], **changes: Any) -> Ingest:
    values = {
        "source": source,
        "options": options,
        "benchmark": None,
        "benchmark_kind": "concept101",
        "validation": None,
        "validation_kind": "concept101",
        "benchmark_name": "test",
        "prompts_per_combination": 2,
        "combinations": None,
        "validation_prompts_per_combination": 1,
        "validation_combinations": None,
        "variant": "official",
        "seed": 420,
    }
    return Ingest.model_validate(values | changes)


class _Entry:
    def __init__(self, name: str, kind: type) -> None:
        self.name, self.kind = name, kind

    def load(self) -> type:
        return self.kind


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    known: Sequence[_Entry] = [_Entry("sa1b", Sa1b), _Entry("folder", Folder), _Entry("made", _Made)]
    monkeypatch.setattr(sources, "entry_points", lambda group: known)


def test_an_unknown_source_is_one_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match="got source 'sa2b'; expected one of folder, made, sa1b"):
        sources.create("sa2b", {})


def test_wrong_options_are_one_error_that_names_them():
    with pytest.raises(ConfigError, match="foldr"):
        sources.create("sa1b", {"foldr": "x"})


def test_ingest_writes_index_tasks_and_what_the_source_makes(tmp_path: Path):
    out = sources.ingest(_config("made", {"images": 3}), out=tmp_path / "index", work=tmp_path / "work")
    rows = read_rows(out, "index")
    assert [row["image_id"] for row in rows] == ["0", "1", "2"]
    assert all(Path(row["image_path"]).is_relative_to(out / "source") for row in rows)
    assert len(read_rows(out / "tasks.parquet", "tasks")) == 2
    assert len(read_rows(out / "validation_tasks.parquet", "tasks")) == 1
    assert read_rows(out / "rejected.parquet", "rejected") == []


def test_ingest_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    contents = []
    for _ in range(2):
        out = sources.ingest(_config("made", {"images": 3}), out=Path("index"), work=Path("work"))
        contents.append({p.name: p.read_bytes() for p in sorted(out.glob("*.parquet"))})
    assert contents[0] == contents[1]


def test_ingest_keeps_what_other_stages_left_in_the_work_folder(tmp_path: Path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "other").write_text("x")
    sources.ingest(_config("made", {"images": 1}), out=tmp_path / "index", work=tmp_path / "work")
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["other"]


def test_ingest_without_a_benchmark_is_an_error(kit, tmp_path: Path):
    kit.write_tar(tmp_path / "s" / "sa_0.tar", kit.pair("a"))
    with pytest.raises(ConfigError, match=r"ingest\.benchmark"):
        sources.ingest(_config("sa1b", {"folder": str(tmp_path / "s")}), out=tmp_path / "index", work=tmp_path / "work")


def test_ingest_takes_a_users_shards_and_benchmark_and_no_validation(kit, tmp_path: Path):
    kit.write_tar(tmp_path / "s" / "sa_0.tar", kit.pair("a") | {"b.jpg": b"x"})
    write_concept101(tmp_path / "bench")
    config = _config("sa1b", {"folder": str(tmp_path / "s")}, benchmark=str(tmp_path / "bench"))
    out = sources.ingest(config, out=tmp_path / "index", work=tmp_path / "work")
    assert kit.reasons(read_rows(out / "rejected.parquet", "rejected")) == [Reason.MISSING_ANNOTATION]
    assert read_rows(out / "validation_tasks.parquet", "tasks") == []
    assert not (out / "source").exists()


def test_a_source_without_shards_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="no shards"):
        sources.ingest(_config("sa1b", {"folder": str(tmp_path)}), out=tmp_path / "index", work=tmp_path / "work")
