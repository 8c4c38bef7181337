"""Large files past the page cache: the same bytes as the plain way, whatever their length; errors leave nothing."""

import errno
import os
import threading

import numpy as np
import pytest
import torch
from store.samples import LAYERS, ids_of, part_of, rows_of, tree, write

import logra_kernels as lk
from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, fsck
from logra_kernels.store.writing import commit, disk, growing, slots, writer

SLOT = 2 * disk.BLOCK
FORMATS = ["fp32", "bf16", "int8", "int4"]


@pytest.fixture
def small_slots(monkeypatch):
    monkeypatch.setattr(disk, "SLOT_BYTES", SLOT)


@pytest.fixture
def python_writes(monkeypatch):
    """The disk without the native library, so that `os.pwrite` may be replaced."""
    monkeypatch.setattr(disk, "has_writes", lambda: False)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("per_shard", [93, 500, 1200])
def test_a_store_is_the_same_either_way(tmp_path, monkeypatch, dtype, per_shard, native):
    plain = tree(write(tmp_path / "plain", 1200, dtype, rows_per_shard=per_shard))
    if not native:
        monkeypatch.setattr(disk, "has_writes", lambda: False)
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


def test_a_file_system_that_refuses_direct_writes(tmp_path, small_slots, python_writes, monkeypatch):
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
def test_an_error_leaves_nothing_and_the_rest_can_follow(
    tmp_path, small_slots, python_writes, monkeypatch, good_writes
):
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


@pytest.mark.parametrize("nbytes", [slots.PAGE, slots.HUGE_PAGE, 3 * slots.HUGE_PAGE + slots.PAGE])
def test_slots_are_aligned_and_their_own(nbytes):
    pool = slots.Slots(nbytes)
    held = [pool.take() for _ in range(3)]
    for number, slot in enumerate(held):
        assert len(slot.bytes) == nbytes
        assert slot.bytes.ctypes.data % min(nbytes, slots.HUGE_PAGE) % slots.PAGE == 0
        slot.bytes[:] = number
    assert [int(slot.bytes.min()) + int(slot.bytes.max()) for slot in held] == [0, 2, 4]
    pool.give_back(held[1])
    assert pool.take() is held[1]


def test_memory_of_a_closed_store_is_kept_for_the_next_one(monkeypatch):
    monkeypatch.setattr(slots, "_kept", slots._Kept())
    monkeypatch.setattr(slots, "KEPT_BYTES", 2 * slots.HUGE_PAGE)
    first, second = slots.Slots(slots.HUGE_PAGE), slots.Slots(slots.HUGE_PAGE)
    held = [first.take() for _ in range(4)]
    for slot in held:
        first.give_back(slot)
    first.close()
    kept = [second.take() for _ in range(3)]
    assert sum(slot in held for slot in kept) == 2
    for slot in kept:
        slot.bytes[:] = 7
        assert int(slot.bytes.min()) == 7
    assert slots.Slots(2 * slots.HUGE_PAGE).take() not in held


def test_memory_that_a_caller_may_still_fill_goes_to_no_other_store(tmp_path, monkeypatch):
    """The writer fails while rows are being encoded into a place that it gave out."""
    monkeypatch.setattr(slots, "_kept", slots._Kept())
    monkeypatch.setattr(disk, "SLOT_BYTES", slots.HUGE_PAGE)
    with GradientStore.create(tmp_path / "s", {"l": (64, 64)}, rows_per_shard=512) as store:
        place = store._appender.writer.reserve(1)
        memory = place.pieces("rows")[0]
        with monkeypatch.context() as patch, pytest.raises(StoreError, match="broken"):
            patch.setattr(growing.GrowingShard, "add", lambda *_: (_ for _ in ()).throw(StoreError("broken")))
            other = store._appender.writer
            other.submit(other.reserve(1), ["a"])
            other.flush()
        other.close()
    kept = slots._kept._slots
    assert not any(np.shares_memory(memory, slot.bytes) for slot in kept)


@pytest.mark.parametrize("slot", [SLOT, 3 * SLOT, 1 << 20])
@pytest.mark.parametrize("form", [("int8", 32, "fp32"), ("int4", 128, "fp16"), ("fp8", 64, "fp16")])
def test_rows_that_lie_in_two_slots(tmp_path, monkeypatch, form, slot):
    monkeypatch.setattr(disk, "SLOT_BYTES", slot)
    dtype, block, scale = form
    rows = torch.randn(77, 6000, generator=torch.Generator().manual_seed(3))
    kind = lk.RowFormat.of(dtype, block, scale)
    with GradientStore.create(
        tmp_path / "s", {"l": (60, 100)}, dtype, block=block, scale=scale, rows_per_shard=31
    ) as store:
        for start, stop in ((0, 2), (2, 30), (30, 77)):
            store.append(rows.t().contiguous().t()[start:stop], [str(i) for i in range(start, stop)])
    wanted = lk.dequantize_rows(lk.quantize_rows(rows, kind, backend="reference"))
    assert torch.equal(GradientStore.open(tmp_path / "s").read(0, 77), wanted)
    assert fsck(tmp_path / "s").faults == []


@pytest.mark.parametrize(
    "form", [("int8", 32, "fp32"), ("int8", 32, "fp16"), ("sign", 32, "fp16"), ("bf16", None, None)]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_bad_number_anywhere_is_found_while_it_is_encoded(tmp_path, form, bad):
    dtype, block, scale = form
    with GradientStore.create(tmp_path / "s", {"l": (10, 10)}, dtype, block=block, scale=scale) as store:
        for row, column in ((0, 0), (2, 99), (3, 40)):
            rows = torch.ones(4, 100)
            rows[row, column] = bad
            if bad == 3e38 and (dtype == "bf16" or scale == "fp32"):
                store.append(rows, [f"{row} {i}" for i in range(4)])
                continue
            with pytest.raises(StoreError, match=f"ids '{row}'"):
                store.append(rows, list("0123"))
        store.append(torch.ones(4, 100), list("0123"))
        small = torch.full((2, 100), 2.0**-20)
        if scale == "fp16":
            with pytest.raises(StoreError, match="too small"):
                store.append(small, ["s", "t"])
    assert GradientStore.open(tmp_path / "s").ids[-4:] == list("0123")


def test_rows_of_a_bad_append_give_their_memory_back(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "QUEUED_BYTES", 4 * slots.PAGE)
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        bad = rows_of(100)
        bad[7, 3] = float("nan")
        for _ in range(20):
            with pytest.raises(StoreError, match="hold NaN or Inf: ids 'row-7'"):
                store.append(bad, ids_of(100))
        store.append(*part_of(20, 0, 20))
    assert tree(tmp_path / "s") == tree(write(tmp_path / "t"))
