"""C++ launcher of score_factored."""

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._factored import Layers
from logra_kernels.ops._native import matrix


def launch(queries: Tensor, factors: Tensor, layers: Layers, rank: int) -> Tensor:
    q, n = queries.shape[0], factors.shape[0]
    out = torch.empty(q, n, dtype=accumulator_dtype(factors.dtype))
    _C.score_factored(
        matrix(queries), matrix(factors), list(layers), rank, out.data_ptr(), q, n, torch.get_num_threads()
    )
    return out
