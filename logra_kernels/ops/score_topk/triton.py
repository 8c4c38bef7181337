"""Triton kernel scores a block of rows at a time; a stable sort merges each block into the best so far."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._tile import OPTIONS, accumulator, block, device_of, dot_tile, fp32_precision, must_upcast

SCORES_AT_ONCE = 1 << 21  # entries of the [Q, block] buffer, 8 MiB in fp32; merging takes a few times that
LEAST_BLOCK = 4096  # rows; shorter blocks leave most of the device idle


@triton.jit
def _scaled_score_kernel(
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


def _score(queries: Tensor, rows: Tensor, row_scale: Tensor | None) -> Tensor:
    (q, d), n = queries.shape, rows.shape[0]
    scores = torch.empty((q, n), dtype=accumulator_dtype(rows.dtype), device=rows.device)
    block_q, block_n = block(q, 64), block(n, 64)
    _scaled_score_kernel[triton.cdiv(n, block_n), triton.cdiv(q, block_q)](
        queries, rows, row_scale, scores, q, n, d, *queries.stride(), *rows.stride(),
        0 if row_scale is None else row_scale.stride(0),
        ACC=accumulator(rows.dtype), BLOCK_Q=block_q, BLOCK_N=block_n,
        BLOCK_D=block(d, 32 if queries.element_size() > 2 else 64),
        PRECISION=fp32_precision(), UPCAST=must_upcast(queries.dtype, rows.dtype),
        num_warps=4, **OPTIONS,
    )  # fmt: skip
    return scores


def launch(queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    q, n = queries.shape[0], rows.shape[0]
    values = torch.empty((q, 0), dtype=accumulator_dtype(rows.dtype), device=rows.device)
    index = torch.empty((q, 0), dtype=torch.int64, device=rows.device)
    if not q:
        return values.new_empty((0, min(k, n))), index.new_empty((0, min(k, n)))
    step = max(LEAST_BLOCK, SCORES_AT_ONCE // q)
    with device_of(rows):
        for start in range(0, n, step):
            span = slice(start, start + step)
            scores = _score(queries, rows[span], None if row_scale is None else row_scale[span])
            numbers = torch.arange(start, start + scores.shape[1], device=rows.device).expand(q, -1)
            values, index = _best(torch.cat([values, scores], 1), torch.cat([index, numbers], 1), k, largest)
    return values, index


def _best(scores: Tensor, numbers: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Columns stand in the order that decides between equal scores, which a stable sort keeps; NaN is greatest."""
    order = torch.sort(scores if largest else -scores, dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), numbers.gather(1, order)
