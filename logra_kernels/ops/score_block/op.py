"""score_block: every query against every row of a block.

S[q,n] = sum_d queries[q,d] rows[n,d]        [Q, N], fp32 (fp64 for fp64 input)
"""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype, check_tensors
from logra_kernels.ops._dispatch import LIB, launcher
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops.dequantize_rows import dequantize_rows

LIB.define("score_block(Tensor queries, Tensor rows, str backend) -> Tensor")


def _launch(queries: Tensor, rows: Tensor, backend: str) -> Tensor:
    return launcher("score_block", rows.device.type, backend)(queries, rows)


LIB.impl("score_block", _launch, "CPU")
LIB.impl("score_block", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::score_block", lib=LIB)
def _fake(queries: Tensor, rows: Tensor, backend: str) -> Tensor:
    return queries.new_empty((queries.shape[0], rows.shape[0]), dtype=accumulator_dtype(rows.dtype))


_op = torch.ops.logra_kernels.score_block.default


def check_scores(op: str, queries: Tensor, rows: Tensor) -> None:
    check_tensors(op, queries=queries, rows=rows)
    if queries.dim() != 2 or rows.dim() != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(f"{op}: queries {tuple(queries.shape)} and rows {tuple(rows.shape)} must be [Q, D] and [N, D]")
    if queries.dtype not in (rows.dtype, accumulator_dtype(rows.dtype)):
        raise ValueError(
            f"{op}: queries are {queries.dtype}; for {rows.dtype} rows they must be {accumulator_dtype(rows.dtype)}"
            " or of the rows' dtype"
        )


def score_block(queries: Tensor, rows: Tensor | EncodedRows, *, backend: str = "auto") -> Tensor:
    """Score queries against stored rows: a GEMM that converts the rows as it loads them.

    Args:
        queries: [Q, D], fp32 or of the rows' dtype; preconditioned already.
        rows: [N, D], fp32, bf16, fp16 or fp64, any strides; or rows in a stored format.
        backend: "auto", "cpp", "triton" or "reference"; an unavailable one raises RuntimeError.

    Returns:
        [Q, N] in fp32; fp64 for fp64 rows.

    Raises:
        ValueError: Sizes, dtypes or devices do not fit.
    """
    if isinstance(rows, EncodedRows):
        rows = dequantize_rows(rows) if rows.format.scaled else rows.codes
    check_scores("score_block", queries, rows)
    return _op(queries, rows, backend)
