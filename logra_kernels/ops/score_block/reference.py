"""The definition of score_block. Runs on any device and dtype; fp64 in, fp64 out."""

from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype


def score_block(queries: Tensor, rows: Tensor) -> Tensor:
    dtype = accumulator_dtype(rows.dtype)
    return queries.to(dtype) @ rows.to(dtype).T
