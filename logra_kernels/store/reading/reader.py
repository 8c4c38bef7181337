"""Committed rows of one manifest: blocks on mapped pages, scores and top-k streamed over them.

S[q,n] = row_scale[n] sum_d queries[q,d] rows[n,d]
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.ops import QUERY_FORMATS, EncodedRows
from logra_kernels.ops.score_topk import RowBlocks
from logra_kernels.store.arrow import integers, others, strings
from logra_kernels.store.deleted import shown_lines
from logra_kernels.store.encoding import decode, row_sums, wrap
from logra_kernels.store.entry import Shard
from logra_kernels.store.format import Manifest, read_manifest
from logra_kernels.store.ids import KnownIds
from logra_kernels.store.reading.ahead import loaded, on_device
from logra_kernels.store.reading.memory import outgrows_memory
from logra_kernels.store.reading.scoring import Best, RowScorer
from logra_kernels.store.removed import read_removed
from logra_kernels.store.shard import MappedShard, Piece, asked_lately, damaged, missing, read_columns

BLOCK_BYTES = 64 << 20
FACTOR_BYTES = 16 << 20  # of factors as fp32, or of their scores, at a time
SCORED_BYTES = 256 << 20  # at a time; a shard is no longer, unless it was asked for
MAPPED_SHARDS = 128  # kept mapped between queries; each costs a file descriptor and no memory of its own


class Reader:
    """The rows that a manifest shows, numbered without gaps.

    What a writer may replace and delete is read at once: a short last shard and the lists of deleted rows.
    """

    def __init__(self, directory: Path, load: Callable[[], Manifest], before: "Reader | None" = None):
        self.directory = directory
        self._mapped: OrderedDict[str, MappedShard] = OrderedDict()
        self._verified: set[str] = set(before._verified) if before is not None else set()
        self._table: pa.Table | None = None
        self._tail: MappedShard | None = None
        self._tail_table: pa.Table | None = None
        self._at_once: RowBlocks | None = None  # every row, while the mapped shards are those it was made of
        self._seen = -math.inf  # when all of it was last at hand
        self._shown: dict[int, Tensor] = {}  # start of a shard with deleted rows -> its lines that are shown
        self.manifest = load()
        while True:
            try:
                self._hold()
                return
            except FileNotFoundError as error:
                newer = load()
                if newer.shards == self.manifest.shards:
                    raise missing(Path(error.filename)) from None
                self.manifest = newer

    def _hold(self) -> None:
        shards = self.manifest.shards
        self._shown = {s.start: shown_lines(self.directory, s) for s in shards if s.deleted is not None}
        self._tail = self._tail_table = None
        if shards and shards[-1].count < self.manifest.rows_per_shard:
            self._tail = MappedShard(self.directory, self.manifest, shards[-1])
            self._tail_table = read_columns(self.directory, shards[-1])

    @property
    def table(self) -> pa.Table:
        """Column "id" and the user's columns of every row, [N]; read and verified once."""
        if self._table is None:
            shards = self.manifest.shards
            if not shards:
                return pa.table([strings([])], names=["id"])
            tables = [self._columns_of(shard) for shard in shards]
            for shard, table in zip(shards, tables, strict=True):
                if table.schema != tables[0].schema:
                    raise StoreError(f"{self.directory / shard.columns.name} has other columns than the first shard")
            self._table = pa.concat_tables(self._shown_of(*pair) for pair in zip(shards, tables, strict=True))
        return self._table

    def _shown_of(self, shard: Shard, table: pa.Table) -> pa.Table:
        shown = self._shown.get(shard.start)
        return table if shown is None else table.take(integers(shown))

    def _columns_of(self, shard: Shard) -> pa.Table:
        if shard is self.manifest.shards[-1] and self._tail_table is not None:
            return self._tail_table
        try:
            return read_columns(self.directory, shard)
        except FileNotFoundError:
            raise self._gone(shard.columns.name) from None
        except OSError as error:
            raise StoreError(f"{self.directory / shard.columns.name} cannot be read: {error.strerror}") from None

    def deleted_ids(self) -> Iterator[str]:
        """Ids of the rows that were deleted, compacted away or not, some perhaps twice."""
        yield from read_removed(self.directory)
        for shard in self.manifest.shards:
            if shard.hidden:
                yield from others(self._columns_of(shard).column("id"), self._shown[shard.start])

    @cached_property
    def known(self) -> KnownIds:
        """The ids that are shown, and those that were deleted, to be asked for."""
        return KnownIds(self.table.column("id"), self.deleted_ids())

    def _map(self, shard: Shard, private: bool, keep: bool = True) -> MappedShard:
        """A shard, verified once per open. A private mapping is the caller's own to write on."""
        if self._tail is not None and shard is self.manifest.shards[-1]:
            return self._tail  # its file may be gone, so it cannot be mapped once more
        name = shard.rows.name
        mapped = None if private else self._mapped.pop(name, None)
        if mapped is None:
            try:
                mapped = MappedShard(self.directory, self.manifest, shard)
            except FileNotFoundError:
                raise self._gone(name) from None
            self._at_once = None
            if shard.rows.checksum in self._verified:
                mapped.trust()
        if keep and not private:
            self._mapped[name] = mapped
            while len(self._mapped) > MAPPED_SHARDS:
                self._mapped.popitem(last=False)
        return mapped

    def _at_hand(self) -> bool:
        """Whether every shard is mapped, verified and in memory, so that nothing is waited for between them."""
        if self._at_once is not None and asked_lately(self._seen):
            return True
        mapped = [self._mapped.get(shard.rows.name) for shard in self.manifest.shards]
        if self._tail is not None:
            mapped[-1] = self._tail
        found = all(shard is not None and shard.at_hand for shard in mapped)
        self._seen = time.monotonic() if found else -math.inf
        return found

    def _every_row(self) -> RowBlocks:
        """Of a store that is at hand and shows all rows."""
        if self._at_once is None:
            shards = self.manifest.shards
            blocks = [self._rows(shard, self._map(shard, private=False), private=False) for shard in shards]
            self._at_once = RowBlocks(blocks)
        return self._at_once

    def _rows(self, shard: Shard, mapped: MappedShard, private: bool) -> EncodedRows:
        tensors = mapped.tensors()
        self._verified.add(shard.rows.checksum)
        if private and mapped is self._tail:
            return wrap(self.manifest, _copies(tensors))
        if mapped.wrapped is None:
            mapped.wrapped = wrap(self.manifest, tensors)
        return mapped.wrapped

    def _gone(self, name: str) -> StoreError:
        if any(name in shard.names for shard in read_manifest(self.directory).shards):
            return missing(self.directory / name)
        return StoreError(
            f"{self.directory} was compacted while this object read an older state of it; open the store again"
        )

    def _overlapping(self, start: int, stop: int) -> list[tuple[int, Shard]]:
        """Shards with rows in [start, stop), and the number of each one's first row."""
        found, end = [], 0
        for shard in self.manifest.shards:
            begin, end = end, end + shard.shown
            if end > start and begin < stop:
                found.append((begin, shard))
        return found

    def _stream(
        self, start: int, stop: int, max_bytes: int, row_bytes: int, private: bool, at_hand: bool = False
    ) -> Iterator[tuple[int, EncodedRows]]:
        step = max(1, max_bytes // row_bytes)
        wanted = self._overlapping(start, stop)
        give_back = self._outgrows_memory and not private  # what the caller has written would be lost
        mapped: Iterator[MappedShard] = (self._map(shard, private, keep=not give_back) for _, shard in wanted)
        if len(wanted) > 1 and not at_hand:
            mapped = loaded(mapped, give_back)
        for (begin, shard), mapping in zip(wanted, mapped, strict=True):
            rows, shown = self._rows(shard, mapping, private), self._shown.get(shard.start)
            end = min(stop, begin + shard.shown)
            for first in range(max(start, begin), end, step):
                part = slice(first - begin, min(first + step, end) - begin)
                if shown is None and len(rows) == part.stop - part.start:
                    yield first, rows
                else:
                    yield first, rows[part] if shown is None else _lines(rows, shown[part])

    @cached_property
    def _outgrows_memory(self) -> bool:
        return outgrows_memory(sum(shard.rows.nbytes for shard in self.manifest.shards))

    def blocks(self, max_bytes: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows [n, D] decoded), in order, of at most `max_bytes` but at least one row; the caller's own."""
        private = self.manifest.rank is None and not self.manifest.format.scaled  # else decoding makes a copy
        row_bytes = self.manifest.dim * self.manifest.torch_dtype.itemsize
        for first, rows in self._stream(0, self.manifest.rows, max_bytes or BLOCK_BYTES, row_bytes, private):
            yield first, decode(self.manifest, rows)

    def encoded_blocks(
        self, max_bytes: int | None = None, start: int = 0, stop: int | None = None, at_hand: bool = False
    ) -> Iterator[tuple[int, EncodedRows]]:
        """(first row, rows [start, stop) as they are stored), in order, of at most `max_bytes` but at least one row.

        Args:
            at_hand: What `_at_hand` has found.
        """
        manifest = self.manifest
        stop = manifest.rows if stop is None else stop
        yield from self._stream(start, stop, max_bytes or SCORED_BYTES, manifest.row_bytes, False, at_hand)

    def _blocks_to_score(
        self, queries: int, max_bytes: int | None, at_hand: bool = False
    ) -> Iterator[tuple[int, EncodedRows]]:
        """encoded_blocks; those of factors are short, so that their numbers and their scores stay in the cache."""
        manifest, max_bytes = self.manifest, max_bytes or SCORED_BYTES
        if manifest.rank is not None:
            max_bytes = min(max_bytes, _factored_rows(manifest.width, queries) * manifest.row_bytes)
        return self.encoded_blocks(max_bytes, at_hand=at_hand)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as fp32 [stop - start, D], a copy."""
        if not 0 <= start <= stop <= self.manifest.rows:
            raise StoreError(
                f"rows {start} to {stop} are outside the store, which holds {self.manifest.rows}; ask for fewer"
            )
        out = torch.zeros(stop - start, self.manifest.dim, dtype=torch.float32, device="cpu")
        for first, rows in self._stream(start, stop, BLOCK_BYTES, self.manifest.dim * 4, private=False):
            out[first - start : first - start + len(rows)] = decode(self.manifest, rows)
        return out

    def rows_at(self, numbers: Tensor, sums: Tensor) -> Iterator[tuple[Tensor, EncodedRows]]:
        """(row numbers, these rows as they are stored), a shard at a time; no other row is read.

        Args:
            numbers: Of rows, sorted, [n] int64.
            sums: `row_sums` of every row of the store, which are compared where the shard was not verified as a whole.

        Raises:
            StoreError: A row is damaged.
        """
        if not len(numbers):
            return
        for begin, shard in self._overlapping(int(numbers[0]), int(numbers[-1]) + 1):
            mine = numbers[torch.searchsorted(numbers, begin) : torch.searchsorted(numbers, begin + shard.shown)]
            if not len(mine):
                continue
            shown = self._shown.get(shard.start)
            lines = mine - begin if shown is None else shown[mine - begin]
            mapped = self._map(shard, private=False)
            if mapped is self._tail:
                mapped.verify()  # its file may be gone, so its lines cannot be read from there
            try:
                rows = wrap(self.manifest, mapped.read_lines(lines))
            except FileNotFoundError:
                raise self._gone(shard.rows.name) from None
            if not mapped.verified and not torch.equal(row_sums(rows), sums[mine]):
                raise damaged(self.directory / shard.rows.name, "a row is not the one that the search index knows")
            yield mine, rows

    def topk_among(
        self, numbers: Tensor, sums: Tensor, queries: Tensor, k: int, row_scale: Tensor | None, largest: bool
    ) -> tuple[Tensor, Tensor]:
        """`topk` over chosen rows only; `numbers` and `sums` as in `rows_at`."""
        queries, row_scale = self.check(queries, row_scale)
        best = Best(self.manifest, queries, k, len(numbers), largest)
        for mine, rows in self.rows_at(numbers, sums):
            scale = None if row_scale is None else row_scale[mine.to(queries.device)]
            best.add((rows.to(queries.device), scale))
        values, places = best.found()
        return values, numbers.to(queries.device)[places]

    def score(
        self,
        queries: Tensor,
        row_scale: Tensor | None,
        max_bytes: int | None = None,
        query_format: str | None = None,
    ) -> Tensor:
        """[Q, N] fp32 on the queries' device."""
        queries, row_scale = self.check(queries, row_scale, query_format)
        out = queries.new_zeros((queries.shape[0], self.manifest.rows), dtype=torch.float32)
        scorer = RowScorer(self.manifest, queries, query_format)
        for first, rows in on_device(self._blocks_to_score(len(queries), max_bytes), queries.device):
            scorer.score(rows, out[:, first : first + len(rows)])
        return out if row_scale is None else out.mul_(row_scale)

    def topk(
        self,
        queries: Tensor,
        k: int,
        row_scale: Tensor | None,
        largest: bool,
        max_bytes: int | None = None,
        query_format: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """values and row numbers [Q, min(k, N)] on the queries' device; NaN first, then by score, then by row."""
        queries, row_scale = self.check(queries, row_scale, query_format)
        if k < 1:
            raise StoreError(f"k is {k}; it must be at least 1")
        best = Best(self.manifest, queries, k, self.manifest.rows, largest, query_format)
        at_hand = queries.is_cpu and self._at_hand()
        if at_hand and max_bytes is None and self.manifest.rank is None and not self._shown and self.manifest.shards:
            best.add_all(self._every_row(), row_scale)
            return best.found()
        blocks = (
            (rows, None if row_scale is None else row_scale[first : first + len(rows)])
            for first, rows in on_device(self._blocks_to_score(len(queries), max_bytes, at_hand), queries.device)
        )
        if at_hand:
            best.add(*blocks)
        else:
            for block in blocks:
                best.add(block)
        return best.found()

    def check(
        self, queries: Tensor, row_scale: Tensor | None, query_format: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Both as the scoring ops take them.

        Raises:
            StoreError: They do not fit the store.
        """
        dim, count = self.manifest.dim, self.manifest.rows
        if queries.dim() != 2 or queries.shape[1] != dim or not queries.is_floating_point():
            raise StoreError(
                f"queries {tuple(queries.shape)} {queries.dtype} must be floating point [Q, {dim}],"
                " as long as the store's rows"
            )
        plain = not self.manifest.format.scaled or self.manifest.rank is not None
        if query_format is not None and (query_format not in QUERY_FORMATS or plain):
            raise StoreError(
                f"query_format {query_format!r} does not go with rows kept as {self.manifest.kept_as}; it may be"
                f" {' or '.join(map(repr, QUERY_FORMATS))} for rows in fp8, int8 and below that are not kept as factors"
            )
        queries = queries.detach()
        form = self.manifest.format
        if queries.dtype != form.value_dtype and not (form.scaled and queries.dtype.itemsize == 2):
            queries = queries.float()
        if row_scale is not None:
            if row_scale.shape != (count,):
                raise StoreError(
                    f"row_scale {tuple(row_scale.shape)} must be [{count}], one factor for each stored row"
                )
            row_scale = row_scale.detach().to(queries.device, torch.float32)
        return queries, row_scale


def _factored_rows(width: int, queries: int) -> int:
    """How many rows that are kept as factors are scored at a time."""
    return max(1, FACTOR_BYTES // (4 * max(width, queries)))


def factored_bytes(rows: int, width: int, queries: int) -> int:
    """The most memory that scoring `rows` kept as factors takes beside them: their numbers, scores and keys as fp32."""
    return 4 * min(rows, _factored_rows(width, queries)) * (width + 3 * queries)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def tail_of(directory: Path, manifest: Manifest) -> list[Piece]:
    """A short last shard, deleted rows included, as a piece of its own; nothing when the last one is full.

    Raises:
        StoreError: It is missing or damaged.
    """
    last = manifest.shards[-1] if manifest.shards else None
    if last is None or last.count == manifest.rows_per_shard:
        return []
    try:
        return [(MappedShard(directory, manifest, last).tensors(), read_columns(directory, last))]
    except FileNotFoundError as error:
        raise missing(Path(error.filename)) from None


def _lines(rows: EncodedRows, lines: Tensor) -> EncodedRows:
    """Chosen lines of a shard, sorted; a copy only where they have gaps."""
    first, last = int(lines[0]), int(lines[-1])
    return rows[first : last + 1] if last - first + 1 == len(lines) else rows[lines]
