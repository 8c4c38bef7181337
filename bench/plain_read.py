"""The bandwidth that a share is of: plain reads of the very bytes that are scored, where they lie."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from logra_kernels.ops import EncodedRows


def plain_reads(blocks: Iterable[EncodedRows]) -> dict[str, Callable[[], object]]:
    """Two passes of all threads over every byte of the blocks, to be timed beside the scores; the faster one counts."""
    parts = [part for rows in blocks for part in (rows.codes, rows.scales) if part is not None]
    flat = [part.reshape(-1).view(torch.uint8) for part in parts]
    whole = [part[: part.numel() // 4 * 4].view(torch.float32) for part in flat]
    return {"sum": lambda: _each(Tensor.sum, whole), "largest": lambda: _each(Tensor.amax, flat)}


def _each(of: Callable[[Tensor], Tensor], parts: list[Tensor]) -> None:
    for part in parts:
        of(part)
