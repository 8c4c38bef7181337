"""The background writer: takes rows from a bounded queue, cuts them into shards, writes and commits them.

Three threads, so that hashing, writing and waiting for the disk overlap: this file's cuts and hashes, `Disk` writes,
and one settles and commits a shard while the next is written.
"""

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from logra_kernels.errors import StoreError
from logra_kernels.store.format import Manifest, shard_names
from logra_kernels.store.shard import Piece, write_shard
from logra_kernels.store.writing.commit import MOST_SECONDS, Committer
from logra_kernels.store.writing.disk import SLOT_BYTES, SLOTS, Disk
from logra_kernels.store.writing.lane import Lane

QUEUED_BYTES = 128 << 20  # at least; a whole shard, where that is more
UNSETTLED_SHARDS = 2  # written and waiting for their fsync


@dataclass
class _Flush:
    """A place in the queue: once it is reached, everything before it has been committed."""

    reached: bool = False


@dataclass(frozen=True)
class _Queued:
    piece: Piece
    nbytes: int
    arrival: Callable[[], None] | None


class _Closed(Exception):  # noqa: N818 - ends the thread, nothing failed
    pass


class BackgroundWriter:
    """Writes what is submitted, in order, from one daemon thread.

    Args:
        directory: The store, locked by the caller.
        manifest: Its manifest.
        tail: The rows of the last shard when that is short; they are written again together with what follows.
    """

    def __init__(self, directory: Path, manifest: Manifest, tail: Sequence[Piece]):
        self._directory = directory
        self._committer = Committer(directory, manifest)
        self._pieces = list(tail)
        last = manifest.shards[-1] if tail else None
        self._version, self._removed = (last.version, last.removed) if last is not None else (0, 0)
        self._base = last.start if last is not None else manifest.end
        self._assembled = sum(table.num_rows for _, table in tail)
        self._written = manifest.end  # serial number up to which the system has the rows
        self._unsettled: deque[tuple[str, Future]] = deque()
        self._at = ""  # the file at work, to be named if it fails
        self._queue: deque[_Queued | _Flush | None] = deque()
        self._queued_bytes = 0
        self._max_bytes = max(QUEUED_BYTES, manifest.rows_per_shard * manifest.row_bytes)
        self._failure: StoreError | None = None
        self._failure_told = False
        self._changed = threading.Condition()
        self._owner = os.getpid()
        self._disk = Disk()
        self._commits = Lane("logra-store-commit")
        self._thread = threading.Thread(target=self._run, name="logra-store-writer", daemon=True)
        self._thread.start()

    @property
    def manifest(self) -> Manifest:
        """The newest committed one."""
        return self._committer.manifest

    def check(self) -> None:
        """
        Raises:
            StoreError: The writer has failed.
        """
        self._check_process()
        with self._changed:
            self._raise_failure()

    def submit(self, piece: Piece, arrival: Callable[[], None] | None = None) -> None:
        """Queue rows; waits while the queue is full.

        Args:
            arrival: Returns once the rows' memory is filled; what it raises is a failure of the writer.

        Raises:
            StoreError: The writer has failed.
        """
        self._check_process()
        nbytes = _nbytes(piece)
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or not self._queued_bytes or self._queued_bytes + nbytes <= self._max_bytes
            )
            self._raise_failure()
            self._queue.append(_Queued(piece, nbytes, arrival))
            self._queued_bytes += nbytes
            self._changed.notify_all()

    def flush(self) -> None:
        """Return once every submitted row is committed.

        Raises:
            StoreError: The writer has failed.
        """
        self._check_process()
        mark = _Flush()
        with self._changed:
            self._queue.append(mark)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure or mark.reached)
            self._raise_failure()

    def close(self) -> None:
        """Commit what was submitted and end the thread. In a forked child there is no thread, and nothing happens.

        Raises:
            StoreError: The writer has failed, and no earlier call has said so.
        """
        if os.getpid() != self._owner:
            return
        with self._changed:
            self._queue.append(None)
            self._changed.notify_all()
        self._thread.join()
        if not self._failure_told:
            self._raise_failure()

    def _check_process(self) -> None:
        if os.getpid() != self._owner:
            raise StoreError(
                f"{self._directory} was opened for writing by another process (this one was forked from it);"
                " append from that process"
            )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._failure_told = True
            raise StoreError(str(self._failure)) from self._failure.__cause__

    def _run(self) -> None:
        try:
            with self._disk, self._commits:
                try:
                    while True:
                        self._handle(self._next())
                except _Closed:
                    pass
                except BaseException as error:  # anything at all must reach the caller, who would wait for ever
                    self._fail(error)
        finally:
            self._pieces = []

    def _fail(self, error: BaseException) -> None:
        """Commit what is whole, and say the rest."""
        with contextlib.suppress(BaseException):
            self._commits.submit(self._committer.commit).result()
        failure = self._describe(error)
        failure.__cause__ = error
        with self._changed:
            self._failure = failure
            self._queue.clear()
            self._changed.notify_all()

    def _next(self) -> _Queued | _Flush | None:
        with self._changed:
            while not self._changed.wait_for(lambda: self._queue, MOST_SECONDS):
                if self._committer.behind:  # a pause in the rows
                    self._unsettled.append((self._at, self._commits.submit(self._committer.commit)))
            return self._queue.popleft()

    def _handle(self, item: _Queued | _Flush | None) -> None:
        if item is None:
            self._commit()
            raise _Closed
        if isinstance(item, _Flush):
            self._commit()
            with self._changed:
                item.reached = True
                self._changed.notify_all()
            return
        if item.arrival is not None:
            item.arrival()
        tensors, table = item.piece
        taken = 0
        while taken < table.num_rows:
            room = self.manifest.rows_per_shard - self._assembled
            stop = min(table.num_rows, taken + room)
            part = {name: tensor[taken:stop] for name, tensor in tensors.items()}
            self._pieces.append((part, table.slice(taken, stop - taken)))
            self._assembled += stop - taken
            taken = stop
            if self._assembled == self.manifest.rows_per_shard:
                self._write()
        with self._changed:
            self._queued_bytes -= item.nbytes
            self._changed.notify_all()

    def _write(self) -> None:
        """Write the assembled rows, if any are new; let a full shard go, keep a short one to be written again."""
        stop = self._base + self._assembled + self._removed
        if stop > self._written:
            while len(self._unsettled) >= UNSETTLED_SHARDS:
                self._settle_oldest()
            self._at = shard_names(self._base, stop, self._version)[0]
            written = write_shard(
                self._directory, self._base, self.manifest, self._pieces, self._disk, self._version, self._removed
            )
            self._written = stop
            self._unsettled.append((self._at, self._commits.submit(partial(self._committer.add, written))))
        if self._assembled == self.manifest.rows_per_shard:
            self._base, self._assembled = stop, 0
            self._version, self._removed = 0, 0
            self._pieces = []

    def _settle_oldest(self) -> None:
        self._at, settling = self._unsettled.popleft()
        settling.result()

    def _commit(self) -> None:
        """Write and commit everything assembled."""
        self._write()
        while self._unsettled:
            self._settle_oldest()
        self._commits.submit(self._committer.commit).result()

    def _describe(self, error: BaseException) -> StoreError:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            what = "free some space"
        elif code == errno.EFBIG:
            what = "raise the file size limit (ulimit -f)"
        else:
            what = "remove the cause"
        if isinstance(error, OSError) and error.strerror:
            why = error.strerror
        else:
            why = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
        return StoreError(
            f"writing {self._directory / self._at} failed: {why}; {self.manifest.rows} rows are committed and intact;"
            f" {what}, then open the store with mode='append' and append the rest again"
            " (skip_committed=True drops the rows that are stored)"
        )


def writing_bytes(shard_bytes: int) -> int:
    """The most memory that rows on their way to the disk take: the queue, a shard that is cut, what `Disk` writes."""
    return max(QUEUED_BYTES, shard_bytes) + shard_bytes + SLOTS * SLOT_BYTES


def _nbytes(piece: Piece) -> int:
    return sum(tensor.nbytes for tensor in piece[0].values()) + piece[1].nbytes
