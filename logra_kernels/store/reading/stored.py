"""What a store is asked of its rows: ids and columns, blocks, scores, the best of them, copies for other tools."""

import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from logra_kernels.ops import EncodedRows
from logra_kernels.store.encoding import decode, encode_here, wrap
from logra_kernels.store.facts import Facts
from logra_kernels.store.life.export import export
from logra_kernels.store.reading import coarse
from logra_kernels.store.reading.reader import Reader


class StoredRows(Facts):
    """The half of `GradientStore` that reads."""

    _index: tuple[str, coarse.CoarseIndex] | None = None  # under the content_hash it belongs to

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
        return self.table.column("id").take(pa.array(indices.tolist(), pa.int64())).to_pylist()

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
        """(first row, rows as they are stored) over all rows, on mapped pages, read only; what `score_block` takes, and
        where they are kept as factors, `score_factored`.

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

    def build_index(
        self,
        dims: int | None = None,
        dtype: str = "bf16",
        *,
        k: int = 100,
        queries: Tensor | None = None,
        row_scale: Tensor | None = None,
        seed: int = 0,
    ) -> coarse.IndexInfo:
        """Make the index that `search` needs, and measure how much of the exact answer it finds.

        It pays where a pass over the rows takes too long to wait for: rows much longer than `dims`, and many of them.

        Args:
            dims: Numbers in a short row; by default 2,048, or a quarter of D where that is less.
            dtype: Of the short rows, as in `create`.
            k: The recall is of the k best rows.
            queries: [Q, D], preconditioned as later ones will be; by default 32 stored rows ask.
            row_scale: As later searches will have it, [N].
            seed: Of the random signs and groups.

        Returns:
            What it is, with the recall for shortlists of k, 2k, 4k, ... rows.

        Raises:
            StoreError: An argument is wrong, there are no rows, or the disk refuses.
        """
        return coarse.build(self, dims, dtype, seed, k, queries, row_scale)

    @property
    def index(self) -> coarse.IndexInfo:
        """What is known of the search index of the rows as they are.

        Raises:
            StoreError: There is none, or it is of other rows.
        """
        return self._coarse().info

    def search(
        self,
        queries: Tensor,
        k: int,
        row_scale: Tensor | None = None,
        largest: bool = True,
        *,
        shortlist: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`topk` in two stages: the index names a shortlist for each query, and only these rows are read and scored.

        Values are exact; a row that is among the k best may be missed, as seldom as `index.recall` says of the highest
        scores. The lowest are found as well as they stand out.

        Args:
            queries, k, row_scale, largest: As in `topk`.
            shortlist: Rows for each query; by default what the index was measured to need.

        Returns:
            As `topk`.

        Raises:
            StoreError: No index, or one of other rows; sizes do not fit; a row is damaged.
        """
        return coarse.search(self._current(), self._coarse(), queries, k, row_scale, largest, shortlist)

    def _coarse(self) -> coarse.CoarseIndex:
        if self._index is None or self._index[0] != self.content_hash:
            self._index = self.content_hash, coarse.load(self)
        return self._index[1]

    def export(self, path: str | os.PathLike, format: str = "npy") -> Path:
        """Write all rows, their ids and columns for other tools.

        Args:
            path: A new directory.
            format: "npy" (rows.npy fp32 and columns.parquet), "faiss" (index.faiss, inner product) or "datasets"
                (Hugging Face; column "gradient").

        Raises:
            StoreError: An unknown format, its package is missing, something is at the path, or the disk refuses.
        """
        return export(self, path, format)
