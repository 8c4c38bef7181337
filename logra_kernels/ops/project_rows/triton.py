"""Triton kernel: rows times projection, a program for a tile of rows and columns.

The tiles of a row's columns are neighbours, which find its x in L2. They are as wide for any k: a factor's columns have
the same bits whatever it is stacked with.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._device import device_of
from logra_kernels.ops._tile import OPTIONS, accumulator, block, dot_tile, fp32_precision, must_upcast

BLOCK_K = 64


@triton.jit(do_not_specialize=["K"])
def _project_rows_kernel(
    x, p, a,
    R, T, D, K, stride_xn, stride_xt, stride_xd, stride_pk, stride_pd,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, IN_P: tl.constexpr,
):  # fmt: skip
    """a[r,k] = sum_d x[n,t,d] p[k,d] for row r = n T + t"""
    tiles = tl.cdiv(K, BLOCK_K)
    r = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = (tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    x_rows = x + (r // T) * stride_xn + (r % T) * stride_xt
    tile = dot_tile(
        x_rows, p + k * stride_pk, r < R, k < K, stride_xd, stride_pd, D, ACC, BLOCK_D, PRECISION, UPCAST, IN_P
    )
    tl.store(a + r[:, None] * K + k[None, :], tile, mask=(r < R)[:, None] & (k < K)[None, :])


def launch(x: Tensor, p: Tensor) -> Tensor:
    n, t, d = x.shape
    k = p.shape[0]
    a = torch.empty((n, t, k), dtype=accumulator_dtype(x.dtype), device=x.device)
    if not a.numel():
        return a
    wide = x.element_size() > 2
    block_r = block(n * t, 64)
    with device_of(x):
        _project_rows_kernel[triton.cdiv(n * t, block_r) * triton.cdiv(k, BLOCK_K),](
            x, p, a, n * t, t, d, k, *x.stride(), *p.stride(),
            ACC=accumulator(x.dtype), BLOCK_R=block_r, BLOCK_K=BLOCK_K, BLOCK_D=block(d, 32 if wide else 64),
            PRECISION=fp32_precision(), UPCAST=must_upcast(p.dtype, p.dtype), IN_P=x.dtype != p.dtype,
            num_warps=4, **OPTIONS,
        )  # fmt: skip
    return a
