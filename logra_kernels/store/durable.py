"""Files that appear whole or not at all, and their checksums.

A file is written under a temporary name, fsynced and renamed. A text or tensor file carries its own checksum: xxh3_128
of all its bytes, taken while the 32 digits of the checksum itself are zeros.
"""

import contextlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, wait
from pathlib import Path

import xxhash

TEMPORARY = ".tmp-"
ZEROS = b"0" * 32


def digest(*chunks) -> str:
    """xxh3_128 (hex) of the concatenated buffers."""
    state = xxhash.xxh3_128()
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def seal(head: bytes, at: int, *payload) -> tuple[bytes, str]:
    """Put the checksum of head + payload into head[at : at + 32], which must be zeros; returns (head, checksum)."""
    if head[at : at + 32] != ZEROS:
        raise AssertionError("the place of the checksum is taken")
    checksum = digest(head, *payload)
    return head[:at] + checksum.encode() + head[at + 32 :], checksum


def sealed_checksum(data: memoryview, at: int) -> tuple[str, str]:
    """(recorded, computed) checksum of a sealed file; they differ when any byte has changed."""
    recorded = bytes(data[at : at + 32])
    computed = digest(data[:at], ZEROS, data[at + 32 :])
    return recorded.decode("ascii", "replace"), computed


class Temporary:
    """A file under a temporary name, to be settled or discarded."""

    def __init__(self, directory: Path, name: str, flags: int = 0):
        self._final = directory / name
        self._path = directory / f"{TEMPORARY}{name}"
        self.writes: list[Future] = []  # under way in another thread
        self.fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | flags, 0o666)

    def settle(self) -> None:
        """Fsync and rename; what fails is removed. The caller fsyncs the directory."""
        try:
            for write in self.writes:
                write.result()
            os.fsync(self.fd)
            os.replace(self._path, self._final)
        except BaseException:
            self.discard()
            raise
        os.close(self.fd)

    def discard(self) -> None:
        wait(self.writes)
        os.close(self.fd)
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def begin_file(directory: Path, name: str, chunks: Iterable) -> Temporary:
    """Hand the buffers of `directory/name` to the system, to be settled by the caller.

    Raises:
        OSError: As the system reports it (disk full, file size limit, ...); the temporary file is removed.
    """
    temporary = Temporary(directory, name)
    try:
        for chunk in chunks:
            left = memoryview(chunk).cast("B")
            while left:  # a write may take less than it is given
                left = left[os.write(temporary.fd, left) :]
    except BaseException:
        temporary.discard()
        raise
    return temporary


def write_file(directory: Path, name: str, chunks: Iterable) -> None:
    """Write `directory/name` from buffers: temporary file, fsync, rename. The caller fsyncs the directory.

    Raises:
        OSError: As in `begin_file`.
    """
    begin_file(directory, name, chunks).settle()


def sync_directory(directory: Path) -> None:
    """Make renames and deletions in `directory` survive a power cut."""
    sync(directory, os.O_DIRECTORY)


def sync(path: Path, flags: int = 0) -> None:
    """Make what was written to a file, by whatever means, survive a power cut."""
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_files(directory: Path, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(directory / name)
