"""Triton launcher of score_factored: a tile of rows is rebuilt in registers and multiplied by a tile of queries."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._device import device_of
from logra_kernels.ops._factored import Layers, layer_table
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._tile import INTERPRETED, OPTIONS, accumulator, block, fp32_precision
from logra_kernels.ops.dequantize_rows.triton import launch as dequantize_rows


@triton.jit
def _score_factored_kernel(
    queries, factors, table, scores,
    Q, N, L, stride_qq, stride_qd, stride_fn, stride_ff,
    RANK: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores[q,n] = sum_l sum_c u_{n,l,c}^T Q_{q,l} v_{n,l,c}"""
    q = tl.program_id(1).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_Q, BLOCK_N], ACC)
    for layer in range(0, L):
        k_out, k_in = tl.load(table + layer * 4), tl.load(table + layer * 4 + 1)
        column, factor = tl.load(table + layer * 4 + 2), tl.load(table + layer * 4 + 3)
        for start in range(0, k_out * k_in, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            i = d // k_in
            j = d - i * k_in
            ok = d < k_out * k_in
            left = tl.load(
                queries + q[:, None] * stride_qq + (column + d)[None, :] * stride_qd,
                mask=(q < Q)[:, None] & ok[None, :], other=0.0,
            )  # fmt: skip
            rows = tl.zeros([BLOCK_D, BLOCK_N], ACC)
            mask = ok[:, None] & (n < N)[None, :]
            for c in tl.static_range(RANK):
                at = factors + n[None, :] * stride_fn
                u = tl.load(at + (factor + c * k_out + i)[:, None] * stride_ff, mask=mask, other=0.0)
                v = tl.load(at + (factor + RANK * k_out + c * k_in + j)[:, None] * stride_ff, mask=mask, other=0.0)
                rows += u.to(ACC) * v.to(ACC)
            acc = tl.dot(left.to(OPERAND), rows.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(scores + q[:, None] * N + n[None, :], acc, mask=(q < Q)[:, None] & (n < N)[None, :])


_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(queries: Tensor, factors: Tensor, layers: Layers, rank: int, align: int) -> Tensor:
    q, n = queries.shape[0], factors.shape[0]
    scores = torch.empty((q, n), dtype=accumulator_dtype(factors.dtype), device=factors.device)
    if not scores.numel():
        return scores
    block_q, block_n, acc = block(q, 64), block(n, 64), accumulator(factors.dtype)
    stages = OPTIONS["num_stages"] if rank * factors.element_size() <= 8 else 1  # of which shared memory has room
    with device_of(factors):
        _score_factored_kernel[triton.cdiv(n, block_n), triton.cdiv(q, block_q)](
            queries, factors, layer_table(tuple(layers), rank, factors.device, align), scores,
            q, n, len(layers), *queries.stride(), *factors.stride(),
            RANK=rank, ACC=acc, OPERAND=acc if INTERPRETED else _OPERANDS.get(queries.dtype, acc),
            BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=32, PRECISION=fp32_precision(),
            num_warps=4 if queries.element_size() == 2 else 8,  # four would spill registers
            **(OPTIONS | {"num_stages": stages}),
        )  # fmt: skip
    return scores


def launch_encoded(queries: Tensor, factors: EncodedRows, layers: Layers, rank: int, align: int) -> Tensor:
    """The factors are decoded beforehand."""
    return launch(queries.float(), dequantize_rows(factors), layers, rank, align)
