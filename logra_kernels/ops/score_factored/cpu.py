"""C++ launcher of score_factored."""

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._factored import Layers
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._native import encoded, matrix, row_major


def launch(queries: Tensor, factors: Tensor, layers: Layers, rank: int, align: int) -> Tensor:
    q, n = queries.shape[0], factors.shape[0]
    out = torch.empty(q, n, dtype=accumulator_dtype(factors.dtype), device="cpu")
    _C.score_factored(
        matrix(queries), matrix(factors), list(layers), rank, align, out.data_ptr(), q, n, torch.get_num_threads()
    )
    return out


def launch_encoded(queries: Tensor, factors: EncodedRows, layers: Layers, rank: int, align: int) -> Tensor:
    q, n = queries.shape[0], len(factors)
    out = torch.empty(q, n, dtype=torch.float32, device="cpu")
    factors = row_major(factors)
    _C.score_factored_encoded(
        matrix(queries), encoded(factors), list(layers), rank, align, out.data_ptr(), q, n, torch.get_num_threads()
    )
    return out
