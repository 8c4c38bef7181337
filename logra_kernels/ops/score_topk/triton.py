"""Triton launcher: the shared score kernel takes blocks of rows; a stable sort merges each into the best so far."""

from collections.abc import Callable

import torch
from torch import Tensor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._format import EncodedRows
from logra_kernels.ops._score import score, score_encoded
from logra_kernels.ops._tile import device_of

SCORES_AT_ONCE = 1 << 21  # entries of the [Q, block] buffer, 8 MiB in fp32; merging takes a few times that
LEAST_BLOCK = 4096  # rows; shorter blocks leave most of the device idle


def launch(queries: Tensor, rows: Tensor, k: int, row_scale: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    def scores(span: slice) -> Tensor:
        return score(queries, rows[span], None if row_scale is None else row_scale[span])

    return _select(scores, queries.shape[0], rows.shape[0], k, largest, rows.device, accumulator_dtype(rows.dtype))


def launch_encoded(
    queries: Tensor, rows: EncodedRows, k: int, row_scale: Tensor | None, largest: bool, digits: int
) -> tuple[Tensor, Tensor]:
    """Products in fp32, whatever `digits` allows."""

    def scores(span: slice) -> Tensor:
        return score_encoded(queries, rows[span], None if row_scale is None else row_scale[span])

    return _select(scores, queries.shape[0], len(rows), k, largest, rows.device, torch.float32)


def _select(
    scores_of: Callable[[slice], Tensor],
    q: int,
    n: int,
    k: int,
    largest: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    values = torch.empty((q, 0), dtype=dtype, device=device)
    index = torch.empty((q, 0), dtype=torch.int64, device=device)
    if not q:
        return values.new_empty((0, min(k, n))), index.new_empty((0, min(k, n)))
    step = max(LEAST_BLOCK, SCORES_AT_ONCE // q)
    with device_of(values):
        for start in range(0, n, step):
            span = slice(start, start + step)
            scores = scores_of(span)
            numbers = torch.arange(start, start + scores.shape[1], device=device).expand(q, -1)
            values, index = _best(torch.cat([values, scores], 1), torch.cat([index, numbers], 1), k, largest)
    return values, index


def _best(scores: Tensor, numbers: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Columns stand in the order that decides between equal scores, which a stable sort keeps; NaN is greatest."""
    order = torch.sort(scores if largest else -scores, dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), numbers.gather(1, order)
