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


def launch_encoded(queries: Tensor, rows: EncodedRows, digits: int) -> Tensor:
    (q, d), n = queries.shape, len(rows)
    out = torch.empty(q, n, dtype=torch.float32, device="cpu")
    rows = row_major(rows)
    _C.score_block_encoded(matrix(queries), encoded(rows), out.data_ptr(), q, n, d, digits, torch.get_num_threads())
    return out
