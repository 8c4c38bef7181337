"""The background writer: errors reach the caller, memory is bounded, nothing waits for ever."""

import errno
import gc
import os
import threading

import pytest
import torch
from store.samples import DIM, LAYERS, ids_of, part_of, rows_of, tree, write

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore
from logra_kernels.store.columns import build_table
from logra_kernels.store.writing import growing
from logra_kernels.store.writing import writer as writer_module

pytestmark = pytest.mark.timeout(30)
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def broken(monkeypatch):
    """Makes the writer fail with an error from the second shard on."""

    def install(error):
        calls = []

        def write_shard(directory, start, *rest):
            calls.append(start)
            if len(calls) > 1:
                raise error
            return real(directory, start, *rest)

        monkeypatch.setattr(growing, "write_shard", write_shard)

    real = growing.write_shard
    return install


def sixteen(store):
    store.append(*part_of(20, 0, 16))


def wait_until_failed(store):
    with pytest.raises(StoreError):
        store.flush()


@pytest.mark.parametrize("error", [NO_SPACE, RuntimeError("a fault"), MemoryError(), KeyboardInterrupt()])
def test_flush_says_what_happened(tmp_path, broken, error):
    broken(error)
    store = GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8)
    sixteen(store)
    with pytest.raises(
        StoreError, match=r"rows-000000000008-000000000016.safetensors failed: .*; 8 rows are committed"
    ):
        store.flush()
    store.close()
    with GradientStore.open(tmp_path / "s", mode="append") as again:
        assert again.ids == ids_of(8)


def test_close_says_it_when_nothing_did_before(tmp_path, broken):
    broken(NO_SPACE)
    store = GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8)
    sixteen(store)
    with pytest.raises(StoreError, match="No space left on device; 8 rows are committed and intact; free some space"):
        store.close()
    store.close()


def test_every_later_append_says_it(tmp_path, broken):
    broken(NO_SPACE)
    store = GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8)
    sixteen(store)
    wait_until_failed(store)
    for _ in range(3):
        with pytest.raises(StoreError, match="No space left"):
            store.append(*part_of(20, 16, 20))
    store.close()


def test_the_body_of_a_with_block_is_told_once(tmp_path, broken):
    broken(NO_SPACE)
    with (
        pytest.raises(StoreError, match="No space left") as caught,
        GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store,
    ):
        sixteen(store)
        store.flush()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__context__ is caught.value.__cause__ or caught.value.__context__ is None


def test_a_caller_who_waits_for_room_is_told(tmp_path, monkeypatch):
    go = threading.Event()

    def write_shard(*arguments):
        go.wait()
        raise NO_SPACE

    monkeypatch.setattr(growing, "write_shard", write_shard)
    monkeypatch.setattr(writer_module, "QUEUED_BYTES", 0)
    store = GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=1)
    threading.Timer(0.2, go.set).start()
    with pytest.raises(StoreError, match="; 0 rows are committed"):
        for row in range(1000):
            store.append(rows_of(1), [str(row)])
    assert row < 50
    store.close()


def test_the_queue_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "QUEUED_BYTES", 0)
    longest = []
    real = growing.write_shard

    def write_shard(*arguments):
        longest.append(store._appender.writer._queued_bytes)
        return real(*arguments)

    monkeypatch.setattr(growing, "write_shard", write_shard)
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=4) as store:
        for start in range(0, 200, 2):
            store.append(rows_of(2), [str(start), str(start + 1)])
    assert max(longest) <= 4 * DIM * 4 + 2 * DIM * 4


def test_an_interrupt_while_closing_keeps_the_lock_until_the_rows_are_down(tmp_path, monkeypatch):
    go = threading.Event()
    real = growing.write_shard

    def write_shard(*arguments):
        go.wait()
        return real(*arguments)

    monkeypatch.setattr(growing, "write_shard", write_shard)
    store = GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8)
    store.append(*part_of(20, 0, 20))
    join = store._appender.writer._thread.join
    monkeypatch.setattr(store._appender.writer._thread, "join", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.close()
    with pytest.raises(StoreError, match="being written"):
        GradientStore.open(tmp_path / "s", mode="append")
    monkeypatch.setattr(store._appender.writer._thread, "join", join)
    go.set()
    store.close()
    assert tree(tmp_path / "s") == tree(write(tmp_path / "t"))


def test_a_forked_child_cannot_append_and_does_no_harm(tmp_path):
    store = GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8)
    store.append(*part_of(20, 0, 11))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            store.append(*part_of(20, 11, 12))
        except StoreError as error:
            store.close()
            code = 0 if "forked" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with pytest.raises(StoreError, match="being written"):
        GradientStore.open(tmp_path / "s", mode="append")
    store.append(*part_of(20, 11, 20))
    store.close()
    assert tree(tmp_path / "s") == tree(write(tmp_path / "t"))


def test_threads_may_append(tmp_path):
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        rows = rows_of(60)
        threads = [
            threading.Thread(target=lambda t=t: [store.append(rows[i : i + 1], [str(i)]) for i in range(t, 60, 3)])
            for t in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    store = GradientStore.open(tmp_path / "s")
    assert torch.equal(store.read(0, 60), rows[[int(name) for name in store.ids]])


def test_stores_leave_no_threads_or_files_open(tmp_path):
    gc.collect()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for number in range(5):
        with GradientStore.create(tmp_path / str(number), LAYERS, rows_per_shard=2) as store:
            store.append(rows_of(5), ids_of(5))
        store.score(rows_of(1))
    del store
    gc.collect()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


def late_piece(store, start, stop, arrive):
    """Rows whose memory is filled only when the writer asks for it, as those that come from a device are."""
    rows, ids, columns = part_of(20, start, stop)
    table, writer, begin = build_table(ids, columns, None), store._appender.writer, 0
    while begin < len(ids):
        place = writer.reserve(len(ids) - begin)
        part = slice(begin, begin + place.count)
        held = torch.full(rows[part].shape, torch.nan)

        def filling(place=place, held=held, part=part):
            arrive(held, rows[part])
            place.fill({"rows": held})

        writer.submit(place, table[part], filling)
        begin = part.stop


def test_rows_are_waited_for_where_they_are_written(tmp_path):
    store = GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8)
    for start in range(0, 20, 5):
        late_piece(store, start, start + 5, lambda held, rows: held.copy_(rows))
    store.close()
    assert tree(tmp_path / "s") == tree(write(tmp_path / "t"))


def test_rows_that_arrive_bad_stop_the_writer_before_them(tmp_path):
    def bad(held, rows):
        raise StoreError("1 rows hold NaN: ids 'row-11'")

    store = GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8)
    store.append(*part_of(20, 0, 10))
    late_piece(store, 10, 12, bad)
    with pytest.raises(StoreError, match=r"failed: 1 rows hold NaN: ids 'row-11'; 8 rows are committed"):
        store.flush()
    store.close()
    assert GradientStore.open(tmp_path / "s").ids == ids_of(8)
