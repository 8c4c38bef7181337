"""One writer at a time, and whether somebody is reading.

Two flocks: the writer's on the file `lock`, and a shared one of every reader on the store's directory, so that the
files that a reader may still map are not removed. A reader can take its own where it may not write.
"""

import contextlib
import fcntl
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from logra_kernels.errors import StoreError
from logra_kernels.store.format import LOCK


class WriterLock:
    """An exclusive flock on the store's lock file, released by `release` or by the end of the process.

    Raises:
        StoreError: Another writer holds it, or the directory is not there or cannot be written.
    """

    def __init__(self, directory: Path):
        path = directory / LOCK
        self._owner = os.getpid()
        try:
            self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{directory} {_why_absent(directory)}; choose another path") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be opened for writing: {error.strerror}; check permissions") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise StoreError(
                f"{directory} is being written by another process or store object; wait for it or close it"
                " (reading is possible meanwhile)"
            ) from None
        except OSError as error:
            os.close(self._fd)
            raise StoreError(f"{path} cannot be locked: {error.strerror}; use a file system that has flock") from None

    def release(self) -> None:
        """Release once. A forked child only closes its copy: unlocking there would unlock the parent's."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        if os.getpid() == self._owner:
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _why_absent(directory: Path) -> str:
    """What keeps a directory that is not there from being made, as far as can be told without trying."""
    # not Path.exists, which raises where a folder may not be searched
    nearest = next(parent for parent in directory.absolute().parents if os.path.exists(parent))
    if directory.is_file() or not nearest.is_dir():
        return f"cannot be made: {directory if directory.is_file() else nearest} is a file"
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        return f"cannot be made: {nearest} is on a read-only file system"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"cannot be made: no permission to write in {nearest}"
    return "is not there and cannot be made"


def is_being_written(directory: Path) -> bool:
    """Whether a writer has the store at this moment."""
    try:
        fd = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        return False
    except OSError:
        return True
    finally:
        os.close(fd)


class ReaderLease:
    """Says that somebody reads, until it is dropped. Without flock on directories (some network file systems) it says
    nothing, and a reader whose files a compaction removes is told so when it comes to them."""

    def __init__(self, directory: Path):
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # no such directory; whoever opens the store in it will say so
            return
        weakref.finalize(self, os.close, fd)
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_SH)


@contextlib.contextmanager
def without_readers(directory: Path) -> Iterator[bool]:
    """True when nobody reads; who opens the store inside the `with` waits for its end."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except OSError:
        alone = False
    try:
        yield alone
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # by itself, closing would leave it to a forked child's copy
        os.close(fd)
