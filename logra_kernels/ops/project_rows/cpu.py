"""C++ launcher of project_rows."""

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._native import matrix, positions


def launch(x: Tensor, p: Tensor) -> Tensor:
    n, t, d = x.shape
    out = torch.empty(n, t, p.shape[0], dtype=accumulator_dtype(x.dtype))
    _C.project_rows(positions(x), matrix(p), out.data_ptr(), n * t, d, p.shape[0], torch.get_num_threads())
    return out
