"""dequantize_rows: codes and scales back to numbers.

out[n,d] = scale[n, d // block] code[n,d]        [N, D], fp32
"""

import torch
from torch import Tensor

from logra_kernels.ops._dispatch import LIB, launcher
from logra_kernels.ops._format import EncodedRows, RowFormat

LIB.define(
    "dequantize_rows(Tensor codes, Tensor scales, int dim, str format, int block, str scale, str backend) -> Tensor"
)


def _launch(codes: Tensor, scales: Tensor, dim: int, format: str, block: int, scale: str, backend: str) -> Tensor:
    rows = EncodedRows(RowFormat(format, block, scale), dim, codes, scales)
    return launcher("dequantize_rows", codes.device.type, backend)(rows)


LIB.impl("dequantize_rows", _launch, "CPU")
LIB.impl("dequantize_rows", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::dequantize_rows", lib=LIB)
def _fake(codes: Tensor, scales: Tensor, dim: int, format: str, block: int, scale: str, backend: str) -> Tensor:
    return codes.new_empty((codes.shape[0], dim), dtype=torch.float32)


_op = torch.ops.logra_kernels.dequantize_rows.default


def dequantize_rows(rows: EncodedRows, *, backend: str = "auto") -> Tensor:
    """The numbers of rows in a stored format, [N, D] fp32.

    Args:
        rows: In any format, any strides.
        backend: "auto", "cpp", "triton" or "reference"; an unavailable one raises RuntimeError.
    """
    form = rows.format
    if form.block is None or form.scale is None or rows.scales is None:
        return rows.codes.float()
    return _op(rows.codes, rows.scales, rows.dim, form.name, form.block, form.scale, backend)
