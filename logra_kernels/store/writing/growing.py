"""The shard that rows come to: its full file laid out in memory, and written while it grows.

Rows are encoded straight to their place in the file. What of it is whole is handed to the disk and hashed at once, so a
full shard is on the disk soon after its last row came. A shard that is to be committed before it is full has
another file, which is written from the same memory; it goes on growing.

One thread takes places, another says which are filled; each of them in order.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from torch import Tensor

from logra_kernels.store.columns import Lines, table_of
from logra_kernels.store.durable import Temporary
from logra_kernels.store.entry import File, Shard, shard_names
from logra_kernels.store.format import Manifest
from logra_kernels.store.native import gather
from logra_kernels.store.shard import WrittenShard, begin_columns, write_shard
from logra_kernels.store.tensorfile import CHECKSUM_AT, as_bytes, header
from logra_kernels.store.writing import disk
from logra_kernels.store.writing.disk import BLOCK, Disk, begin_direct
from logra_kernels.store.writing.slots import Slot


class _Region(NamedTuple):
    """Where a tensor's lines are in the file."""

    offset: int
    line: int
    nbytes: int

    def filled(self, count: int) -> int:
        return self.offset + count * self.line


@dataclass(frozen=True, slots=True)
class Place:
    """Room for rows: lines [first, first + count) of each of a shard's tensors."""

    shard: "GrowingShard"
    first: int
    count: int

    @property
    def stop(self) -> int:
        return self.first + self.count

    @property
    def due(self) -> bool:
        """Whether these rows make something whole that can be written."""
        return self.shard.due(self.first, self.stop)

    def pieces(self, name: str) -> list[np.ndarray]:
        """The memory of a tensor's lines, one piece after the other."""
        return self.shard.pieces(name, self.first, self.stop)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy encoded rows, named as in `Manifest.tensors`."""
        for name, tensor in tensors.items():
            data = np.frombuffer(as_bytes(tensor), np.uint8)
            for piece in self.pieces(name):
                gather([data[: len(piece)]], piece)
                data = data[len(piece) :]

    def whole(self) -> dict[str, np.ndarray] | None:
        """The memory of each tensor's lines; None if one's are in more than one piece."""
        return self.shard.whole(self.first, self.stop)

    def runs(self) -> Iterator["Place"]:
        """Cut so that each tensor's lines are one piece, if there is more than one line."""
        cuts = [self.first, *self.shard.cuts(self.first, self.stop), self.stop]
        return (Place(self.shard, first, stop - first) for first, stop in pairwise(cuts))


class GrowingShard:
    """Rows [start, start + count + removed) of a store, of which compactions took out `removed`.

    Args:
        manifest: Says how many rows are a full shard.
        version: How often the shard was compacted.
    """

    def __init__(self, directory: Path, manifest: Manifest, disk: Disk, start: int, version: int = 0, removed: int = 0):
        self.start, self.count = start, 0
        self._promised = self._taken = 0
        self._directory, self._manifest, self._disk = directory, manifest, disk
        self._version, self._removed = version, removed
        self._lines: list[Lines] = []
        self._regions: dict[str, _Region] = {}
        specs = manifest.tensors(manifest.rows_per_shard)
        self._head = header(specs, {})
        end = len(self._head)
        for name, spec in specs.items():
            self._regions[name] = _Region(end, spec.nbytes // manifest.rows_per_shard, spec.nbytes)
            end += spec.nbytes
        self._end = end
        self._slots: dict[int, Slot] = {}
        self._unsent = deque(self._in_order_of_need())
        self._due_at = [count for count, _ in self._unsent] or [manifest.rows_per_shard]
        self._sent: dict[int, Future] = {}
        self._file: Temporary | None = None
        self._state, self._hashed = xxhash.xxh3_128(), 0

    @property
    def stop(self) -> int:
        return self.start + self.count + self._removed

    @property
    def full_stop(self) -> int:
        return self.start + self._manifest.rows_per_shard + self._removed

    @property
    def promised(self) -> int:
        """How many rows are filled, or will be."""
        return self._promised

    @property
    def room(self) -> int:
        """How many more rows it takes."""
        return self._manifest.rows_per_shard - self._promised

    @property
    def full(self) -> bool:
        return self.count == self._manifest.rows_per_shard

    @property
    def name(self) -> str:
        """Of the file of its rows so far."""
        return shard_names(self.start, self.stop, self._version)[0]

    @property
    def full_name(self) -> str:
        """Of the file of rows of the full shard."""
        return shard_names(self.start, self.full_stop, self._version)[0]

    def take(self, count: int) -> Place:
        """A place for up to `room` rows. Until one is promised to be filled, the next one is the same."""
        place = Place(self, self._promised, count)
        size = self._disk.slots.nbytes
        for region in self._regions.values():
            for index in range(region.filled(place.first) // size, (region.filled(place.stop) - 1) // size + 1):
                if index not in self._slots:
                    self._slots[index] = self._disk.slots.take()
        self._taken = place.stop
        return place

    def promise(self, place: Place) -> None:
        """What was taken last is filled, or will be before it is added."""
        self._promised = place.stop

    def drop(self) -> None:
        """What was taken last is not being filled."""
        self._taken = self._promised

    def due(self, first: int, stop: int) -> bool:
        return bisect_right(self._due_at, first) < bisect_right(self._due_at, stop)

    def pieces(self, name: str, first: int, stop: int) -> list[np.ndarray]:
        region = self._regions[name]
        cut = self._cut(region.filled(first), region.filled(stop))
        return [self._slots[index].bytes[begin:end] for index, begin, end in cut]

    def whole(self, first: int, stop: int) -> dict[str, np.ndarray] | None:
        found, size = {}, self._disk.slots.nbytes
        for name, region in self._regions.items():
            index, begin = divmod(region.filled(first), size)
            end = begin + (stop - first) * region.line
            if end > size:
                return None
            found[name] = self._slots[index].bytes[begin:end]
        return found

    def cuts(self, first: int, stop: int) -> list[int]:
        """Numbers of lines before and after those that lie in two slots, and of those that begin a slot."""
        found = set()
        for region in self._regions.values():
            for index, _, _ in self._cut(region.filled(first), region.filled(stop)):
                whole, within = divmod(self._span(index)[0] - region.offset, region.line)
                found |= {whole, whole + bool(within)}
        return sorted(line for line in found if first < line < stop)

    def add(self, count: int, lines: Sequence[Lines]) -> None:
        """The next `count` rows are filled: write what is whole now, and hash it, unless `written` comes next.

        Raises:
            OSError: As the system reports it.
        """
        self.count += count
        self._lines += lines
        while self._unsent and self._unsent[0][0] <= self.count:
            self._send(self._unsent.popleft()[1])
        if not self.full:
            self._hash()

    def written(self) -> WrittenShard:
        """The rows so far as two files that the system has, to be settled by the caller. A full shard takes no more,
        and another thread may do this.

        Raises:
            OSError: As the system reports it; nothing is left.
        """
        table = table_of(self._lines)
        self._lines = [table]
        if self._file is None or not self.full:
            payload = {name: [p.data for p in self.pieces(name, 0, self.count)] for name in self._regions}
            return write_shard(
                self._directory, self.start, self._manifest, payload, table, self._version, self._removed
            )
        self._hash()
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
        block = Slot(BLOCK).bytes
        block[:] = self._slots[0].bytes[:BLOCK]
        block[CHECKSUM_AT : CHECKSUM_AT + len(checksum)] = np.frombuffer(checksum.encode(), np.uint8)
        self._disk.write(file, block, 0)

    def close(self) -> None:
        """Let the memory go once it is written, and remove the file of a shard that did not become full."""
        if self._file is not None:
            self._file.discard()
            self._file = None
        slots, self._slots = self._slots, {}
        if self._taken != self.count:
            return  # a place may be being filled still: no other store may have its memory
        for index, slot in slots.items():
            if index in self._sent:
                self._sent[index].add_done_callback(partial(_give_back, self._disk, slot))
            else:
                self._disk.slots.give_back(slot)

    def _cut(self, begin: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(slot, first byte in it, last one + 1) of the parts of the file's bytes [begin, stop)."""
        size = self._disk.slots.nbytes
        while begin < stop:
            index, within = divmod(begin, size)
            end = min(stop - begin + within, size)
            yield index, within, end
            begin += end - within

    def _span(self, index: int) -> tuple[int, int]:
        """The slot's part of the file."""
        size = self._disk.slots.nbytes
        return index * size, min(self._end, (index + 1) * size)

    def _in_order_of_need(self) -> list[tuple[int, int]]:
        """(how many rows make it whole, slot); none of a file too short to be written while it grows."""
        if self._end < disk.SLOT_BYTES:
            return []
        found = []
        for index in range(-(-self._end // self._disk.slots.nbytes)):
            begin, stop = self._span(index)
            needs = [
                -(-(min(stop, region.offset + region.nbytes) - region.offset) // region.line)
                for region in self._regions.values()
                if region.offset < stop and begin < region.offset + region.nbytes
            ]
            found.append((max(needs), index))
        return sorted(found)

    def _send(self, index: int) -> None:
        if self._file is None:
            self._file = begin_direct(self._directory, self.full_name)
        if index == 0:
            self._slots[0].bytes[: len(self._head)] = np.frombuffer(self._head, np.uint8)
        begin, stop = self._span(index)
        self._sent[index] = self._disk.write(self._file, self._slots[index].bytes[: stop - begin], begin)

    def _hash(self) -> None:
        """As far as all slots are being written."""
        while self._hashed in self._sent:
            begin, stop = self._span(self._hashed)
            self._state.update(self._slots[self._hashed].bytes[: stop - begin].data)
            self._hashed += 1


def _give_back(disk: Disk, slot: Slot, _: Future) -> None:
    disk.slots.give_back(slot)
