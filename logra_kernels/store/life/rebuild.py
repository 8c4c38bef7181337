"""One shard checked byte by byte, and the shards of a store whose manifest is lost, found again from their files.

A file of rows and one of columns carry their own checksums, their names the serial numbers and how often the shard was
compacted. Of several states of a shard the most compacted one counts, so that no deleted row comes back, and of those
the longest, which begins with the rows of the shorter ones.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from logra_kernels.errors import StoreError
from logra_kernels.store.arrow import integers
from logra_kernels.store.columns import ID, is_intact
from logra_kernels.store.deleted import read_deleted, shown_lines
from logra_kernels.store.durable import digest, sealed_checksum
from logra_kernels.store.entry import File, Shard, parse_deleted_name, parse_shard_name, shard_names
from logra_kernels.store.format import Manifest
from logra_kernels.store.shard import MappedShard, damaged, missing, read_columns
from logra_kernels.store.tensorfile import CHECKSUM_AT, map_file, parse_header


@dataclass
class Checked:
    """What is known of a shard.

    Attributes:
        faults: A line each.
        intact: Every byte of it is as it was written.
        list_damaged: Only its list of deleted rows is not.
        ids: Of the rows it shows, where columns and list are intact.
        schema: Of its columns.
    """

    shard: Shard
    faults: list[str] = field(default_factory=list)
    intact: bool = False
    list_damaged: bool = False
    ids: list[str] = field(default_factory=list)
    schema: pa.Schema | None = None


def reason(error: StoreError) -> str:
    """What is wrong, without the advice."""
    return str(error).rpartition("; ")[0]


def check_shard(directory: Path, manifest: Manifest, shard: Shard) -> Checked:
    """Read and verify all files of a shard."""
    found = Checked(shard)
    rows = columns = shown = None
    for part in ("rows", "columns", "list"):
        try:
            if part == "rows":
                MappedShard(directory, manifest, shard).verify()
                rows = True
            elif part == "columns":
                columns = read_columns(directory, shard)
            else:
                shown = shown_lines(directory, shard)
        except FileNotFoundError as error:
            found.faults.append(reason(missing(Path(error.filename))))
        except OSError as error:
            found.faults.append(f"{error.filename} cannot be read: {error.strerror}")
        except StoreError as error:
            found.faults.append(reason(error))
    found.intact = bool(rows) and columns is not None and shown is not None
    found.list_damaged = bool(rows) and columns is not None and shown is None
    if columns is not None:
        found.schema = columns.schema
        if shown is not None:
            found.ids = columns.column(ID).take(integers(shown)).to_pylist()
    return found


def rebuild(directory: Path, manifest: Manifest) -> tuple[list[Checked], list[str]]:
    """(the shards that verify, in order; a line for each that does not).

    Args:
        manifest: Of the empty store.
    """
    states: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for entry in directory.iterdir():
        parsed = parse_shard_name(entry.name)
        if parsed is not None:
            start, stop, version = parsed
            states[start].add((version, stop))
    found: list[Checked] = []
    faults: list[str] = []
    end = 0
    for start in sorted(states):
        if start < end:
            continue
        newest = max(version for version, _ in states[start])
        for stop in sorted((stop for version, stop in states[start] if version == newest), reverse=True):
            try:
                shard = shard_of_files(directory, manifest, start, stop, newest)
            except StoreError as error:
                faults.append(reason(error))
                continue
            found.append(check_shard(directory, manifest, shard))
            end = stop
            break
    return found, faults


def shard_of_files(directory: Path, manifest: Manifest, start: int, stop: int, version: int) -> Shard:
    """What a manifest would say of the two files and the list of deleted rows that goes with them.

    Raises:
        StoreError: They do not verify, or are not of this store.
    """
    rows_name, columns_name = shard_names(start, stop, version)
    rows, count = _rows_file(directory / rows_name, manifest)
    path = directory / columns_name
    try:
        data = path.read_bytes()
    except OSError:
        raise missing(path) from None
    if not is_intact(data):
        raise damaged(path, "its checksum does not fit its content")
    removed = stop - start - count
    if removed < 0 or (version == 0 and removed):
        raise damaged(directory / rows_name, f"it holds {count} rows")
    deleted, hidden = _list_of(directory, start, version)
    columns = File(columns_name, len(data), digest(data))
    return Shard(start, stop, rows, columns, version, removed, deleted, hidden)


def _rows_file(path: Path, manifest: Manifest) -> tuple[File, int]:
    try:
        mapping = map_file(path, CHECKSUM_AT + 32)
        with memoryview(mapping) as data:
            recorded, computed = sealed_checksum(data, CHECKSUM_AT)
            if recorded != computed:
                raise ValueError("its checksum does not fit its content")
            entries, _ = parse_header(data)
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; check permissions and the disk") from None
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, str(error)) from None
    specs = {name: spec for name, (spec, _) in entries.items()}
    count = next(iter(specs.values())).shape[0]
    if specs != manifest.tensors(count):
        raise damaged(path, "it holds rows of another store")
    return File(path.name, len(mapping), computed), count


def _list_of(directory: Path, start: int, version: int) -> tuple[File | None, int]:
    """The list of deleted rows that goes with a shard: the longest, because lists only grow, or a damaged one."""
    found: list[tuple[int, File]] = []
    for path in sorted(directory.iterdir()):
        if parse_deleted_name(path.name) != (start, version):
            continue
        try:
            lines, checksum = read_deleted(path)
        except StoreError:
            return File(path.name, path.stat().st_size, ""), 0
        found.append((len(lines), File(path.name, path.stat().st_size, checksum)))
    hidden, file = max(found, key=lambda pair: pair[0], default=(0, None))
    return file, hidden
