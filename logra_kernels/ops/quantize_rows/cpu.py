"""C++ launcher of quantize_rows."""

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._format import RowFormat
from logra_kernels.ops._native import matrix


def launch(g: Tensor, form: RowFormat, rounding: str, seed: int, first_row: int) -> tuple[Tensor, Tensor]:
    n, d = g.shape
    codes = torch.empty(n, form.code_width(d), dtype=form.code_dtype, device="cpu")
    scales = torch.empty(n, form.scale_width(d), dtype=form.scale_dtype, device="cpu")
    _C.quantize_rows(
        matrix(g),
        codes.data_ptr(),
        scales.data_ptr(),
        n,
        d,
        form.code,
        form.scale == "fp16",
        form.block or 0,
        rounding == "stochastic",
        seed,
        first_row,
        torch.get_num_threads(),
    )
    return codes, scales
