"""Triton kernels: one program a scale, then one a run of a row's codes.

No multiply-add may be fused, as the codes are those of a product that was rounded; the sum of a sign's mean magnitude
has another order than the reference's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._codes import as_bytes
from logra_kernels.ops._device import device_of
from logra_kernels.ops._format import RowFormat

RUN = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _mix(x):
    """The 32-bit finaliser of MurmurHash3 (Appleby 2008)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _nearest(x):
    """The nearest integer, ties to even; |x| < 2^23."""
    size = ((tl.abs(x) + 8388608.0) - 8388608.0).to(tl.int32)
    return tl.where(x < 0, -size, size)


@triton.jit
def _scales_kernel(
    g, scales,
    D, COUNT, stride_gn, stride_gd, stride_s,
    BLOCK: tl.constexpr, RUN: tl.constexpr, MOST: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """scales[n,b] = max |g| / MOST or mean |g| over the block"""
    n, b = tl.program_id(0).to(tl.int64) // COUNT, tl.program_id(0) % COUNT  # a grid's second side ends at 65535
    count = tl.minimum(D - b * BLOCK, BLOCK)
    best = tl.zeros([RUN], tl.int32)  # magnitudes in the order of their bits, NaN above all
    total = tl.zeros([RUN], tl.float32)
    for start in range(0, count, RUN):
        d = start + tl.arange(0, RUN)
        at = g + n * stride_gn + (b * BLOCK + d).to(tl.int64) * stride_gd
        size = tl.abs(tl.load(at, mask=d < count, other=0.0).to(tl.float32))
        best = tl.maximum(best, size.to(tl.int32, bitcast=True))
        total += size
    if MEAN:
        scale = tl.div_rn(tl.sum(total, 0), count.to(tl.float32))
    else:
        scale = tl.div_rn(tl.max(best, 0).to(tl.float32, bitcast=True), MOST)
    scale = scale.to(scales.dtype.element_ty).to(tl.float32)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    scale = tl.where(scale == float("inf"), float("nan"), scale)
    tl.store(scales + n * stride_s + b, scale.to(scales.dtype.element_ty))


@triton.jit
def _codes_kernel(
    g, scales, codes,
    D, WIDTH, seed, first_row, stride_gn, stride_gd, stride_s,
    CODE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """codes[n,d] = g[n,d] / scales[n, d // BLOCK], rounded"""
    n = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * (RUN // EACH) + tl.arange(0, RUN // EACH)
    d = byte[:, None] * EACH + tl.arange(0, EACH)[None, :]
    ok = d < D
    x = tl.load(g + n * stride_gn + d.to(tl.int64) * stride_gd, mask=ok, other=0.0).to(tl.float32)
    scale = tl.load(scales + n * stride_s + d // BLOCK, mask=ok, other=0.0).to(tl.float32)
    usable = scale > 0
    y = tl.where(usable, x * tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    if STOCHASTIC:
        row = n + first_row
        hashed = _mix((row ^ (row >> 32)).to(tl.uint32) ^ seed.to(tl.uint32))
        chance = (_mix(hashed ^ d.to(tl.uint32)) >> 16).to(tl.int32)
    if CODE == 3:
        bits = y.to(tl.int32, bitcast=True)
        size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)
        small = tl.where(size < 0x3C800000, size, 0).to(tl.float32, bitcast=True)
        if STOCHASTIC:
            normal = size + (chance << 4)
            below = (_nearest(small * 33554432.0) + chance) >> 16
        else:
            normal = size + 0x7FFFF + ((size >> 20) & 1)
            below = _nearest(small * 512.0)
        field = tl.where(size < 0x3C800000, below, (normal >> 20) - (120 << 3))
        field = field | tl.where(bits < 0, 0x80, 0)
    elif CODE == 7:
        if STOCHASTIC:
            up = tl.maximum(tl.minimum(_nearest(y * 32768.0), 32768), -32768)
            field = ((up + 32768 + chance) >> 16 > 0).to(tl.int32)
        else:
            field = (y >= 0).to(tl.int32)
    else:
        MOST: tl.constexpr = 127 if CODE == 4 else (7 if CODE == 5 else 1)
        integer = (_nearest(y * 65536.0) + chance) >> 16 if STOCHASTIC else _nearest(y)
        integer = tl.maximum(tl.minimum(integer, MOST), -MOST)
        field = integer & 0xFF if CODE == 4 else integer + (8 if CODE == 5 else 2)
    field = tl.where(ok, field, 0) << ((d % EACH) * (8 // EACH))
    tl.store(codes + n * WIDTH + byte, tl.sum(field, 1).to(tl.uint8), mask=byte < WIDTH)


def launch(g: Tensor, form: RowFormat, rounding: str, seed: int, first_row: int) -> tuple[Tensor, Tensor]:
    n, d = g.shape
    codes = torch.empty((n, form.code_width(d)), dtype=form.code_dtype, device=g.device)
    scales = torch.empty((n, form.scale_width(d)), dtype=form.scale_dtype, device=g.device)
    if not codes.numel():
        return codes, scales
    stochastic = rounding == "stochastic"
    with device_of(g):
        _scales_kernel[n * scales.shape[1],](
            g, scales, d, scales.shape[1], *g.stride(), scales.stride(0),
            BLOCK=form.block, RUN=min(form.block or 0, RUN), MOST=form.most,
            MEAN=form.name == "sign" and not stochastic, **OPTIONS,
        )  # fmt: skip
        _codes_kernel[n, triton.cdiv(d, RUN)](
            g, scales, as_bytes(codes), d, codes.shape[1], _hash(seed), first_row, *g.stride(), scales.stride(0),
            CODE=form.code, EACH=8 // form.bits, BLOCK=form.block, RUN=RUN, STOCHASTIC=stochastic, **OPTIONS,
        )  # fmt: skip
    return codes, scales


def _hash(seed: int) -> int:
    """`_mix` of both halves' sum, on the host."""
    x = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
