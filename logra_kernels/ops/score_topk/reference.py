"""The definition of score_topk. Runs on any device and dtype; fp64 in, fp64 out."""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype


def score_topk(
    queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None = None, largest: bool = True
) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(rows.dtype)
    scores = queries.to(dtype) @ rows.to(dtype).T
    if row_scale is not None:
        scores = scores * row_scale
    order = torch.sort(scores if largest else -scores, dim=1, descending=True, stable=True).indices[:, :k].contiguous()
    return scores.gather(1, order), order
