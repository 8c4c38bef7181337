"""Commits: shards that were written become durable, and the manifest names them.

A commit: both files of every new shard, then the directory, then the manifest, then the directory again, and only then
the deletion of a tail that a shard replaces. A crash between any two steps leaves the old manifest or the new one, and
every file either of them names.

Every wait for the disk holds up what is written beside it, and every commit writes the whole manifest. So after the
first shard, those that come fast are committed together, every `MOST_SECONDS`: a crash costs that much work, and the
rows of the last shard.
"""

import math
import time
from dataclasses import replace
from pathlib import Path

from logra_kernels.store.durable import remove_files, sync_directory
from logra_kernels.store.entry import Shard
from logra_kernels.store.format import Manifest, write_manifest
from logra_kernels.store.shard import WrittenShard

MOST_SECONDS = 1.0  # between two commits while shards come in
MOST_FILES = 64  # open and not settled


class Committer:
    """Holds the manifest of a store and extends it. One thread at a time."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.manifest = manifest  # the newest committed one
        self._directory = directory
        self._written: list[WrittenShard] = []
        self._settled: list[Shard] = []
        self._broken = False  # a shard could not be settled
        self._committed_at = -math.inf

    @property
    def behind(self) -> bool:
        """Whether there are shards that no manifest names yet."""
        return bool(self._written or self._settled)

    def add(self, written: WrittenShard) -> None:
        """Take the shard over, and commit when that is due."""
        if self._broken:
            written.discard()  # a shard before it is missing
            return
        self._written.append(written)
        if time.monotonic() - self._committed_at >= MOST_SECONDS:
            self.commit()
        elif len(self._written) * len(written.files) >= MOST_FILES:
            self._settle()

    def _settle(self) -> None:
        """Make all that was written durable, as far as it goes."""
        waiting, self._written = self._written, []
        for place, written in enumerate(waiting):
            try:
                self._settled.append(written.settle())
            except BaseException:
                self._broken = True
                for other in waiting[place + 1 :]:
                    other.discard()
                raise

    def commit(self) -> None:
        """Commit what was added.

        Raises:
            OSError: As the system reports it. What was settled before is kept, and committed by another call.
        """
        self._settle()
        if not self._settled:
            return
        first = self._settled[0].start
        sync_directory(self._directory)
        kept = tuple(old for old in self.manifest.shards if old.stop <= first)
        replaced = self.manifest.shards[len(kept) :]  # the tail: what follows begins with its rows
        for old in replaced:
            self._settled[0] = replace(self._settled[0], deleted=old.deleted, hidden=old.hidden)
        committed = replace(self.manifest, shards=(*kept, *self._settled), content=None)
        write_manifest(self._directory, committed)
        self.manifest = committed
        self._settled = []
        self._committed_at = time.monotonic()
        sync_directory(self._directory)
        remove_files(self._directory, [file.name for old in replaced for file in (old.rows, old.columns)])
