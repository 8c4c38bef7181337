"""Tensors as the native library takes them: an address, a dtype code and strides in elements."""

import torch
from torch import Tensor

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

Matrix = tuple[int, ...]  # address, dtype code, row stride, column stride
Positions = tuple[int, ...]  # address, dtype code, rows of a sample, strides of sample, row and column


def matrix(t: Tensor) -> Matrix:
    """A 2-D tensor."""
    return (t.data_ptr(), DTYPE_CODE[t.dtype], *t.stride())


def positions(t: Tensor) -> Positions:
    """[N, T, d], or [R, d] as one sample."""
    if t.dim() == 2:
        return (t.data_ptr(), DTYPE_CODE[t.dtype], t.shape[0], 0, *t.stride())
    return (t.data_ptr(), DTYPE_CODE[t.dtype], t.shape[1], *t.stride())
