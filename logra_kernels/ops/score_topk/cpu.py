"""C++ launchers of score_topk."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._native import Encoded, Matrix, encoded, matrix, row_major


def launch(queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    (q, d), n = queries.shape, rows.shape[0]
    k = min(k, n)
    values = torch.empty(q, k, dtype=accumulator_dtype(rows.dtype), device="cpu")
    indices = torch.empty(q, k, dtype=torch.int64, device="cpu")
    _C.score_topk(
        matrix(queries),
        matrix(rows),
        None if row_scale is None else matrix(row_scale.unsqueeze(-1)),
        values.data_ptr(),
        indices.data_ptr(),
        q,
        n,
        d,
        k,
        largest,
        torch.get_num_threads(),
    )
    return values, indices


def launch_encoded(
    queries: Tensor, rows: EncodedRows, k: int, row_scale: Tensor | None, largest: bool, digits: int
) -> tuple[Tensor, Tensor]:
    (q, d), n = queries.shape, len(rows)
    k = min(k, n)
    values = torch.empty(q, k, dtype=torch.float32, device="cpu")
    indices = torch.empty(q, k, dtype=torch.int64, device="cpu")
    rows = row_major(rows)
    _C.score_topk_encoded(
        matrix(queries),
        encoded(rows),
        None if row_scale is None else matrix(row_scale.unsqueeze(-1)),
        values.data_ptr(),
        indices.data_ptr(),
        q,
        n,
        d,
        k,
        largest,
        digits,
        torch.get_num_threads(),
    )
    return values, indices


class Blocks:
    """Blocks of rows as the native library takes them, all numbers or all encoded; they keep their memory alive."""

    def __init__(self, blocks: Sequence[Tensor | EncodedRows]):
        self._kept = [row_major(rows) if isinstance(rows, EncodedRows) else rows for rows in blocks]
        self.encoded = isinstance(self._kept[0], EncodedRows)
        self.parts: list[tuple[Any, Matrix | None, int]] = [(_described(rows), None, len(rows)) for rows in self._kept]


def _described(rows: Tensor | EncodedRows) -> Encoded | Matrix:
    return encoded(rows) if isinstance(rows, EncodedRows) else matrix(rows)


class Search:
    """Native top k of rows that come block by block, for fp32 scores; queries are laid out once."""

    def __init__(self, queries: Tensor, k: int, count: int, largest: bool):
        self._queries = queries  # read until the last row has come
        q, d = queries.shape
        self._native = _C.Search(matrix(queries), q, count, d, min(k, count), largest)

    def add(self, blocks: Blocks, row_scale: Tensor | None, digits: int) -> None:
        """Rows and their factors [n]: one call, in which the threads stay awake."""
        parts = blocks.parts
        if row_scale is not None:
            address, dtype, stride, _ = matrix(row_scale.unsqueeze(-1))
            step = stride * row_scale.element_size()
            parts, first = [], 0
            for rows, _, count in blocks.parts:
                parts.append((rows, (address + first * step, dtype, stride, 1), count))
                first += count
        if blocks.encoded:
            self._native.add_encoded(parts, digits, torch.get_num_threads())
        else:
            self._native.add(parts, torch.get_num_threads())

    def best(self) -> tuple[Tensor, Tensor]:
        shape = (len(self._queries), self._native.found())
        values = torch.empty(shape, dtype=torch.float32, device="cpu")
        indices = torch.empty(shape, dtype=torch.int64, device="cpu")
        self._native.write(values.data_ptr(), indices.data_ptr(), torch.get_num_threads())
        return values, indices
