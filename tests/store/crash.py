"""A writer that is killed with SIGKILL, over and over, and must end in the bytes of one that never was.

Run as a program, because a fork is only safe in a process without threads: it imports the package once and forks a
child for each life of the writer. `crash.py random SCRATCH` kills at random times, `crash.py steps SCRATCH` before each
single system call that changes what is on the disk. Prints one line of JSON with what happened; fails by an exception.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from store.samples import LAYERS, columns_of, ids_of, part_of, rows_of, tree

from logra_kernels.store import GradientStore

PAUSE = 0.004  # seconds between two appends, at most
TAIL_ROWS, TAIL_SHARD = 12, 5
STEPS = (
    "replace",
    "fsync",
    "unlink",
    "link",
)  # of `os`; what lies between two of them a crash leaves as it was, or a temporary


def write_all(path: Path, count: int, rows_per_shard: int, seed: int, pause: float = 0.0, ready: int = 0) -> None:
    """Append all rows in random batches, with random flushes and reopenings, going on where a killed writer stopped."""
    chance = random.Random(seed)
    store = None
    if ready:
        os.write(ready, b"x")
    start = 0
    while start < count:
        if store is None:
            store = open_or_create(path, rows_per_shard)
        stop = min(count, start + chance.randint(1, 5))
        store.append(*part_of(count, start, stop), skip_committed=True)
        time.sleep(chance.uniform(0, pause))
        if chance.random() < 0.3:
            store.flush()
        if chance.random() < 0.1:
            store.close()
            store = None
        start = stop
    if store is not None:
        store.close()


def open_or_create(path: Path, rows_per_shard: int) -> GradientStore:
    if GradientStore.exists(path):
        return GradientStore.open(path, mode="append")
    return GradientStore.create(path, LAYERS, rows_per_shard=rows_per_shard)


def forked(job: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        job()
        code = 0
    finally:
        os._exit(code)


def lived(pid: int) -> bool:
    """Wait for a child: True when it finished, False when it was killed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "the writer failed by itself"
    return True


def committed(path: Path, count: int) -> int:
    """How many rows a reader is shown; each must be what was appended."""
    if not GradientStore.exists(path):
        return 0
    store = GradientStore.open(path)
    rows = len(store)
    assert torch.equal(store.read(0, rows), rows_of(count)[:rows])
    assert store.ids == ids_of(count)[:rows]
    assert store.columns == {name: values[:rows] for name, values in columns_of(count).items()} or rows == 0
    return rows


def at_random_times(scratch: Path, enough: int = 16, lives: int = 3, count: int = 90, per_shard: int = 16) -> dict:
    """Each store is killed up to `lives` times, then finished; until there were enough kills."""
    wait, ready = os.pipe()
    pid = forked(lambda: write_all(scratch / "whole", count, per_shard, 0, PAUSE, ready))
    os.read(wait, 1)
    started = time.perf_counter()
    assert lived(pid)
    duration = time.perf_counter() - started
    whole = tree(scratch / "whole")
    kills, stores, seen = 0, 0, set()
    while kills < enough:
        chance = random.Random(stores)
        path = scratch / str(stores)
        rows = 0
        for life in range(lives):
            seed = 100 * stores + life
            pid = forked(lambda path=path, seed=seed: write_all(path, count, per_shard, seed, PAUSE, ready))
            os.read(wait, 1)
            time.sleep(chance.uniform(0, 0.7 * duration))
            os.kill(pid, signal.SIGKILL)
            kills += not lived(pid)
            before, rows = rows, committed(path, count)
            assert rows >= before, "a committed row was lost"
            seen.add(rows)
        assert lived(forked(lambda path=path, seed=stores: write_all(path, count, per_shard, seed)))
        assert tree(path) == whole, f"store {stores} differs"
        stores += 1
    return {"kills": kills, "states": len(seen)}


def before_every_step(scratch: Path) -> dict:
    """The n-th step of a writer is its last, for every n."""
    assert lived(forked(lambda: write_tails(scratch / "whole")))
    whole = tree(scratch / "whole")
    kills, seen = 0, set()
    while True:
        path = scratch / str(kills)
        if lived(forked(lambda path=path, step=kills: die_at(step, lambda: write_tails(path)))):
            return {"kills": kills, "states": len(seen)}
        rows = committed(path, TAIL_ROWS)
        seen.add(rows)
        assert lived(forked(lambda path=path, seed=kills: write_all(path, TAIL_ROWS, TAIL_SHARD, seed)))
        assert tree(path) == whole, f"differs after a kill before step {kills}"
        kills += 1


def write_tails(path: Path) -> None:
    """Commits short shards and replaces them: by a full one, by a longer one, and after reopening."""
    with GradientStore.create(path, LAYERS, rows_per_shard=TAIL_SHARD) as store:
        store.append(*part_of(TAIL_ROWS, 0, 3))
        store.flush()
        store.append(*part_of(TAIL_ROWS, 3, 7))
    with GradientStore.open(path, mode="append") as store:
        store.append(*part_of(TAIL_ROWS, 7, 8))
        store.flush()
        store.append(*part_of(TAIL_ROWS, 8, TAIL_ROWS))


def die_at(step: int, job: Callable[[], None]) -> None:
    left = [step]

    def counted(call):
        def stand_in(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*args, **kwargs)

        return stand_in

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    job()


def warm_up(scratch: Path) -> None:
    """Do the imports and first calls once, for all children."""
    write_tails(scratch / "warm")
    committed(scratch / "warm", TAIL_ROWS)
    assert threading.active_count() == 1, "a fork would leave threads behind"


if __name__ == "__main__":
    warm_up(Path(sys.argv[2]))
    how = {"random": at_random_times, "steps": before_every_step}[sys.argv[1]]
    print(json.dumps(how(Path(sys.argv[2]))))
