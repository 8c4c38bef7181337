"""The raw projected Fisher: H = mean over stored rows of g g^T, per layer (Choe et al. 2024, section 3.1)."""

from collections.abc import Callable

import torch
from torch import Tensor

from logra_kernels.curvature.factor import Factor
from logra_kernels.errors import LograError
from logra_kernels.ops import accumulate_gram
from logra_kernels.store import GradientStore

_SIDECAR = "fisher-raw"


class RawFisher:
    """Second moment of each layer's projected gradients.

    Attributes:
        blocks: Layer name -> H, [k_out*k_in, k_out*k_in] fp32, symmetric, in the order of the rows' columns.
        rows: How many rows it is the mean of.
    """

    def __init__(self, blocks: dict[str, Tensor], rows: int) -> None:
        self.blocks = blocks
        self.rows = rows

    @classmethod
    def of(cls, store: GradientStore, progress: Callable[[int], None] | None = None) -> "RawFisher":
        """The one kept beside the store if the rows are still the same, else computed in one streaming pass and kept.

        Args:
            store: At least one row.
            progress: Called with the number of rows of each block done.

        Raises:
            LograError: The store is empty.
        """
        kept = store.sidecar_read(_SIDECAR)
        if kept is not None:
            return cls({name: kept[0][name] for name in store.layers}, len(store))
        if len(store) == 0:
            raise LograError(f"curvature: the store {store.path} has no rows; log some first")
        slices = store.slices
        blocks = {name: torch.zeros(s.stop - s.start, s.stop - s.start) for name, s in slices.items()}
        for _, rows in store.blocks():
            for name, part in slices.items():
                accumulate_gram(rows[:, part], blocks[name])
            if progress is not None:
                progress(len(rows))
        for block in blocks.values():
            block /= len(store)
        store.sidecar_write(_SIDECAR, blocks)
        return cls(blocks, len(store))

    def factorize(self, damping: float | None = None) -> Factor:
        """H + lambda I, ready to be solved with; see `Factor`."""
        return Factor(self.blocks, damping)
