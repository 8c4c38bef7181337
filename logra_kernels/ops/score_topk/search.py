"""score_topk of rows that come block by block, as a store too large for memory gives them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from logra_kernels.ops._check import check_tensors
from logra_kernels.ops._dispatch import is_native, launcher
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops.score_block.op import numbers_of
from logra_kernels.ops.score_topk.op import check_topk, score_topk

Ranked = tuple[Tensor, Tensor]  # values and row numbers [Q, k]: NaN first, then by score, then by row


class RowBlocks:
    """Blocks of rows that follow each other, all in one format; described once for any number of searches.

    Args:
        blocks: Rows [n, D] as in `score_topk`, at least one block; their memory must stay as it is.
    """

    def __init__(self, blocks: Sequence[Tensor | EncodedRows]) -> None:
        self._blocks = [numbers_of("score_topk", rows, None) for rows in blocks]
        self._count = sum(len(rows) for rows in self._blocks)
        self._native: Any = None
        self._fitted: tuple[tuple, int] | None = None  # what queries were like that fitted, and their digits

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor | EncodedRows]:
        return iter(self._blocks)

    def check(self, queries: Tensor, k: int, row_scale: Tensor | None, query_format: str | None) -> int:
        """As `check_topk`, for all rows and their factors [N].

        Raises:
            ValueError: As in `score_topk`.
        """
        asked, fitted = (queries.shape, queries.dtype, queries.device, query_format), self._fitted
        if fitted is None or fitted[0] != asked or k < 1:
            numbers_of("score_topk", self._blocks[0], query_format)
            digits = [check_topk(queries, rows, k, None, query_format) for rows in self._blocks]
            self._fitted = fitted = asked, digits[0]
        if row_scale is not None:
            check_tensors("score_topk", queries=queries, row_scale=row_scale)
            if row_scale.shape != (self._count,) or row_scale.dtype != torch.float32:
                raise ValueError(
                    f"score_topk: row_scale {tuple(row_scale.shape)} {row_scale.dtype} must be [{self._count}]"
                    f" {torch.float32}"
                )
        return fitted[1]

    def native(self) -> Any:
        """As the C++ launchers take them."""
        if self._native is None:
            self._native = launcher("score_topk", "cpu", "auto", "Blocks")(self._blocks)
        return self._native


class TopK:
    """The k best rows for each query of blocks that come in row order: what `score_topk` finds in all of them.

    The C++ kernels lay the queries out once and go on from the best rows so far; elsewhere each block's are merged.

    Args:
        queries, k, largest, query_format: As in `score_topk`; the queries must not change meanwhile.
        count: Rows that will come at most; memory is taken for min(k, count).
    """

    def __init__(
        self, queries: Tensor, k: int, count: int, *, largest: bool = True, query_format: str | None = None
    ) -> None:
        self._queries, self._k, self._count = queries, k, count
        self._largest, self._query_format = largest, query_format
        self._native = queries.is_cpu and queries.dtype != torch.float64 and is_native("score_topk")
        self._search: Any = None  # of the C++ launchers
        self._rows = 0
        self._best: Ranked | None = None

    def add(self, *blocks: tuple[Tensor | EncodedRows, Tensor | None]) -> None:
        """The next blocks: rows [n, D] as in `score_topk`, all in one format, and their factors [n] or None.

        Raises:
            ValueError: As in `score_topk`.
        """
        for rows, scale in blocks:
            if self._native:
                self.add_all(RowBlocks([rows]), scale)
                continue
            values, index = score_topk(
                self._queries, rows, self._k, scale, largest=self._largest, query_format=self._query_format
            )
            self._best = merge(self._best, (values, index + self._rows), self._k, self._largest)
            self._rows += len(rows)

    def add_all(self, blocks: RowBlocks, row_scale: Tensor | None) -> None:
        """The next blocks in one call, in which the threads stay awake, and the factors [N] of all their rows or None.

        Raises:
            ValueError: As in `score_topk`.
        """
        if not self._native:
            first = 0
            for rows in blocks:
                self.add((rows, None if row_scale is None else row_scale[first : first + len(rows)]))
                first += len(rows)
            return
        digits = blocks.check(self._queries, self._k, row_scale, self._query_format)
        if self._search is None:
            make = launcher("score_topk", "cpu", "auto", "Search")
            self._search = make(self._queries, self._k, self._count, self._largest)
        self._search.add(blocks.native(), row_scale, digits)

    def best(self) -> Ranked:
        """values fp32 and row numbers int64 among all rows so far, [Q, min(k, rows)]."""
        if self._search is not None:
            return self._search.best()
        return nothing(self._queries) if self._best is None else self._best


def nothing(queries: Tensor) -> Ranked:
    """The best of no rows, [Q, 0]."""
    shape = (len(queries), 0)
    return queries.new_zeros(shape, dtype=torch.float32), queries.new_zeros(shape, dtype=torch.int64)


def merge(best: Ranked | None, block: Ranked, k: int, largest: bool) -> Ranked:
    """The k first of two sorted lists; `best` holds lower row numbers, so a stable sort keeps ties in row order."""
    if best is None:
        return block
    values = torch.cat((best[0], block[0]), dim=1)
    index = torch.cat((best[1], block[1]), dim=1)
    order = torch.sort(values if largest else -values, dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), index.gather(1, order)
