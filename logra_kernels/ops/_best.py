"""The best rows of blocks of scores: a block's own are selected, and merged with those before by a stable sort."""

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
            own, numbers = _best_of_block(scores_of(span), k, largest)
            values, index = _best(torch.cat([values, own], 1), torch.cat([index, numbers + start], 1), k, largest)
    return values, index


def _best_of_block(scores: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The [q, k] best scores, or all, and their columns.

    fp32 scores are selected by integers that no two columns share: a score's bits in its order, then the column. So
    equal scores go by column, and the selection reads the block a few times where a sort would move it.
    """
    if scores.shape[1] <= k or scores.dtype != torch.float32:
        return scores, torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    ordered = scores if largest else -scores
    bits = (ordered + 0.0).view(torch.int32)  # -0 becomes 0
    bits = torch.where(ordered.isnan(), torch.iinfo(torch.int32).max, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    last = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    columns = scores.shape[1] - 1 - ((bits.long() << 32) + last).topk(k, dim=1).values % (1 << 32)
    return scores.gather(1, columns), columns


def _best(scores: Tensor, numbers: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Columns stand in the order that decides between equal scores, which a stable sort keeps; NaN is greatest."""
    order = torch.sort(scores if largest else -scores, dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), numbers.gather(1, order)
