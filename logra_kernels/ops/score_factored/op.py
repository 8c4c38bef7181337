"""score_factored: every query against every row of a block whose rows are kept as factors.

S[q,n] = sum_l sum_c u_{n,l,c}^T Q_{q,l} v_{n,l,c}        [Q, N], fp32 (fp64 for fp64 input)
"""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype, check_tensors
from logra_kernels.ops._dispatch import LIB, launcher
from logra_kernels.ops._factored import Layers, check_factors, dense_dim, factored_dim, flat_sizes, pairs
from logra_kernels.ops._format import EncodedRows, RowFormat

LIB.define("score_factored(Tensor queries, Tensor factors, int[] sizes, int rank, int align, str backend) -> Tensor")


def _launch(queries: Tensor, factors: Tensor, sizes: list[int], rank: int, align: int, backend: str) -> Tensor:
    return launcher("score_factored", factors.device.type, backend)(queries, factors, pairs(sizes), rank, align)


LIB.impl("score_factored", _launch, "CPU")
LIB.impl("score_factored", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::score_factored", lib=LIB)
def _fake(queries: Tensor, factors: Tensor, sizes: list[int], rank: int, align: int, backend: str) -> Tensor:
    return factors.new_empty((queries.shape[0], factors.shape[0]), dtype=accumulator_dtype(factors.dtype))


_op = torch.ops.logra_kernels.score_factored.default

LIB.define(
    "score_factored_encoded(Tensor queries, Tensor codes, Tensor scales, str format, int block, str scale,"
    " int[] sizes, int rank, int align, str backend) -> Tensor"
)


def _launch_encoded(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    block: int,
    scale: str,
    sizes: list[int],
    rank: int,
    align: int,
    backend: str,
) -> Tensor:
    layers = pairs(sizes)
    factors = EncodedRows(RowFormat(format, block, scale), factored_dim(layers, rank, align), codes, scales)
    return launcher("score_factored", codes.device.type, backend, "launch_encoded")(
        queries, factors, layers, rank, align
    )


LIB.impl("score_factored_encoded", _launch_encoded, "CPU")
LIB.impl("score_factored_encoded", _launch_encoded, "CUDA")


@torch.library.register_fake("logra_kernels::score_factored_encoded", lib=LIB)
def _fake_encoded(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    block: int,
    scale: str,
    sizes: list[int],
    rank: int,
    align: int,
    backend: str,
) -> Tensor:
    return queries.new_empty((queries.shape[0], codes.shape[0]), dtype=torch.float32)


_op_encoded = torch.ops.logra_kernels.score_factored_encoded.default


def score_factored(
    queries: Tensor,
    factors: Tensor | EncodedRows,
    layers: Layers,
    rank: int,
    *,
    align: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Score dense queries against factored rows; dense rows exist in cache or registers at the most.

    Args:
        queries: [Q, D], fp32 or of the factors' dtype, fp32, bf16 or fp16 for factors with scales; preconditioned
            already. D is the sum of k_out * k_in.
        factors: [N, F], fp32, bf16, fp16 or fp64, laid out as `factor_rows` does, any strides; or in a stored format.
        layers: (k_out, k_in) of each layer, in row order.
        rank: c, 1 to 8.
        align: Each layer's factors begin at a multiple of it; what is between them is not looked at.
        backend: "auto", "cpp", "triton" or "reference"; an unavailable one raises RuntimeError.

    Returns:
        [Q, N] in fp32; fp64 for fp64 factors.

    Raises:
        ValueError: Sizes, dtypes or devices do not fit.
    """
    sizes = flat_sizes("score_factored", layers, rank, align)
    if isinstance(factors, EncodedRows) and not factors.format.scaled:
        factors = factors.codes
    check_tensors("score_factored", queries=queries)
    if isinstance(factors, EncodedRows):
        if queries.device != factors.device:
            raise ValueError(
                f"score_factored: queries are on {queries.device} and factors on {factors.device}; move one"
            )
    else:
        check_tensors("score_factored", queries=queries, factors=factors)
    check_factors("score_factored", factors, layers, rank, align)
    if queries.dim() != 2 or queries.shape[1] != dense_dim(layers):
        raise ValueError(
            f"score_factored: queries {tuple(queries.shape)} must be [Q, {dense_dim(layers)}], as long as dense rows"
        )
    if isinstance(factors, EncodedRows):
        if queries.dtype == torch.float64:
            raise ValueError(
                f"score_factored: queries are fp64; for factors in {factors.format} they must be fp32, bf16 or fp16"
            )
        form = factors.format
        encoded = factors.codes, factors.scales, form.name, form.block, form.scale
        return _op_encoded(queries, *encoded, sizes, rank, align, backend)
    if queries.dtype not in (factors.dtype, accumulator_dtype(factors.dtype)):
        raise ValueError(
            f"score_factored: queries are {queries.dtype}; for {factors.dtype} factors they must be"
            f" {accumulator_dtype(factors.dtype)} or of the factors' dtype"
        )
    return _op(queries, factors, sizes, rank, align, backend)
