"""C++ launcher of dequantize_rows."""

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._native import encoded, row_major


def launch(rows: EncodedRows) -> Tensor:
    rows = row_major(rows)
    out = torch.empty(rows.shape, dtype=torch.float32, device="cpu")
    _C.dequantize_rows(encoded(rows), out.data_ptr(), *rows.shape, torch.get_num_threads())
    return out
