"""The same numbers in memory layouts that kernels get wrong; what lies between and around them is NaN."""

import mmap

import torch
from torch import Tensor

NAN = float("nan")


def contiguous(t: Tensor) -> Tensor:
    return t


def wide(t: Tensor) -> Tensor:
    """A slice of a wider buffer."""
    buffer = t.new_full((*t.shape[:-1], t.shape[-1] + 5), NAN)
    view = buffer[..., 3 : 3 + t.shape[-1]]
    view.copy_(t)
    return view


def transposed(t: Tensor) -> Tensor:
    """The last two dimensions stored the other way round."""
    return t.mT.contiguous().mT


def every_other(t: Tensor) -> Tensor:
    """Stride 2 in the last dimension."""
    view = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), NAN)[..., ::2]
    view.copy_(t)
    return view


def unaligned(t: Tensor) -> Tensor:
    """Contiguous, from a base pointer that is aligned to one element only."""
    view = t.new_full((t.numel() + 1,), NAN)[1:].view(t.shape)
    view.copy_(t)
    return view


VIEWS = {view.__name__: view for view in (contiguous, wide, transposed, every_other, unaligned)}


def far_apart(t: Tensor) -> Tensor:
    """Rows 2^20 elements apart, so that 2,049 rows and more need 64-bit offsets; on a CPU, in memory barely touched."""
    rows, d = t.shape
    stride = 1 << 20
    size = (rows - 1) * stride + d
    if t.is_cuda:
        buffer = torch.zeros(size, dtype=t.dtype, device=t.device)
    else:
        memory = mmap.mmap(-1, size * t.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        buffer = torch.frombuffer(memory, dtype=t.dtype)
    view = buffer.as_strided((rows, d), (stride, 1))
    view.copy_(t)
    return view
