"""Triton launcher of score_factored: a tile of rows is rebuilt in registers and multiplied by a tile of queries."""

from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._device import device_of
from logra_kernels.ops._factored import Layers, layer_table, parts
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._tile import INTERPRETED, OPTIONS, accumulator, block, fp32_precision
from logra_kernels.ops.dequantize_rows.triton import launch as dequantize_rows


@triton.jit
def _score_factored_kernel(
    queries, factors, table, scores,
    Q, N, L, stride_qq, stride_qd, stride_fn, stride_ff,
    RANK: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores[q,n] = sum_l sum_c u_{n,l,c}^T Q_{q,l} v_{n,l,c}"""
    q = tl.program_id(1).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_Q, BLOCK_N], ACC)
    for layer in range(0, L):
        k_out, k_in = tl.load(table + layer * 4), tl.load(table + layer * 4 + 1)
        column, factor = tl.load(table + layer * 4 + 2), tl.load(table + layer * 4 + 3)
        k_in, column = tl.multiple_of(k_in, ALIGN), tl.multiple_of(column, ALIGN)
        right = tl.multiple_of(factor + RANK * k_out, ALIGN)
        tiles = tl.cdiv(k_in, BLOCK_D)
        for step in range(0, k_out * tiles):
            i = step // tiles
            j = (step - i * tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
            ok = j < k_in
            left = tl.load(
                queries + q[:, None] * stride_qq + (column + i * k_in + j)[None, :] * stride_qd,
                mask=(q < Q)[:, None] & ok[None, :], other=0.0,
            )  # fmt: skip
            rows = tl.zeros([BLOCK_D, BLOCK_N], ACC)
            mask = ok[:, None] & (n < N)[None, :]
            for c in tl.static_range(RANK):
                at = factors + n[None, :] * stride_fn
                u = tl.load(at + (factor + c * k_out + i) * stride_ff, mask=(n < N)[None, :], other=0.0)
                v = tl.load(at + (right + c * k_in + j)[:, None] * stride_ff, mask=mask, other=0.0)
                rows += u.to(ACC) * v.to(ACC)
            acc = tl.dot(left.to(OPERAND), rows.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(scores + q[:, None] * N + n[None, :], acc, mask=(q < Q)[:, None] & (n < N)[None, :])


_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@cache
def _common_multiple(layers: tuple[tuple[int, int], ...], rank: int, align: int) -> int:
    """Of which power of 2 up to 16 every layer's width, first number and first factor is a multiple."""
    sizes = [k_in for _, k_in in layers]
    for dense, _, right in parts(layers, rank, align):
        sizes += [dense.start, right.start]
    return gcd(16, *sizes)


def launch(queries: Tensor, factors: Tensor, layers: Layers, rank: int, align: int) -> Tensor:
    q, n, layers = queries.shape[0], factors.shape[0], tuple(layers)
    scores = torch.empty((q, n), dtype=accumulator_dtype(factors.dtype), device=factors.device)
    if not scores.numel():
        return scores
    acc, wide = accumulator(factors.dtype), factors.element_size() == 8
    block_q, block_n = block(q, 64), block(n, 32 if wide else 64)
    stages = OPTIONS["num_stages"] if rank * factors.element_size() <= 8 else 1  # of which shared memory has room
    with device_of(factors):
        _score_factored_kernel[triton.cdiv(n, block_n), triton.cdiv(q, block_q)](
            queries, factors, layer_table(layers, rank, factors.device, align), scores,
            q, n, len(layers), *queries.stride(), *factors.stride(),
            RANK=rank, ALIGN=_common_multiple(layers, rank, align), ACC=acc,
            OPERAND=acc if INTERPRETED else _OPERANDS.get(queries.dtype, acc),
            BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=block(max((k_in for _, k_in in layers), default=0), 32),
            PRECISION=fp32_precision(),
            num_warps=4 if queries.element_size() == 2 else 8,  # four would spill registers
            **(OPTIONS | {"num_stages": stages}),
        )  # fmt: skip
    return scores


def launch_encoded(queries: Tensor, factors: EncodedRows, layers: Layers, rank: int, align: int) -> Tensor:
    """The factors are decoded beforehand."""
    return launch(queries.float(), dequantize_rows(factors), layers, rank, align)
