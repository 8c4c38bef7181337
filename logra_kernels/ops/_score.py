"""The Triton kernel that score_block and score_topk share: a tile of queries against a tile of rows.

The rows are converted as they are loaded, and each row's scores are scaled as they leave.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._tile import OPTIONS, accumulator, block, device_of, dot_tile, fp32_precision, must_upcast


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
