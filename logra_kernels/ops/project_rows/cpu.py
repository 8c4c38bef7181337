"""C++ launcher of project_rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from logra_kernels import _C
from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._native import matrix, positions


def launch(x: Tensor, p: Tensor) -> Tensor:
    n, t, d = x.shape
    out = torch.empty(n, t, p.shape[0], dtype=accumulator_dtype(x.dtype), device="cpu")
    _C.project_rows(positions(x), matrix(p), out.data_ptr(), n * t, d, p.shape[0], torch.get_num_threads())
    return out


def prepare(x: Tensor, p: Tensor, rounded: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """f(x): launch of contiguous x [N, T, d]; its result in dtype `rounded` where one is given."""
    (n, t, d), k = x.shape, p.shape[0]
    sums = accumulator_dtype(x.dtype)
    to_bf16 = rounded is torch.bfloat16 and sums is torch.float32
    native = _C.row_projector(positions(x), matrix(p), n * t, d, k, to_bf16)
    dtype, empty, threads = torch.bfloat16 if to_bf16 else sums, torch.empty, torch.get_num_threads

    given = rounded is None or rounded is dtype

    def project(x: Tensor, _held: Tensor = p) -> Tensor:
        a = empty(n, t, k, dtype=dtype, device="cpu")
        native(x.data_ptr(), a.data_ptr(), threads())
        return a if given else a.to(rounded)

    return project
