"""score_topk: the k best rows for each query, without a [Q, N] matrix in memory.

    S[q,n] = row_scale[n] sum_d queries[q,d] rows[n,d];  values, indices = the k largest (or smallest) of S[q,:]

Order: by score, then by row number; NaN comes first whichever end is asked for, so that it is seen.
"""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype, check_tensors
from logra_kernels.ops._dispatch import LIB, launcher
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops.dequantize_rows import dequantize_rows
from logra_kernels.ops.score_block.op import check_scores

LIB.define(
    "score_topk(Tensor queries, Tensor rows, int k, Tensor? row_scale, bool largest, str backend) -> (Tensor, Tensor)"
)


def _launch(
    queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None, largest: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return launcher("score_topk", rows.device.type, backend)(queries, rows, k, row_scale, largest)


LIB.impl("score_topk", _launch, "CPU")
LIB.impl("score_topk", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::score_topk", lib=LIB)
def _fake(
    queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None, largest: bool, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], min(k, rows.shape[0]))
    return rows.new_empty(shape, dtype=accumulator_dtype(rows.dtype)), rows.new_empty(shape, dtype=torch.int64)


_op = torch.ops.logra_kernels.score_topk.default


def score_topk(
    queries: Tensor,
    rows: Tensor | EncodedRows,
    k: int,
    row_scale: Tensor | None = None,
    *,
    largest: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k rows that score highest (or lowest) for each query.

    Args:
        queries: [Q, D], fp32 or of the rows' dtype; preconditioned already.
        rows: [N, D], fp32, bf16, fp16 or fp64, any strides; or rows in a stored format.
        k: How many rows to keep, at least 1; min(k, N) are returned.
        row_scale: A factor for each row's score, [N], fp32 (fp64 for fp64 rows); l-RelatIF's 1/sqrt(self-influence).
        largest: False for the lowest scores, ascending.
        backend: "auto", "cpp", "triton" or "reference"; an unavailable one raises RuntimeError.

    Returns:
        values [Q, min(k, N)] in fp32 (fp64 for fp64 rows), best first, and row numbers of the same shape in int64.

    Raises:
        ValueError: Sizes, dtypes or devices do not fit, or k < 1.
    """
    if isinstance(rows, EncodedRows):
        rows = dequantize_rows(rows) if rows.format.scaled else rows.codes
    check_scores("score_topk", queries, rows)
    if k < 1:
        raise ValueError(f"score_topk: k is {k}; it must be at least 1")
    if row_scale is not None:
        check_tensors("score_topk", rows=rows, row_scale=row_scale)
        if row_scale.shape != rows.shape[:1] or row_scale.dtype != accumulator_dtype(rows.dtype):
            raise ValueError(
                f"score_topk: row_scale {tuple(row_scale.shape)} {row_scale.dtype} must be [{rows.shape[0]}]"
                f" {accumulator_dtype(rows.dtype)}"
            )
    return _op(queries, rows, k, row_scale, largest, backend)
