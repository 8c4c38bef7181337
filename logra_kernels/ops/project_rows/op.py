"""project_rows: skinny projection of rows, used in forward so that only k numbers a position are kept.

A[n,t] = P x[n,t]        [N, T, k], fp32 (fp64 for fp64 input)
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype, check_factor, check_tensors
from logra_kernels.ops._dispatch import LIB, eager, is_native, launcher

LIB.define("project_rows(Tensor x, Tensor p, str backend) -> Tensor")


def _launch(x: Tensor, p: Tensor, backend: str) -> Tensor:
    return launcher("project_rows", x.device.type, backend)(x, p)


LIB.impl("project_rows", _launch, "CPU")
LIB.impl("project_rows", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::project_rows", lib=LIB)
def _fake(x: Tensor, p: Tensor, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], p.shape[0]), dtype=accumulator_dtype(x.dtype))


_op = torch.ops.logra_kernels.project_rows.default


ProjectRows = Callable[[Tensor], Tensor]


def row_projector(x: Tensor, p: Tensor, dtype: torch.dtype | None = None) -> ProjectRows | None:
    """`project_rows(x, p)` as a function of x, checked here for a layer's many batches.

    It takes plain CPU tensors of this dtype outside of autograd: x of this one's shape [N, T, d] and contiguous.

    Args:
        dtype: What the function's results are rounded to; by default they are as `project_rows` gives them.

    Returns:
        None where tensors on the CPU do not get the C++ implementation.

    Raises:
        ValueError: As `project_rows`.
    """
    _check(x, p)
    return launcher("project_rows", "cpu", "auto", "prepare")(x, p, dtype) if is_native("project_rows") else None


@cache
def columns_stand_alone(device: str) -> bool:
    """Whether a factor's columns have the same bits on a device type whatever the factor is stacked with.

    The C++ kernels keep to that for factors of more than 8 rows; torch's products, which the reference is made of, may
    be others for another k.
    """
    return launcher("project_rows", device, "auto").__module__ != "logra_kernels.ops.project_rows.reference"


def _check(x: Tensor, p: Tensor) -> None:
    check_tensors("project_rows", x=x, p=p)
    check_factor("project_rows", "x", x, "p", p)
    if x.dim() < 1 or p.dim() != 2 or x.shape[-1] != p.shape[1]:
        raise ValueError(f"project_rows: x {tuple(x.shape)} must be [..., d] and p {tuple(p.shape)} [k, d] with one d")


def project_rows(x: Tensor, p: Tensor, *, backend: str = "auto") -> Tensor:
    """Project every row of `x` by `p` (Choe et al. 2024, eq. 6: the encoder's half).

    Args:
        x: Rows, [..., d], any strides.
        p: Projection, [k, d]. Products are taken in its dtype: x's own, bf16 beside fp32 rows, which are rounded as
            they are read, or fp32 beside rows of 16 bits.
        backend: "auto", "cpp", "triton" or "reference"; an unavailable one raises RuntimeError.

    Returns:
        [..., k] in fp32; fp64 for fp64 input.

    Raises:
        ValueError: Sizes, dtypes or devices do not fit.
    """
    _check(x, p)
    call = _launch if eager(x) else _op
    if x.dim() == 3:
        return call(x, p, backend)
    if x.dim() == 2:
        return call(x.unsqueeze(0), p, backend).squeeze(0)
    rows = x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
    return call(rows, p, backend).reshape(*x.shape[:-1], p.shape[0])
