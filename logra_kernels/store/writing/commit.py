"""Commits: shards that were written become durable, and the manifest names them.

A commit: both files of every new shard, then the directory, then the manifest, then the directory again, and only then
the deletion of a tail that a shard replaces. A crash between any two steps leaves the old manifest or the new one, and
every file either of them names.

Every commit writes the whole manifest. Shards are committed in groups that grow with it, so that manifests take a small
part of all that is written however many shards there are; what a group holds back is settled already and waits seconds.
"""

import time
from dataclasses import replace
from pathlib import Path

from logra_kernels.store.durable import remove_files, sync_directory
from logra_kernels.store.format import Manifest, Shard, write_manifest
from logra_kernels.store.shard import WrittenShard

BYTES_PER_MANIFEST_BYTE = 64  # of shards in a group, for one byte of manifest
MOST_SECONDS = 2.0  # between two commits while shards come in


class Committer:
    """Holds the manifest of a store and extends it. One thread at a time."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.manifest = manifest  # the newest committed one
        self._directory = directory
        self._settled: list[Shard] = []
        self._broken = False  # an `add` has failed
        self._manifest_bytes = 0
        self._committed_at = time.monotonic()

    @property
    def behind(self) -> bool:
        """Whether shards are settled that no manifest names yet."""
        return bool(self._settled)

    def add(self, written: WrittenShard) -> None:
        """Settle the shard, and commit when a group is due."""
        if self._broken:
            written.discard()  # a shard before it may be missing
            return
        self._broken = True
        self._settled.append(written.settle())
        new = sum(shard.rows.nbytes + shard.columns.nbytes for shard in self._settled)
        late = time.monotonic() - self._committed_at >= MOST_SECONDS
        if late or new >= BYTES_PER_MANIFEST_BYTE * self._manifest_bytes:
            self.commit()
        self._broken = False

    def commit(self) -> None:
        """Commit what is settled."""
        if not self._settled:
            return
        first = self._settled[0].start
        sync_directory(self._directory)
        kept = tuple(old for old in self.manifest.shards if old.stop <= first)
        replaced = self.manifest.shards[len(kept) :]  # the tail: what follows begins with its rows
        for old in replaced:
            self._settled[0] = replace(self._settled[0], deleted=old.deleted, hidden=old.hidden)
        committed = replace(self.manifest, shards=(*kept, *self._settled), content=None)
        self._manifest_bytes = write_manifest(self._directory, committed)
        self.manifest = committed
        self._settled = []
        self._committed_at = time.monotonic()
        sync_directory(self._directory)
        remove_files(self._directory, [file.name for old in replaced for file in (old.rows, old.columns)])
