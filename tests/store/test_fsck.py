"""Every kind of damage is named; a repair keeps what verifies, brings no deleted row back, deletes nothing whole."""

import json
import os
import shutil

import pytest
import torch
from store.samples import LAYERS, columns_of, ids_of, part_of, rows_of, tree

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, fsck
from logra_kernels.store.life import fsck as life_fsck

COUNT = 30
GONE = (1, 12, 13)  # deleted in the sample
KINDS = {
    "manifest": "manifest.json",
    "origin": "origin.json",
    "rows": "rows-000000000008-000000000016.safetensors",
    "columns": "rows-000000000008-000000000016.parquet",
    "tail": "rows-000000000024-000000000030.safetensors",
    "deleted": "deleted-000000000008-*.safetensors",
    "sidecar": "sidecars/norms.*.safetensors",
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Four shards, the first and second with deleted rows, and a sidecar."""
    path = tmp_path_factory.mktemp("sample") / "s"
    with GradientStore.create(path, LAYERS, rows_per_shard=8) as store:
        store.append(*part_of(COUNT, 0, COUNT))
        store.delete([f"row-{i}" for i in GONE])
    store.sidecar_write("norms", {"x": torch.ones(COUNT - len(GONE))})
    return path


@pytest.fixture
def path(sample, tmp_path):
    return shutil.copytree(sample, tmp_path / "s")


def find(path, kind):
    (file,) = path.glob(KINDS[kind])
    return file


def shows(path, *lost):
    store = GradientStore.open(path)
    kept = [i for i in range(COUNT) if i not in (*GONE, *lost)]
    assert store.ids == [ids_of(COUNT)[i] for i in kept]
    assert store.columns == {name: [values[i] for i in kept] for name, values in columns_of(COUNT).items()}
    assert torch.equal(store.read(0, len(store)), rows_of(COUNT)[kept])
    return True


def flip(file, at=None):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 4
    file.write_bytes(data)


def names(ids):
    return [f"row-{i}" for i in ids]


def test_a_whole_store(path):
    before = tree(path)
    report = fsck(path)
    assert (report.rows, report.faults, report.notes, report.lost, report.left) == (27, [], [], [], 0)
    assert fsck(path, repair=True).repairs == []
    assert tree(path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_changed_byte_is_named(path, kind):
    file = find(path, kind)
    good = file.read_bytes()
    for at in range(0, len(good), 7):
        flip(file, at)
        report = fsck(path)
        assert report.left >= 1, at
        assert any(str(file) in fault for fault in report.faults), at
        assert not any("\n" in fault for fault in report.faults)
        file.write_bytes(good)
    for data in (b"", good[:20], good[:-1], good + b"\0"):
        file.write_bytes(data)
        assert any(str(file) in fault for fault in fsck(path).faults)
    file.unlink()
    if kind in ("origin", "sidecar"):  # made again by the next writer, or computed again
        assert fsck(path).faults == []
    else:
        assert any(f"{file} is missing" in fault for fault in fsck(path).faults)


@pytest.mark.parametrize("kind", ["rows", "columns", "deleted", "manifest"])
def test_no_reader_shows_a_number_before_fsck_would_name_the_fault(path, kind):
    flip(find(path, kind))
    with pytest.raises(StoreError, match="damaged"):
        store = GradientStore.open(path)
        assert store.ids
        store.topk(rows_of(1), 3)


@pytest.mark.parametrize("harm", [flip, os.unlink, lambda file: os.truncate(file, 100)])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_a_damaged_shard_is_dropped_and_its_rows_are_said(path, kind, harm):
    before = tree(path)
    harm(find(path, kind))
    damaged = tree(path)
    report = fsck(path, repair=True)
    assert report.left == 0
    assert report.lost == (names([8, 9, 10, 11, 14, 15]) if kind == "rows" else [])
    assert shows(path, *range(8, 16))
    assert fsck(path).rows == 21
    kept = {*tree(path).values()}
    assert all(data in kept for name, data in damaged.items() if name != "manifest.json"), "a file was deleted"
    with GradientStore.open(path, mode="append") as store:  # and it goes on
        rows, ids, columns = part_of(COUNT, 8, 16)
        store.append(rows, ids, columns)
        store.flush()
        assert len(store.ids) == 29
    assert fsck(path).rows == 29
    assert {name for name in before if name.startswith("sidecars")} <= {*tree(path)}


@pytest.mark.parametrize("harm", [flip, os.unlink, lambda file: os.truncate(file, 100)])
def test_a_lost_manifest_is_rebuilt(path, harm):
    before = tree(path)
    harm(path / "manifest.json")
    with pytest.raises(StoreError, match="fsck --repair"):
        GradientStore.open(path)
    assert fsck(path).rows == 27
    assert fsck(path, repair=True).left == 0
    assert tree(path) == before
    assert shows(path)


def test_a_lost_manifest_and_a_damaged_shard(path):
    (path / "manifest.json").unlink()
    flip(find(path, "rows"))
    report = fsck(path, repair=True)
    assert report.left == 0
    assert any("does not fit" in fault for fault in report.faults)
    assert shows(path, *range(8, 16))
    assert fsck(path).rows == 21


def test_a_lost_manifest_after_a_compaction(path):
    reader = GradientStore.open(path)  # keeps the files that the compaction replaces
    with GradientStore.open(path, mode="append") as store:
        store.compact()
    (path / "manifest.json").unlink()
    assert fsck(path, repair=True).left == 0
    assert shows(path)
    del reader


def test_a_lost_manifest_between_two_states_of_the_tail(path, sample):
    with GradientStore.open(path, mode="append") as store:
        rows, _, columns = part_of(COUNT, 0, 1)
        store.append(rows, ["new"], columns)
    for kind in ("safetensors", "parquet"):
        shutil.copy(sample / f"rows-000000000024-000000000030.{kind}", path)
    (path / "manifest.json").unlink()
    assert fsck(path, repair=True).left == 0
    assert GradientStore.open(path).ids[-2:] == ["row-29", "new"]


def test_without_manifest_and_origin_nothing_can_be_read_and_nothing_is_touched(path):
    (path / "manifest.json").unlink()
    (path / "origin.json").unlink()
    before = tree(path)
    report = fsck(path, repair=True)
    assert report.left == 3
    assert "nothing in" in report.faults[-1]
    assert tree(path) == before


def test_a_damaged_list_of_deleted_rows_brings_none_back_by_itself(path):
    flip(find(path, "deleted"))
    for lost in ((), ("manifest.json",)):
        for name in lost:
            (path / name).unlink()
        before = tree(path)
        report = fsck(path, repair=True)
        assert report.left >= 1
        assert "--undelete" in report.repairs[-1]
        assert tree(path) == before
    report = fsck(path, repair=True, undelete=True)
    assert report.left == 0
    assert GradientStore.open(path).ids == [f"row-{i}" for i in range(COUNT) if i != 1]


def test_leftovers_are_notes_and_a_repair_sets_rows_aside(path, sample):
    shutil.copy(sample / "rows-000000000000-000000000008.parquet", path / "rows-000000000030-000000000038.parquet")
    (path / ".tmp-manifest.json").write_bytes(b"half")
    (path / "notes.txt").write_bytes(b"the user's own")
    report = fsck(path)
    assert report.left == 0
    assert [note.rpartition("/")[2].split()[0] for note in report.notes] == [
        ".tmp-manifest.json",
        "rows-000000000030-000000000038.parquet",
    ]
    with GradientStore.open(path, mode="append"), pytest.raises(StoreError, match="being written"):
        fsck(path, repair=True)
    assert (path / "notes.txt").exists()
    (path / ".tmp-manifest.json").write_bytes(b"half")
    shutil.copy(sample / "rows-000000000000-000000000008.parquet", path / "rows-000000000030-000000000038.parquet")
    assert len(fsck(path, repair=True).repairs) == 2
    assert (path / "lost+found" / "rows-000000000030-000000000038.parquet").exists()
    assert fsck(path).notes == []


def test_a_damaged_sidecar_is_removed(path):
    flip(find(path, "sidecar"))
    assert fsck(path, repair=True).left == 0
    assert GradientStore.open(path).sidecar_read("norms") is None


def test_an_id_in_two_rows(path):
    """No writer makes such a store; a manifest that names a shard's columns twice does."""
    from store.test_damage import resealed

    def twice(table):
        first, last = table["shards"][0], table["shards"][2]
        shutil.copy(path / first["columns"]["file"], path / last["columns"]["file"])
        last["columns"] |= {key: first["columns"][key] for key in ("bytes", "checksum")}

    resealed(path, twice)
    assert "ids in more than one row: row-0, row-2" in fsck(path).faults[0]


def test_a_newer_format_is_not_a_fault(path):
    table = json.loads((path / "manifest.json").read_text()) | {"version": 99}
    (path / "manifest.json").write_text(json.dumps(table))
    with pytest.raises(StoreError, match="has format version 99"):
        fsck(path, repair=True)


def test_what_a_writer_replaces_meanwhile_is_no_fault(path, monkeypatch):
    """The short last shard grows and a list of deleted rows gives way to another while they are checked."""
    writer = GradientStore.open(path, mode="append")
    turns = iter(range(3))
    real = life_fsck.check_shard

    def check(*args):
        turn = next(turns, None)
        if turn is not None:
            rows, _, columns = part_of(COUNT, turn, turn + 1)
            writer.append(rows, [f"new-{turn}"], columns)
            writer.delete([f"row-{16 + turn}"])
        return real(*args)

    monkeypatch.setattr(life_fsck, "check_shard", check)
    report = fsck(path)
    assert next(turns, None) is None
    writer.close()
    assert (report.faults, report.rows) == ([], len(GradientStore.open(path)))


def test_a_fault_beside_a_writer_stays_one(path):
    flip(find(path, "rows"))
    with GradientStore.open(path, mode="append"):
        assert len(fsck(path).faults) == 1


def test_a_damaged_version_is_a_fault(path):
    """A byte of it can look like a newer format."""
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"version": 2', '"version": 6'))
    with pytest.raises(StoreError, match="checksum does not fit"):
        GradientStore.open(path)
    assert "checksum does not fit" in fsck(path).faults[0]
    assert fsck(path, repair=True).left == 0
    assert (path / "manifest.json").read_text() == text


def test_not_a_store(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="is not a"):
            fsck(place, repair=True)
    assert not list(tmp_path.iterdir())
