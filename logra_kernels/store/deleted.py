"""Rows that were deleted: a list of each shard's lines that are not shown, and the commit that adds to it.

The rows stay in their files until a compaction. Deleting some is one commit: the new lists, then the manifest that
names them, then the removal of the lists they replace. A crash between any two steps leaves all of the rows deleted or
none.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.durable import remove_files, sealed_checksum, sync_directory, write_file
from logra_kernels.store.entry import File, Shard, deleted_name
from logra_kernels.store.format import Manifest, write_manifest
from logra_kernels.store.shard import damaged
from logra_kernels.store.tensorfile import CHECKSUM_AT, Spec, as_bytes, map_file, parse_header, sealed_file, view


def delete_rows(directory: Path, manifest: Manifest, rows: Tensor) -> Manifest:
    """Commit that rows are no longer shown. The caller holds the lock.

    Args:
        rows: Numbers of rows that are shown, [n] int64, each once.

    Raises:
        StoreError: A list of deleted rows is damaged, or the disk refuses.
    """
    ends = torch.tensor([shard.shown for shard in manifest.shards], device="cpu").cumsum(0)
    rows = rows.sort().values
    places, counts = torch.searchsorted(ends, rows, right=True).unique_consecutive(return_counts=True)
    shards, replaced = list(manifest.shards), []
    try:
        for place, found in zip(places.tolist(), rows.split(counts.tolist()), strict=True):
            shard = shards[place]
            shown = shown_lines(directory, shard)
            lines = torch.ones(shard.count, dtype=torch.bool, device="cpu")
            lines[shown] = False
            lines[shown[found - (ends[place] - shard.shown)]] = True
            shards[place] = write_deleted(directory, shard, lines.nonzero().flatten())
            replaced += [shard.deleted.name] if shard.deleted is not None else []
        committed = replace(manifest, shards=tuple(shards), content=None)
        sync_directory(directory)
        write_manifest(directory, committed)
        sync_directory(directory)
    except OSError as error:
        raise StoreError(
            f"deleting rows of {directory} failed: {error.strerror}; remove the cause and delete them again"
        ) from error
    remove_files(directory, replaced)
    return committed


def write_deleted(directory: Path, shard: Shard, lines: Tensor) -> Shard:
    """The shard with `lines` [m] int64, sorted, not shown. The caller syncs the directory and commits the manifest."""
    spec = Spec(torch.int64, (len(lines),))
    chunks, checksum = sealed_file({"rows": spec}, {}, [as_bytes(lines)])
    name = deleted_name(shard.start, shard.version, checksum)
    write_file(directory, name, chunks)
    return replace(shard, deleted=File(name, sum(map(len, chunks)), checksum), hidden=len(lines))


def shown_lines(directory: Path, shard: Shard) -> Tensor:
    """Lines of the shard's files that are shown, sorted, int64.

    Raises:
        FileNotFoundError: The list of deleted rows is gone.
        StoreError: It is damaged.
    """
    if shard.deleted is None:
        return torch.arange(shard.count, device="cpu")
    path = directory / shard.deleted.name
    lines, checksum = read_deleted(path)
    if checksum != shard.deleted.checksum or len(lines) != shard.hidden:
        raise damaged(path, "it is not the list that the manifest names")
    return without(shard.count, lines, path)


def without(count: int, lines: Tensor, path: Path) -> Tensor:
    """0, 1, ..., count - 1 less `lines`.

    Raises:
        StoreError: The lines are not sorted numbers below count.
    """
    if len(lines) and (lines[0] < 0 or lines[-1] >= count or not bool((lines[1:] > lines[:-1]).all())):
        raise damaged(path, f"it lists other lines than the {count} of its shard")
    kept = torch.ones(count, dtype=torch.bool, device="cpu")
    kept[lines] = False
    return kept.nonzero().flatten()


def read_deleted(path: Path) -> tuple[Tensor, str]:
    """(lines, checksum) of a list of deleted rows, verified.

    Raises:
        FileNotFoundError: It is gone.
        StoreError: A byte differs from what was written.
    """
    try:
        mapping = map_file(path, CHECKSUM_AT + len("0" * 32))
        with memoryview(mapping) as data:
            recorded, computed = sealed_checksum(data, CHECKSUM_AT)
            if recorded != computed:
                raise ValueError("its checksum does not fit its content")
            entries, _ = parse_header(data)
        spec, offset = entries["rows"]
        return view(mapping, spec, offset).clone(), computed
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; check permissions and the disk") from None
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, str(error)) from None
