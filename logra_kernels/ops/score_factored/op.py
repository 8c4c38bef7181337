"""score_factored: every query against every row of a block whose rows are kept as factors.

S[q,n] = sum_l sum_c u_{n,l,c}^T Q_{q,l} v_{n,l,c}        [Q, N], fp32 (fp64 for fp64 input)
"""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype, check_tensors
from logra_kernels.ops._dispatch import LIB, launcher
from logra_kernels.ops._factored import Layers, check_factors, dense_dim, flat_sizes, pairs

LIB.define("score_factored(Tensor queries, Tensor factors, int[] sizes, int rank, str backend) -> Tensor")


def _launch(queries: Tensor, factors: Tensor, sizes: list[int], rank: int, backend: str) -> Tensor:
    return launcher("score_factored", factors.device.type, backend)(queries, factors, pairs(sizes), rank)


LIB.impl("score_factored", _launch, "CPU")
LIB.impl("score_factored", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::score_factored", lib=LIB)
def _fake(queries: Tensor, factors: Tensor, sizes: list[int], rank: int, backend: str) -> Tensor:
    return factors.new_empty((queries.shape[0], factors.shape[0]), dtype=accumulator_dtype(factors.dtype))


_op = torch.ops.logra_kernels.score_factored.default


def score_factored(queries: Tensor, factors: Tensor, layers: Layers, rank: int, *, backend: str = "auto") -> Tensor:
    """Score dense queries against factored rows; dense rows exist in cache or registers at the most.

    Args:
        queries: [Q, D], fp32 or of the factors' dtype; preconditioned already. D is the sum of k_out * k_in.
        factors: [N, F], fp32, bf16, fp16 or fp64, laid out as `factor_rows` does. Any strides.
        layers: (k_out, k_in) of each layer, in row order.
        rank: c, 1 to 8.
        backend: "auto", "cpp", "triton" or "reference"; an unavailable one raises RuntimeError.

    Returns:
        [Q, N] in fp32; fp64 for fp64 factors.

    Raises:
        ValueError: Sizes, dtypes or devices do not fit.
    """
    sizes = flat_sizes("score_factored", layers, rank)
    check_tensors("score_factored", queries=queries, factors=factors)
    check_factors("score_factored", factors, layers, rank)
    if queries.dim() != 2 or queries.shape[1] != dense_dim(layers):
        raise ValueError(
            f"score_factored: queries {tuple(queries.shape)} must be [Q, {dense_dim(layers)}], as long as dense rows"
        )
    if queries.dtype not in (factors.dtype, accumulator_dtype(factors.dtype)):
        raise ValueError(
            f"score_factored: queries are {queries.dtype}; for {factors.dtype} factors they must be"
            f" {accumulator_dtype(factors.dtype)} or of the factors' dtype"
        )
    return _op(queries, factors, sizes, rank, backend)
