"""Shards on their way: from the disk into memory while the one before is scored, and from there onto a device."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch

from logra_kernels.ops import EncodedRows
from logra_kernels.store.reading.memory import outgrows_memory
from logra_kernels.store.shard import MappedShard
from logra_kernels.store.writing.lane import Lane

AHEAD_BYTES = 64 << 20  # at least this much is on its way while a shard is used; at least one shard
AHEAD_SHARDS = 32  # unless they are so short; each has a file open
DEVICE_BLOCKS = 2  # on a device at a time: one is used, one arrives


class _Waiting(NamedTuple):
    shard: MappedShard
    brought: Future
    verified: Future


def held_bytes(nbytes: int, largest_shard: int) -> int:
    """How much of a store's `nbytes` is in memory at most while a pass goes over it."""
    return min(nbytes, 2 * largest_shard) if outgrows_memory(nbytes) else nbytes


def loaded(shards: Iterable[MappedShard], give_back: bool) -> Iterator[MappedShard]:
    """The shards in order, each in memory and verified.

    Two threads work ahead of the caller: one brings shards in, one hashes them. A shard that is at hand needs neither:
    beside a kernel that has all cores, each would get its turn milliseconds late.

    Args:
        give_back: Whether a shard's memory, the page cache's too, is given back once the caller has moved on.

    Raises:
        StoreError: A shard is damaged; those before it have been handed out.
    """
    waiting: deque[_Waiting] = deque()
    ahead = 0 if give_back else AHEAD_BYTES
    with ExitStack() as lanes:
        read = verify = None
        try:
            nbytes = 0
            for shard in shards:
                if not waiting and shard.at_hand:
                    yield shard
                    continue
                if read is None or verify is None:
                    read, verify = (lanes.enter_context(Lane(f"logra-store-{job}")) for job in ("read", "hash"))
                brought = read.submit(shard.bring_in)
                waiting.append(_Waiting(shard, brought, verify.submit(partial(_verify, shard, brought))))
                nbytes += shard.nbytes
                while len(waiting) > 1 and (nbytes - waiting[0].shard.nbytes >= ahead or len(waiting) > AHEAD_SHARDS):
                    nbytes -= waiting[0].shard.nbytes
                    yield from _next(waiting, give_back)
            while waiting:
                yield from _next(waiting, give_back)
        finally:
            for entry in waiting:
                entry.verified.cancel()


def _verify(shard: MappedShard, brought: Future) -> None:
    brought.result()
    shard.verify()


def _next(waiting: deque[_Waiting], give_back: bool) -> Iterator[MappedShard]:
    entry = waiting.popleft()
    entry.verified.result()
    yield entry.shard
    if give_back:
        if waiting:
            wait([waiting[0].brought])  # two shards are in memory before a third is begun, neither more nor less
        entry.shard.let_go()


def on_device(blocks: Iterable[tuple[int, EncodedRows]], device: torch.device) -> Iterator[tuple[int, EncodedRows]]:
    """The blocks on a device. Onto a CUDA device they go by pinned memory and on a stream of their own, so that copies
    and kernels overlap; of the device's memory no more than `DEVICE_BLOCKS` blocks are used."""
    if device.type != "cuda":
        for first, rows in blocks:
            yield first, rows if rows.device == device else rows.to(device)
        return
    copies = torch.cuda.Stream(device)
    used: deque[tuple[EncodedRows, EncodedRows, torch.cuda.Event]] = deque()
    try:
        for first, rows in blocks:
            while len(used) >= DEVICE_BLOCKS:
                used[0][2].synchronize()  # only then may its memory, here and there, be used again
                used.popleft()
            pinned = rows.pinned()
            with torch.cuda.stream(copies):
                sent = pinned.to(device, non_blocking=True)
                arrived = copies.record_event()
            torch.cuda.current_stream(device).wait_event(arrived)
            yield first, sent
            used.append((pinned, sent, torch.cuda.current_stream(device).record_event()))
    finally:
        torch.cuda.current_stream(device).synchronize()  # for the blocks in use, also where the caller breaks off
