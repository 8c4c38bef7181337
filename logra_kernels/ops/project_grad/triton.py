"""Triton kernel: both projections and the sum over positions in one pass.

The positions of a sample are cut into chunks, one program for each chunk and each tile of (k_out, k_in), so that one
long sample and many short ones both fill the chip; x and dy are read once for every tile, so exactly once for k up to
`Tile.block_k`. A sample of one chunk is written at once. The sums of several chunks go through memory, never more than
a sixteenth of what is read, and a second kernel adds them in order: same input, same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._device import capability_of, device_of, programs_of
from logra_kernels.ops._tile import (
    OPTIONS,
    accumulator,
    block,
    describable,
    descriptor,
    dot_tile,
    dot_tile_described,
    fp32_precision,
    in_dtype,
    must_upcast,
)
from logra_kernels.ops._tune import tile_for
from logra_kernels.ops.project_grad.chunks import cut, partials_of
from logra_kernels.ops.project_grad.configs import TILES, Tile, candidates, key_of

SAMPLES_AT_ONCE = 1024  # whose chunks are counted side by side where a program looks for its own


@triton.jit
def _chunk_of(
    offsets, chunk, N, T, stride_offset,
    CHUNK: tl.constexpr, MOST: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """(sample, first position, end, whether it is the sample's only chunk); the sample is N for a chunk too many.

    Samples of equal length T have cdiv(T, CHUNK) = MOST chunks each; ragged ones have their chunks one after the other.
    """
    if offsets is None:
        n = chunk // MOST
        first = (chunk % MOST) * CHUNK
        end = tl.minimum(first + CHUNK, T)
        only = MOST == 1
    else:
        total = tl.cast(0, tl.int64)
        before = tl.cast(0, tl.int64)
        n = tl.cast(0, tl.int64)
        for start in range(0, N, SPAN):
            s = start + tl.arange(0, SPAN).to(tl.int64)
            low = tl.load(offsets + s * stride_offset, mask=s < N, other=0).to(tl.int64)
            high = tl.load(offsets + (s + 1) * stride_offset, mask=s < N, other=0).to(tl.int64)
            ends = total + tl.cumsum((high - low + CHUNK - 1) // CHUNK, 0)
            passed = (ends <= chunk) & (s < N)
            n += tl.sum(passed.to(tl.int64), 0)
            before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
            total = tl.max(ends, 0)
        low = tl.load(offsets + n * stride_offset, mask=n < N, other=0).to(tl.int64)
        high = tl.load(offsets + (n + 1) * stride_offset, mask=n < N, other=0).to(tl.int64)
        first = low + (chunk - before) * CHUNK
        end = tl.minimum(first + CHUNK, high)
        only = high - low <= CHUNK
    return n, first, end, only


@triton.jit
def _projected(
    v, p, row, ok, stride_vt, stride_vd, stride_pk, stride_pd, k, k0, D, K,
    ACC: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, IN_P: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[T, K] = v p^T, or v itself where there is no p; zeros where not ok."""
    if DESCRIBED:
        tile = dot_tile_described(v, p, row, k0, ok.shape[0], k.shape[0], 0, D, ACC, BLOCK_D, PRECISION, UPCAST, IN_P)
        tile = tl.where(ok[:, None], tile, 0.0)  # a block of rows may run on into the next sample
    elif p is None:
        rows = v + (row + tl.arange(0, ok.shape[0])).to(tl.int64) * stride_vt
        there = ok[:, None] & (k < K)[None, :]
        tile = tl.load(rows[:, None] + (k * stride_vd)[None, :], mask=there, other=0.0).to(ACC)
    else:
        rows = v + (row + tl.arange(0, ok.shape[0])).to(tl.int64) * stride_vt
        tile = dot_tile(
            rows, p + k * stride_pk, ok, k < K, stride_vd, stride_pd, D, ACC, BLOCK_D, PRECISION, UPCAST, IN_P
        )
    return tile


@triton.jit
def _add_outer(acc, b, a, ACC: tl.constexpr, OUTER: tl.constexpr, UPCAST: tl.constexpr):
    """acc + b^T a; "bf16x2": both in two bf16 parts, which keep 16 bits, without the product of the small ones"""
    if OUTER == "bf16x2":
        b0 = in_dtype(b, tl.bfloat16, UPCAST)
        a0 = in_dtype(a, tl.bfloat16, UPCAST)
        b1 = in_dtype(b - b0.to(ACC), tl.bfloat16, UPCAST)
        a1 = in_dtype(a - a0.to(ACC), tl.bfloat16, UPCAST)
        acc = tl.dot(tl.trans(b0), a1, acc, out_dtype=ACC)
        acc = tl.dot(tl.trans(b1), a0, acc, out_dtype=ACC)
        acc = tl.dot(tl.trans(b0), a0, acc, out_dtype=ACC)
    else:
        acc = tl.dot(tl.trans(b), a, acc, input_precision=OUTER, out_dtype=ACC)
    return acc


@triton.jit
def _project_grad_kernel(
    x, dy, p_in, p_out, offsets, weights, g, partial,
    N, T, D_IN, D_OUT, K_IN, K_OUT,
    stride_xn, stride_xt, stride_xd, stride_yn, stride_yt, stride_yd, stride_wn, stride_wt, stride_offset,
    stride_ik, stride_id, stride_ok, stride_od,
    ACC: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, OUTER: tl.constexpr, UPCAST: tl.constexpr,
    X_IN_P: tl.constexpr, DY_IN_P: tl.constexpr, X_DESCRIBED: tl.constexpr, DY_DESCRIBED: tl.constexpr,
):  # fmt: skip
    """g[n] or partial[chunk] = sum_{t of the chunk} w[t] (p_out dy[t]) (p_in x[t])^T"""
    tiles_i = tl.cdiv(K_IN, BLOCK_I)
    tiles = tiles_i * tl.cdiv(K_OUT, BLOCK_O)  # a chunk's tiles are neighbours: they find its x and dy in L2
    chunk, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    o0, i0 = (tile // tiles_i) * BLOCK_O, (tile % tiles_i) * BLOCK_I
    o, i = (o0 + tl.arange(0, BLOCK_O)).to(tl.int64), (i0 + tl.arange(0, BLOCK_I)).to(tl.int64)
    n, first, end, only = _chunk_of(offsets, chunk, N, T, stride_offset, CHUNK, MOST, SPAN)
    if n >= N:
        return
    row = n * T if offsets is None else tl.cast(0, tl.int64)  # of the sample's position 0
    acc = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    for start in range(first, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        ok = t < end
        if weights is not None:
            w = tl.load(weights + n * stride_wn + t * stride_wt, mask=ok, other=0.0)
            ok = ok & (w != 0)  # what has no weight does not count, so that NaN there stays there
        if X_DESCRIBED:
            a = _projected(
                x, p_in, row + start, ok, 0, 0, 0, 0, i, i0, D_IN, K_IN,
                ACC, BLOCK_D, PRECISION, UPCAST, X_IN_P, True,
            )  # fmt: skip
        else:
            a = _projected(
                x + n * stride_xn, p_in, start, ok, stride_xt, stride_xd, stride_ik, stride_id, i, i0, D_IN, K_IN,
                ACC, BLOCK_D, PRECISION, UPCAST, X_IN_P, False,
            )  # fmt: skip
        if DY_DESCRIBED:
            b = _projected(
                dy, p_out, row + start, ok, 0, 0, 0, 0, o, o0, D_OUT, K_OUT,
                ACC, BLOCK_D, PRECISION, UPCAST, DY_IN_P, True,
            )  # fmt: skip
        else:
            b = _projected(
                dy + n * stride_yn, p_out, start, ok, stride_yt, stride_yd, stride_ok, stride_od, o, o0, D_OUT, K_OUT,
                ACC, BLOCK_D, PRECISION, UPCAST, DY_IN_P, False,
            )  # fmt: skip
        if weights is not None:
            b = b * w[:, None]
        acc = _add_outer(acc, b, a, ACC, OUTER, UPCAST)
    there = (o < K_OUT)[:, None] & (i < K_IN)[None, :]
    to = g + n * K_OUT * K_IN
    if not only:
        to = partial + chunk * K_OUT * K_IN
    tl.store(to + o[:, None] * K_IN + i[None, :], acc, mask=there)


@triton.jit
def _add_chunks_kernel(
    offsets, partial, g,
    N, T, SIZE, stride_offset,
    ACC: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g[n] = sum of the partial sums of n's chunks, in order; samples of exactly one chunk are there already"""
    runs = tl.cdiv(SIZE, BLOCK)
    n = tl.program_id(0).to(tl.int64) // runs
    if offsets is None:
        first = n * MOST
        count = tl.cast(MOST, tl.int64)
    else:
        first = tl.cast(0, tl.int64)
        for start in range(0, n, SPAN):
            s = start + tl.arange(0, SPAN).to(tl.int64)
            low = tl.load(offsets + s * stride_offset, mask=s < n, other=0).to(tl.int64)
            high = tl.load(offsets + (s + 1) * stride_offset, mask=s < n, other=0).to(tl.int64)
            first += tl.sum((high - low + CHUNK - 1) // CHUNK, 0)
        length = tl.load(offsets + (n + 1) * stride_offset).to(tl.int64) - tl.load(offsets + n * stride_offset)
        count = (length + CHUNK - 1) // CHUNK
    if count == 1:
        return
    e = (tl.program_id(0) % runs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, count, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        there = (c < count)[:, None] & (e < SIZE)[None, :]
        total += tl.sum(tl.load(partial + (first + c)[:, None] * SIZE + e[None, :], mask=there, other=0.0), 0)
    tl.store(g + n * SIZE + e, total, mask=e < SIZE)


def launch(
    x: Tensor, dy: Tensor, p_in: Tensor | None, p_out: Tensor | None, offsets: Tensor | None, weights: Tensor | None
) -> Tensor:
    n = x.shape[0] if offsets is None else offsets.shape[0] - 1
    k_in, k_out = (v.shape[-1] if p is None else p.shape[0] for p, v in ((p_in, x), (p_out, dy)))
    g = torch.empty((n, k_out, k_in), dtype=accumulator_dtype(dy.dtype), device=dy.device)
    if not g.numel():
        return g
    if not x.shape[-2]:
        return g.zero_()
    capability = capability_of(dy)

    def run(tile: Tile) -> None:
        launch_tile(x, dy, p_in, p_out, offsets, weights, g, tile, described=capability[0] >= 9)

    with device_of(dy):
        key = key_of(capability, dy.element_size(), max(k_in, k_out))
        run(tile_for("project_grad", TILES, key, candidates, run, triton.testing.do_bench))
    return g


def launch_tile(
    x: Tensor,
    dy: Tensor,
    p_in: Tensor | None,
    p_out: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
    g: Tensor,
    tile: Tile,
    *,
    described: bool,
    programs: int | None = None,
    most_partials: int | None = None,
) -> None:
    """Fill g by one tile of the table.

    Args:
        described: Let operands that can be come through tensor descriptors.
        programs: How many to aim at; by default twice the device's processors.
        most_partials: How many partial sums may be written; by default as many as are a sixteenth of what is read.
    """
    (n, k_out, k_in), t = g.shape, x.shape[-2]
    block_i, block_o = block(k_in, tile.block_k), block(k_out, tile.block_k)
    tiles = triton.cdiv(k_in, block_i) * triton.cdiv(k_out, block_o)
    programs, most_partials = programs or programs_of(dy), most_partials or partials_of(x, dy, g)
    block_t, chunk = cut(n, t, offsets is not None, tiles, tile.block_t, programs, most_partials)
    most = triton.cdiv(t, chunk)
    chunks = n * most if offsets is None else n + t // chunk
    partial = g if offsets is None and most == 1 else g.new_empty((chunks, k_out, k_in))
    precision, none = fp32_precision(), (0, 0)
    x_arg, in_arg = _operands(x, p_in, block_t, block_i, tile.block_d, described)
    dy_arg, out_arg = _operands(dy, p_out, block_t, block_o, tile.block_d, described)
    cuts = {
        "ACC": accumulator(dy.dtype),
        "CHUNK": chunk,
        "MOST": most if offsets is None else 1,
        "SPAN": 1 if offsets is None else block(n, SAMPLES_AT_ONCE),
    }
    _project_grad_kernel[chunks * tiles,](
        x_arg, dy_arg, in_arg, out_arg, offsets, weights, g, partial,
        n, t, x.shape[-1], dy.shape[-1], k_in, k_out,
        *_three(x), *_three(dy), *(none if weights is None else _three(weights.unsqueeze(-1))[:2]),
        0 if offsets is None else offsets.stride(0),
        *(none if p_in is None else p_in.stride()), *(none if p_out is None else p_out.stride()),
        **cuts, BLOCK_T=block_t, BLOCK_I=block_i, BLOCK_O=block_o, BLOCK_D=tile.block_d,
        PRECISION=precision, OUTER=_outer_precision(dy, p_out, precision),
        UPCAST=must_upcast(dy.dtype, dy.dtype),
        X_IN_P=p_in is not None and p_in.dtype != x.dtype, DY_IN_P=p_out is not None and p_out.dtype != dy.dtype,
        X_DESCRIBED=isinstance(x_arg, TensorDescriptor), DY_DESCRIBED=isinstance(dy_arg, TensorDescriptor),
        num_warps=tile.warps, **(OPTIONS | {"num_stages": tile.stages}),
    )  # fmt: skip
    if partial is not g:
        size = k_out * k_in
        _add_chunks_kernel[triton.cdiv(size, 256) * n,](
            offsets, partial, g, n, t, size, 0 if offsets is None else offsets.stride(0),
            **cuts, BLOCK_C=16, BLOCK=256, num_warps=4, **OPTIONS,
        )  # fmt: skip


def _outer_precision(dy: Tensor, p_out: Tensor | None, precision: str) -> str:
    """How projected positions are multiplied, which products of half operands have given."""
    if p_out is not None and p_out.element_size() == 2:
        return "bf16x2"
    return "tf32x3" if dy.element_size() == 2 else precision


def _operands(
    v: Tensor, p: Tensor | None, block_t: int, block_k: int, block_d: int, described: bool
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor | None]:
    """A side as the kernel takes it: through descriptors (TMA) where layout and dtype allow, else as pointers."""
    rows = v if v.dim() == 2 else v.flatten(0, 1) if _flat(v) else None
    if p is None or not described or rows is None or not (describable(rows) and describable(p)):
        return v, p
    return descriptor(rows, block_t, block_d), descriptor(p, block_k, block_d)


def _flat(v: Tensor) -> bool:
    """Whether [N, T, d] is [N * T, d] with one row stride."""
    return v.shape[0] == 1 or v.stride(0) == v.shape[1] * v.stride(1)


def _three(v: Tensor) -> tuple[int, ...]:
    """Strides by sample, position and feature; positions cut by offsets have no sample stride."""
    return v.stride() if v.dim() == 3 else (0, *v.stride())
