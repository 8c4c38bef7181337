"""The definition of score_factored. Runs on any device and dtype; fp64 in, fp64 out."""

from torch import Tensor

from logra_kernels.ops._factored import Layers, rebuild_rows
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops.dequantize_rows.reference import dequantize_rows


def score_factored(queries: Tensor, factors: Tensor, layers: Layers, rank: int, align: int) -> Tensor:
    rows = rebuild_rows(factors, layers, rank, align=align)
    return queries.to(rows.dtype) @ rows.T


def launch_encoded(queries: Tensor, factors: EncodedRows, layers: Layers, rank: int, align: int) -> Tensor:
    """The factors are decoded beforehand."""
    return score_factored(queries.float(), dequantize_rows(factors), layers, rank, align)
