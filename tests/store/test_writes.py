"""Bytes on their way to the disk: the writes of C++ and those of Python alike."""

import ctypes
import errno
import fcntl
import os
import sys
import threading
import time

import numpy as np
import pytest
import torch
from store.samples import LAYERS, ids_of, part_of, tree, write

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, native
from logra_kernels.store.rows import largest_magnitude
from logra_kernels.store.writing import disk, growing, writer
from logra_kernels.store.writing.slots import Slot

BLOCK = disk.BLOCK
needs_native = pytest.mark.skipif(not native.has_writes(), reason="the native library is not built")


@pytest.fixture(params=[pytest.param("native", marks=needs_native), "python"])
def writes(request) -> disk.Writes:
    return native.NativeWrites() if request.param == "native" else disk.PythonWrites()


@pytest.fixture
def fd(tmp_path):
    """A file past the page cache, where there are any."""
    try:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | disk.DIRECT)
    except OSError:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def noise(nbytes: int) -> np.ndarray:
    slot = Slot(nbytes).bytes
    slot[:] = np.frombuffer(os.urandom(nbytes), np.uint8)
    return slot


@pytest.mark.parametrize("last", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 17, 600 * BLOCK + 5])
def test_a_file_is_what_was_written_in_order(tmp_path, fd, writes, last):
    parts = [(noise(5 * BLOCK), 2 * BLOCK), (noise(2 * BLOCK), 0), (noise(last), 7 * BLOCK), (noise(BLOCK), 0)]
    wanted = bytearray(7 * BLOCK + last)
    waits = []
    for data, offset in parts:
        wanted[offset : offset + len(data)] = data.tobytes()
        waits.append(writes.begin(fd, data, offset))
    for wait in waits:
        wait()
    assert (tmp_path / "file").read_bytes() == wanted


def test_what_a_file_system_refuses_goes_through_the_page_cache(tmp_path, fd, writes):
    data = noise(2 * BLOCK + 1)[1:]  # at no address for O_DIRECT
    writes.begin(fd, data, 0)()
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & disk.DIRECT


def test_an_error_is_told_and_the_others_are_written(tmp_path, fd, writes):
    full = os.open("/dev/full", os.O_WRONLY)
    data = noise(BLOCK)
    waits = [writes.begin(fd, data, 0), writes.begin(full, data, 0), writes.begin(fd, data, BLOCK)]
    waits[0]()
    with pytest.raises(OSError, match="No space left") as raised:
        waits[1]()
    assert raised.value.errno == errno.ENOSPC
    waits[2]()
    assert (tmp_path / "file").read_bytes() == data.tobytes() * 2
    os.close(full)


@needs_native
def test_no_interpreter_is_needed_between_two_writes(fd):
    writes, data, count = native.NativeWrites(), noise(BLOCK), 200
    waits = [writes.begin(fd, data, at * BLOCK) for at in range(count)]
    waiting = threading.Thread(target=lambda: [wait() for wait in waits])
    interval, sleep = sys.getswitchinterval(), ctypes.PyDLL(None).usleep  # which holds the interpreter
    sys.setswitchinterval(1e6)
    try:
        waiting.start()
        for _ in range(60):
            sleep(50_000)
            if os.fstat(fd).st_size == count * BLOCK:
                break
        assert os.fstat(fd).st_size == count * BLOCK
    finally:
        sys.setswitchinterval(interval)
    waiting.join()


@needs_native
def test_memory_is_held_until_it_is_written(tmp_path, fd):
    writes = native.NativeWrites()
    wanted, waits = b"", []
    for at in range(200):
        data = noise(2 * BLOCK)
        wanted += data.tobytes()
        waits.append(writes.begin(fd, data, at * 2 * BLOCK))
        del data
    for wait in waits:
        wait()
    assert (tmp_path / "file").read_bytes() == wanted


@needs_native
def test_a_forked_child_may_drop_it(fd):
    writes = native.NativeWrites()
    writes.begin(fd, noise(BLOCK), 0)
    pid = os.fork()
    if pid == 0:
        del writes
        os._exit(0)
    end = time.monotonic() + 20
    while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    assert found == (pid, 0)
    del writes


@needs_native
@pytest.mark.parametrize("good_writes", [0, 1, 4, 7])
def test_a_disk_that_is_full_leaves_nothing_and_the_rest_can_follow(tmp_path, monkeypatch, good_writes):
    monkeypatch.setattr(disk, "SLOT_BYTES", 2 * BLOCK)
    whole = tree(write(tmp_path / "whole", 1200, rows_per_shard=500))
    full, left = os.open("/dev/full", os.O_WRONLY), [good_writes]
    real = native.NativeWrites.begin

    def begin(self, fd, data, offset):
        left[0] -= 1
        return real(self, full if left[0] < 0 else fd, data, offset)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="No space left on device; .* free some space"):
        patch.setattr(native.NativeWrites, "begin", begin)
        write(tmp_path / "s", 1200, rows_per_shard=500)
    os.close(full)
    assert not [name for name in tree(tmp_path / "s") if name.startswith(".tmp")]
    with GradientStore.open(tmp_path / "s", mode="append") as store:
        store.append(*part_of(1200, 0, 1200), skip_committed=True)
    assert tree(tmp_path / "s") == whole


def test_a_shard_that_cannot_be_finished_holds_back_those_behind_it(tmp_path, monkeypatch):
    real, left = growing.begin_columns, [2]

    def begin_columns(directory, name, table, beside):
        left[0] -= 1
        if left[0] == 0:
            beside.discard()
            raise OSError(errno.EIO, "Input/output error")
        return real(directory, name, table, beside)

    monkeypatch.setattr(disk, "SLOT_BYTES", 2 * BLOCK)
    with monkeypatch.context() as patch, pytest.raises(StoreError, match="Input/output error; 500 rows are committed"):
        patch.setattr(growing, "begin_columns", begin_columns)
        write(tmp_path / "s", 2400, rows_per_shard=500)
    assert GradientStore.open(tmp_path / "s").ids == ids_of(500)
    assert not [name for name in tree(tmp_path / "s") if name.startswith(".tmp")]


def test_while_a_shard_is_finished_no_more_than_the_queue_is_behind_it(tmp_path, monkeypatch):
    """The memory of a full shard is not free before it was hashed."""
    monkeypatch.setattr(disk, "SLOT_BYTES", 2 * BLOCK)
    monkeypatch.setattr(writer, "QUEUED_BYTES", 4 * BLOCK)
    seen, going_on = [], threading.Event()
    real = growing.GrowingShard.written

    def written(self):
        if self.full and self.start == 0:
            assert going_on.wait(20)
            store_writer = store._appender.writer
            seen.append(sum(shard.promised for shard in store_writer._shards) * store_writer._row_bytes)
        return real(self)

    monkeypatch.setattr(growing.GrowingShard, "written", written)
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=500) as store:
        threading.Timer(0.3, going_on.set).start()
        for start in range(0, 1200, 10):
            store.append(*part_of(1200, start, start + 10))
    assert seen
    assert 0 < seen[0] <= 4 * BLOCK
    assert tree(tmp_path / "s") == tree(write(tmp_path / "t", 1200, rows_per_shard=500))


@pytest.mark.parametrize(
    "rows", [torch.randn(7, 33), torch.randn(33, 7).t(), torch.randn(9, 50)[:, 3:], torch.randn(1, 1).bfloat16()]
)
def test_largest_magnitude(rows):
    assert largest_magnitude(rows) == rows.abs().amax()
    for bad in (float("nan"), float("inf"), -float("inf"), -3e38):
        for place in ((0, 0), (len(rows) - 1, rows.shape[1] - 1)):
            worse = rows.clone()
            worse[place] = bad
            found = largest_magnitude(worse)
            assert torch.equal(found.isnan(), worse.isnan().any())
            assert found.isnan() or found == worse.abs().amax()
