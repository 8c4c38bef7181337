"""Compaction: shards that have deleted rows are written again without them.

It goes on in steps, each a commit of its own: the new files of some shards, the manifest that names them in place of
the old ones, then the removal of those. A crash between any two leaves a store that shows the same rows, and the next
compaction does what is left. Ids of the rows that go are kept, see `store.removed`. The rows that are shown and their
numbers do not change, so neither does `content_hash`, and what was computed from them stays valid. Readers that are
open keep the files they know: those are removed by the next writer that comes when nobody reads.
"""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.arrow import integers, others
from logra_kernels.store.columns import ID
from logra_kernels.store.deleted import shown_lines
from logra_kernels.store.durable import remove_files, sync_directory
from logra_kernels.store.entry import Shard
from logra_kernels.store.format import SHARD_BYTES, Manifest, write_manifest
from logra_kernels.store.lock import without_readers
from logra_kernels.store.removed import add_removed
from logra_kernels.store.shard import MappedShard, missing, read_columns, write_shard
from logra_kernels.store.tensorfile import as_bytes

STEP_BYTES = 16 * SHARD_BYTES  # of old files replaced by one commit


def compact(directory: Path, manifest: Manifest) -> Manifest:
    """Rewrite every shard that has deleted rows; the caller holds the lock.

    Raises:
        StoreError: A file is damaged or missing, or the disk refuses; the rows that are shown are all intact.
    """
    while any(shard.hidden for shard in manifest.shards):
        try:
            manifest = remove_retired(directory, _step(directory, manifest))
        except FileNotFoundError as error:
            raise missing(Path(error.filename)) from None
        except OSError as error:
            raise StoreError(
                f"compacting {directory} failed: {error.strerror}; its rows are intact;"
                " remove the cause and compact again"
            ) from error
    return manifest


def _step(directory: Path, manifest: Manifest) -> Manifest:
    shards: list[Shard] = []
    retired: list[str] = []
    gone: list[str] = []
    nbytes = 0
    for shard in manifest.shards:
        if not shard.hidden or nbytes >= STEP_BYTES:
            shards.append(shard)
            continue
        nbytes += shard.rows.nbytes
        retired += shard.names
        shown, table = shown_lines(directory, shard), read_columns(directory, shard)
        gone += others(table.column(ID), shown)
        if shard.shown or shard is manifest.shards[-1]:  # the last one goes on, so that no serial number is used twice
            shards.append(_without_deleted(directory, manifest, shard, shown, table))
    committed = replace(
        manifest, shards=tuple(shards), content=manifest.content_hash, retired=(*manifest.retired, *retired)
    )
    sync_directory(directory)
    add_removed(directory, gone)
    write_manifest(directory, committed)
    sync_directory(directory)
    return committed


def _without_deleted(directory: Path, manifest: Manifest, shard: Shard, shown: Tensor, table: pa.Table) -> Shard:
    """The shard's shown lines as a shard of their own, its columns taken from `table`."""
    tensors = MappedShard(directory, manifest, shard).tensors()
    payload = {name: [as_bytes(lines[shown])] for name, lines in tensors.items()}
    table = table.take(integers(shown))
    removed = shard.removed + shard.hidden
    return write_shard(directory, shard.start, manifest, payload, table, shard.version + 1, removed).settle()


def remove_retired(directory: Path, manifest: Manifest) -> Manifest:
    """Remove the files that compactions have replaced, unless somebody reads. The caller holds the lock."""
    if not manifest.retired:
        return manifest
    with without_readers(directory) as alone:
        if not alone:
            return manifest
        remove_files(directory, manifest.retired)
    manifest = replace(manifest, retired=())
    write_manifest(directory, manifest)
    sync_directory(directory)
    return manifest
