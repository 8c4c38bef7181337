"""How much of the identity is added to a curvature block before it is solved with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from logra_kernels.errors import LograError


@dataclass(frozen=True)
class Damping:
    """lambda of each layer: `absolute` where given, or `whole` where given, else `relative`.

    Args:
        relative: Times the block's own mean eigenvalue, trace(H) / d. 0.1 is the paper's (Choe et al. 2024, appendix;
            Grosse et al. 2023, section 3.1).
        absolute: lambda itself.
        whole: Times the mean eigenvalue of the *whole* layer's curvature, over all d_out d_in directions. Random
            factors keep it in expectation, so there it is as `relative`; PCA keeps the largest directions, so the
            block's mean is scaled by spread = (trace(C) / d) / (trace(P C P^T) / k) of either side's covariance C.

    Raises:
        LograError: A value is negative or not finite, or both `absolute` and `whole` are given.
    """

    relative: float = 0.1
    absolute: float | None = None
    whole: float | None = None
    spread: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.absolute is not None and self.whole is not None:
            raise LograError("curvature: damping is either absolute or times the whole layer's mean; give one of them")
        value = next((v for v in (self.absolute, self.whole) if v is not None), self.relative)
        if not 0 <= value < math.inf:
            raise LograError(f"curvature: damping is {value}; it must be finite and must not be negative")

    @classmethod
    def of(cls, damping: "float | Damping | None", spread: Mapping[str, float] | None = None) -> "Damping":
        """A number is absolute; None is the default.

        The default is what measured best (bench/results/accuracy-*.json): after PCA the whole layer's mean eigenvalue,
        else 0.1 times the block's.

        Args:
            damping: As the user gave it.
            spread: Layer name -> the spread of its learned factors; of the layers that have some.
        """
        if damping is None:
            damping = cls(whole=1.0) if spread else cls()
        elif not isinstance(damping, Damping):
            damping = cls(absolute=float(damping))
        return replace(damping, spread=spread or {})

    def __str__(self) -> str:
        if self.absolute is not None:
            return f"{self.absolute:g}"
        if self.whole is not None:
            return f"{self.whole:g} x the whole layer's mean eigenvalue"
        return f"{self.relative:g} x each layer's mean eigenvalue"

    def value(self, layer: str, mean_eigenvalue: float) -> float:
        """lambda for a layer whose block has this mean eigenvalue."""
        if self.absolute is not None:
            return self.absolute
        if self.whole is not None:
            return self.whole * mean_eigenvalue * self.spread.get(layer, 1.0)
        return self.relative * mean_eigenvalue
