"""Triton launcher: the shared score kernel takes blocks of rows; a stable sort merges each into the best so far."""

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._score import score
from logra_kernels.ops._tile import device_of

SCORES_AT_ONCE = 1 << 21  # entries of the [Q, block] buffer, 8 MiB in fp32; merging takes a few times that
LEAST_BLOCK = 4096  # rows; shorter blocks leave most of the device idle


def launch(queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    q, n = queries.shape[0], rows.shape[0]
    values = torch.empty((q, 0), dtype=accumulator_dtype(rows.dtype), device=rows.device)
    index = torch.empty((q, 0), dtype=torch.int64, device=rows.device)
    if not q:
        return values.new_empty((0, min(k, n))), index.new_empty((0, min(k, n)))
    step = max(LEAST_BLOCK, SCORES_AT_ONCE // q)
    with device_of(rows):
        for start in range(0, n, step):
            span = slice(start, start + step)
            scores = score(queries, rows[span], None if row_scale is None else row_scale[span])
            numbers = torch.arange(start, start + scores.shape[1], device=rows.device).expand(q, -1)
            values, index = _best(torch.cat([values, scores], 1), torch.cat([index, numbers], 1), k, largest)
    return values, index


def _best(scores: Tensor, numbers: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Columns stand in the order that decides between equal scores, which a stable sort keeps; NaN is greatest."""
    order = torch.sort(scores if largest else -scores, dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), numbers.gather(1, order)
