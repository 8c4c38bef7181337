"""The Triton kernels that score_block and score_topk share: a tile of queries against a tile of rows.

The rows are converted as they are loaded, and each row's scores are scaled as they leave.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._codes import as_bytes, field_of, integer_of, number_of
from logra_kernels.ops._device import device_of
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._tile import INTERPRETED, OPTIONS, accumulator, block, dot_tile, fp32_precision, must_upcast


@triton.jit
def _score_kernel(
    queries, rows, row_scale, scores,
    Q, N, D, stride_qq, stride_qd, stride_rn, stride_rd, stride_s,
    ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scores[q,n] = row_scale[n] sum_d queries[q,d] rows[n,d]"""
    q = tl.program_id(1).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = dot_tile(
        queries + q * stride_qq, rows + n * stride_rn, q < Q, n < N, stride_qd, stride_rd, D,
        ACC, BLOCK_D, PRECISION, UPCAST,
    )  # fmt: skip
    if row_scale is not None:
        tile = tile * tl.load(row_scale + n * stride_s, mask=n < N, other=0.0)[None, :]
    tl.store(scores + q[:, None] * N + n[None, :], tile, mask=(q < Q)[:, None] & (n < N)[None, :])


@triton.jit
def _score_encoded_kernel(
    queries, codes, scales, row_scale, scores,
    Q, N, D, stride_qq, stride_qd, stride_cn, stride_cd, stride_sn, stride_sd, stride_s,
    CODE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, BF16: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores[q,n] = row_scale[n] sum_d queries[q,d] scales[n, d // BLOCK] codes[n,d]

    A step lies within one block, so that the codes, exact in bf16, are multiplied first and scaled in fp32.
    """
    q = tl.program_id(1).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        step = d.to(tl.int64)
        ok = d < D
        left = tl.load(
            queries + (q * stride_qq)[:, None] + (step * stride_qd)[None, :],
            mask=(q < Q)[:, None] & ok[None, :], other=0.0,
        )  # fmt: skip
        byte = tl.load(
            codes + (n * stride_cn)[None, :] + (step // EACH * stride_cd)[:, None],
            mask=(n < N)[None, :] & ok[:, None], other=0,
        )  # fmt: skip
        scale = tl.load(scales + n * stride_sn + start // BLOCK * stride_sd, mask=n < N, other=0.0).to(tl.float32)
        number = number_of(field_of(byte, d[:, None], CODE), CODE)
        if BF16:
            product = tl.dot(left, number.to(tl.bfloat16), out_dtype=tl.float32)
        else:
            product = tl.dot(left.to(tl.float32), number, input_precision=PRECISION, out_dtype=tl.float32)
        acc += product * scale[None, :]
    if row_scale is not None:
        acc = acc * tl.load(row_scale + n * stride_s, mask=n < N, other=0.0)[None, :]
    tl.store(scores + q[:, None] * N + n[None, :], acc, mask=(q < Q)[:, None] & (n < N)[None, :])


@triton.jit
def _score_int8_kernel(
    queries, query_scales, codes, scales, row_scale, scores,
    Q, N, D, stride_qq, stride_qs, stride_cn, stride_cd, stride_sn, stride_sd, stride_s,
    CODE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scores[q,n] = row_scale[n] sum_d query_scales[q, d // SPAN] queries[q,d] scales[n, d // BLOCK] codes[n,d]

    A span lies within one block of the rows, so that its bytes add up as integers and are scaled once.
    """
    q = tl.program_id(1).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for first in range(0, D, SPAN):
        whole = tl.zeros([BLOCK_Q, BLOCK_N], tl.int32)
        for start in range(0, SPAN, BLOCK_D):
            d = first + start + tl.arange(0, BLOCK_D)
            step = d.to(tl.int64)
            ok = d < D
            left = tl.load(
                queries + (q * stride_qq)[:, None] + step[None, :], mask=(q < Q)[:, None] & ok[None, :], other=0
            )
            byte = tl.load(
                codes + (n * stride_cn)[None, :] + (step // EACH * stride_cd)[:, None],
                mask=(n < N)[None, :] & ok[:, None], other=0,
            )  # fmt: skip
            right = integer_of(field_of(byte, d[:, None], CODE), CODE)
            whole = tl.dot(left, right, whole, out_dtype=tl.int32)
        left_scale = tl.load(query_scales + q * stride_qs + first // SPAN, mask=q < Q, other=0.0)
        scale = tl.load(scales + n * stride_sn + first // BLOCK * stride_sd, mask=n < N, other=0.0).to(tl.float32)
        acc += whole.to(tl.float32) * left_scale[:, None] * scale[None, :]
    if row_scale is not None:
        acc = acc * tl.load(row_scale + n * stride_s, mask=n < N, other=0.0)[None, :]
    tl.store(scores + q[:, None] * N + n[None, :], acc, mask=(q < Q)[:, None] & (n < N)[None, :])


def score_encoded(queries: Tensor | EncodedRows, rows: EncodedRows, row_scale: Tensor | None = None) -> Tensor:
    """[Q, N] scores of rows with scales, on their device; queries are numbers or, beside whole codes, in int8."""
    if isinstance(queries, EncodedRows):
        return _score_int8(queries, rows, row_scale)
    (q, d), n, form = queries.shape, len(rows), rows.format
    scores = torch.empty((q, n), dtype=torch.float32, device=rows.device)
    if not scores.numel() or rows.scales is None:
        return scores
    block_q, block_n = block(q, 64), block(n, 64)
    with device_of(rows.codes):
        _score_encoded_kernel[triton.cdiv(n, block_n), triton.cdiv(q, block_q)](
            queries, as_bytes(rows.codes), rows.scales, row_scale, scores, q, n, d,
            *queries.stride(), *rows.codes.stride(), *rows.scales.stride(),
            0 if row_scale is None else row_scale.stride(0),
            CODE=form.code, EACH=8 // form.bits, BLOCK=form.block,
            BF16=queries.dtype == torch.bfloat16 and not INTERPRETED,
            BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=32 if queries.element_size() > 2 else min(form.block or 64, 64),
            # codes are exact in tf32: three products keep the queries' 22 leading bits on the tensor cores
            PRECISION="tf32x3" if fp32_precision() == "ieee" else fp32_precision(), num_warps=4, **OPTIONS,
        )  # fmt: skip
    return scores


def _score_int8(queries: EncodedRows, rows: EncodedRows, row_scale: Tensor | None) -> Tensor:
    (q, d), n, form = queries.shape, len(rows), rows.format
    scores = torch.empty((q, n), dtype=torch.float32, device=rows.device)
    span = queries.format.block
    if not scores.numel() or rows.scales is None or queries.scales is None or span is None:
        return scores
    block_q, block_n = block(q, 64), block(n, 128)
    with device_of(rows.codes):
        _score_int8_kernel[triton.cdiv(n, block_n), triton.cdiv(q, block_q)](
            queries.codes, queries.scales, as_bytes(rows.codes), rows.scales, row_scale, scores, q, n, d,
            queries.codes.stride(0), queries.scales.stride(0), *rows.codes.stride(), *rows.scales.stride(),
            0 if row_scale is None else row_scale.stride(0),
            CODE=form.code, EACH=8 // form.bits, BLOCK=form.block, SPAN=span,
            BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=min(span, 128), num_warps=4, **OPTIONS,
        )  # fmt: skip
    return scores


def score(queries: Tensor, rows: Tensor, row_scale: Tensor | None = None) -> Tensor:
    """[Q, N] scores on the rows' device."""
    (q, d), n = queries.shape, rows.shape[0]
    scores = torch.empty((q, n), dtype=accumulator_dtype(rows.dtype), device=rows.device)
    if not scores.numel():
        return scores
    block_q, block_n = block(q, 64), block(n, 64)
    with device_of(rows):
        _score_kernel[triton.cdiv(n, block_n), triton.cdiv(q, block_q)](
            queries, rows, row_scale, scores, q, n, d, *queries.stride(), *rows.stride(),
            0 if row_scale is None else row_scale.stride(0),
            ACC=accumulator(rows.dtype), BLOCK_Q=block_q, BLOCK_N=block_n,
            BLOCK_D=block(d, 32 if queries.element_size() > 2 else 64),
            PRECISION=fp32_precision(), UPCAST=must_upcast(queries.dtype, rows.dtype),
            num_warps=4, **OPTIONS,
        )  # fmt: skip
    return scores
