"""The shard that rows come to: its full file laid out in memory, and written while it grows.

Every row that comes is copied to its place in the file; what of the file is whole is hashed and handed to the disk at
once. So a full shard is on the disk soon after its last row came, and the memory of what comes is free at once. A shard
that is to be committed before it is full has another file, which is written from the same memory; it goes on growing.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from torch import Tensor

from logra_kernels.store.durable import Temporary
from logra_kernels.store.entry import File, Shard, shard_names
from logra_kernels.store.format import Manifest
from logra_kernels.store.native import gather
from logra_kernels.store.shard import WrittenShard, begin_columns, write_shard
from logra_kernels.store.tensorfile import CHECKSUM_AT, as_bytes, header
from logra_kernels.store.writing import disk
from logra_kernels.store.writing.disk import BLOCK, Disk, begin_direct
from logra_kernels.store.writing.ring import aligned


class _Region(NamedTuple):
    """Where a tensor's lines are in the file."""

    offset: int
    line: int
    nbytes: int

    def filled(self, count: int) -> int:
        return self.offset + count * self.line


class GrowingShard:
    """Rows [start, start + count + removed) of a store, of which compactions took out `removed`.

    Args:
        manifest: Says how many rows are a full shard.
        version: How often the shard was compacted.
    """

    def __init__(self, directory: Path, manifest: Manifest, disk: Disk, start: int, version: int = 0, removed: int = 0):
        self.start, self.count = start, 0
        self._directory, self._manifest, self._disk = directory, manifest, disk
        self._version, self._removed = version, removed
        self._tables: list[pa.Table] = []
        self._regions: dict[str, _Region] = {}
        specs = manifest.tensors(manifest.rows_per_shard)
        self._head = header(specs, {})
        end = len(self._head)
        for name, spec in specs.items():
            self._regions[name] = _Region(end, spec.nbytes // manifest.rows_per_shard, spec.nbytes)
            end += spec.nbytes
        self._end = end
        self._slots: dict[int, np.ndarray] = {}
        self._sent: dict[int, Future] = {}
        self._file: Temporary | None = None
        self._state, self._hashed = xxhash.xxh3_128(), 0
        self._place(0, np.frombuffer(self._head, np.uint8))

    @property
    def stop(self) -> int:
        return self.start + self.count + self._removed

    @property
    def room(self) -> int:
        """How many more rows it takes."""
        return self._manifest.rows_per_shard - self.count

    @property
    def name(self) -> str:
        """Of the file of its rows so far."""
        return shard_names(self.start, self.stop, self._version)[0]

    @property
    def full_name(self) -> str:
        """Of the file of rows of the full shard."""
        return shard_names(self.start, self.stop + self.room, self._version)[0]

    def add(self, tensors: Mapping[str, Tensor], table: pa.Table) -> None:
        """Take up to `room` rows, copied.

        Raises:
            OSError: As the system reports it.
        """
        for name, region in self._regions.items():
            self._place(region.filled(self.count), np.frombuffer(as_bytes(tensors[name]), np.uint8))
        self.count += table.num_rows
        self._tables.append(table)
        if self._end >= disk.SLOT_BYTES:
            for index in sorted(self._slots.keys() - self._sent.keys()):
                if self._whole(index):
                    self._send(index)

    def written(self) -> WrittenShard:
        """The rows so far as two files that the system has, to be settled by the caller. A full shard takes no more.

        Raises:
            OSError: As the system reports it; nothing is left.
        """
        table = pa.concat_tables(self._tables)
        if self._file is None or self.room:
            payload = {name: list(self._lines(region)) for name, region in self._regions.items()}
            return write_shard(
                self._directory, self.start, self._manifest, payload, table, self._version, self._removed
            )
        file, self._file = self._file, None
        rows = File(self.name, self._end, self._state.hexdigest())
        _, columns_name = shard_names(self.start, self.stop, self._version)
        columns_file, columns = begin_columns(self._directory, columns_name, table, file)
        try:
            self._seal(file, rows.checksum)
        except BaseException:
            file.discard()
            columns_file.discard()
            raise
        shard = Shard(self.start, self.stop, rows, columns, self._version, self._removed)
        return WrittenShard(shard, (file, columns_file))

    def _seal(self, file: Temporary, checksum: str) -> None:
        """Write the first block once more, with the checksum."""
        block = aligned(BLOCK)
        block[:] = self._slots[0][:BLOCK]
        block[CHECKSUM_AT : CHECKSUM_AT + len(checksum)] = np.frombuffer(checksum.encode(), np.uint8)
        self._disk.write(file, block, 0)

    def close(self) -> None:
        """Let the memory go once it is written, and remove the file of a shard that did not become full."""
        if self._file is not None:
            self._file.discard()
            self._file = None
        for index, slot in self._slots.items():
            if index in self._sent:
                self._sent[index].add_done_callback(partial(_give_back, self._disk, slot))
            else:
                self._disk.give_back(slot)
        self._slots = {}

    def _place(self, at: int, data: np.ndarray) -> None:
        for index, begin, stop in _cut(at, at + len(data)):
            if index not in self._slots:
                self._slots[index] = self._disk.slot()
            gather([data[: stop - begin]], self._slots[index][begin:stop])
            data = data[stop - begin :]

    def _lines(self, region: _Region) -> Iterator[memoryview]:
        for index, begin, stop in _cut(region.offset, region.filled(self.count)):
            yield self._slots[index][begin:stop].data

    def _span(self, index: int) -> tuple[int, int]:
        """The slot's part of the file."""
        return index * disk.SLOT_BYTES, min(self._end, (index + 1) * disk.SLOT_BYTES)

    def _whole(self, index: int) -> bool:
        begin, stop = self._span(index)
        return all(
            region.offset >= stop or min(region.offset + region.nbytes, stop) <= max(begin, region.filled(self.count))
            for region in self._regions.values()
        )

    def _send(self, index: int) -> None:
        """Write a slot, and hash it as soon as all before it are."""
        if self._file is None:
            self._file = begin_direct(self._directory, self.full_name)
        begin, stop = self._span(index)
        self._sent[index] = self._disk.write(self._file, self._slots[index][: stop - begin], begin)
        while self._hashed in self._sent:
            begin, stop = self._span(self._hashed)
            self._state.update(self._slots[self._hashed][: stop - begin].data)
            self._hashed += 1


def _give_back(disk: Disk, slot: np.ndarray, _: Future) -> None:
    disk.give_back(slot)


def _cut(begin: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(slot, first byte in it, last one + 1) of the parts of a file's bytes [begin, stop)."""
    while begin < stop:
        index, within = divmod(begin, disk.SLOT_BYTES)
        end = min(stop - begin + within, disk.SLOT_BYTES)
        yield index, within, end
        begin += end - within
