"""C++ launchers of score_block."""

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._native import encoded, matrix, row_major


def launch(queries: Tensor, rows: Tensor) -> Tensor:
    (q, d), n = queries.shape, rows.shape[0]
    out = torch.empty(q, n, dtype=accumulator_dtype(rows.dtype), device="cpu")
    _C.score_block(matrix(queries), matrix(rows), out.data_ptr(), q, n, d, torch.get_num_threads())
    return out


class Scorer:
    """Queries [Q, D] laid out once for any number of blocks of encoded rows; they must not change meanwhile."""

    def __init__(self, queries: Tensor):
        self._queries = queries  # read until the last block has come
        self._native = _C.Scorer(matrix(queries), *queries.shape)

    def score(self, rows: EncodedRows, digits: int, out: Tensor) -> None:
        """Write the scores of rows [n, D] to `out` [Q, n] fp32, whose rows are contiguous."""
        place = len(rows), out.data_ptr(), max(out.stride(0), len(rows))  # of one query it is of no account
        rows = row_major(rows)
        self._native.score(encoded(rows), *place, digits, torch.get_num_threads())


def launch_encoded(queries: Tensor, rows: EncodedRows, digits: int) -> Tensor:
    (q, d), n = queries.shape, len(rows)
    out = torch.empty(q, n, dtype=torch.float32, device="cpu")
    rows = row_major(rows)
    _C.score_block_encoded(matrix(queries), encoded(rows), out.data_ptr(), q, n, d, digits, torch.get_num_threads())
    return out
