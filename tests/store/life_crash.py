"""Deleting, compacting, merging, quantising, exporting and what is computed from rows, killed over and over, on a full
disk, and beside readers.

Run as a program, as `crash.py` is: `life_crash.py SCRATCH KIND...`, the kinds steps, random, readers, limit and mount
(which expects a small file system of its own at SCRATCH). Every job can be done again after it was killed, must then
end in the bytes of one that never was, and at no time shows a row too many or too few. Prints one line of JSON, what
happened by kind; fails by an exception.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from store.crash import die_at, forked, lived
from store.samples import LAYERS, columns_of, ids_of, part_of, rows_of, tree

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, fsck, merge, quantization_loss, quantize

COUNT, PER_SHARD = 40, 8
FIRST, SECOND = (3, 9, 39), (*range(16, 24), 10, 30)  # deleted one after the other; a whole shard among them
PARTS = ((0, 17), (17, 30), (30, COUNT))


def delete(path: Path, rows) -> None:
    with GradientStore.open(path, mode="append") as store:
        store.delete([f"row-{row}" for row in rows])


def compact(path: Path) -> None:
    with GradientStore.open(path, mode="append") as store:
        store.compact()


def merge_all(path: Path) -> None:
    merge([path / str(part) for part in range(len(PARTS))], path / "out")


def quantize_all(path: Path) -> None:
    if not GradientStore.exists(path / "out"):
        quantize(path / "source", path / "out", "int4")


def export(path: Path) -> None:
    if not (path / "out").exists():
        GradientStore.open(path / "source").export(path / "out")


def index(path: Path) -> None:
    GradientStore.open(path).build_index(8, k=5)


def sum_up(path: Path) -> None:
    """What finalizing writes: a sidecar in place of an older one."""
    GradientStore.open(path).sidecar_write("sums", {"sum": rows_of(COUNT).sum(0)})


def whole_store(path: Path) -> Path:
    with GradientStore.create(path, LAYERS, rows_per_shard=PER_SHARD) as store:
        store.append(*part_of(COUNT, 0, COUNT))
    return path


def store_to_delete_from(path: Path) -> None:
    delete(whole_store(path), FIRST)


def store_to_compact(path: Path) -> None:
    store_to_delete_from(path)
    delete(path, SECOND)


def stores_to_merge(path: Path) -> None:
    for part, (start, stop) in enumerate(PARTS):
        with GradientStore.create(path / str(part), LAYERS, rows_per_shard=PER_SHARD) as store:
            store.append(*part_of(COUNT, start, stop))
            if part == 1:
                store.delete(["row-20"])


def store_to_quantize(path: Path) -> None:
    path.mkdir(parents=True)
    whole_store(path / "source")


def store_with_old_sums(path: Path) -> None:
    whole_store(path)
    GradientStore.open(path).sidecar_write("sums", {"sum": torch.zeros(4)}, key="0" * 32)


def without(*gone: int) -> list[int]:
    return [row for row in range(COUNT) if row not in gone]


def shown(path: Path) -> list[int]:
    """The numbers of the rows that a reader is shown, each of which must be what was appended."""
    store = GradientStore.open(path)
    rows = [int(name.removeprefix("row-")) for name in store.ids]
    assert torch.equal(store.read(0, len(store)), rows_of(COUNT)[rows])
    assert store.columns == {name: [values[row] for row in rows] for name, values in columns_of(COUNT).items()}
    assert fsck(path).faults == []
    return rows


def check_delete(path: Path) -> None:
    assert shown(path) in (without(*FIRST), without(*FIRST, *SECOND))


def check_compact(path: Path) -> None:
    assert shown(path) == without(*FIRST, *SECOND)


def check_merge(path: Path) -> None:
    assert not GradientStore.exists(path / "out") or shown(path / "out") == without(20)


def check_quantize(path: Path) -> None:
    assert shown(path / "source") == without()
    if GradientStore.exists(path / "out"):
        store = GradientStore.open(path / "out")
        assert (store.ids, store.dtype) == (ids_of(COUNT), "int4")
        assert quantization_loss(store) is not None
        assert fsck(path / "out").faults == []


def check_export(path: Path) -> None:
    assert shown(path / "source") == without()
    if (path / "out").exists():
        assert np.array_equal(np.load(path / "out" / "rows.npy"), rows_of(COUNT).numpy())
        assert pq.read_table(path / "out" / "columns.parquet").column("id").to_pylist() == ids_of(COUNT)


def check_index(path: Path) -> None:
    assert shown(path) == without()


def check_sums(path: Path) -> None:
    assert shown(path) == without()
    store = GradientStore.open(path)
    old, new = store.sidecar_read("sums", key="0" * 32), store.sidecar_read("sums")
    assert old is not None or new is not None
    assert new is None or torch.equal(new[0]["sum"], rows_of(COUNT).sum(0))


JOBS: dict[str, tuple[Callable, Callable, Callable]] = {  # prepare; do; check what is there, done or not
    "delete": (store_to_delete_from, lambda path: delete(path, SECOND), check_delete),
    "compact": (store_to_compact, compact, check_compact),
    "merge": (stores_to_merge, merge_all, check_merge),
    "quantize": (store_to_quantize, quantize_all, check_quantize),
    "export": (store_to_quantize, export, check_export),
    "index": (whole_store, index, check_index),
    "sidecar": (store_with_old_sums, sum_up, check_sums),
}


class Prepared:
    """A job's stores and what it must end in, made once."""

    def __init__(self, scratch: Path, job: str):
        prepare, self.do, self.check = JOBS[job]
        self.job, self._scratch = job, scratch
        prepare(scratch / f"{job}-before")
        started = time.perf_counter()
        assert lived(forked(lambda: self.do(self.fresh("whole"))))
        self.seconds = time.perf_counter() - started
        self.whole = tree(scratch / f"{job}-whole")

    def fresh(self, name: str) -> Path:
        path = self._scratch / f"{self.job}-{name}"
        shutil.rmtree(path, ignore_errors=True)
        return shutil.copytree(self._scratch / f"{self.job}-before", path)

    def finish(self, path: Path) -> None:
        """Check what a killed job has left, do it again, and compare."""
        self.check(path)
        assert lived(forked(lambda: self.do(path)))
        self.check(path)
        assert tree(path) == self.whole, f"{self.job} ends in other bytes"


def before_every_step(scratch: Path) -> dict:
    """The n-th step of a job is its last, for every n."""
    kills = {}
    for job in JOBS:
        prepared = Prepared(scratch, job)
        for step in range(1000):
            path = prepared.fresh("killed")
            if lived(forked(lambda step=step, path=path, do=prepared.do: die_at(step, lambda: do(path)))):
                break
            kills[job] = step + 1
            prepared.finish(path)
    return kills


def at_random_times(scratch: Path, enough: int = 20) -> int:
    """A job is killed at a random time, up to three times, and then finished."""
    kills = 0
    prepared = [Prepared(scratch, job) for job in JOBS]
    chance = random.Random(0)
    while kills < enough:
        one = chance.choice(prepared)
        path = one.fresh("killed")
        for _ in range(3):
            pid = forked(lambda path=path, do=one.do: do(path))
            time.sleep(chance.uniform(0, one.seconds))
            os.kill(pid, signal.SIGKILL)
            kills += not lived(pid)
            one.check(path)
        one.finish(path)
    return kills


def beside_readers(scratch: Path, seconds: float = 2.0) -> dict:
    """A process deletes, compacts and appends; others read the store of their moment, at once and to its end."""
    path = whole_store(scratch / "read")
    writer = forked(lambda: write_for(path, seconds))
    opened, states = 0, set()
    held = GradientStore.open(path)
    before = held.ids
    finished = False
    while not finished:
        finished = os.waitpid(writer, os.WNOHANG) != (0, 0)
        reader = GradientStore.open(path)
        count = len(reader)
        time.sleep(0.003)  # the writer goes on
        rows = [int(name.removeprefix("row-").partition("+")[0]) for name in reader.ids]
        assert len(rows) == count
        assert torch.equal(reader.read(0, count), rows_of(COUNT)[rows])
        opened, states = opened + 1, states | {tuple(rows)}
    assert torch.equal(held.read(0, len(before)), rows_of(COUNT)[:COUNT])  # the state before everything
    del held, reader
    GradientStore.open(path, mode="append").close()
    assert fsck(path).faults == fsck(path).notes == []
    return {"opened": opened, "states": len(states)}


def write_for(path: Path, seconds: float) -> None:
    """Delete random rows, compact, append the same numbers again under new names."""
    chance, until, turn = random.Random(0), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        turn += 1
        with GradientStore.open(path, mode="append") as store:
            store.delete(chance.sample(store.ids, 5))
            if turn % 2:
                store.compact()
            rows, _, columns = part_of(COUNT, 0, 5)
            store.append(rows, [f"row-{row}+{turn}" for row in range(5)], columns)


def under_a_limit(scratch: Path) -> dict:
    """Files cannot be longer than a few bytes, or only shards cannot: the job says so, and can be done later."""
    said = {}
    for job in JOBS:
        prepared = Prepared(scratch, job)
        for limit in (0, 600):
            path = prepared.fresh("full")
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                prepared.do(path)
            except StoreError as error:
                said[f"{job} {limit}"] = str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            prepared.finish(path)
    return said


def on_a_full_disk(scratch: Path) -> dict:
    """The file system has no block left, or a few: the job says so, and can be done once there is room."""
    said = {}
    for job in JOBS:
        prepared = Prepared(scratch, job)
        for room in (0, 3 * 4096):
            path = prepared.fresh("full")
            filler = fill(scratch, room)
            try:
                prepared.do(path)
            except StoreError as error:
                said[f"{job} {room}"] = str(error)
            prepared.check(path)
            filler.unlink()
            prepared.finish(path)
    return said


def fill(folder: Path, room: int) -> Path:
    """A file that leaves so many bytes of the file system."""
    free = os.statvfs(folder)
    path = folder / "filler"
    path.write_bytes(bytes(free.f_bavail * free.f_frsize - room))
    return path


def warm_up(scratch: Path) -> None:
    """Do the imports and first calls once, for all children."""
    for job, (prepare, do, check) in JOBS.items():
        prepare(scratch / f"warm-{job}")
        do(scratch / f"warm-{job}")
        check(scratch / f"warm-{job}")
    assert threading.active_count() == 1, "a fork would leave threads behind"


KINDS = {
    "steps": before_every_step,
    "random": at_random_times,
    "readers": beside_readers,
    "limit": under_a_limit,
    "mount": on_a_full_disk,
}

if __name__ == "__main__":
    scratch = Path(sys.argv[1])
    warm_up(scratch)
    found = {}
    for kind in sys.argv[2:]:
        (scratch / kind).mkdir()
        found[kind] = KINDS[kind](scratch / kind)
    print(json.dumps(found))
