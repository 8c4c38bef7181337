"""Tensors as the native library takes them: an address, a dtype code and strides in elements."""

import torch
from torch import Tensor

from logra_kernels.ops._format import EncodedRows

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

Matrix = tuple[int, ...]  # address, dtype code, row stride, column stride
Encoded = tuple[int, ...]  # codes, scales, format code, whether scales are fp16, block, bytes and scales between rows
Positions = tuple[int, ...]  # address, dtype code, rows of a sample, strides of sample, row and column


def matrix(t: Tensor) -> Matrix:
    """A 2-D tensor."""
    return (t.data_ptr(), DTYPE_CODE[t.dtype], *t.stride())


def positions(t: Tensor) -> Positions:
    """[N, T, d], or [R, d] as one sample."""
    if t.dim() == 2:
        return (t.data_ptr(), DTYPE_CODE[t.dtype], t.shape[0], 0, *t.stride())
    return (t.data_ptr(), DTYPE_CODE[t.dtype], t.shape[1], *t.stride())


def encoded(rows: EncodedRows) -> Encoded:
    """Rows with scales, as `row_major` gives them."""
    codes, scales, form = rows.codes, rows.scales, rows.format
    assert scales is not None
    strides = codes.stride(0) * codes.element_size(), scales.stride(0)
    return (codes.data_ptr(), scales.data_ptr(), form.code, form.scale == "fp16", form.block or 0, *strides)


def row_major(rows: EncodedRows) -> EncodedRows:
    """The same rows; copied where a row's codes or scales are not neighbours in memory."""
    codes, scales = rows.codes, rows.scales
    if all(t is None or t.shape[1] <= 1 or t.stride(1) == 1 for t in (codes, scales)):
        return rows
    return EncodedRows(rows.format, rows.dim, codes.contiguous(), None if scales is None else scales.contiguous())
