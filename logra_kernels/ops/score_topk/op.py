"""score_topk: the k best rows for each query, without a [Q, N] matrix in memory.

    S[q,n] = row_scale[n] sum_d queries[q,d] rows[n,d];  values, indices = the k largest (or smallest) of S[q,:]

Order: by score, then by row number; NaN comes first whichever end is asked for, so that it is seen.
"""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype, check_tensors
from logra_kernels.ops._dispatch import LIB, launcher
from logra_kernels.ops._format import EncodedRows, RowFormat
from logra_kernels.ops.score_block.op import check_encoded, check_scores, numbers_of

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

LIB.define(
    "score_topk_encoded(Tensor queries, Tensor codes, Tensor scales, str format, int block, str scale, int k,"
    " Tensor? row_scale, bool largest, int digits, str backend) -> (Tensor, Tensor)"
)


def _launch_encoded(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    block: int,
    scale: str,
    k: int,
    row_scale: Tensor | None,
    largest: bool,
    digits: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = EncodedRows(RowFormat(format, block, scale), queries.shape[1], codes, scales)
    launch = launcher("score_topk", codes.device.type, backend, "launch_encoded")
    return launch(queries, rows, k, row_scale, largest, digits)


LIB.impl("score_topk_encoded", _launch_encoded, "CPU")
LIB.impl("score_topk_encoded", _launch_encoded, "CUDA")


@torch.library.register_fake("logra_kernels::score_topk_encoded", lib=LIB)
def _fake_encoded(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    block: int,
    scale: str,
    k: int,
    row_scale: Tensor | None,
    largest: bool,
    digits: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], min(k, codes.shape[0]))
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


_op_encoded = torch.ops.logra_kernels.score_topk_encoded.default


def check_topk(
    queries: Tensor, rows: Tensor | EncodedRows, k: int, row_scale: Tensor | None, query_format: str | None
) -> int:
    """One of DIGITS."""
    digits = 0
    if isinstance(rows, EncodedRows):
        digits = check_encoded("score_topk", queries, rows, query_format)
    else:
        check_scores("score_topk", queries, rows)
    if k < 1:
        raise ValueError(f"score_topk: k is {k}; it must be at least 1")
    if row_scale is not None:
        numbers = rows.scales if isinstance(rows, EncodedRows) else rows
        dtype = torch.float32 if isinstance(rows, EncodedRows) else accumulator_dtype(rows.dtype)
        check_tensors("score_topk", rows=numbers, row_scale=row_scale)
        if row_scale.shape != rows.shape[:1] or row_scale.dtype != dtype:
            raise ValueError(
                f"score_topk: row_scale {tuple(row_scale.shape)} {row_scale.dtype} must be [{rows.shape[0]}] {dtype}"
            )
    return digits


def score_topk(
    queries: Tensor,
    rows: Tensor | EncodedRows,
    k: int,
    row_scale: Tensor | None = None,
    *,
    largest: bool = True,
    query_format: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k rows that score highest (or lowest) for each query.

    Args:
        queries: [Q, D], fp32 or of the rows' dtype; preconditioned already. As in `score_block` for rows with scales.
        rows: [N, D], fp32, bf16, fp16 or fp64, any strides; or rows in a stored format.
        k: How many rows to keep, at least 1; min(k, N) are returned.
        row_scale: A factor for each row's score, [N], fp32 (fp64 for fp64 rows); l-RelatIF's 1/sqrt(self-influence).
        largest: False for the lowest scores, ascending.
        query_format: As in `score_block`.
        backend: "auto", "cpp", "triton", "cuda" or "reference"; an unavailable one raises RuntimeError.

    Returns:
        values [Q, min(k, N)] in fp32 (fp64 for fp64 rows), best first, and row numbers of the same shape in int64.

    Raises:
        ValueError: Sizes, dtypes or devices do not fit, or k < 1.
    """
    rows = numbers_of("score_topk", rows, query_format)
    digits = check_topk(queries, rows, k, row_scale, query_format)
    if isinstance(rows, EncodedRows):
        form = rows.format
        encoded = rows.codes, rows.scales, form.name, form.block, form.scale
        return _op_encoded(queries, *encoded, k, row_scale, largest, digits, backend)
    return _op(queries, rows, k, row_scale, largest, backend)
