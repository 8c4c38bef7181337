"""Large writes past the page cache, from memory that is aligned and used again, by a thread of their own.

Measured on ext4 on a virtual disk, 1.5 GB in files of 64 MB that are synced at the end (`bench/bench_store.py`):
0.6 GB/s through the page cache, 2.2 GB/s with O_DIRECT.
"""

import errno
import fcntl
import os
from collections import deque
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

import numpy as np

from logra_kernels.store.durable import Temporary
from logra_kernels.store.writing.lane import Lane
from logra_kernels.store.writing.ring import PAGE, aligned

SLOT_BYTES = 16 << 20  # of one write; shorter files go through the page cache
SLOTS_UNDER_WAY = 4  # handed to the disk and not written yet
BLOCK = PAGE  # what O_DIRECT asks addresses, offsets and lengths to be multiples of
DIRECT = getattr(os, "O_DIRECT", 0)


class Disk:
    """The thread that writes, and the slots it writes from."""

    def __init__(self) -> None:
        self._lane = Lane("logra-store-disk")
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()
        self._under_way: deque[Future] = deque()

    def slot(self) -> np.ndarray:
        """`SLOT_BYTES` of memory; what is in it is left over from another use."""
        try:
            return self._free.get_nowait()
        except Empty:
            return aligned(SLOT_BYTES)

    def give_back(self, slot: np.ndarray) -> None:
        self._free.put(slot)

    def write(self, file: Temporary, data: np.ndarray, offset: int) -> Future:
        """Queue bytes of a slot for the file, once few enough are under way. The file keeps the future, too.

        Raises:
            OSError: An earlier write of the file has failed, as the system reports it.
        """
        while len(self._under_way) >= SLOTS_UNDER_WAY:
            wait([self._under_way.popleft()])
        while file.writes and file.writes[0].done():
            file.writes.pop(0).result()
        future = self._lane.submit(partial(_write, file.fd, data, offset))
        file.writes.append(future)
        self._under_way.append(future)
        return future

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lane.close()


def begin_direct(directory: Path, name: str) -> Temporary:
    """A file past the page cache, or through it where the file system has nothing else.

    Raises:
        OSError: As the system reports it.
    """
    try:
        return Temporary(directory, name, DIRECT)
    except OSError:  # without O_DIRECT, or an error that the next call reports
        return Temporary(directory, name)


def _write(fd: int, data: np.ndarray, offset: int) -> None:
    """The last block of a file is written whole and cut, because a page in the cache would have to be synced."""
    whole = len(data) - len(data) % BLOCK
    _write_at(fd, data[:whole].data, offset)
    if whole < len(data):
        block = aligned(BLOCK)
        block[: len(data) - whole] = data[whole:]
        _write_at(fd, block.data, offset + whole)
        os.ftruncate(fd, offset + len(data))


def _write_at(fd: int, left: memoryview, offset: int) -> None:
    while left:
        try:
            written = os.pwrite(fd, left, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not _leave_direct(fd):
                raise
            continue  # larger blocks than ours, or the rest of a write that was cut short
        left, offset = left[written:], offset + written


def _leave_direct(fd: int) -> bool:
    """Go on through the page cache; False if that is so already."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~DIRECT)
    return bool(flags & DIRECT)
