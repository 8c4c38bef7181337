"""The writing half of a store: what stands between `append` and the background writer."""

import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.columns import build_table
from logra_kernels.store.encoding import encode
from logra_kernels.store.format import Manifest
from logra_kernels.store.lock import WriterLock
from logra_kernels.store.reader import Reader
from logra_kernels.store.rows import check_finite, check_new, check_rows, committed_prefix
from logra_kernels.store.shard import check_files
from logra_kernels.store.writer import BackgroundWriter

SLICE_BYTES = 16 << 20  # of converted rows queued at a time, so that one huge append stays within the queue's bound


class Appender:
    """Checks rows, knows every id, and holds the background writer and the lock."""

    def __init__(self, directory: Path, manifest: Manifest, lock: WriterLock):
        check_files(directory, manifest)
        stored = Reader(directory, lambda: manifest)
        self.row_of = stored.row_of  # of every row, queued ones included
        self._directory = directory
        self._schema = stored.table.schema if manifest.rows else None
        self._opened_with = manifest.rows
        self._appending = threading.Lock()
        tail = []
        last = manifest.shards[-1] if manifest.shards else None
        if last is not None and last.stop - last.start < manifest.rows_per_shard:
            tail = [(stored.tail(), stored.table.slice(last.start, last.stop - last.start))]
        self.writer = BackgroundWriter(directory, manifest, tail)
        self._lock = lock
        # For a store that is dropped, or not closed when the interpreter ends: what was appended is committed then.
        self._finalizer = weakref.finalize(self, _finish, self.writer, lock)

    def append(self, rows: Tensor, ids: Sequence[str], columns: Mapping[str, Any] | None, skip_committed: bool) -> int:
        manifest = self.writer.manifest
        with self._appending:
            check_rows(self._directory, manifest, rows, ids)
            self.writer.check()
            if len(ids) == 0:
                return 0
            table = build_table(ids, columns, self._schema)
            skip = committed_prefix(self.row_of, self._opened_with, len(self.row_of), ids) if skip_committed else 0
            rows, ids, table = rows[skip:], ids[skip:], table.slice(skip)
            check_new(self.row_of, ids)
            check_finite(manifest, rows, ids)
            self._schema = table.schema
            step = max(1, SLICE_BYTES // manifest.row_bytes)
            for start in range(0, len(ids), step):
                part = ids[start : start + step]
                held = encode(manifest, rows[start : start + step].detach())
                end = len(self.row_of)
                self.row_of.update((name, end + place) for place, name in enumerate(part))
                self.writer.submit((held, table.slice(start, len(part))))
            return len(ids)

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
