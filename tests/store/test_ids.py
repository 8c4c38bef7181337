"""Every id and the number of its row, against lists and dictionaries, with and without the native library."""

import random

import pyarrow as pa
import pytest
import torch
from store.samples import LAYERS, part_of, rows_of, tree, write

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, ids, shard
from logra_kernels.store.ids import DELETED, UNKNOWN, KnownIds, PythonPlaces
from logra_kernels.store.native import NativePlaces, has_places

COUNT = 40


@pytest.fixture(params=["native", "python"])
def kind(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(ids, "has_places", lambda: False)
        return PythonPlaces
    if not has_places():
        pytest.skip("no C++ compiler when the package was installed")
    return NativePlaces


def drawn(chance: random.Random, count: int) -> list[str]:
    """Strings of which some are equal, some share their first bytes, some are empty."""
    return ["".join(chance.choice("ab\0é\n\U0001f600") for _ in range(chance.randrange(12))) for _ in range(count)]


def first_that_clashes(there: list[str], names: list[str]) -> int:
    return next((i for i, name in enumerate(names) if name in there or name in names[:i]), -1)


@pytest.mark.parametrize("seed", range(20))
def test_places(kind, seed):
    chance, places, there = random.Random(seed), kind(), []
    for _ in range(30):
        names = drawn(chance, chance.choice([0, 1, 3, 70, 500]))
        if chance.random() < 0.7:
            names = [name for name in dict.fromkeys(names) if name not in {*there}]
        clash = first_that_clashes(there, names)
        added = pa.array(["x", *names], pa.string())[1:] if chance.random() < 0.3 else None
        assert (places.add(names) if added is None else places.add_arrow(added)) == clash
        there += names if clash < 0 else []
        if chance.random() < 0.3:
            gone = chance.randrange(len(there) + 1)
            places.drop(gone)
            there = there[: len(there) - gone]
        assert len(places) == len(there)
        asked = [*there[::7], *drawn(chance, 5), "nobody"]
        place_of = {name: place for place, name in enumerate(there)}
        assert places.find(asked).tolist() == [place_of.get(name, -1) for name in asked]


@pytest.mark.parametrize("seed", range(10))
def test_only_what_is_not_there_is_added(kind, seed):
    chance, places, there = random.Random(seed), kind(), []
    for count in (0, 1, 3, 70, 500, 2000):
        names = [*drawn(chance, count), *chance.sample(there, min(len(there), 5))]
        chance.shuffle(names)
        wanted = [name not in there and name not in names[:row] for row, name in enumerate(names)]
        new = places.add_new(pa.array(["x", *names], pa.string())[1:])
        assert (new.dtype, new.tolist()) == (bool, wanted)
        there += [name for name, is_new in zip(names, wanted, strict=True) if is_new]
        assert len(places) == len(there)
        assert places.find(there).tolist() == [*range(len(there))]


def test_many_places(kind):
    """The table grows several times, and forgets what came last across that."""
    names = [f"row-{i}" for i in range(30_000)]
    places = kind()
    assert places.add(names) == -1
    places.drop(20_000)
    assert places.find([names[9_999], names[10_000]]).tolist() == [9_999, -1]
    assert places.add(names[10_000:]) == -1
    assert places.add(["new", names[17]]) == 1
    assert places.find(names).tolist() == list(range(30_000))


@pytest.mark.parametrize(("names", "error"), [(["a", 1], TypeError), (["a", "\ud800"], UnicodeEncodeError)])
def test_what_is_no_id(kind, names, error):
    places = kind()
    with pytest.raises(error):
        places.add(names)
    assert (len(places), places.add(["a"])) == (0, -1)


@pytest.mark.parametrize("seed", range(5))
def test_numbers_of_rows(kind, seed):
    chance = random.Random(seed)
    shown, deleted = [f"s{i}" for i in range(30)], ["d0", "d1"]
    known = KnownIds(pa.chunked_array([shown[:20], [], shown[20:]], pa.string()), deleted)
    for turn in range(20):
        new = [f"n{turn}-{i}" for i in range(chance.randrange(5))]
        assert known.add(new) == -1
        shown += new
        gone = chance.sample(shown, chance.randrange(min(6, len(shown))))
        known.delete(gone)
        shown = [name for name in shown if name not in gone]
        deleted += gone
        assert known.rows == len(shown)
        assert known.numbers([*shown, *deleted, "x"]).tolist() == [
            *range(len(shown)), *[DELETED] * len(deleted), UNKNOWN,
        ]  # fmt: skip


def test_ids_in_two_rows(kind):
    with pytest.raises(StoreError, match="two rows have the id 'a'; see `logra fsck`"):
        KnownIds(pa.chunked_array([["a", "b", "a"]], pa.string()), [])
    known = KnownIds(pa.chunked_array([["a", "b"]], pa.string()), ["a", "c", "c"])
    assert known.numbers(["a", "b", "c"]).tolist() == [0, 1, DELETED]
    assert known.add(["d"]) == -1
    assert known.numbers(["d"]).tolist() == [2]


def test_a_store_is_the_same(kind, tmp_path):
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        store.append(*part_of(COUNT, 0, 30))
        store.delete(["row-3", "row-29"])
        store.append(*part_of(COUNT, 30, COUNT))
        assert store.delete(["row-39", "row-3"]) == 1
        with pytest.raises(StoreError, match="were deleted from the store: 'row-3'"):
            store.append(*part_of(COUNT, 3, 4))
        store.flush()
        assert [store.committed(f"row-{i}") for i in (0, 3, 38, 39)] == [True, False, True, False]
        assert not store.committed("nobody")
    kept = [i for i in range(COUNT) if i not in (3, 29, 39)]
    assert GradientStore.open(tmp_path / "s").ids == [f"row-{i}" for i in kept]
    assert torch.equal(GradientStore.open(tmp_path / "s").read(0, len(kept)), rows_of(COUNT)[kept])


@pytest.mark.parametrize("count", [1, 30])
def test_ids_of_rows_that_were_refused_are_free(kind, tmp_path, monkeypatch, count):
    monkeypatch.setattr("logra_kernels.store.writing.writer.SLICE_BYTES", 4 * 22 * 4)
    rows, names, columns = part_of(count, 0, count)
    bad = rows.clone()
    bad[-1, 5] = torch.nan
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        for _ in range(2):
            with pytest.raises(StoreError, match="NaN or Inf"):
                store.append(bad, names, columns)
        store.append(rows, names, columns)
    assert tree(tmp_path / "s") == tree(write(tmp_path / "other", count))


def test_a_deletion_reads_no_ids_but_the_tails(tmp_path, monkeypatch):
    write(tmp_path / "s", 39)
    with GradientStore.open(tmp_path / "s", mode="append") as store:
        read = []
        real = shard.from_parquet
        monkeypatch.setattr(shard, "from_parquet", lambda data, names: read.append(data) or real(data))
        for i in (0, 17, 38):
            assert store.delete([f"row-{i}"]) == 1
    assert len(read) == 3
