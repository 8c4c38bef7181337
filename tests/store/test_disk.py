"""Large files past the page cache: the same bytes as the plain way, whatever their length; errors leave nothing."""

import errno
import os
import threading

import numpy as np
import pytest
from store.samples import LAYERS, ids_of, part_of, rows_of, tree, write

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, fsck
from logra_kernels.store.writing import commit, disk, ring, writer

SLOT = 2 * disk.BLOCK
FORMATS = ["fp32", "bf16", "int8", "int4"]


@pytest.fixture
def small_slots(monkeypatch):
    monkeypatch.setattr(disk, "SLOT_BYTES", SLOT)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("per_shard", [93, 500, 1200])
def test_a_store_is_the_same_either_way(tmp_path, monkeypatch, dtype, per_shard):
    plain = tree(write(tmp_path / "plain", 1200, dtype, rows_per_shard=per_shard))
    monkeypatch.setattr(disk, "SLOT_BYTES", SLOT)
    assert tree(write(tmp_path / "direct", 1200, dtype, rows_per_shard=per_shard)) == plain


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_shard_that_is_committed_before_it_is_full_goes_on_growing(tmp_path, small_slots, dtype):
    with GradientStore.create(tmp_path / "s", LAYERS, dtype, rows_per_shard=500) as store:
        for start, stop in ((0, 150), (150, 333), (333, 700), (700, 701)):
            store.append(*part_of(1200, start, stop))
            store.flush()
            assert len(GradientStore.open(tmp_path / "s")) == stop
    with GradientStore.open(tmp_path / "s", mode="append") as store:
        store.append(*part_of(1200, 701, 1200))
    assert tree(tmp_path / "s") == tree(write(tmp_path / "whole", 1200, dtype, rows_per_shard=500))
    assert fsck(tmp_path / "s").faults == fsck(tmp_path / "s").notes == []


def test_a_file_system_that_refuses_direct_writes(tmp_path, small_slots, monkeypatch):
    plain = tree(write(tmp_path / "plain", 1200, rows_per_shard=500))
    real, refused = os.pwrite, []
    monkeypatch.setattr(disk, "_leave_direct", lambda fd: refused.append(fd) or True)

    def pwrite(fd, data, offset):
        if len(refused) < 3:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data[:5000], offset)

    monkeypatch.setattr(disk, "DIRECT", 0)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert tree(write(tmp_path / "refused", 1200, rows_per_shard=500)) == plain
    assert len(refused) >= 3


@pytest.mark.parametrize("good_writes", [0, 1, 4, 7])
def test_an_error_leaves_nothing_and_the_rest_can_follow(tmp_path, small_slots, monkeypatch, good_writes):
    whole = tree(write(tmp_path / "whole", 1200, rows_per_shard=500))
    real, left = os.pwrite, [good_writes]

    def pwrite(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="No space left on device; .* free some space"):
        patch.setattr(os, "pwrite", pwrite)
        write(tmp_path / "s", 1200, rows_per_shard=500)
    assert not [name for name in tree(tmp_path / "s") if name.startswith(".tmp")]
    with GradientStore.open(tmp_path / "s", mode="append") as store:
        store.append(*part_of(1200, 0, 1200), skip_committed=True)
    assert tree(tmp_path / "s") == whole


def test_shards_that_come_fast_are_committed_together(tmp_path, monkeypatch):
    written = []
    real = commit.write_manifest
    monkeypatch.setattr(commit, "write_manifest", lambda *a: written.append(real(*a)))
    monkeypatch.setattr(commit, "MOST_SECONDS", 1e9)
    files = len(os.listdir("/proc/self/fd"))
    most = []
    settle = commit.Committer._settle
    monkeypatch.setattr(
        commit.Committer, "_settle", lambda self: most.append(len(os.listdir("/proc/self/fd"))) or settle(self)
    )
    path = write(tmp_path / "s", 600, rows_per_shard=1)
    assert len(written) == 2  # the first shard, and all others at the end
    assert max(most) <= files + commit.MOST_FILES + 40  # what the writer and `_settle` have open beside them
    assert GradientStore.open(path).ids == ids_of(600)


def test_what_a_group_holds_back_is_committed_in_a_pause(tmp_path, monkeypatch):
    done = threading.Event()
    real = commit.write_manifest

    def write_manifest(directory, manifest):
        if manifest.rows == 16:
            done.set()
        return real(directory, manifest)

    monkeypatch.setattr(writer, "MOST_SECONDS", 0.05)
    monkeypatch.setattr(commit, "write_manifest", write_manifest)
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        store.append(*part_of(20, 0, 20))
        assert done.wait(20)
    assert len(GradientStore.open(tmp_path / "s")) == 20


def test_a_shard_that_cannot_be_settled_holds_back_those_behind_it(tmp_path, monkeypatch):
    """Of a group, the shards before it are committed."""
    real, left = os.fsync, [4]

    def fsync(fd):
        if ".tmp-rows-" in os.readlink(f"/proc/self/fd/{fd}"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "Input/output error")
        return real(fd)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="Input/output error; 16 rows are committed"):
        patch.setattr(os, "fsync", fsync)
        write(tmp_path / "s", 40)
    assert GradientStore.open(tmp_path / "s").ids == ids_of(16)
    assert not [name for name in tree(tmp_path / "s") if name.startswith(".tmp")]


def test_parts_of_a_ring_never_overlap():
    draw = np.random.default_rng(0)
    memory, taken, number = ring.Ring(10 * ring.PAGE), [], 0
    for _ in range(2000):
        nbytes = int(draw.integers(1, 5 * ring.PAGE))
        found = memory.take(nbytes)
        if found is None:
            assert taken, "an empty ring has room"
            part, given, kept = taken.pop(0)
            assert bool((part == kept).all())
            memory.give_back(given)
            continue
        part, given = found
        assert (len(part), part.ctypes.data % ring.PAGE) == (nbytes, 0)
        if draw.random() < 0.2:
            memory.take_back(given)
            continue
        number = (number + 1) % 251
        part[:] = number
        taken.append((part, given, number))
    assert memory.take(11 * ring.PAGE) is None


def test_rows_of_a_bad_append_give_their_memory_back(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "QUEUED_BYTES", 4 * ring.PAGE)
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        bad = rows_of(100)
        bad[7, 3] = float("nan")
        for _ in range(20):
            with pytest.raises(StoreError, match="hold NaN or Inf: ids 'row-7'"):
                store.append(bad, ids_of(100))
        store.append(*part_of(20, 0, 20))
    assert tree(tmp_path / "s") == tree(write(tmp_path / "t"))
