"""Triton kernel: both projections and the sum over positions in one pass, one program for each sample.

x and dy are each read once for every 128 x 128 tile of (k_out, k_in), so exactly once for k up to 128.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._tile import OPTIONS, accumulator, block, device_of, dot_tile, fp32_precision, must_upcast


@triton.jit
def _projected(
    v, p, ok, stride_vd, stride_pk, stride_pd, k, D, K,
    ACC: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[T, K] = v p^T, or v itself where there is no p; v [T] points at each position's first element."""
    if p is None:
        tile = tl.load(v[:, None] + (k * stride_vd)[None, :], mask=ok[:, None] & (k < K)[None, :], other=0.0).to(ACC)
    else:
        tile = dot_tile(v, p + k * stride_pk, ok, k < K, stride_vd, stride_pd, D, ACC, BLOCK_D, PRECISION, UPCAST)
    return tile


@triton.jit
def _project_grad_kernel(
    x, dy, p_in, p_out, offsets, weights, g,
    T, D_IN, D_OUT, K_IN, K_OUT,
    stride_xn, stride_xt, stride_xd, stride_yn, stride_yt, stride_yd, stride_wn, stride_wt, stride_offset,
    stride_ik, stride_id, stride_ok, stride_od,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, OUTER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """g[n] = sum_{t of n} w[t] (p_out dy[t]) (p_in x[t])^T"""
    tiles_i = tl.cdiv(K_IN, BLOCK_I)
    tiles = tiles_i * tl.cdiv(K_OUT, BLOCK_O)
    n, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    o = ((tile // tiles_i) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    i = ((tile % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    if offsets is None:
        start, end = tl.cast(0, tl.int64), tl.cast(T, tl.int64)
    else:
        start = tl.load(offsets + n * stride_offset).to(tl.int64)
        end = tl.load(offsets + (n + 1) * stride_offset).to(tl.int64)
    acc = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    for first in range(start, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T).to(tl.int64)
        ok = t < end
        if weights is not None:
            w = tl.load(weights + n * stride_wn + t * stride_wt, mask=ok, other=0.0)
            ok = ok & (w != 0)  # what has no weight is not even read, so that NaN there stays there
        x_rows, dy_rows = x + n * stride_xn + t * stride_xt, dy + n * stride_yn + t * stride_yt
        a = _projected(
            x_rows, p_in, ok, stride_xd, stride_ik, stride_id, i, D_IN, K_IN, ACC, BLOCK_D, PRECISION, UPCAST
        )
        b = _projected(
            dy_rows, p_out, ok, stride_yd, stride_ok, stride_od, o, D_OUT, K_OUT, ACC, BLOCK_D, PRECISION, UPCAST
        )
        if weights is not None:
            b = b * w[:, None]
        acc = tl.dot(tl.trans(b), a, acc, input_precision=OUTER, out_dtype=ACC)
    ok = (o < K_OUT)[:, None] & (i < K_IN)[None, :]
    tl.store(g + n * K_OUT * K_IN + o[:, None] * K_IN + i[None, :], acc, mask=ok)


def launch(
    x: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None, offsets: Tensor | None, weights: Tensor | None
) -> Tensor:
    n = x.shape[0] if offsets is None else offsets.shape[0] - 1
    d_in, d_out = x.shape[-1], dy.shape[-1]
    k_in, k_out = (d if p is None else p.shape[0] for p, d in ((p_in, d_in), (p_out, d_out)))
    g = torch.empty((n, k_out, k_in), dtype=accumulator_dtype(dy.dtype), device=dy.device)
    if not g.numel():
        return g
    size = dy.element_size()
    block_t, block_d, most = {2: (64, 64, 128), 4: (32, 32, 128), 8: (16, 16, 64)}[size]
    block_i, block_o = block(k_in, most), block(k_out, most)
    precision = fp32_precision()
    none = (0, 0)
    with device_of(dy):
        _project_grad_kernel[n * triton.cdiv(k_in, block_i) * triton.cdiv(k_out, block_o),](
            x, dy, p_in, p_out, offsets, weights, g, x.shape[-2], d_in, d_out, k_in, k_out,
            *_three(x), *_three(dy), *(none if weights is None else _three(weights.unsqueeze(-1))[:2]),
            0 if offsets is None else offsets.stride(0),
            *(none if p_in is None else p_in.stride()), *(none if p_out is None else p_out.stride()),
            ACC=accumulator(dy.dtype), BLOCK_T=block_t, BLOCK_I=block_i, BLOCK_O=block_o, BLOCK_D=block_d,
            # half operands give fp32 factors: three tf32 products keep their precision on the tensor cores
            PRECISION=precision, OUTER="tf32x3" if size == 2 else precision, UPCAST=must_upcast(dy.dtype, dy.dtype),
            num_warps=8 if block_i * block_o > 64 * 64 else 4, **OPTIONS,
        )  # fmt: skip
    return g


def _three(v: Tensor) -> tuple[int, ...]:
    """Strides by sample, position and feature; positions cut by offsets have no sample stride."""
    return v.stride() if v.dim() == 3 else (0, *v.stride())
