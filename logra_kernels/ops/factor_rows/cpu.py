"""C++ launcher of factor_rows."""

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._factored import Layers, factored_dim
from logra_kernels.ops._native import matrix


def launch(rows: Tensor, layers: Layers, rank: int) -> Tensor:
    out = torch.empty(rows.shape[0], factored_dim(layers, rank), dtype=accumulator_dtype(rows.dtype), device="cpu")
    _C.factor_rows(matrix(rows), list(layers), rank, out.data_ptr(), rows.shape[0], torch.get_num_threads())
    return out
