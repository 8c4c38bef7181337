"""The writing half of a store: what stands between `append` and the background writer."""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.columns import Lines, build_lines, lines_between
from logra_kernels.store.deleted import delete_rows
from logra_kernels.store.format import Manifest, read_manifest
from logra_kernels.store.life.compact import compact
from logra_kernels.store.lock import WriterLock
from logra_kernels.store.reading.reader import Reader
from logra_kernels.store.rows import check_finite, check_new, check_rows, committed_prefix, rows_to_delete
from logra_kernels.store.shard import check_files
from logra_kernels.store.writing.departure import Departures
from logra_kernels.store.writing.filling import checks_itself, fill
from logra_kernels.store.writing.growing import Place
from logra_kernels.store.writing.writer import BackgroundWriter


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
            lines = build_lines(ids, columns, self._schema)
            skip = self._skipped(ids) if skip_committed else 0
            if skip:
                rows, ids, lines = rows[skip:], ids[skip:], lines_between(lines, skip, len(ids))
            check_new(self.row_of, self._deleted, ids)
            self._submit(manifest, rows.detach(), ids, lines)
            if isinstance(lines, pa.Table):
                self._schema = lines.schema
            return len(ids)

    def _submit(self, manifest: Manifest, rows: Tensor, ids: Sequence[str], lines: Lines) -> None:
        at_once = self.writer.room(len(ids)) == len(ids)
        if not rows.is_cuda and not (at_once and checks_itself(manifest, rows)):
            check_finite(manifest, rows, ids)
        start = 0
        while start < len(ids):
            place = self.writer.reserve(len(ids) - start)
            stop = start + place.count
            names = ids[start:stop]
            filling = self._fill(manifest, rows[start:stop], names, place)
            end = len(self.row_of)
            self.row_of.update(zip(names, range(end, end + len(names)), strict=True))
            self.writer.submit(place, lines_between(lines, start, stop), filling)
            start = stop

    def _fill(self, manifest: Manifest, rows: Tensor, ids: Sequence[str], place: Place) -> Callable[[], None] | None:
        """Encode rows into their place. Those of a device are on their way then, and the call that is returned waits
        for them."""
        try:
            if rows.is_cuda:
                leaving, arrival = self._departures.leave(manifest, rows, ids)
                return partial(_arrive, place, leaving, arrival)
            if not fill(manifest, rows, place):
                check_finite(manifest, rows, ids)
        except BaseException:
            self.writer.drop(place)
            raise
        return None

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


def _arrive(place: Place, leaving: Mapping[str, Tensor], arrival: Callable[[], None]) -> None:
    arrival()
    place.fill(leaving)


def _finish(writer: BackgroundWriter, lock: WriterLock) -> None:
    try:
        writer.close()
    except StoreError:
        lock.release()
        raise
    lock.release()
