"""Self-influence I(z, z) = g^T (H + lambda I)^-1 g of every stored row, kept beside the store."""

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from logra_kernels.curvature import Factor
from logra_kernels.store import GradientStore


def self_influence(
    store: GradientStore, factor: Factor, damping: float | None, progress: Callable[[int], None] | None = None
) -> Tensor:
    """I(z, z) of every row, [N] fp32, in one streaming pass.

    Args:
        store: The rows.
        factor: Their factorised curvature.
        damping: The damping the factor was made with, which names the kept result.
        progress: Called with the number of rows of each block done.
    """
    sidecar = "self-influence" if damping is None else f"self-influence-{struct.pack('>d', damping).hex()}"
    kept = store.sidecar_read(sidecar)
    if kept is not None:
        return kept[0]["self_influence"]
    found = torch.empty(len(store))
    for start, rows in store.blocks():
        found[start : start + len(rows)] = factor.quadratic(rows).float()
        if progress is not None:
            progress(len(rows))
    store.sidecar_write(sidecar, {"self_influence": found})
    return found
