"""Several stores made one: those of several ranks, jobs or machines that logged different rows in the same way.

A shard of which no row was deleted and no id changes its name is taken over as it is, by a hard link where both stores
are on one file system, else as a copy that is verified. The directory begins with `merge.json`, which says what is to
be merged, and becomes a store when the manifest is written; the plan then stays as `merged.json`. The same merge again
goes on with what a killed one left, and has nothing to do when it was done.
"""

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from logra_kernels.errors import StoreError, StoreMismatch
from logra_kernels.store.arrow import integers
from logra_kernels.store.columns import ID, to_parquet
from logra_kernels.store.deleted import shown_lines
from logra_kernels.store.durable import TEMPORARY, ZEROS, digest, remove_files, sync_directory, write_file
from logra_kernels.store.entry import File, Shard, shard_names
from logra_kernels.store.format import MERGE_PLAN, MERGED, is_sealed, seal_text, write_manifest, write_origin
from logra_kernels.store.life.distinct import Renamed, Renames, distinct_ids
from logra_kernels.store.lock import WriterLock
from logra_kernels.store.observed import take_observed
from logra_kernels.store.removed import add_removed
from logra_kernels.store.shard import MappedShard, read_columns, write_shard
from logra_kernels.store.sidecar import write_sidecar
from logra_kernels.store.skipped import add_skipped, read_skipped
from logra_kernels.store.store import GradientStore
from logra_kernels.store.tensorfile import as_bytes, map_file
from logra_kernels.store.writing.create import check_free, store_exists

POLICIES = ("refuse", "keep")
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)  # another file system, or none


def merge(
    sources: Sequence[str | os.PathLike], out: str | os.PathLike, *, duplicates: str = "refuse", link: bool = True
) -> GradientStore:
    """Make one store of the rows of several, in the order given; those stay as they are.

    What was computed from the rows (curvature, self-influence) is not carried over; what runs observed beside them, for
    KFAC and EKFAC and the model's own Fisher, adds up.

    Args:
        sources: Directories of stores with equal layers, number format, projection, fingerprints, meta and columns.
        out: A new directory, or that of the same merge.
        duplicates: What becomes of an id that several stores have: "refuse", or "keep" both rows, the later one as
            "<id>#2" (or the next number that is free), so that every row keeps an id of its own.
        link: Share the files of whole shards where the file system can; they are never written to. False copies them.

    Raises:
        StoreMismatch: The stores differ in something else than their rows; every difference is named.
        StoreError: A store cannot be read, ids are in several of them, something else is at `out`, or the disk refuses.
    """
    if duplicates not in POLICIES:
        raise StoreError(f"duplicates is {duplicates!r}; it must be one of {', '.join(POLICIES)}")
    stores = [GradientStore.open(path) for path in sources]
    if not stores:
        raise StoreError("there are no stores to merge; name at least one")
    try:
        _check_equal(stores)
        renames = distinct_ids(stores, duplicates == "keep")
    except FileNotFoundError as error:
        raise _gone(error) from None
    directory = Path(out)
    with contextlib.suppress(OSError):  # where it cannot be made, taking the lock will say why
        directory.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(directory)
    try:
        _Merge(directory, stores, renames, duplicates, link).run()
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise StoreError(
            f"merging into {directory} failed: {error.strerror}{where}; the stores that were to be merged"
            " are intact; remove the cause and run the same merge again"
        ) from error
    finally:
        lock.release()
    return GradientStore.open(directory)


def _check_equal(stores: Sequence[GradientStore]) -> None:
    """
    Raises:
        StoreMismatch: Names every difference from the first store.
    """
    facts = [_facts(store) for store in stores]
    found = [
        f"{name} ({facts[0].get(name, 'none')} in {stores[0].path}, {other.get(name, 'none')} in {store.path})"
        for store, other in zip(stores[1:], facts[1:], strict=True)
        for name in dict.fromkeys((*facts[0], *other))
        if facts[0].get(name) != other.get(name)
    ]
    columns = [(store.path, _columns(store)) for store in stores if store.manifest.shards]  # no rows yet, no columns
    found += [
        f"columns ({columns[0][1]} in {columns[0][0]}, {of} in {path})" for path, of in columns if of != columns[0][1]
    ]
    if found:
        raise StoreMismatch(f"the stores cannot be merged, they differ in {'; '.join(found)}")


def _facts(store: GradientStore) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "format": str(store.format),
        "rank_c": store.rank_c,
        "layers apart": store.manifest.apart,
        "whitening": store.manifest.whitened,
    }
    facts |= {f"layer {layer.name}": f"{layer.k_out}x{layer.k_in} at {layer.offset}" for layer in store.manifest.layers}
    for kind, table in (("projection", store.projection), ("fingerprint", store.fingerprints), ("meta", store.meta)):
        facts |= {f"{kind} {name}": repr(value) for name, value in (table or {}).items()}
    return facts


def _columns(store: GradientStore) -> str:
    schema = read_columns(store.path, store.manifest.shards[0]).schema
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


class _Merge:
    def __init__(self, directory: Path, stores: Sequence[GradientStore], renames: Renames, duplicates: str, link: bool):
        self._directory = directory
        self._stores = stores
        self._renames = renames
        self._link = link
        first = stores[0].manifest
        most = max(store.manifest.rows_per_shard for store in stores)
        self._manifest = replace(first, rows_per_shard=most, shards=(), content=None, retired=())
        plan = {"merging": [store.content_hash for store in stores], "duplicates": duplicates}
        self._plan = seal_text(json.dumps({"checksum": ZEROS.decode(), **plan}, indent=1) + "\n")

    def run(self) -> None:
        directory = self._directory
        self._begin()
        if not store_exists(directory):
            remove_files(directory, [path.name for path in directory.glob(f"{TEMPORARY}*")])
            write_origin(directory, self._manifest)
            self._take_sidecars()
            self._take_gone()
            take_observed(self._stores, directory)
            shards: list[Shard] = []
            for number, store in enumerate(self._stores):
                for shard in store.manifest.shards:
                    if shard.shown:
                        start = shards[-1].stop if shards else 0
                        shards.append(self._take(store, shard, start, self._renames.get((number, shard.start))))
            sync_directory(directory)
            write_manifest(directory, replace(self._manifest, shards=tuple(shards)))
            sync_directory(directory)
            sync_directory(directory.absolute().parent)
        if (directory / MERGE_PLAN).exists():
            os.replace(directory / MERGE_PLAN, directory / MERGED)

    def _begin(self) -> None:
        """Write the plan, or find that of the same merge.

        Raises:
            StoreError: Something else is in the directory.
        """
        plans = [path for name in (MERGE_PLAN, MERGED) if (path := self._directory / name).exists()]
        if not plans:
            check_free(self._directory)
            write_file(self._directory, MERGE_PLAN, [self._plan])
            sync_directory(self._directory)
        elif not is_sealed(plans[0].read_bytes()):
            raise StoreError(f"{plans[0]} is damaged; merge into another place, or mend this one with `logra fsck`")
        elif plans[0].read_bytes() != self._plan:
            raise StoreError(f"{self._directory} holds a merge of other rows; repeat that one, or choose another place")

    def _take_sidecars(self) -> None:
        """A learned projection and the like, which are no rows but belong to them."""
        for name, key in self._manifest.irreplaceable.items():
            kept = self._stores[0].sidecar_read(name, key=key)
            if kept is not None:
                write_sidecar(self._directory, name, key, *kept)

    def _take_gone(self) -> None:
        """Rows that were skipped or deleted, which a rerun passes over."""
        add_skipped(self._directory, [name for store in self._stores for name in read_skipped(store.path)])
        add_removed(self._directory, [name for store in self._stores for name in store.deleted_ids])

    def _take(self, store: GradientStore, shard: Shard, start: int, renamed: Renamed | None) -> Shard:
        """The shard's shown rows as a shard of the new store that begins with number `start`."""
        try:
            if shard.hidden:
                return self._rewrite(store, shard, start, renamed)
            rows_name, columns_name = shard_names(start, start + shard.count)
            self._share(store.path / shard.rows.name, rows_name)
            columns = replace(shard.columns, name=columns_name)
            if renamed is None:
                self._share(store.path / shard.columns.name, columns_name)
            else:
                data = to_parquet(_with_ids(read_columns(store.path, shard), renamed))
                write_file(self._directory, columns_name, [data])
                columns = File(columns_name, len(data), digest(data))
        except FileNotFoundError as error:
            raise _gone(error) from None
        taken = Shard(start, start + shard.count, replace(shard.rows, name=rows_name), columns)
        if not os.path.samefile(store.path / shard.rows.name, self._directory / rows_name):
            MappedShard(self._directory, self._manifest, taken).verify()
            read_columns(self._directory, taken)
        return taken

    def _rewrite(self, store: GradientStore, shard: Shard, start: int, renamed: Renamed | None) -> Shard:
        shown = shown_lines(store.path, shard)
        tensors = MappedShard(store.path, store.manifest, shard).tensors()
        payload = {name: [as_bytes(lines[shown])] for name, lines in tensors.items()}
        table = _with_ids(read_columns(store.path, shard).take(integers(shown)), renamed)
        return write_shard(self._directory, start, self._manifest, payload, table).settle()

    def _share(self, path: Path, name: str) -> None:
        """The file under another name in the new store: as a link, or copied. One that is there is whole already."""
        if (self._directory / name).exists():
            return
        if self._link:
            try:
                os.link(path, self._directory / name)
                return
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
        write_file(self._directory, name, [map_file(path)])


def _with_ids(table: pa.Table, renamed: Renamed | None) -> pa.Table:
    return table if renamed is None else table.set_column(0, table.schema.field(0), renamed.among(table.column(ID)))


def _gone(error: FileNotFoundError) -> StoreError:
    return StoreError(f"{error.filename} is gone, its store changed while it was merged; run the same merge again")
