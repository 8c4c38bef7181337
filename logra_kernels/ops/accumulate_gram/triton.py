"""Triton kernel: one program for each pair of column tiles on or below the diagonal; each sum goes to both places."""

import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._device import device_of
from logra_kernels.ops._tile import OPTIONS, accumulator, block, dot_tile, fp32_precision, must_upcast


@triton.jit
def _accumulate_gram_kernel(
    g, out,
    N, D, stride_gn, stride_gd,
    ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[i,j] += sum_n g[n,i] g[n,j]"""
    below, beside = tl.program_id(0), tl.program_id(1)
    if beside > below:
        return
    i = below.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = beside.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = dot_tile(
        g + i * stride_gd, g + j * stride_gd, i < D, j < D, stride_gn, stride_gn, N,
        ACC, BLOCK_N, PRECISION, UPCAST,
    )  # fmt: skip
    if below == beside:
        # the hardware need not sum (i,j) and (j,i) in one order
        tile = tl.where(i[:, None] >= j[None, :], tile, tl.trans(tile))
    ok = (i < D)[:, None] & (j < D)[None, :]
    here = out + i[:, None] * D + j[None, :]
    tl.store(here, tl.load(here, mask=ok) + tile, mask=ok)
    if below != beside:
        mirror = out + j[None, :] * D + i[:, None]
        tl.store(mirror, tl.load(mirror, mask=ok) + tile, mask=ok)


def launch(g: Tensor, out: Tensor) -> None:
    n, d = g.shape
    if not d:
        return
    block_d = block(d, 64)
    tiles = triton.cdiv(d, block_d)
    with device_of(g):
        _accumulate_gram_kernel[tiles, tiles](
            g, out, n, d, *g.stride(),
            ACC=accumulator(g.dtype), BLOCK_D=block_d, BLOCK_N=block(n, 32 if g.element_size() > 2 else 64),
            PRECISION=fp32_precision(), UPCAST=must_upcast(g.dtype, g.dtype),
            num_warps=4, **OPTIONS,
        )  # fmt: skip
