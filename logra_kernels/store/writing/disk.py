"""Large files written at the disk's speed: hashed and copied here while a second thread writes, past the page cache.

Measured on ext4 on a virtual disk, 512 MB and its fsync: 1.8 GB/s through the page cache, 2.9 GB/s with O_DIRECT.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import xxhash

from logra_kernels.store.durable import Temporary, begin_file, seal
from logra_kernels.store.native import gather
from logra_kernels.store.writing.lane import Lane

SLOTS = 3
SLOT_BYTES = 16 << 20  # of one write; shorter files go through the page cache
BLOCK = 4096  # what O_DIRECT asks addresses, offsets and lengths to be multiples of
_DIRECT = getattr(os, "O_DIRECT", 0)


class Disk(Lane):
    """The thread that writes, and the slots it writes from."""

    def __init__(self) -> None:
        super().__init__("logra-store-disk")
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()
        for _ in range(SLOTS):
            self._free.put(np.frombuffer(mmap.mmap(-1, SLOT_BYTES), np.uint8))  # a mapping, because pages are aligned

    def write_sealed(self, file: Temporary, head: bytes, at: int, payload: Sequence) -> str:
        """Queue head + payload from the file's start, and last of all their checksum into head[at : at + 32].

        The buffers may be reused once this returns.

        Raises:
            OSError: As the system reports it; what comes later is the file's to raise.
        """
        state = xxhash.xxh3_128()
        first = np.zeros(BLOCK, np.uint8)
        offset = 0
        for parts in _cut([np.frombuffer(chunk, np.uint8) for chunk in (head, *payload)], SLOT_BYTES):
            slot = self._free.get()
            try:
                while file.writes and file.writes[0].done():
                    file.writes.pop(0).result()
                count = gather(parts, slot)
                state.update(slot[:count].data)
            except BaseException:
                self._free.put(slot)
                raise
            if offset == 0:
                first[:] = slot[:BLOCK]
            self._write(file, slot, count, offset)
            offset += count
        checksum = state.hexdigest()
        slot = self._free.get()
        slot[:BLOCK] = first
        slot[at : at + len(checksum)] = np.frombuffer(checksum.encode(), np.uint8)
        self._write(file, slot, BLOCK, 0)
        return checksum

    def _write(self, file: Temporary, slot: np.ndarray, count: int, offset: int) -> None:
        file.writes.append(self.submit(partial(self._write_slot, file.fd, slot, count, offset)))

    def _write_slot(self, fd: int, slot: np.ndarray, count: int, offset: int) -> None:
        try:
            aligned = count - count % BLOCK
            _write_at(fd, slot[:aligned].data, offset)
            if aligned < count:
                _leave_direct(fd)
                _write_at(fd, slot[aligned:count].data, offset + aligned)
        finally:
            self._free.put(slot)


def _cut(chunks: Sequence[np.ndarray], most: int) -> Iterator[list[np.ndarray]]:
    """The chunks in order, in groups of `most` bytes, the last one shorter."""
    group, room = [], most
    for chunk in chunks:
        while len(chunk):
            group.append(chunk[:room])
            chunk = chunk[room:]
            room -= len(group[-1])
            if room == 0:
                yield group
                group, room = [], most
    if group:
        yield group


def begin_sealed(
    directory: Path, name: str, head: bytes, at: int, payload: Sequence, disk: Disk | None
) -> tuple[Temporary, str]:
    """Hand `directory/name` to the system: head + payload, their checksum (returned too) in head[at : at + 32].

    Raises:
        OSError: As the system reports it; the temporary file is removed.
    """
    if disk is None or len(head) + sum(len(part) for part in payload) < SLOT_BYTES:
        sealed, checksum = seal(head, at, *payload)
        return begin_file(directory, name, [sealed, *payload]), checksum
    temporary = _begin_direct(directory, name)
    try:
        return temporary, disk.write_sealed(temporary, head, at, payload)
    except BaseException:
        temporary.discard()
        raise


def _begin_direct(directory: Path, name: str) -> Temporary:
    with contextlib.suppress(OSError):
        return Temporary(directory, name, _DIRECT)
    return Temporary(directory, name)  # a file system without O_DIRECT, or an error that this call reports


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
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)
