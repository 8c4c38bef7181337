"""The background writer: takes rows from a bounded queue, cuts them into shards, writes and commits them.

Threads of their own, so that hashing, writing and waiting for the disk overlap: this file's takes rows into the shard
that grows and hashes them, that of `Disk` writes, and one settles and commits shards while the next is written.
"""

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.format import Manifest
from logra_kernels.store.shard import Piece
from logra_kernels.store.writing.commit import MOST_SECONDS, Committer
from logra_kernels.store.writing.disk import SLOT_BYTES, SLOTS_UNDER_WAY, Disk
from logra_kernels.store.writing.growing import GrowingShard
from logra_kernels.store.writing.lane import Lane
from logra_kernels.store.writing.ring import Ring

QUEUED_BYTES = 128 << 20
UNSETTLED_SHARDS = 8  # written and not taken over by the committer yet


@dataclass
class _Flush:
    """A place in the queue: once it is reached, everything before it has been committed."""

    reached: bool = False


@dataclass(frozen=True)
class Reserved:
    """Memory for encoded rows on their way, named as in `Manifest.tensors`."""

    tensors: Mapping[str, Tensor]
    taken: int  # of the ring


@dataclass(frozen=True)
class _Queued:
    piece: Piece
    nbytes: int
    arrival: Callable[[], None] | None
    taken: int


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
        self._tail = tail
        last = manifest.shards[-1] if tail else None
        self._disk = Disk()
        if last is not None:
            self._growing = GrowingShard(directory, manifest, self._disk, last.start, last.version, last.removed)
        else:
            self._growing = GrowingShard(directory, manifest, self._disk, manifest.end)
        self._written = manifest.end  # serial number up to which the system has the rows
        self._unsettled: deque[tuple[str, Future]] = deque()
        self._at = ""  # the file at work, to be named if it fails
        self._queue: deque[_Queued | _Flush | None] = deque()
        self._queued_bytes = 0
        self._ring = Ring(QUEUED_BYTES)
        self._failure: StoreError | None = None
        self._failure_told = False
        self._changed = threading.Condition()
        self._owner = os.getpid()
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

    def reserve(self, count: int) -> "Reserved":
        """Memory for `count` encoded rows; waits while the queue is full. It is submitted, or dropped, before more is
        reserved.

        Raises:
            StoreError: The writer has failed.
        """
        self._check_process()
        specs = self.manifest.tensors(count)
        nbytes = sum(spec.nbytes for spec in specs.values())
        found: list[tuple[np.ndarray, int]] = []

        def taken_or_failed() -> bool:
            part = self._ring.take(nbytes)
            if part is None and not self._queued_bytes:
                part = np.empty(nbytes, np.uint8), 0  # rows that are longer than the queue
            found.extend([part] if part is not None else [])
            return bool(found) or self._failure is not None

        with self._changed:
            self._changed.wait_for(taken_or_failed)
            self._raise_failure()
        memory, taken = found[0]
        tensors, end = {}, 0
        for name, spec in specs.items():
            part = torch.from_numpy(memory[end : end + spec.nbytes])
            tensors[name] = part.view(spec.dtype).view(spec.shape)
            end += spec.nbytes
        return Reserved(tensors, taken)

    def drop(self, reserved: "Reserved") -> None:
        """Of what was reserved last: it is not submitted."""
        with self._changed:
            self._ring.take_back(reserved.taken)

    def submit(
        self, rows: "Reserved | Mapping[str, Tensor]", table: pa.Table, arrival: Callable[[], None] | None = None
    ) -> None:
        """Queue rows: what was reserved and is filled now, or tensors of their own; for those it waits for room.

        Args:
            arrival: Returns once the rows' memory is filled; what it raises is a failure of the writer.

        Raises:
            StoreError: The writer has failed.
        """
        self._check_process()
        tensors, taken = (rows.tensors, rows.taken) if isinstance(rows, Reserved) else (rows, 0)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        with self._changed:
            if not isinstance(rows, Reserved):
                self._changed.wait_for(
                    lambda: self._failure or not self._queued_bytes or self._queued_bytes + nbytes <= QUEUED_BYTES
                )
            self._raise_failure()
            self._queue.append(_Queued((tensors, table), nbytes, arrival, taken))
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
                    for tensors, table in self._tail:
                        self._growing.add(tensors, table)
                    self._tail = ()
                    while True:
                        self._handle(self._next())
                except _Closed:
                    pass
                except BaseException as error:  # anything at all must reach the caller, who would wait for ever
                    self._fail(error)
                self._growing.close()
        finally:
            self._tail = ()

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
            stop = min(table.num_rows, taken + self._growing.room)
            self._at = self._growing.full_name
            part = {name: tensor[taken:stop] for name, tensor in tensors.items()}
            self._growing.add(part, table.slice(taken, stop - taken))
            taken = stop
            if not self._growing.room:
                self._write()
        with self._changed:
            self._queued_bytes -= item.nbytes
            self._ring.give_back(item.taken)
            self._changed.notify_all()

    def _write(self) -> None:
        """Write the rows of the growing shard, if any are new; a full one is followed by another."""
        growing = self._growing
        if growing.stop > self._written:
            while len(self._unsettled) >= UNSETTLED_SHARDS:
                self._settle_oldest()
            self._at = growing.name
            written = growing.written()
            self._written = growing.stop
            self._unsettled.append((self._at, self._commits.submit(partial(self._committer.add, written))))
        if not growing.room:
            growing.close()
            self._growing = GrowingShard(self._directory, self.manifest, self._disk, growing.stop)

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
    """The most memory that rows on their way to the disk take: the queue, the shard that grows, what `Disk` writes."""
    return QUEUED_BYTES + shard_bytes + (SLOTS_UNDER_WAY + 1) * SLOT_BYTES
