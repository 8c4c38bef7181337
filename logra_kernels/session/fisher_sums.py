"""Fishers that a run sums while batches go by: of the rows that it logs, and of the model's own predictions."""

import torch
from torch import Tensor

from logra_kernels.curvature import Curvature, ModelFisher, RawFisher, RowSums
from logra_kernels.errors import LograError
from logra_kernels.session.host_sums import HostSums
from logra_kernels.store import GradientStore, Share


class FisherSums:
    """The sums of a run.

    Args:
        logged: Whether the rows that are logged are summed on the way.
        kind: The run's curvature, whose blocks the sums have.
        on_host: Whether sums are kept in host memory wherever the rows are.

    Attributes:
        model: The curvature of the model's own predictions that is summed.
    """

    def __init__(self, logged: bool, kind: type[Curvature], on_host: bool) -> None:
        self._wanted, self._on_host = logged, on_host
        self._raw = kind if issubclass(kind, RawFisher) else RawFisher.joining(kind.together)
        self.model = kind if issubclass(kind, ModelFisher) else ModelFisher.joining(kind.together)
        self._logged: RowSums | HostSums | None = None
        self._observed: RowSums | HostSums | None = None

    def begin(self, store: GradientStore) -> None:
        """Rows are about to be appended to this store; those that it has are summed first."""
        # others are decoded from what is stored, in a pass afterwards
        fits = not store.format.scaled and store.rank_c is None
        self._logged = self._raw.sums(store) if self._wanted and fits else None

    def add(self, store: GradientStore, rows: Tensor) -> None:
        """Rows that were appended, [n, D]."""
        if self._logged is not None and len(rows):
            self._logged = self._beside(self._logged, rows)
            self._logged.add(rows.detach().to(store.manifest.torch_dtype))

    def observe(self, layers: dict[str, tuple[int, int]], rows: Tensor) -> None:
        """Gradients of losses with labels that the model predicts, [n, D]; layers: name -> (k_out, k_in).

        Raises:
            LograError: One is NaN or infinite.
        """
        if not bool(rows.isfinite().all()):
            raise LograError("observe_fisher: a gradient is NaN or infinite; check the model's loss")
        if self._observed is None:
            self._observed = self.model.empty(layers)
        self._observed = self._beside(self._observed, rows)
        self._observed.add(rows.detach().float())  # as rows are stored: what rounding takes from both alike cancels

    def _beside(self, sums: RowSums | HostSums, rows: Tensor) -> RowSums | HostSums:
        """The sums where these rows can be added to them."""
        if isinstance(sums, HostSums):
            return sums
        if self._on_host and rows.device.type != "cpu":
            return HostSums(sums.to(torch.device("cpu")))
        return sums.to(rows.device)

    def join(self, mine: GradientStore, store: Share) -> None:
        """Give the store that ranks' own were merged into the sum of what each summed while logging; collective."""
        if self._wanted:
            self._raw.join(mine, store)

    def keep(self, store: GradientStore) -> None:
        """Keep them beside the store, all of whose rows are committed.

        Raises:
            Exception: What summing in host memory raised.
        """
        logged, self._logged = self._logged, None
        if logged is not None:
            sums = logged.settled() if isinstance(logged, HostSums) else logged
            if sums.rows == len(store):
                self._raw.keep(store, sums)
        if self._observed is not None:
            held = self._observed
            self.model.keep(store, held.settled() if isinstance(held, HostSums) else held)
