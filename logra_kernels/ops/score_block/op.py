"""score_block: every query against every row of a block.

S[q,n] = sum_d queries[q,d] rows[n,d]        [Q, N], fp32 (fp64 for fp64 input)

Rows may be numbers in a tensor or codes with scales (`EncodedRows`), which are decoded on their way into the registers.
"""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype, check_tensors
from logra_kernels.ops._dispatch import LIB, launcher
from logra_kernels.ops._format import EncodedRows, RowFormat

QUERY_FORMATS = ("fp32", "int8")
# Bytes of a query's number where bytes are multiplied; 0: fp32 products. 1 rounds queries to int8 everywhere.
DIGITS = {"fp32": 0, None: 2, "int8": 1}

LIB.define("score_block(Tensor queries, Tensor rows, str backend) -> Tensor")


def _launch(queries: Tensor, rows: Tensor, backend: str) -> Tensor:
    return launcher("score_block", rows.device.type, backend)(queries, rows)


LIB.impl("score_block", _launch, "CPU")
LIB.impl("score_block", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::score_block", lib=LIB)
def _fake(queries: Tensor, rows: Tensor, backend: str) -> Tensor:
    return queries.new_empty((queries.shape[0], rows.shape[0]), dtype=accumulator_dtype(rows.dtype))


_op = torch.ops.logra_kernels.score_block.default

LIB.define(
    "score_block_encoded(Tensor queries, Tensor codes, Tensor scales, str format, int block, str scale,"
    " int digits, str backend) -> Tensor"
)


def _launch_encoded(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    block: int,
    scale: str,
    digits: int,
    backend: str,
) -> Tensor:
    rows = EncodedRows(RowFormat(format, block, scale), queries.shape[1], codes, scales)
    return launcher("score_block", codes.device.type, backend, "launch_encoded")(queries, rows, digits)


LIB.impl("score_block_encoded", _launch_encoded, "CPU")
LIB.impl("score_block_encoded", _launch_encoded, "CUDA")


@torch.library.register_fake("logra_kernels::score_block_encoded", lib=LIB)
def _fake_encoded(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    block: int,
    scale: str,
    digits: int,
    backend: str,
) -> Tensor:
    return queries.new_empty((queries.shape[0], codes.shape[0]), dtype=torch.float32)


_op_encoded = torch.ops.logra_kernels.score_block_encoded.default


def check_scores(op: str, queries: Tensor, rows: Tensor) -> None:
    check_tensors(op, queries=queries, rows=rows)
    if queries.dim() != 2 or rows.dim() != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(f"{op}: queries {tuple(queries.shape)} and rows {tuple(rows.shape)} must be [Q, D] and [N, D]")
    if queries.dtype not in (rows.dtype, accumulator_dtype(rows.dtype)):
        raise ValueError(
            f"{op}: queries are {queries.dtype}; for {rows.dtype} rows they must be {accumulator_dtype(rows.dtype)}"
            " or of the rows' dtype"
        )


def check_encoded(op: str, queries: Tensor, rows: EncodedRows, query_format: str | None) -> int:
    """One of DIGITS."""
    check_tensors(op, queries=queries)
    if queries.dim() != 2 or queries.shape[1] != rows.dim:
        raise ValueError(f"{op}: queries {tuple(queries.shape)} and rows {rows.shape} must be [Q, D] and [N, D]")
    if queries.device != rows.device:
        raise ValueError(f"{op}: queries are on {queries.device} and rows on {rows.device}; move one")
    if queries.dtype == torch.float64:
        raise ValueError(f"{op}: queries are fp64; for rows in {rows.format} they must be fp32, bf16 or fp16")
    if query_format not in DIGITS:
        raise ValueError(
            f"{op}: query_format is {query_format!r}; it must be None or one of {', '.join(QUERY_FORMATS)}"
        )
    return DIGITS[query_format]


def numbers_of(op: str, rows: Tensor | EncodedRows, query_format: str | None) -> Tensor | EncodedRows:
    """A tensor in place of encoded rows without scales."""
    plain = not isinstance(rows, EncodedRows) or not rows.format.scaled
    if plain and query_format is not None:
        raise ValueError(f"{op}: query_format {query_format!r} is for rows with scales; leave it out")
    return rows.codes if isinstance(rows, EncodedRows) and plain else rows


def score_block(
    queries: Tensor, rows: Tensor | EncodedRows, *, query_format: str | None = None, backend: str = "auto"
) -> Tensor:
    """Score queries against stored rows: a GEMM that converts the rows as it loads them.

    Args:
        queries: [Q, D], fp32 or of the rows' dtype; preconditioned already. For rows with scales fp32, bf16 or fp16.
        rows: [N, D], fp32, bf16, fp16 or fp64, any strides; or rows in a stored format.
        query_format: How queries enter the product with rows that have scales. None: a CPU with AVX2 or more may take
            them, beside int8, int4, int2 and sign rows in blocks of 128 numbers or more, in 16-bit fixed point: each
            number is rounded by at most 1/65000 of the largest one of those it shares a scale with in the rows, 512 at
            most; beside sign rows sums of four may be, by four times that at most. A score is off by at most
            sum_d max|q| |g_d| / 65000, in practice by 3e-5 of a score's standard deviation over rows, 100 times less
            than by int8 rows' own rounding. One that multiplies bf16 and bytes may take them, beside such fp8 rows, as
            bf16 numbers and what those leave, in bf16 again or, of more than 8 queries, in bytes: off by as little in
            practice and by sum_d max|q| (|g_d| + max|g|) / 65000 at most. "fp32": never coarser than fp32, half as
            fast there.
            "int8": rounded to int8 with scales as above on every device; the fastest where bytes are multiplied
            (VNNI), but for few queries beside sign rows. A score is off by 0.7 % of a standard deviation.
        backend: "auto", "cpp", "triton", "cuda" or "reference"; an unavailable one raises RuntimeError.

    Returns:
        [Q, N] in fp32; fp64 for fp64 rows.

    Raises:
        ValueError: Sizes, dtypes or devices do not fit.
    """
    rows = numbers_of("score_block", rows, query_format)
    if isinstance(rows, EncodedRows):
        digits = check_encoded("score_block", queries, rows, query_format)
        form = rows.format
        return _op_encoded(queries, rows.codes, rows.scales, form.name, form.block, form.scale, digits, backend)
    check_scores("score_block", queries, rows)
    return _op(queries, rows, backend)
