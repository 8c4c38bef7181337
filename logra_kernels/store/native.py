"""The C++ helpers of the store. Without them everything works, page by page and slower."""

try:
    from logra_kernels import _C
except ImportError:  # not built here
    _C = None  # type: ignore[assignment]

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from logra_kernels.ops._native import DTYPE_CODE


def take_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool] | None:
    """(a copy of fp32 rows [n, D] in fp32 or bf16, whether every number of it is finite), in one pass of one thread;
    None for what must go another way. A pass on all threads would make them wait for the one that the store's writer
    has displaced."""
    if _C is None or rows.device.type != "cpu" or rows.dtype != torch.float32 or rows.stride(1) != 1:
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    out = torch.empty(rows.shape, dtype=dtype)
    return out, _C.take_rows(rows.data_ptr(), rows.stride(0), out.data_ptr(), DTYPE_CODE[dtype], *rows.shape)


def gather(parts: Sequence[np.ndarray], out: np.ndarray) -> int:
    """Copy arrays of bytes one after the other; how many bytes they have. One call, because each that lets the
    interpreter go may have to wait for it afterwards."""
    if _C is not None:
        return _C.gather([(part.ctypes.data, len(part)) for part in parts], out.ctypes.data, len(out))
    count = 0
    for part in parts:
        np.copyto(out[count : count + len(part)], part)
        count += len(part)
    return count
