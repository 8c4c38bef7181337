"""Deleted rows are seen by nobody; compaction takes them out of the files and changes nothing that is seen."""

import random

import pytest
import torch
from store.samples import LAYERS, columns_of, ids_of, part_of, rows_of, tree

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, fsck, merge, quantize

COUNT = 40


def fill(path, start, stop, per_shard=8):
    """Append rows [start, stop) of `COUNT`."""
    exists = GradientStore.exists(path)
    store = (
        GradientStore.open(path, "append") if exists else GradientStore.create(path, LAYERS, rows_per_shard=per_shard)
    )
    with store:
        store.append(*part_of(COUNT, start, stop))
    return path


@pytest.fixture
def path(tmp_path):
    return fill(tmp_path / "s", 0, 30)


def delete(path, rows):
    with GradientStore.open(path, mode="append") as store:
        return store.delete([f"row-{row}" for row in rows])


def compact(path):
    with GradientStore.open(path, mode="append") as store:
        return store.compact()


def assert_shows(store, kept):
    """Every way of reading shows these rows of `COUNT` and no other."""
    rows = rows_of(COUNT)[kept]
    queries = rows_of(3, seed=1)
    assert len(store) == len(kept)
    assert store.ids == [ids_of(COUNT)[i] for i in kept]
    assert store.columns == {name: [values[i] for i in kept] for name, values in columns_of(COUNT).items()}
    assert torch.equal(store.read(0, len(kept)), rows)
    for at in range(0, len(kept), 7):
        assert torch.equal(store.read(at, min(len(kept), at + 9)), rows[at : at + 9])
    for max_bytes in (1, 300, None):
        blocks = list(store.blocks(max_bytes))
        assert torch.equal(torch.cat([block for _, block in blocks]), rows)
        assert [first for first, _ in blocks] == [0, *torch.tensor([len(b) for _, b in blocks[:-1]]).cumsum(0).tolist()]
    dense = queries.double() @ rows.double().T
    torch.testing.assert_close(store.score(queries).double(), dense, rtol=1e-5, atol=1e-5)
    _, index = store.topk(queries, 4, max_bytes=300)
    assert torch.equal(index, dense.topk(min(4, len(kept))).indices)
    assert [store.ids_of(row) for row in index] == [[store.ids[i] for i in row] for row in index.tolist()]
    assert all(store.committed(f"row-{i}") == (i in kept) for i in range(COUNT))


def without(*gone, of=30):
    return [i for i in range(of) if i not in gone]


@pytest.mark.parametrize("gone", [[0], [29], [7, 8], [*range(8, 16)], [3, 5, 9, 17, 24, 29], [*range(1, 30, 2)]])
def test_deleted_rows_are_not_seen_and_compaction_changes_nothing_that_is(path, gone):
    hash_before = GradientStore.open(path).content_hash
    assert delete(path, gone) == len(gone)
    assert_shows(GradientStore.open(path), without(*gone))
    deleted_hash = GradientStore.open(path).content_hash
    assert deleted_hash != hash_before
    size = sum(map(len, tree(path).values()))
    assert compact(path) == len(gone)
    assert_shows(GradientStore.open(path), without(*gone))
    assert GradientStore.open(path).content_hash == deleted_hash
    assert not [name for name in tree(path) if name.startswith("deleted")]
    assert sum(map(len, tree(path).values())) < size
    fill(path, 30, COUNT)
    assert_shows(GradientStore.open(path), without(*gone, of=COUNT))
    assert GradientStore.open(path).content_hash != deleted_hash


def test_all_rows_deleted(path):
    delete(path, range(30))
    for step in (lambda: None, lambda: compact(path)):
        step()
        store = GradientStore.open(path)
        assert (len(store), store.ids, store.read(0, 0).shape) == (0, [], (0, 22))
        assert store.table.column_names == ["id", "source", "span", "weight"]
        assert store.topk(rows_of(1), 3)[0].shape == (1, 0)
    fill(path, 30, COUNT)
    assert_shows(GradientStore.open(path), [*range(30, COUNT)])


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_appends_deletions_and_compactions(tmp_path, seed):
    chance = random.Random(seed)
    path = tmp_path / "s"
    kept, end, readers = [], 0, []
    while end < COUNT:
        stop = min(COUNT, end + chance.randint(1, 9))
        fill(path, end, stop, per_shard=5)
        kept, end = [*kept, *range(end, stop)], stop
        readers.append((GradientStore.open(path), list(kept)))
        gone = chance.sample(kept[1:], chance.randint(0, min(4, len(kept) - 1)))
        delete(path, gone)
        kept = [i for i in kept if i not in gone]
        if chance.random() < 0.5:
            compact(path)
    for store, shown in readers:  # each goes on with the state it was opened in
        assert_shows(store, shown)
    del store, readers
    compact(path)
    assert_shows(GradientStore.open(path), kept)


def test_within_one_object(path):
    with GradientStore.open(path, mode="append") as store:
        store.append(*part_of(COUNT, 30, 33))
        assert store.delete(["row-31", "row-2", "row-2"]) == 2  # a queued row is committed first
        assert store.delete(["row-31"]) == 0
        assert_shows(store, without(2, 31, of=33))
        store.append(*part_of(COUNT, 33, 35))
        assert store.compact() == 2
        assert store.compact() == 0
        store.append(*part_of(COUNT, 35, COUNT))
    assert_shows(store, without(2, 31, of=COUNT))


def test_ids_that_are_not_there(path):
    before = tree(path)
    with GradientStore.open(path, mode="append") as store:
        with pytest.raises(StoreError, match=r"no rows with 1 of the 2 ids: 'nobody'; none was deleted"):
            store.delete(["row-1", "nobody"])
        for ids in ([1], "row-1", b"row-1"):
            with pytest.raises(StoreError, match="list of str"):
                store.delete(ids)
        assert len(store) == 30
        assert store.delete([]) == 0
    assert tree(path) == before
    with GradientStore.open(path, mode="append") as store:
        assert store.delete(["row-1", "nobody"], missing_ok=True) == 1
        assert store.delete(f"row-{i}" for i in (1, 4, 5)) == 2
    with pytest.raises(StoreError, match="mode='append'"):
        GradientStore.open(path).delete(["row-2"])


def test_a_rerun_passes_over_deleted_rows(path):
    delete(path, [5, 11, 29])
    with GradientStore.open(path, mode="append") as store:
        assert store.append(*part_of(COUNT, 0, 12), skip_committed=True) == 0
        assert store.append(*part_of(COUNT, 12, COUNT), skip_committed=True) == 10
    assert_shows(GradientStore.open(path), without(5, 11, 29, of=COUNT))
    with GradientStore.open(path, mode="append") as store:
        with pytest.raises(StoreError, match="were deleted from the store: 'row-5'"):
            store.append(*part_of(COUNT, 5, 6))
        assert store.compact() == 3
        with pytest.raises(StoreError, match="were deleted from the store: 'row-5'.*release_ids=True"):
            store.append(*part_of(COUNT, 5, 6))
        assert store.compact(release_ids=True) == 0
        store.append(*part_of(COUNT, 5, 6))
    assert_shows(GradientStore.open(path), [*without(5, 11, 29, of=COUNT), 5])


def test_a_rerun_passes_over_rows_that_were_compacted_away(path):
    delete(path, [5, 11, 29])
    assert compact(path) == 3
    delete(path, [0, 28])
    assert compact(path) == 2
    gone = [f"row-{i}" for i in (5, 11, 29, 0, 28)]
    store = GradientStore.open(path)
    assert store.deleted_ids == gone
    assert store.taken([*gone, "row-1"])
    with GradientStore.open(path, mode="append") as store:
        assert store.delete(gone) == 0
        assert store.append(*part_of(COUNT, 0, 12), skip_committed=True) == 0
        assert store.append(*part_of(COUNT, 12, COUNT), skip_committed=True) == 10
    left = without(0, 5, 11, 28, 29, of=COUNT)
    assert_shows(GradientStore.open(path), left)
    assert fsck(path).faults == []
    with GradientStore.open(path, mode="append") as store:
        assert store.compact(release_ids=True) == 0
        assert store.deleted_ids == []
        store.append(*part_of(COUNT, 5, 6))
    assert GradientStore.open(path).deleted_ids == []


def test_deleted_ids_go_on_into_stores_that_are_made_of_it(path, tmp_path):
    delete(path, [3])
    compact(path)
    delete(path, [4])
    fill(tmp_path / "other", 30, 35)
    for made in (merge([path, tmp_path / "other"], tmp_path / "m"), quantize(path, tmp_path / "q", "bf16")):
        assert sorted(made.deleted_ids) == ["row-3", "row-4"]


def test_a_damaged_list_of_removed_ids_is_found(path):
    delete(path, [3])
    compact(path)
    file = next((path / "sidecars").glob("removed.*"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert fsck(path).faults
    with pytest.raises(StoreError, match="removed"):
        GradientStore.open(path, mode="append")


def test_resume_after_data_without_the_deleted_rows(path):
    delete(path, [5, 11])
    rows, ids, columns = part_of(COUNT, 0, COUNT)
    left = [i for i in range(COUNT) if i not in (5, 11)]
    picked = {name: [values[i] for i in left] for name, values in columns.items()}
    with GradientStore.open(path, mode="append") as store:
        assert store.append(rows[left], [ids[i] for i in left], picked, skip_committed=True) == 10
    assert_shows(GradientStore.open(path), left)


def test_sidecars_go_stale_with_a_deletion_and_outlive_a_compaction(path):
    GradientStore.open(path).sidecar_write("norms", {"x": torch.ones(30)})
    delete(path, [4])
    assert GradientStore.open(path).sidecar_read("norms") is None
    GradientStore.open(path).sidecar_write("norms", {"x": torch.ones(29)})
    compact(path)
    assert GradientStore.open(path).sidecar_read("norms") is not None


def test_files_that_readers_need_stay_until_they_are_gone(path):
    delete(path, [1, 12])
    reader = GradientStore.open(path)
    compact(path)
    fill(path, 30, 35)
    assert_shows(reader, without(1, 12))
    files = set(tree(path))
    assert "rows-000000000000-000000000008.safetensors" in files
    del reader
    fill(path, 35, COUNT)
    assert not [
        name for name in tree(path) if name.startswith("deleted") or name.startswith("rows-000000000000-000000000008.")
    ]
    assert_shows(GradientStore.open(path), without(1, 12, of=COUNT))


def test_every_changed_byte_of_the_list_is_found(path):
    delete(path, [1, 12])
    for name in [name for name in tree(path) if name.startswith("deleted")]:
        good = (path / name).read_bytes()
        changed = [good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :] for at in range(len(good))]
        for data in [*changed, b"", good[:50], good + b"\0"]:
            (path / name).write_bytes(data)
            with pytest.raises(StoreError, match=f"{name}.*is damaged"):
                GradientStore.open(path)
        (path / name).unlink()
        for mode in ("read", "append"):
            with pytest.raises(StoreError, match=f"{name} is missing"):
                GradientStore.open(path, mode=mode)
        (path / name).write_bytes(good)
    assert_shows(GradientStore.open(path), without(1, 12))
