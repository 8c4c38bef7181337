"""Fishers that a run sums while batches go by: of the rows that it logs, and of the model's own predictions."""

from itertools import accumulate

from torch import Tensor

from logra_kernels.curvature import GramSums, RawFisher, keep_model_fisher
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore


class FisherSums:
    """The sums of a run.

    Args:
        logged: Whether the rows that are logged are summed on the way.
    """

    def __init__(self, logged: bool) -> None:
        self._wanted = logged
        self._logged: GramSums | None = None
        self._observed: GramSums | None = None

    def begin(self, store: GradientStore) -> None:
        """Rows are about to be appended to this store; those that it has are summed first."""
        # others are decoded from what is stored, in a pass afterwards
        fits = not store.format.scaled and store.rank_c is None
        self._logged = RawFisher.sums(store) if self._wanted and fits else None

    def add(self, store: GradientStore, rows: Tensor) -> None:
        """Rows that were appended, [n, D]."""
        if self._logged is not None and len(rows):
            self._logged.add(rows.detach().to(store.manifest.torch_dtype))

    def observe(self, layers: dict[str, tuple[int, int]], rows: Tensor) -> None:
        """Gradients of losses with labels that the model predicts, [n, D]; layers: name -> (k_out, k_in).

        Raises:
            LograError: One is NaN or infinite.
        """
        if not bool(rows.isfinite().all()):
            raise LograError("observe_fisher: a gradient is NaN or infinite; check the model's loss")
        if self._observed is None:
            ends = [0, *accumulate(k_out * k_in for k_out, k_in in layers.values())]
            self._observed = GramSums({name: slice(*ends[i : i + 2]) for i, name in enumerate(layers)})
        self._observed.add(rows.float())

    def keep(self, store: GradientStore) -> None:
        """Keep them beside the store, all of whose rows are committed."""
        if self._logged is not None and self._logged.rows == len(store):
            RawFisher.keep(store, self._logged)
        self._logged = None
        if self._observed is not None:
            keep_model_fisher(store, self._observed)
