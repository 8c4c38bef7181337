"""The writing half of a store: what stands between `append` and the background writer."""

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.columns import ID, Lines, build_lines, lines_between
from logra_kernels.store.deleted import delete_rows
from logra_kernels.store.format import Manifest, read_manifest
from logra_kernels.store.ids import KnownIds
from logra_kernels.store.life.compact import compact
from logra_kernels.store.lock import WriterLock
from logra_kernels.store.reading.reader import Reader, tail_of
from logra_kernels.store.removed import release_removed
from logra_kernels.store.rows import add_ids, check_finite, check_rows, committed_prefix, rows_to_delete
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

    def _begin(self, manifest: Manifest, known: KnownIds | None = None) -> None:
        if known is None:
            stored = Reader(self._directory, lambda: manifest)
            try:
                known = KnownIds(stored.table.column(ID), stored.deleted_ids())
            except StoreError as error:
                raise StoreError(f"{self._directory}: {error}") from None
            self._schema = stored.table.schema if manifest.shards else None
        self.known = known
        self.writer = BackgroundWriter(self._directory, manifest, tail_of(self._directory, manifest))
        # For a store that is dropped, or not closed when the interpreter ends: what was appended is committed then.
        self._finalizer = weakref.finalize(self, _finish, self.writer, self._lock)

    def append(self, rows: Tensor, ids: Sequence[str], columns: Mapping[str, Any] | None, skip_committed: bool) -> int:
        manifest = self.writer.manifest
        with self._appending:
            check_rows(self._directory, manifest, rows, ids)
            self.writer.check()
            if len(ids) == 0:
                return 0
            names = list(ids)
            lines = build_lines(names, columns, self._schema)
            skip = self._skipped(names) if skip_committed else 0
            if skip:
                rows, names, lines = rows[skip:], names[skip:], lines_between(lines, skip, len(names))
            add_ids(self.known, names)
            rows = rows.detach() if rows.requires_grad else rows
            self._submit(manifest, rows if rows.is_cpu or rows.is_cuda else rows.cpu(), names, lines)
            if isinstance(lines, pa.Table):
                self._schema = lines.schema
            return len(names)

    def _submit(self, manifest: Manifest, rows: Tensor, ids: list[str], lines: Lines) -> None:
        start = 0
        try:
            in_place = checks_itself(manifest, rows)
            if not rows.is_cuda and not (in_place and self.writer.room(len(ids)) == len(ids)):
                check_finite(manifest, rows, ids)
            while start < len(ids):
                place = self.writer.reserve(len(ids) - start)
                stop = start + place.count
                part = rows, ids, lines
                if place.count < len(ids):
                    part = rows[start:stop], ids[start:stop], lines_between(lines, start, stop)
                filling = self._fill(manifest, part[0], part[1], place, in_place)
                self.writer.submit(place, part[2], filling)
                start = stop
        except BaseException:
            self.known.drop(len(ids) - start)
            raise

    def _fill(
        self, manifest: Manifest, rows: Tensor, ids: Sequence[str], place: Place, in_place: bool
    ) -> Callable[[], None] | None:
        """Encode rows into their place. Those of a device are on their way then, and the call that is returned waits
        for them."""
        try:
            if rows.is_cuda:
                leaving, arrival = self._departures.leave(manifest, rows, ids)
                return partial(_arrive, place, leaving, arrival)
            if not fill(manifest, rows, place, in_place):
                check_finite(manifest, rows, ids)
        except BaseException:
            self.writer.drop(place)
            raise
        return None

    def _skipped(self, ids: list[str]) -> int:
        if not self._opened_with and not self.known.any_deleted:
            return 0
        return committed_prefix(self.known, self._opened_with, ids)

    def is_committed(self, name: str) -> bool:
        return 0 <= int(self.known.numbers([name])[0]) < self.writer.manifest.rows

    def delete(self, ids: Iterable[str], missing_ok: bool) -> int:
        """Commit what was appended, then that these rows are no longer shown; how many were until now."""
        with self._appending:
            found = rows_to_delete(self._directory, self.known, ids, missing_ok)
            if found:
                rows = torch.tensor([*found.values()], dtype=torch.int64, device="cpu")
                self._exchange(lambda manifest: delete_rows(self._directory, manifest, rows), self.known)
                self.known.delete([*found])
                self._opened_with -= int((rows < self._opened_with).sum())
            return len(found)

    def compact(self, release_ids: bool) -> int:
        """Commit what was appended, then write shards with deleted rows again without them; how many that took out."""
        with self._appending:
            hidden = sum(shard.hidden for shard in self.writer.manifest.shards)
            if hidden:
                self._exchange(lambda manifest: compact(self._directory, manifest), None)
            else:
                self.writer.flush()
            if release_ids:
                release_removed(self._directory)
                self._exchange(lambda manifest: manifest, None)
            return hidden

    def _exchange(self, commit: Callable[[Manifest], Manifest], known: KnownIds | None) -> None:
        """Let the writer end, commit another manifest, and go on from what is then committed.

        Args:
            known: What is known of ids if that succeeds; None to look them up.
        """
        self.writer.close()
        before = self._finalizer
        try:
            commit(self.writer.manifest)
        except BaseException:
            known = None
            raise
        finally:
            self._begin(read_manifest(self._directory), known)
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
