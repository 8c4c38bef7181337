"""The definition of score_topk. Runs on any device and dtype; fp64 in, fp64 out."""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._queries import as_multiplied
from logra_kernels.ops.dequantize_rows.reference import dequantize_rows


def score_topk(
    queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None = None, largest: bool = True
) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(rows.dtype)
    return _best(queries.to(dtype) @ rows.to(dtype).T, k, row_scale, largest)


def launch_encoded(
    queries: Tensor, rows: EncodedRows, k: int, row_scale: Tensor | None, largest: bool, digits: int
) -> tuple[Tensor, Tensor]:
    """Products in fp32; with 1 digit of queries rounded to int8."""
    queries = as_multiplied(queries, rows.format, digits)
    return _best(queries.float() @ dequantize_rows(rows).T, k, row_scale, largest)


def _best(scores: Tensor, k: int, row_scale: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    if row_scale is not None:
        scores = scores * row_scale
    order = torch.sort(scores if largest else -scores, dim=1, descending=True, stable=True).indices[:, :k].contiguous()
    return scores.gather(1, order), order
