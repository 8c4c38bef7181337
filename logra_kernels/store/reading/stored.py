"""What a store is asked of its rows: ids and columns, blocks, scores, the best of them."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from logra_kernels.ops import EncodedRows
from logra_kernels.store.arrow import integers, strings
from logra_kernels.store.encoding import decode, encode_here, wrap
from logra_kernels.store.facts import Facts
from logra_kernels.store.ids import UNKNOWN
from logra_kernels.store.reading.reader import Reader


class StoredRows(Facts):
    """The part of `GradientStore` that reads."""

    @abstractmethod
    def _current(self) -> Reader:
        """The reader of the newest manifest this object may show."""

    def __len__(self) -> int:
        """Committed rows."""
        return self.manifest.rows

    @property
    def table(self) -> pa.Table:
        """Column "id" and the user's columns of the committed rows, as an Arrow table."""
        return self._current().table

    @property
    def ids(self) -> list[str]:
        return self.table.column("id").to_pylist()

    def ids_of(self, indices: Tensor) -> list[str]:
        """The ids of chosen rows, [k] int64, without making a list of all."""
        return self.table.column("id").take(integers(indices)).to_pylist()

    def numbers_of(self, ids: Sequence[str]) -> Tensor:
        """The numbers of the committed rows with these ids, [n] int64; -1 for an id that no row has.

        Raises:
            StoreError: They are no strings.
        """
        return torch.from_numpy(self._current().known.numbers(list(ids))).clamp(min=UNKNOWN)

    @property
    def deleted_ids(self) -> list[str]:
        """Ids of the rows that were deleted, compacted away or not, unless other rows have them now."""
        names = strings(list(dict.fromkeys(self._current().deleted_ids())))
        return names.filter(pc.invert(pc.is_in(names, self.table.column("id")))).to_pylist()

    @property
    def columns(self) -> dict[str, list]:
        """The user's columns: name -> one value for each committed row."""
        return {name: self.table.column(name).to_pylist() for name in self.table.column_names[1:]}

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as fp32 [stop - start, D].

        Raises:
            StoreError: Outside the store, or a shard is damaged.
        """
        return self._current().read(start, stop)

    def as_stored(self, rows: Tensor) -> Tensor:
        """Rows [n, D] as they would be read if they were appended, fp32."""
        return decode(self.manifest, wrap(self.manifest, encode_here(self.manifest, rows))).float()

    def blocks(self, max_bytes: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows [n, D] in `manifest.torch_dtype`) over all rows; about 64 MB each by default.

        Rows in a scaled format are decoded to fp32; others lie on mapped pages. A block is the caller's: writing on it
        changes neither the store nor what is read later.

        Raises:
            StoreError: A shard is damaged.
        """
        return self._current().blocks(max_bytes)

    def encoded_blocks(self, max_bytes: int | None = None) -> Iterator[tuple[int, EncodedRows]]:
        """(first row, rows as they are stored) over all rows, on mapped pages, read only; what `RowScorer` takes: they
        are `manifest.width` numbers wide.

        Raises:
            StoreError: A shard is damaged.
        """
        return self._current().encoded_blocks(max_bytes)

    def score(
        self,
        queries: Tensor,
        row_scale: Tensor | None = None,
        *,
        max_bytes: int | None = None,
        query_format: str | None = None,
    ) -> Tensor:
        """Every query against every row.

        Args:
            queries: [Q, D], preconditioned already; the result is on their device.
            row_scale: A factor for each row's score, [N].
            max_bytes: Of rows scored at a time; a shard, or 256 MB, by default.
            query_format: How queries enter the product with rows that have scales, as in `score_block`.

        Returns:
            [Q, N] fp32.

        Raises:
            StoreError: Sizes or a query_format do not fit the rows, or a shard is damaged.
        """
        return self._current().score(queries, row_scale, max_bytes, query_format)

    def topk(
        self,
        queries: Tensor,
        k: int,
        row_scale: Tensor | None = None,
        largest: bool = True,
        *,
        max_bytes: int | None = None,
        query_format: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best rows for each query, in one pass and bounded memory.

        Args:
            queries: [Q, D], preconditioned already; the results are on their device.
            k: At least 1.
            row_scale: A factor for each row's score, [N].
            largest: False for the lowest scores, ascending.
            max_bytes: Of rows scored at a time; a shard, or 256 MB, by default.
            query_format: As in `score`.

        Returns:
            values fp32 and row numbers int64, [Q, min(k, N)]: by score, then by lower row number, NaN first.

        Raises:
            StoreError: Sizes do not fit, or a shard is damaged.
        """
        return self._current().topk(queries, k, row_scale, largest, max_bytes, query_format)
