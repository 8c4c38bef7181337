"""The writing half of a store: what stands between `append` and the background writer."""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.columns import build_table
from logra_kernels.store.deleted import delete_rows
from logra_kernels.store.encoding import checks_itself, encode
from logra_kernels.store.format import Manifest, read_manifest
from logra_kernels.store.life.compact import compact
from logra_kernels.store.lock import WriterLock
from logra_kernels.store.reading.reader import Reader
from logra_kernels.store.rows import check_finite, check_new, check_rows, committed_prefix, rows_to_delete
from logra_kernels.store.shard import check_files
from logra_kernels.store.writing.departure import Departures
from logra_kernels.store.writing.writer import BackgroundWriter, Reserved

SLICE_BYTES = 16 << 20  # of converted rows queued at a time, so that one huge append stays within the queue's bound


class Appender:
    """Checks rows, knows every id, and holds the background writer and the lock."""

    def __init__(self, directory: Path, manifest: Manifest, lock: WriterLock):
        check_files(directory, manifest)
        self._directory = directory
        self._lock = lock
        self._opened_with = manifest.rows
        self._appending = threading.Lock()
        self._departures = Departures()
        self._begin(manifest)

    def _begin(self, manifest: Manifest) -> None:
        stored = Reader(self._directory, lambda: manifest)
        self.row_of = stored.row_of  # number of every row that is shown, queued ones included
        self._deleted = set(stored.deleted_ids())
        self._schema = stored.table.schema if manifest.shards else None
        self.writer = BackgroundWriter(self._directory, manifest, stored.tail())
        # For a store that is dropped, or not closed when the interpreter ends: what was appended is committed then.
        self._finalizer = weakref.finalize(self, _finish, self.writer, self._lock)

    def append(self, rows: Tensor, ids: Sequence[str], columns: Mapping[str, Any] | None, skip_committed: bool) -> int:
        manifest = self.writer.manifest
        with self._appending:
            check_rows(self._directory, manifest, rows, ids)
            self.writer.check()
            if len(ids) == 0:
                return 0
            table = build_table(ids, columns, self._schema)
            skip = self._skipped(ids) if skip_committed else 0
            rows, ids, table = rows[skip:], ids[skip:], table.slice(skip)
            check_new(self.row_of, self._deleted, ids)
            self._submit(manifest, rows.detach(), ids, table)
            self._schema = table.schema
            return len(ids)

    def _submit(self, manifest: Manifest, rows: Tensor, ids: Sequence[str], table: pa.Table) -> None:
        step = max(1, SLICE_BYTES // manifest.row_bytes)
        on_device = rows.is_cuda
        if not on_device and (len(ids) > step or not checks_itself(manifest, rows)):
            check_finite(manifest, rows, ids)
        for start in range(0, len(ids), step):
            part, names = rows[start : start + step], ids[start : start + step]
            held, arrival = self._departures.leave(manifest, part, names) if on_device else (None, None)
            queued = held or self._encoded(manifest, part, names)
            end = len(self.row_of)
            self.row_of.update((name, end + place) for place, name in enumerate(names))
            self.writer.submit(queued, table.slice(start, step), arrival)

    def _encoded(self, manifest: Manifest, rows: Tensor, ids: Sequence[str]) -> Reserved:
        reserved = self.writer.reserve(len(rows))
        try:
            if not encode(manifest, rows, reserved.tensors):
                check_finite(manifest, rows, ids)
        except BaseException:
            self.writer.drop(reserved)
            raise
        return reserved

    def _skipped(self, ids: Sequence[str]) -> int:
        return committed_prefix(self.row_of, self._deleted, self._opened_with, len(self.row_of), ids)

    def delete(self, ids: Sequence[str], missing_ok: bool) -> int:
        """Commit what was appended, then that these rows are no longer shown; how many were until now."""
        with self._appending:
            rows = rows_to_delete(self._directory, self.row_of, self._deleted, ids, missing_ok)
            if len(rows):
                self._exchange(lambda manifest: delete_rows(self._directory, manifest, rows))
                self._opened_with -= int((rows < self._opened_with).sum())
            return len(rows)

    def compact(self) -> int:
        """Commit what was appended, then write shards with deleted rows again without them; how many that took out."""
        with self._appending:
            hidden = sum(shard.hidden for shard in self.writer.manifest.shards)
            self._exchange(lambda manifest: compact(self._directory, manifest))
            return hidden

    def _exchange(self, commit: Callable[[Manifest], Manifest]) -> None:
        """Let the writer end, commit another manifest, and go on from what is then committed."""
        self.writer.close()
        before = self._finalizer
        try:
            commit(self.writer.manifest)
        finally:
            self._begin(read_manifest(self._directory))
            before.detach()

    def close(self) -> None:
        _finish(self.writer, self._lock)
        self._finalizer.detach()


def _finish(writer: BackgroundWriter, lock: WriterLock) -> None:
    try:
        writer.close()
    except StoreError:
        lock.release()
        raise
    lock.release()
