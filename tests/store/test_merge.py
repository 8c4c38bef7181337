"""Several stores made one, without touching a number; what does not fit together is refused in full."""

import errno
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from store.samples import LAYERS, columns_of, ids_of, part_of, rows_of, tree

from logra_kernels.errors import StoreError, StoreMismatch
from logra_kernels.store import GradientStore, add_skipped, fsck, lock, merge, read_skipped

COUNT = 40


def make(path, start, stop, per_shard=8, **settings):
    settings = {"fingerprints": {"model": "m"}, "projection": {"rank": 4}, **settings}
    with GradientStore.create(path, LAYERS, rows_per_shard=per_shard, **settings) as store:
        store.append(*part_of(COUNT, start, stop))
    return path


@pytest.fixture
def parts(tmp_path):
    return [make(tmp_path / "a", 0, 20), make(tmp_path / "b", 20, 36), make(tmp_path / "c", 36, COUNT)]


def assert_holds(store, kept, ids=None):
    assert store.ids == (ids or [ids_of(COUNT)[i] for i in kept])
    assert torch.equal(store.read(0, len(store)), rows_of(COUNT)[kept])
    assert store.columns == {name: [values[i] for i in kept] for name, values in columns_of(COUNT).items()}
    report = fsck(store.path)
    assert (report.rows, report.faults, report.notes) == (len(kept), [], [])


@pytest.mark.parametrize("link", [True, False])
def test_the_rows_of_all_in_order(parts, tmp_path, link):
    before = [tree(part) for part in parts]
    store = merge(parts, tmp_path / "out", link=link)
    assert_holds(store, [*range(COUNT)])
    assert store.fingerprints == {"model": "m"}
    assert store.projection == {"rank": 4}
    assert [tree(part) for part in parts] == before
    source, target = (next(iter(sorted(place.glob("rows-*.safetensors")))) for place in (parts[0], store.path))
    assert os.path.samefile(source, target) == link
    queries = rows_of(3, seed=1)
    torch.testing.assert_close(store.topk(queries, 5)[0], (queries @ rows_of(COUNT).T).topk(5).values)


def test_the_merged_store_goes_on_and_its_sources_stay(parts, tmp_path):
    merge(parts[:2], tmp_path / "out")
    before = tree(parts[1])
    with GradientStore.open(tmp_path / "out", mode="append") as store:
        store.append(*part_of(COUNT, 36, COUNT))
        store.delete(["row-3", "row-30"])
        store.compact()
    assert_holds(GradientStore.open(tmp_path / "out"), [i for i in range(COUNT) if i not in (3, 30)])
    assert tree(parts[1]) == before


def test_deleted_rows_stay_behind(parts, tmp_path):
    with GradientStore.open(parts[0], mode="append") as store:
        store.delete([f"row-{i}" for i in (2, *range(8, 16))])
    store = merge(parts, tmp_path / "out")
    assert_holds(store, [i for i in range(COUNT) if i != 2 and not 8 <= i < 16])
    assert all(not shard.hidden for shard in store.manifest.shards)


def test_encoded_rows_keep_their_codes(tmp_path):
    for name, start, stop in (("a", 0, 13), ("b", 13, 30)):
        make(tmp_path / name, start, stop, dtype="int8", block=32)
    with GradientStore.open(tmp_path / "b", mode="append") as store:
        store.delete(["row-20"])
    parts = [GradientStore.open(tmp_path / name) for name in ("a", "b")]
    store = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert torch.equal(store.read(0, 29), torch.cat([part.read(0, len(part)) for part in parts]))


def test_ids_of_skipped_rows_are_kept(parts, tmp_path):
    add_skipped(parts[0], ["bad-1"])
    add_skipped(parts[2], ["bad-2", "bad-1"])
    assert read_skipped(merge(parts, tmp_path / "out").path) == ["bad-1", "bad-2"]


def test_stores_without_rows(parts, tmp_path):
    """As those of ranks that found nothing to log."""
    settings = {"fingerprints": {"model": "m"}, "projection": {"rank": 4}}
    for name in ("first", "last"):
        GradientStore.create(tmp_path / name, LAYERS, rows_per_shard=8, **settings).close()
    assert_holds(merge([tmp_path / "first", *parts, tmp_path / "last"], tmp_path / "out"), [*range(COUNT)])
    empty = merge([tmp_path / "first", tmp_path / "last"], tmp_path / "empty")
    assert (len(empty), fsck(empty.path).faults) == (0, [])


def test_every_difference_is_named(tmp_path):
    make(tmp_path / "a", 0, 8)
    make(tmp_path / "b", 8, 16, dtype="bf16", fingerprints={"model": "x", "loss": "sum"}, projection={"rank": 5})
    with GradientStore.create(tmp_path / "c", {"first": (2, 3), "h.0.mlp": (4, 5)}, meta={"bias": True}) as store:
        store.append(torch.ones(1, 26), ["z"])
    with pytest.raises(StoreMismatch) as caught:
        merge([tmp_path / name for name in "abc"], tmp_path / "out")
    text = str(caught.value)
    a, b, c = (tmp_path / name for name in "abc")
    for phrase in (
        f"format (fp32 in {a}, bf16 in {b})",
        f"fingerprint model ('m' in {a}, 'x' in {b})",
        f"fingerprint loss (none in {a}, 'sum' in {b})",
        f"projection rank (4 in {a}, 5 in {b})",
        f"layer h.0.mlp (4x4 at 6 in {a}, 4x5 at 6 in {c})",
        f"meta bias (none in {a}, True in {c})",
        f"columns (id: string, source: string, span: list<element: int64>, weight: double in {a}, id: string in {c})",
    ):
        assert phrase in text
    assert "\n" not in text
    assert not (tmp_path / "out").exists()


def test_duplicate_ids(tmp_path):
    make(tmp_path / "a", 0, 12)
    make(tmp_path / "b", 10, 20)
    make(tmp_path / "c", 11, 13)
    places = [tmp_path / name for name in "abc"]
    with pytest.raises(StoreError, match=r"4 ids are in more than one of the stores: 'row-10', 'row-11', 'row-11'"):
        merge(places, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StoreError, match="duplicates is 'sum'"):
        merge(places, tmp_path / "out", duplicates="sum")
    store = merge(places, tmp_path / "out", duplicates="keep")
    kept = [*range(12), *range(10, 20), 11, 12]
    ids = [*ids_of(12), "row-10#2", "row-11#2", *ids_of(20)[12:], "row-11#3", "row-12#2"]
    assert_holds(store, kept, ids)


def names_of_all(given):
    """By sets: what the rows of stores with these ids are called in one."""
    known, seen, found = {name for ids in given for name in ids}, set(), []
    for ids in given:
        for name in ids:
            if name in seen:
                number = next(n for n in range(2, 10**6) if f"{name}#{n}" not in known)
                name = f"{name}#{number}"
                known.add(name)
            seen.add(name)
            found.append(name)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_any_duplicate_ids(tmp_path, seed, monkeypatch):
    """Names that others get when they are numbered, deleted rows, several shards; with the native table and without."""
    if seed % 2:
        monkeypatch.setattr("logra_kernels.store.ids.has_places", lambda: False)
    chance = random.Random(seed)
    pool = [f"{name}{end}" for name in ("a", "b", "ä", "", "a#2") for end in ("", "#2", "#3", "#2#2", "\0")]
    given, places = [], []
    for number in range(4):
        ids = list(dict.fromkeys(chance.choices(pool, k=20)))
        places.append(tmp_path / str(number))
        with GradientStore.create(places[-1], {"l": (1, 2)}, rows_per_shard=5) as store:
            store.append(torch.randn(len(ids), 2), ids)
            gone = chance.sample(ids, 3)
            store.delete(gone)
        given.append([name for name in ids if name not in gone])
    names = names_of_all(given)
    twice = sum(map(len, given)) - len(set().union(*given))
    with pytest.raises(StoreError, match=f"^{twice} ids are in more than one of the stores: '.*' and {twice - 5} more"):
        merge(places, tmp_path / "out")
    store = merge(places, tmp_path / "out", duplicates="keep")
    assert store.ids == names
    rows = [GradientStore.open(place) for place in places]
    assert torch.equal(store.read(0, len(store)), torch.cat([part.read(0, len(part)) for part in rows]))
    assert fsck(store.path).faults == []


def test_an_id_that_one_store_has_twice(tmp_path, monkeypatch):
    """As damage may leave it: every row has an id of its own afterwards."""
    with monkeypatch.context() as patch:
        patch.setattr("logra_kernels.store.writing.append.add_ids", lambda known, ids: None)
        with GradientStore.create(tmp_path / "a", {"l": (1, 2)}, rows_per_shard=4) as store:
            store.append(torch.randn(6, 2), ["x", "x", "x", "y", "x", "z"])
    store = merge([tmp_path / "a"], tmp_path / "out", duplicates="keep")
    assert store.ids == ["x", "x#2", "x#3", "y", "x#4", "z"]


def test_an_interrupted_merge_is_taken_up(parts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    whole = tree(merge(parts, tmp_path / "whole").path)
    for step in range(40):
        calls = [step]

        def fails(call, calls=calls):
            def stand_in(*args, **kwargs):
                if calls[0] == 0:
                    raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
                calls[0] -= 1
                return call(*args, **kwargs)

            return stand_in

        with monkeypatch.context() as patch:
            for name in ("link", "replace", "fsync"):
                patch.setattr(os, name, fails(getattr(os, name)))
            try:
                merge(parts, out)
            except StoreError as error:
                assert "No space left" in str(error)
                assert not GradientStore.exists(out) or GradientStore.open(out).ids == ids_of(COUNT)
        if calls[0] > 0:
            break
        if not GradientStore.exists(out) and any(out.glob("rows-*")):
            assert "an unfinished merge" in fsck(out, repair=True).faults[-1]
        merge(parts, out)
        assert tree(out) == whole
        shutil.rmtree(out)
    assert step > 10


def test_what_lies_at_the_target(parts, tmp_path):
    with pytest.raises(StoreError, match="holds a gradient store"):
        merge(parts[:1], parts[1])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty"):
        merge(parts, tmp_path / "full")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "merge.json").write_text("{}")
    with pytest.raises(StoreError, match="merge.json is damaged"):
        merge(parts, tmp_path / "out")
    merge(parts[:2], tmp_path / "other")
    with pytest.raises(StoreError, match="holds a merge of other rows"):
        merge(parts, tmp_path / "other")
    with pytest.raises(StoreError, match="no stores to merge"):
        merge([], tmp_path / "new")
    with pytest.raises(StoreError, match="is not a gradient store"):
        merge([parts[0], tmp_path / "nowhere"], tmp_path / "new")


@pytest.mark.parametrize("cause", ["a read-only file system", "permission", "is a file"])
def test_why_the_target_cannot_be_made(parts, tmp_path, monkeypatch, cause):
    folder = tmp_path / "folder"
    if cause == "is a file":
        folder.touch()
    else:
        folder.mkdir()

        def refuse(self, *_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        flags = os.ST_RDONLY if "read-only" in cause else 0
        monkeypatch.setattr(lock.Path, "mkdir", refuse)
        monkeypatch.setattr(lock.os, "statvfs", lambda path: SimpleNamespace(f_flag=flags if path == folder else 0))
        monkeypatch.setattr(lock.os, "access", lambda *_: False)
    with pytest.raises(StoreError, match=f"{folder}/a/new cannot be made: .*{cause}") as caught:
        merge(parts, folder / "a" / "new")
    assert str(folder) in str(caught.value).partition("made: ")[2]
    assert "No such file" not in str(caught.value)


def test_a_damaged_source_is_found_where_it_is_read(parts, tmp_path):
    file = next(iter(sorted(parts[0].glob("rows-*.safetensors"))))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match="is damaged"):
        merge(parts, tmp_path / "copied", link=False)
    store = merge(parts, tmp_path / "linked")
    with pytest.raises(StoreError, match="is damaged"):
        store.read(0, 1)


def test_a_damaged_plan(parts, tmp_path):
    out = merge(parts, tmp_path / "out").path
    good = tree(out)["merged.json"]
    for place in range(len(good)):
        (out / "merged.json").write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        assert fsck(out).faults == [f"{out / 'merged.json'} is damaged: its checksum does not fit"]
    with pytest.raises(StoreError, match=r"merged.json is damaged; merge into another place"):
        merge(parts, out)
    assert fsck(out, repair=True).left == 0
    assert_holds(GradientStore.open(out), [*range(COUNT)])
