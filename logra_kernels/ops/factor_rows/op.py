"""factor_rows: the best approximation of each row's layers by a few factors.

    G[n,l] ~ sum_c u_c v_c^T,  c = 1..rank, of the least squared error        factors [N, F], fp32 (fp64 for fp64 input)

A factored row holds, layer by layer, u_1 .. u_rank [k_out] and then v_1 .. v_rank [k_in], largest singular value first;
u_c and v_c are as long as each other, sqrt(sigma_c), so that both keep their digits when they are quantised.
"""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype, check_tensors
from logra_kernels.ops._dispatch import LIB, launcher
from logra_kernels.ops._factored import Layers, dense_dim, factored_dim, flat_sizes, pairs

LIB.define("factor_rows(Tensor rows, int[] sizes, int rank, str backend) -> Tensor")


def _launch(rows: Tensor, sizes: list[int], rank: int, backend: str) -> Tensor:
    return launcher("factor_rows", rows.device.type, backend)(rows, pairs(sizes), rank)


LIB.impl("factor_rows", _launch, "CPU")
LIB.impl("factor_rows", _launch, "CUDA")


@torch.library.register_fake("logra_kernels::factor_rows", lib=LIB)
def _fake(rows: Tensor, sizes: list[int], rank: int, backend: str) -> Tensor:
    return rows.new_empty((rows.shape[0], factored_dim(pairs(sizes), rank)), dtype=accumulator_dtype(rows.dtype))


_op = torch.ops.logra_kernels.factor_rows.default


def factor_rows(rows: Tensor, layers: Layers, rank: int, *, backend: str = "auto") -> Tensor:
    """Factor stored rows: the truncated singular value decomposition of every layer's G [k_out, k_in].

    The kernels find it by a fixed number of steps of subspace iteration: the squared error of each layer is within
    0.2 % of the least one (that of `torch.linalg.svd`, which the reference uses).

    Args:
        rows: [N, D], fp32, bf16, fp16 or fp64. Any strides.
        layers: (k_out, k_in) of each layer, in row order; D is the sum of k_out * k_in.
        rank: c, 1 to 8. Factors beyond the rank of G are 0.
        backend: "auto", "cpp", "triton" or "reference"; an unavailable one raises RuntimeError.

    Returns:
        [N, F] in fp32 (fp64 for fp64 rows), F the sum of rank * (k_out + k_in). NaN for a layer that has a NaN or Inf.

    Raises:
        ValueError: Sizes or dtypes do not fit.
    """
    sizes = flat_sizes("factor_rows", layers, rank)
    check_tensors("factor_rows", rows=rows)
    if rows.dim() != 2 or rows.shape[1] != dense_dim(layers):
        raise ValueError(
            f"factor_rows: rows {tuple(rows.shape)} must be [N, {dense_dim(layers)}], as {len(layers)} layers fill them"
        )
    return _op(rows, sizes, rank, backend)
