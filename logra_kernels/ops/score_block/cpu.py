"""C++ launcher of score_block."""

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._native import matrix


def launch(queries: Tensor, rows: Tensor) -> Tensor:
    (q, d), n = queries.shape, rows.shape[0]
    out = torch.empty(q, n, dtype=accumulator_dtype(rows.dtype))
    _C.score_block(matrix(queries), matrix(rows), out.data_ptr(), q, n, d, torch.get_num_threads())
    return out
