"""The definition of score_block. Runs on any device and dtype; fp64 in, fp64 out."""

from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._queries import as_multiplied
from logra_kernels.ops.dequantize_rows.reference import dequantize_rows


def score_block(queries: Tensor, rows: Tensor) -> Tensor:
    dtype = accumulator_dtype(rows.dtype)
    return queries.to(dtype) @ rows.to(dtype).T


def launch_encoded(queries: Tensor, rows: EncodedRows, digits: int) -> Tensor:
    """Products in fp32; with 1 digit of queries rounded to int8."""
    return as_multiplied(queries, rows.format, digits).float() @ dequantize_rows(rows).T
