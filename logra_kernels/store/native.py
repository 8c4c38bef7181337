"""The C++ helpers of the store. Without them everything works, page by page and slower."""

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from logra_kernels.ops._native import DTYPE_CODE

READERS = 8  # threads that bring a file in; more than there are cores, since each waits for the disk


@cache
def _library() -> ModuleType | None:
    """The native library, loaded at its first use; None where it is not built."""
    try:
        from logra_kernels import _C
    except ImportError:
        return None
    return _C


def takes_rows(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether `take_rows` can be called."""
    plain = rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.stride(1) == 1
    return plain and dtype in (torch.float32, torch.bfloat16) and _library() is not None


def take_rows(rows: Tensor, out: Tensor) -> bool:
    """Copy fp32 rows [n, D] into contiguous fp32 or bf16; whether every number of it is finite. One pass of one thread:
    on all threads, they would wait for the one that the store's writer has displaced."""
    library = _library()
    assert library is not None
    return library.take_rows(rows.data_ptr(), rows.stride(0), out.data_ptr(), DTYPE_CODE[out.dtype], *rows.shape)


def gather(parts: Sequence[np.ndarray], out: np.ndarray) -> int:
    """Copy arrays of bytes one after the other; how many bytes they have. One call, because each that lets the
    interpreter go may have to wait for it afterwards."""
    library = _library()
    if library is not None:
        return library.gather([(part.ctypes.data, len(part)) for part in parts], out.ctypes.data, len(out))
    count = 0
    for part in parts:
        np.copyto(out[count : count + len(part)], part)
        count += len(part)
    return count


def populate(pages: np.ndarray) -> None:
    """Return once a mapped file's bytes are in memory and in the page table, in huge pages where there are any.

    Raises:
        OSError: The disk cannot read them.
    """
    library = _library()
    error = library.populate(pages.ctypes.data, len(pages), READERS) if library is not None else 0
    if error:
        raise OSError(error, os.strerror(error))


def resident(pages: np.ndarray) -> bool:
    """Whether a sample of a mapped file's bytes is in memory; taken for granted where nobody can tell."""
    library = _library()
    return library is None or library.resident(pages.ctypes.data, len(pages))


def let_go(pages: np.ndarray) -> None:
    """Take a mapped file's bytes out of the page table; they stay valid."""
    library = _library()
    if library is not None:
        library.let_go(pages.ctypes.data, len(pages))
