"""The best rows of blocks of scores, merged by a stable sort."""

from collections.abc import Callable

import torch
from torch import Tensor

from logra_kernels.ops._device import device_of

SCORES_AT_ONCE = 1 << 21  # entries of the [Q, block] buffer, 8 MiB in fp32; merging takes a few times that
LEAST_BLOCK = 4096  # rows; shorter blocks leave most of the device idle


def rows_at_once(q: int) -> int:
    """Rows of a block beside q queries."""
    return max(LEAST_BLOCK, SCORES_AT_ONCE // max(1, q))


def select(
    scores_of: Callable[[slice], Tensor],
    q: int,
    n: int,
    k: int,
    largest: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The k best of the [q, n] scores that `scores_of` gives for some rows, in score_topk's order, and their rows."""
    values = torch.empty((q, 0), dtype=dtype, device=device)
    index = torch.empty((q, 0), dtype=torch.int64, device=device)
    if not q:
        return values.new_empty((0, min(k, n))), index.new_empty((0, min(k, n)))
    step = rows_at_once(q)
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
