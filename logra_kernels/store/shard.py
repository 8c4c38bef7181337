"""One shard: its two files written, and read with their checksums verified."""

import contextlib
import math
import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.ops import EncodedRows
from logra_kernels.store.columns import from_parquet, to_parquet
from logra_kernels.store.durable import Temporary, begin_file, digest, seal, sealed_checksum
from logra_kernels.store.entry import File, Shard, shard_names
from logra_kernels.store.format import Manifest
from logra_kernels.store.native import let_go, populate, resident
from logra_kernels.store.tensorfile import CHECKSUM_AT, Spec, header, map_file, view

ASKED_EVERY = 1.0  # s; asking takes tens of microseconds, and pages that have left since only come back more slowly
READS_AT_ONCE = 16  # of few lines; a disk answers many as fast as one
_ADVICE = "restore it from a copy, or keep what is intact with `logra fsck --repair`"

Piece = tuple[Mapping[str, Tensor], pa.Table]  # the tensors of n encoded rows by name, and their ids and columns


@dataclass(frozen=True)
class WrittenShard:
    """A shard whose bytes the system has, under temporary names."""

    shard: Shard
    files: tuple[Temporary, Temporary]

    def settle(self) -> Shard:
        """Fsync and rename. The caller fsyncs the directory and commits the manifest.

        Raises:
            OSError: As the system reports it; what is not settled is removed.
        """
        rows, columns = self.files
        try:
            rows.settle()
        except BaseException:
            columns.discard()
            raise
        columns.settle()
        return self.shard

    def discard(self) -> None:
        for file in self.files:
            file.discard()


def write_shard(
    directory: Path,
    start: int,
    manifest: Manifest,
    payload: Mapping[str, Sequence[memoryview]],
    table: pa.Table,
    version: int = 0,
    removed: int = 0,
) -> WrittenShard:
    """Write n rows as two files, to be settled by the caller.

    Args:
        start: Serial number of the first row.
        payload: The bytes of each tensor that `Manifest.tensors` names, n lines in row order.
        table: Ids and columns, n lines.
        version, removed: How often the shard was compacted, and how many of its rows that took out.

    Raises:
        OSError: As the system reports it; nothing is left.
    """
    stop = start + table.num_rows + removed
    rows_name, columns_name = shard_names(start, stop, version)
    specs = manifest.tensors(table.num_rows)
    parts = [part for name in specs for part in payload[name]]
    head, checksum = seal(header(specs, {}), CHECKSUM_AT, *parts)
    rows = File(rows_name, len(head) + sum(len(part) for part in parts), checksum)
    rows_file = begin_file(directory, rows_name, [head, *parts])
    columns_file, columns = begin_columns(directory, columns_name, table, rows_file)
    return WrittenShard(Shard(start, stop, rows, columns, version, removed), (rows_file, columns_file))


def begin_columns(directory: Path, name: str, table: pa.Table, beside: Temporary) -> tuple[Temporary, File]:
    """Write ids and columns `beside` a file of rows.

    Raises:
        OSError: As the system reports it; nothing is left, the file of rows neither.
    """
    try:
        parquet = to_parquet(table)
        return begin_file(directory, name, [parquet]), File(name, len(parquet), digest(parquet))
    except BaseException:
        beside.discard()
        raise


class MappedShard:
    """The rows of a shard on mapped pages. No number leaves before the checksum of the whole file was verified.

    Raises:
        FileNotFoundError: The rows' file is gone; the caller knows whether that is a fault.
        StoreError: It cannot be read, or its length is wrong.
    """

    def __init__(self, directory: Path, manifest: Manifest, shard: Shard):
        self._path = directory / shard.rows.name
        self._shard = shard
        self._specs = manifest.tensors(shard.count)
        self._head = header(self._specs, {}, shard.rows.checksum)
        self._mapping = self._map()
        self._pages = np.frombuffer(self._mapping, np.uint8)
        self._verified = False
        self._brought = False
        self._seen = -math.inf  # when it was last found in memory
        self._tensors: dict[str, Tensor] | None = None
        self.wrapped: EncodedRows | None = None  # the tensors as a reader has wrapped them

    def _map(self) -> mmap.mmap:
        expected = len(self._head) + sum(spec.nbytes for spec in self._specs.values())
        try:
            mapping = map_file(self._path, expected)
        except ValueError as error:
            raise damaged(self._path, f"it is {error}") from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read: {error.strerror}; check permissions and the disk") from None
        if len(mapping) != expected:
            raise damaged(self._path, f"it is {len(mapping)} bytes long where {expected} are expected")
        return mapping

    @property
    def nbytes(self) -> int:
        return len(self._pages)

    def bring_in(self) -> None:
        """Read the file into memory, unless it was and is there.

        Raises:
            StoreError: The disk cannot read it.
        """
        if self._brought and resident(self._pages):
            return
        try:
            populate(self._pages)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read: {error.strerror}; check the disk") from None
        self._brought = True

    @property
    def at_hand(self) -> bool:
        """Whether it was verified and is in memory, or was so within `ASKED_EVERY`."""
        if not (self._verified and self._brought):
            return False
        if not asked_lately(self._seen):
            if not resident(self._pages):
                return False
            self._seen = time.monotonic()
        return True

    def verify(self) -> None:
        """Hash the file once.

        Raises:
            StoreError: A byte differs from what was written, or the disk cannot read it.
        """
        if self._verified:
            return
        self.bring_in()
        with memoryview(self._mapping) as data:
            _, computed = sealed_checksum(data, CHECKSUM_AT)
            if computed != self._shard.rows.checksum or data[: len(self._head)] != self._head:
                raise damaged(self._path, "its checksum does not fit its content")
        self._verified = True

    def let_go(self) -> None:
        """Give the memory back, the page cache's too."""
        let_go(self._pages)
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def trust(self) -> "MappedShard":
        """Skip the hash: this open of the store has verified the file before."""
        self._verified = True
        return self

    @property
    def verified(self) -> bool:
        return self._verified

    def tensors(self) -> dict[str, Tensor]:
        """Each stored tensor, a line a row, on the mapping."""
        self.verify()
        if self._tensors is None:
            self._tensors = {name: view(self._mapping, spec, offset) for name, spec, offset in self._places()}
        return self._tensors

    def read_lines(self, lines: Tensor) -> dict[str, Tensor]:
        """Each stored tensor's chosen lines, copied.

        Of a shard that is not verified these lines alone are read, several at a time, and the caller must compare them
        with checksums of their own.

        Raises:
            FileNotFoundError: The file is gone.
            StoreError: The disk cannot read it.
        """
        if self._verified:
            return {name: tensor[lines] for name, tensor in self.tensors().items()}
        found = {
            name: torch.empty(len(lines), *spec.shape[1:], dtype=spec.dtype, device="cpu")
            for name, spec, _ in self._places()
        }
        try:
            with open(self._path, "rb", buffering=0) as file, ThreadPoolExecutor(READS_AT_ONCE) as pool:
                for name, spec, offset in self._places():
                    stride = spec.nbytes // spec.shape[0]
                    held = found[name].view(torch.uint8).view(len(lines), stride).numpy()
                    jobs = [(file.fileno(), held[i], offset + line * stride) for i, line in enumerate(lines.tolist())]
                    step = -(-len(jobs) // READS_AT_ONCE)
                    list(pool.map(_read_all, (jobs[i : i + step] for i in range(0, len(jobs), step))))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read: {error.strerror or error}; check the disk") from None
        return found

    def _places(self) -> Iterator[tuple[str, Spec, int]]:
        offset = len(self._head)
        for name, spec in self._specs.items():
            yield name, spec, offset
            offset += spec.nbytes


def asked_lately(seen: float) -> bool:
    """Whether what was in memory at a time is taken to be there still."""
    return time.monotonic() - seen <= ASKED_EVERY


def _read_all(jobs: Sequence[tuple[int, np.ndarray, int]]) -> None:
    for fd, out, offset in jobs:
        left = out.data
        while left:
            count = os.preadv(fd, [left], offset)
            if count == 0:
                raise OSError(f"the file ends at {offset}")
            left, offset = left[count:], offset + count


def read_columns(directory: Path, shard: Shard, names: list[str] | None = None) -> pa.Table:
    """The id and user columns of a shard, or some.

    Raises:
        FileNotFoundError: The file is gone.
        StoreError: A byte differs from what was written.
    """
    path = directory / shard.columns.name
    data = path.read_bytes()
    if digest(data) != shard.columns.checksum:
        raise damaged(path, "its checksum does not fit its content")
    table = from_parquet(data, names)
    if table.num_rows != shard.count:
        raise damaged(path, f"it has {table.num_rows} lines for {shard.count} rows")
    return table


def check_files(directory: Path, manifest: Manifest) -> None:
    """Every file the manifest names is there with its length; what is in them is verified when they are read.

    Raises:
        StoreError: One is missing or of another length.
    """
    for file in (file for shard in manifest.shards for file in shard.files):
        path = directory / file.name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise missing(path) from None
        if size != file.nbytes:
            raise damaged(path, f"it is {size} bytes long where {file.nbytes} are expected")


def damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why}; {_ADVICE}")


def missing(path: Path) -> StoreError:
    return StoreError(f"{path} is missing; {_ADVICE}")
