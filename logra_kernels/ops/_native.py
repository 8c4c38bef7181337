"""Tensors as the native library takes them: an address, a dtype code and strides in elements."""

import torch
from torch import Tensor

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

Matrix = tuple[int, int, int, int]
Positions = tuple[int, int, int, int, int, int]


def matrix(t: Tensor) -> Matrix:
    """A 2-D tensor: address, dtype, row stride, column stride."""
    return (t.data_ptr(), DTYPE_CODE[t.dtype], *t.stride())


def positions(t: Tensor) -> Positions:
    """Rows cut into samples [N, T, d], or not [R, d]: address, dtype, rows of a sample, and the strides of N, T and d."""
    if t.dim() == 2:
        return (t.data_ptr(), DTYPE_CODE[t.dtype], t.shape[0], 0, *t.stride())
    return (t.data_ptr(), DTYPE_CODE[t.dtype], t.shape[1], *t.stride())
