"""Is every byte of a store as it was written, and what can be kept of one that is not.

Checked are the manifest, every shard's rows, columns and list of deleted rows, that no id occurs twice, the sidecars,
the plan of a merge, and what lies beside them that no manifest names. A repair drops the rows of damaged shards and
says which, rebuilds a lost manifest from the shards that verify, and moves what it takes out to `lost+found`. It
deletes temporaries only.
"""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from logra_kernels.errors import StoreError
from logra_kernels.store.durable import TEMPORARY, remove_files, sync_directory
from logra_kernels.store.entry import Shard, is_row_file
from logra_kernels.store.format import (
    MANIFEST,
    MERGE_PLAN,
    MERGED,
    ORIGIN,
    SIDECARS,
    Manifest,
    NewerFormat,
    is_sealed,
    read_manifest,
    write_manifest,
    write_origin,
)
from logra_kernels.store.life.rebuild import Checked, check_shard, reason, rebuild
from logra_kernels.store.lock import ReaderLease, WriterLock, is_being_written
from logra_kernels.store.rows import shorten
from logra_kernels.store.sidecar import read_sidecar

LOST = "lost+found"
MOST_MANIFESTS = 100  # that come while their shards are checked, each before the last one's were


@dataclass
class Report:
    """What a check found, a line each.

    Attributes:
        rows: How many rows are intact.
        faults: What is wrong, or was before the repair.
        notes: What writers that died have left; harmless, the next writer removes it.
        repairs: What a repair did.
        lost: Ids of the rows that are lost, where they can be told.
        left: How many faults are left.
    """

    rows: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    left: int = 0


def fsck(path: str | os.PathLike, *, repair: bool = False, undelete: bool = False) -> Report:
    """Check a store, and with `repair` keep everything of it that verifies.

    Args:
        path: Its directory.
        repair: Become the writer and mend what can be mended; then check again.
        undelete: Let a repair show all rows of a shard whose list of deleted rows is damaged. Without it such a store
            stays as it is, because deleted rows must not come back by themselves.

    Raises:
        StoreError: There is no such directory, it is of a newer format, or, to repair, another writer has it.
        OSError: A repair could not write.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise StoreError(f"{directory} is not a directory; check the path")
    if not any(entry.name in (MANIFEST, ORIGIN) or is_row_file(entry.name) for entry in directory.iterdir()):
        raise StoreError(f"{directory} is not a gradient store: it has neither manifest nor rows; check the path")
    if not repair:
        return _Check(directory).report
    lock = WriterLock(directory)
    try:
        check = _Check(directory, alone=True)
        check.repair(undelete)
        check.report.left = len(_Check(directory, alone=True).report.faults)
        return check.report
    finally:
        lock.release()


class _Check:
    def __init__(self, directory: Path, alone: bool = False):
        self.report = Report()
        self._directory = directory
        self._lease = ReaderLease(directory)  # a compaction leaves the files while this is held
        self._rebuilt = False
        self._manifest = self._read_manifest()
        self._shards: list[Checked] = []
        self._damaged_sidecars: list[Path] = []
        self._damaged_plans = [path for path in self._plans() if not is_sealed(path.read_bytes())]
        self.report.faults += [f"{path} is damaged: its checksum does not fit" for path in self._damaged_plans]
        if self._manifest is not None:
            self._check_shards(self._manifest)
            self._check_ids()
            self._check_sidecars()
            if alone or not is_being_written(directory):
                for path in self._temporaries():
                    self.report.notes.append(f"{path} is half-written, left by a writer that died")
                for path in self._unnamed(one.shard for one in self._shards):
                    self.report.notes.append(f"{path} belongs to no committed row")
        self.report.left = len(self.report.faults)

    def _plans(self) -> list[Path]:
        return [path for name in (MERGE_PLAN, MERGED) if (path := self._directory / name).exists()]

    def _read_manifest(self) -> Manifest | None:
        """The manifest, or where that cannot be read that of the empty store."""
        found = {}
        for name in (MANIFEST, ORIGIN):
            try:
                found[name] = read_manifest(self._directory, name)
            except NewerFormat:
                raise
            except StoreError as error:
                if (self._directory / name).exists():
                    self.report.faults.append(reason(error))
                elif name == MANIFEST or MANIFEST not in found:
                    self.report.faults.append(f"{self._directory / name} is missing")
        if MANIFEST in found:
            return found[MANIFEST]
        if (self._directory / MERGE_PLAN).exists():
            self.report.faults.append(f"{self._directory} holds an unfinished merge: run the same merge again")
            return None
        self._rebuilt = True
        if ORIGIN not in found:
            self.report.faults.append(f"nothing in {self._directory} says what its rows are, so they cannot be read")
        return found.get(ORIGIN)

    def _check_shards(self, manifest: Manifest) -> None:
        if self._rebuilt:
            self._shards, faults = rebuild(self._directory, manifest)
            self.report.faults += faults
        else:
            self._shards = self._check_beside_a_writer(manifest)
        for one in self._shards:
            self.report.faults += one.faults
            if one.intact:
                self.report.rows += one.shard.shown
            else:
                self.report.lost += one.ids

    def _check_beside_a_writer(self, manifest: Manifest) -> list[Checked]:
        """The shards of the newest manifest. What a writer has replaced since it was read is no fault."""
        checked: dict[Shard, Checked] = {}
        for _ in range(MOST_MANIFESTS):
            for shard in manifest.shards:
                if shard not in checked:
                    checked[shard] = check_shard(self._directory, manifest, shard)
            found = [checked[shard] for shard in manifest.shards]
            self._manifest, before = manifest, manifest
            with contextlib.suppress(StoreError):
                manifest = read_manifest(self._directory)
            if all(one.intact for one in found) or manifest.shards == before.shards:
                break
        return found

    def _check_ids(self) -> None:
        seen: set[str] = set()
        twice: list[str] = []
        intact = [one for one in self._shards if one.intact]
        for one in intact:
            twice += [name for name in one.ids if name in seen]
            seen.update(one.ids)
            if one.schema != intact[0].schema:
                path = self._directory / one.shard.columns.name
                self.report.faults.append(f"{path} has other columns than the first shard")
        if twice:
            self.report.faults.append(f"{self._directory} has ids in more than one row: {shorten(twice)}")

    def _check_sidecars(self) -> None:
        for path in sorted((self._directory / SIDECARS).glob("[!.]*.safetensors")):  # a temporary is no fault
            name, _, key = path.name.removesuffix(".safetensors").partition(".")
            try:
                if read_sidecar(self._directory, name, key) is None and path.exists():  # a newer one may take its place
                    raise StoreError(f"{path} is damaged: it was written under another name; remove it")
            except StoreError as error:
                self.report.faults.append(reason(error))
                self._damaged_sidecars.append(path)
        for path in self._factors():
            if not path.exists():
                self.report.faults.append(f"{path} is missing, which the rows were made with")

    def _factors(self) -> list[Path]:
        """Sidecars that cannot be computed again."""
        wanted = self._manifest.irreplaceable if self._manifest is not None else {}
        return [self._directory / SIDECARS / f"{name}.{key}.safetensors" for name, key in wanted.items()]

    def _temporaries(self) -> list[Path]:
        return [
            p for place in (self._directory, self._directory / SIDECARS) for p in sorted(place.glob(f"{TEMPORARY}*"))
        ]

    def _unnamed(self, shards: Iterable[Shard]) -> list[Path]:
        """Files of rows that belong to none of the shards, and that no compaction has left for readers."""
        named = {name for shard in shards for name in shard.names}
        if self._manifest is not None and not self._rebuilt:
            named |= {*self._manifest.retired}
        return [path for path in sorted(self._directory.iterdir()) if is_row_file(path.name) and path.name not in named]

    def repair(self, undelete: bool) -> None:
        """Commit what verifies."""
        for path in self._temporaries():
            path.unlink()
            self.report.repairs.append(f"removed {path}")
        self._set_aside(self._damaged_sidecars)
        if self._manifest is None:
            return
        self._set_aside(self._damaged_plans)
        if any(one.list_damaged for one in self._shards) and not undelete:
            self.report.repairs.append(
                "kept as it is, because which rows were deleted is lost with a list of them: restore the list from a"
                " copy, or repair with --undelete, which shows these rows again"
            )
            return
        kept = [
            replace(one.shard, deleted=None, hidden=0) if one.list_damaged else one.shard
            for one in self._shards
            if one.intact or one.list_damaged
        ]
        if self._rebuilt or kept != list(self._manifest.shards):
            write_manifest(self._directory, replace(self._manifest, shards=tuple(kept), content=None))
            sync_directory(self._directory)
            rows = sum(shard.shown for shard in kept)
            self.report.repairs.append(f"committed {rows} rows in {len(kept)} shards")
        self._set_aside(self._unnamed(kept))
        with contextlib.suppress(StoreError):
            read_manifest(self._directory, ORIGIN)
            return
        remove_files(self._directory, [ORIGIN])
        write_origin(self._directory, self._manifest)
        sync_directory(self._directory)

    def _set_aside(self, paths: list[Path]) -> None:
        if paths:
            (self._directory / LOST).mkdir(exist_ok=True)
        for path in paths:
            path.replace(self._directory / LOST / path.name)
            self.report.repairs.append(f"moved {path} to {LOST}")
