"""H of a run's rows, solved with at a damping, and what each stored row has under it: computed once, and held."""

import warnings
from collections.abc import Collection

from torch import Tensor

from logra_kernels import influence
from logra_kernels.curvature import Curvature, Damping, Factor, Progress
from logra_kernels.session.modes import some
from logra_kernels.store import GradientStore


class Solved:
    """Curvature, factors and row statistics of the rows as they are, until `forget`.

    Args:
        kind: Of the curvature.
        damping: Where a call is given none; None for `Damping.of`'s default.
    """

    def __init__(self, kind: type[Curvature], damping: float | Damping | None) -> None:
        self.kind = kind
        self.damping = damping if damping is None else Damping.of(damping)
        self._curvature: Curvature | None = None
        self._factors: dict[float | Damping | None, Factor] = {}
        self._statistics: dict[float | Damping | None, dict[str, Tensor]] = {}

    def forget(self) -> None:
        """The rows, or what was observed beside them, are others now."""
        self._curvature = None
        self._factors.clear()
        self._statistics.clear()

    def factor(
        self, store: GradientStore, damping: float | Damping | None = None, progress: Progress | None = None
    ) -> Factor:
        """(H + lambda I)^-1 of the store's committed rows.

        Raises:
            LograError: The curvature is singular at this damping, or a layer's gradients are too small for it.
        """
        damping = self.damping if damping is None else damping
        if damping not in self._factors:
            whitened = influence.whitened_factor(store, self.kind.kind, damping)
            if whitened is not None:
                self._factors[damping] = whitened
                return whitened
            if self._curvature is None:
                self._curvature = self.kind.of(store, progress)
                zero = sorted(self._curvature.zero)
                if zero:
                    warnings.warn(
                        f"curvature: all stored gradients of {len(zero)} layers are zero ({some(zero)}), so they have"
                        " no part in any score: did no row reach them, or are they detached from the loss?",
                        stacklevel=3,
                    )
            for other in [kept for kept in self._factors if kept != self.damping]:
                del self._factors[other]  # a factor is as large as the curvature: the default's and one more are held
            self._factors[damping] = self._curvature.factorize(damping)
        return self._factors[damping]

    def statistics(
        self,
        store: GradientStore,
        wanted: Collection[str],
        damping: float | Damping | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Tensor]:
        """`influence.row_statistics` by name, each [N]; those that are held are not computed again."""
        damping = self.damping if damping is None else damping
        kept = self._statistics.setdefault(damping, {})
        missing = [name for name in wanted if name not in kept]
        if missing:
            factor = self.factor(store, damping)
            kept |= influence.row_statistics(
                store, factor, missing, curvature=self.kind.kind, damping=damping, progress=progress
            )
        return {name: kept[name] for name in wanted}
