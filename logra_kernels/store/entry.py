"""A shard as the manifest lists it, and the names of its files."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class File:
    """An immutable file of the store: name, length in bytes, xxh3_128."""

    name: str
    nbytes: int
    checksum: str


@dataclass(frozen=True)
class Shard:
    """The rows with serial numbers [start, stop), less those that compactions took out, and the files that hold them.

    Attributes:
        version: How often the shard was compacted.
        removed: How many rows compactions took out.
        deleted: The file that lists the lines which are not shown; None where all are.
        hidden: How many it lists.
    """

    start: int
    stop: int
    rows: File
    columns: File
    version: int = 0
    removed: int = 0
    deleted: File | None = None
    hidden: int = 0

    @property
    def count(self) -> int:
        """Rows in the files."""
        return self.stop - self.start - self.removed

    @property
    def shown(self) -> int:
        """Rows that a reader sees."""
        return self.count - self.hidden

    @property
    def files(self) -> tuple[File, ...]:
        return (self.rows, self.columns) if self.deleted is None else (self.rows, self.columns, self.deleted)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(file.name for file in self.files)

    @cached_property
    def line(self) -> str:
        """The shard's line in the manifest; kept, because every commit writes all of them."""
        entry: dict[str, Any] = {"start": self.start, "stop": self.stop}
        if self.version:
            entry |= {"version": self.version, "removed": self.removed}
        entry |= {"rows": _entry(self.rows), "columns": _entry(self.columns)}
        if self.deleted is not None:
            entry |= {"deleted": _entry(self.deleted), "hidden": self.hidden}
        return json.dumps(entry, separators=(",", ":"))

    @classmethod
    def of_entry(cls, entry: dict[str, Any]) -> "Shard":
        rows, columns = _file(entry["rows"]), _file(entry["columns"])
        deleted = _file(entry["deleted"]) if "deleted" in entry else None
        removed, hidden = entry.get("removed", 0), entry.get("hidden", 0)
        return cls(entry["start"], entry["stop"], rows, columns, entry.get("version", 0), removed, deleted, hidden)

    def check(self) -> None:
        """
        Raises:
            ValueError: The numbers contradict each other, or the names are not those of this shard.
        """
        fits = 0 <= self.hidden <= self.count and 0 <= self.start < self.stop and self.removed >= 0
        if not fits or (self.version == 0 and self.removed):
            raise ValueError(f"shard {self.start} holds an impossible number of rows")
        names = shard_names(self.start, self.stop, self.version)
        if (self.rows.name, self.columns.name) != names:
            raise ValueError(f"shard {self.start} names files that are not its own")
        if self.deleted is not None and parse_deleted_name(self.deleted.name) != (self.start, self.version):
            raise ValueError(f"shard {self.start} names a list of deleted rows that is not its own")


def _entry(file: File) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.nbytes, "checksum": file.checksum}


def _file(entry: dict[str, Any]) -> File:
    return File(entry["file"], entry["bytes"], entry["checksum"])


def _suffix(version: int) -> str:
    return f"-v{version}" if version else ""


def shard_names(start: int, stop: int, version: int = 0) -> tuple[str, str]:
    stem = f"rows-{start:012d}-{stop:012d}{_suffix(version)}"
    return f"{stem}.safetensors", f"{stem}.parquet"


def deleted_name(start: int, version: int, checksum: str) -> str:
    return f"deleted-{start:012d}{_suffix(version)}-{checksum[:16]}.safetensors"


def parse_shard_name(name: str) -> tuple[int, int, int] | None:
    """(start, stop, version) of a shard's file; None for any other name."""
    found = re.fullmatch(r"rows-(\d{12,})-(\d{12,})(?:-v(\d+))?\.(?:safetensors|parquet)", name)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def parse_deleted_name(name: str) -> tuple[int, int] | None:
    """(start, version) of the shard whose deleted rows the file lists; None for any other name."""
    found = re.fullmatch(r"deleted-(\d{12,})(?:-v(\d+))?-[0-9a-f]{16}\.safetensors", name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def is_row_file(name: str) -> bool:
    """Whether it is the name of a file that belongs to a shard."""
    return parse_shard_name(name) is not None or parse_deleted_name(name) is not None
