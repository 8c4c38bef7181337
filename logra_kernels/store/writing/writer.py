"""The background writer: takes rows from a bounded queue, cuts them into shards, writes and commits them.

Threads of their own, so that hashing, writing and waiting for the disk overlap: this file's takes rows into the shard
that grows and hashes them, that of `Disk` writes, one finishes a full shard while the next grows, and one settles and
commits them.
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
from logra_kernels.store.columns import Lines
from logra_kernels.store.format import Manifest
from logra_kernels.store.shard import Piece
from logra_kernels.store.writing.commit import MOST_SECONDS, Committer
from logra_kernels.store.writing.disk import SLOT_BYTES, Disk
from logra_kernels.store.writing.growing import GrowingShard, Place
from logra_kernels.store.writing.lane import Lane

QUEUED_BYTES = 32 << 20  # not written yet, or not whole
SLICE_BYTES = 8 << 20  # of encoded rows queued at a time, so that one huge append stays within the queue's bound
UNSETTLED_SHARDS = 8  # written and not taken over by the committer yet


@dataclass
class _Flush:
    """A place in the queue: once it is reached, everything before it has been committed."""

    reached: bool = False


@dataclass
class _Queued:
    """The next rows of a shard."""

    shard: GrowingShard
    count: int
    lines: list[Lines]
    filling: Callable[[], None] | None


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
        self._row_bytes, self._rows_per_shard = manifest.row_bytes, manifest.rows_per_shard
        self._most = max(1, SLICE_BYTES // self._row_bytes)
        self._changed = threading.Condition()
        self._disk = Disk(self._row_bytes * manifest.rows_per_shard, self._tell)
        self._shards = deque([self._first(manifest, bool(tail))])  # to be written, and to be filled
        self._written = manifest.end  # serial number up to which the system has the rows
        self._unsettled: deque[tuple[str, Future[Future]]] = deque()
        self._finishing = False  # whether a full shard has its memory still
        self._at = ""  # the file at work, to be named if it fails
        self._queue: deque[_Queued | _Flush | None] = deque()
        self._queued_bytes = 0
        self._due = False  # something in the queue is to be done at once
        self._failure: StoreError | None = None
        self._failure_told = False
        with self._changed:
            for tensors, table in tail:
                place = self._shards[0].take(table.num_rows)
                self._put(place, table, partial(place.fill, tensors))
        self._owner = os.getpid()
        self._finish, self._commits = Lane("logra-store-finish"), Lane("logra-store-commit")
        self._thread = threading.Thread(target=self._run, name="logra-store-writer", daemon=True)
        self._thread.start()

    def _first(self, manifest: Manifest, goes_on: bool) -> GrowingShard:
        if not goes_on:
            return GrowingShard(self._directory, manifest, self._disk, manifest.end)
        last = manifest.shards[-1]
        return GrowingShard(self._directory, manifest, self._disk, last.start, last.version, last.removed)

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
        self._raise_failure()

    def room(self, count: int) -> int:
        """How many of so many rows find a place at once."""
        return min(count, self._most, self._shards[-1].room or self._rows_per_shard)

    def reserve(self, count: int) -> Place:
        """A place for the first `room` of `count` rows; waits while the queue is full. The next one is the same, unless
        it was submitted.

        Raises:
            StoreError: The writer has failed.
        """
        self._check_process()
        count = self.room(count)
        with self._changed:
            if not self._takes(count):
                self._hurry()
                self._changed.wait_for(lambda: self._failure or self._takes(count))
            self._raise_failure()
            if not self._shards[-1].room:
                self._shards.append(self._after(self._shards[-1]))
            return self._shards[-1].take(count)

    def _takes(self, count: int) -> bool:
        if len(self._shards) > UNSETTLED_SHARDS:
            return False
        before = self._queued_bytes + self._disk.bytes_under_way
        if self._finishing:  # its memory is that of a shard, and of those behind it there is none but the queue's
            before = sum(shard.promised for shard in self._shards) * self._row_bytes
        return not before or before + count * self._row_bytes <= QUEUED_BYTES

    def _after(self, shard: GrowingShard) -> GrowingShard:
        return GrowingShard(self._directory, self.manifest, self._disk, shard.full_stop)

    def drop(self, place: Place) -> None:
        """What was reserved last is not submitted."""
        with self._changed:
            place.shard.drop()

    def submit(self, place: Place, lines: Lines, filling: Callable[[], None] | None = None) -> None:
        """Queue rows that are in their place, or will be.

        Args:
            filling: Returns once they are; what it raises is a failure of the writer.

        Raises:
            StoreError: The writer has failed.
        """
        with self._changed:
            self._raise_failure()
            self._put(place, lines, filling)

    def _put(self, place: Place, lines: Lines, filling: Callable[[], None] | None) -> None:
        place.shard.promise(place)
        last = self._queue[-1] if self._queue else None
        if filling is None and isinstance(last, _Queued) and last.filling is None and last.shard is place.shard:
            last.count += place.count  # one after the other: what takes the writer long in Python, the caller waits for
            last.lines.append(lines)
        else:
            self._queue.append(_Queued(place.shard, place.count, [lines], filling))
        self._queued_bytes += place.count * self._row_bytes
        if filling is not None or place.due:
            self._hurry()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _hurry(self) -> None:
        self._due = True
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
            self._hurry()
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
            self._hurry()
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
        with self._disk, self._commits, self._finish:
            try:
                while True:
                    items = self._next()
                    while items:
                        self._handle(items.popleft())  # kept no longer than that
            except _Closed:
                pass
            except BaseException as error:  # anything at all must reach the caller, who would wait for ever
                self._fail(error)
            for shard in self._shards:
                shard.close()

    def _fail(self, error: BaseException) -> None:
        """Commit what is whole, and say the rest."""
        with contextlib.suppress(BaseException):
            self._commit_written().result().result()
        failure = self._describe(error)
        failure.__cause__ = error
        with self._changed:
            self._failure = failure
            self._queue.clear()
            self._changed.notify_all()

    def _next(self) -> deque[_Queued | _Flush | None]:
        """All that is queued, once it makes something whole or there was a pause."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._due, MOST_SECONDS):
                if self._committer.behind:
                    self._unsettled.append((self._at, self._commit_written()))
            items, self._queue = self._queue, deque()
            self._due = False
            return items

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
        self._at = item.shard.full_name
        if item.filling is not None:
            item.filling()
        item.shard.add(item.count, item.lines)
        if item.shard.full:
            self._write()
        with self._changed:
            self._queued_bytes -= item.count * self._row_bytes
            self._changed.notify_all()

    def _write(self) -> None:
        """Have the rows of the growing shard written, if any are new; a full one is followed by another."""
        growing = self._shards[0]
        if growing.stop > self._written:
            while len(self._unsettled) >= UNSETTLED_SHARDS:
                self._settle_oldest()
            if self._unsettled:
                self._at, before = self._unsettled[-1]
                before.result()  # what fails holds back those behind it
            self._at = growing.name
            self._written = growing.stop
            self._finishing = growing.full
            self._unsettled.append((self._at, self._finish.submit(partial(self._finished, growing))))
        if growing.full:
            with self._changed:
                if len(self._shards) == 1:
                    self._shards.append(self._after(growing))
                self._shards.popleft()
                self._changed.notify_all()

    def _finished(self, growing: GrowingShard) -> Future:
        """Hand the rows so far over to be committed."""
        try:
            return self._commits.submit(partial(self._committer.add, growing.written()))
        finally:
            if growing.full:
                growing.close()
                self._finishing = False
                self._tell()

    def _settle_oldest(self) -> None:
        self._at, finished = self._unsettled.popleft()
        finished.result().result()

    def _commit(self) -> None:
        """Write and commit everything assembled."""
        self._write()
        while self._unsettled:
            self._settle_oldest()
        self._commit_written().result().result()

    def _commit_written(self) -> Future[Future]:
        """Commit what comes before."""
        return self._finish.submit(partial(self._commits.submit, self._committer.commit))

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
    """The most memory that rows on their way to the disk take: the shard that grows, the queue (of rows from a device
    twice, since they arrive in memory of their own), and the ends of slots."""
    return shard_bytes + 2 * QUEUED_BYTES + 2 * SLOT_BYTES
