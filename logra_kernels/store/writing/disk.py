"""Large writes past the page cache, from memory that is aligned and used again, one after the other.

The thread that writes is one of C++: after each write, one of Python's would wait for the interpreter while the disk is
idle. One of Python's follows it and tells what is done.

O_DIRECT writes come at more than twice the rate of those through the page cache (`bench/bench_store.py --write`, ext4
on a virtual disk). Several at once were no faster than one.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from logra_kernels.store.durable import Temporary
from logra_kernels.store.native import NativeWrites, has_writes
from logra_kernels.store.writing.lane import Lane
from logra_kernels.store.writing.slots import PAGE, Slot, Slots

SLOT_BYTES = 8 << 20  # of one write; shorter files go through the page cache
BLOCK = PAGE  # what O_DIRECT asks addresses, offsets and lengths to be multiples of
DIRECT = getattr(os, "O_DIRECT", 0)


class Writes(Protocol):
    """Writes of files, done in the order they were begun."""

    def begin(self, fd: int, data: np.ndarray, offset: int) -> Callable[[], None]:
        """Bytes for a file from `offset` on; a call that returns once it has them, or raises OSError."""


class PythonWrites:
    """`Writes` without the native library: each is made when it is waited for."""

    def begin(self, fd: int, data: np.ndarray, offset: int) -> Callable[[], None]:
        return partial(_write, fd, data, offset)


class Disk:
    """The thread that writes, and the slots it writes from.

    Args:
        file_bytes: How long the longest file is.
        when_written: Called by the thread after each write.
    """

    def __init__(self, file_bytes: int, when_written: Callable[[], None]) -> None:
        self.slots = Slots(min(SLOT_BYTES, -(-file_bytes // PAGE) * PAGE))
        self._writes: Writes = NativeWrites() if has_writes() else PythonWrites()
        self._lane = Lane("logra-store-disk")
        self._when_written = when_written
        self._queued_bytes = self._done_bytes = 0

    @property
    def bytes_under_way(self) -> int:
        """Queued and not written yet."""
        return self._queued_bytes - self._done_bytes

    def write(self, file: Temporary, data: np.ndarray, offset: int) -> Future:
        """Queue bytes of a slot for the file, which keeps the future, too.

        Raises:
            OSError: An earlier write of the file has failed, as the system reports it.
        """
        while file.writes and file.writes[0].done():
            file.writes.pop(0).result()
        self._queued_bytes += len(data)
        future = self._lane.submit(partial(self._finish, self._writes.begin(file.fd, data, offset), len(data)))
        file.writes.append(future)
        return future

    def _finish(self, wait: Callable[[], None], nbytes: int) -> None:
        try:
            wait()
        finally:
            self._done_bytes += nbytes
            self._when_written()

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lane.close()
        self.slots.close()


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
        block = Slot(BLOCK).bytes
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
