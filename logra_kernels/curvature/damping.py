"""How much of the identity is added to a curvature block before it is solved with."""

from dataclasses import dataclass

from logra_kernels.errors import LograError


@dataclass(frozen=True)
class Damping:
    """lambda of each layer: `absolute` where given, else `relative` times the block's mean eigenvalue, trace(H) / d.

    The default, 0.1 relative, is the paper's (Choe et al. 2024, appendix; Grosse et al. 2023, section 3.1).

    Raises:
        LograError: A value is negative.
    """

    relative: float = 0.1
    absolute: float | None = None

    def __post_init__(self) -> None:
        value = self.relative if self.absolute is None else self.absolute
        if not value >= 0:
            raise LograError(f"curvature: damping is {value}; it must not be negative")

    @classmethod
    def of(cls, damping: "float | Damping | None") -> "Damping":
        """A number is absolute; None is the default."""
        if damping is None:
            return cls()
        return damping if isinstance(damping, Damping) else cls(absolute=float(damping))

    def value(self, layer: str, mean_eigenvalue: float) -> float:
        """lambda for a layer whose block has this mean eigenvalue.

        Raises:
            LograError: The block is zero: all its gradients are.
        """
        if mean_eigenvalue == 0.0:
            raise LograError(f"curvature: all stored gradients of layer {layer!r} are zero; exclude it")
        return self.relative * mean_eigenvalue if self.absolute is None else self.absolute
