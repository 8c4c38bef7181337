"""The curvatures that need no matrix: the identity, and the diagonal of the raw Fisher."""

from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature.factor import Factor
from logra_kernels.curvature.solver import Solver, SpectralSolver
from logra_kernels.curvature.statistics import Curvature
from logra_kernels.curvature.summed import SummedCurvature
from logra_kernels.curvature.sums import Progress, RowSums, SquareSums
from logra_kernels.store import GradientStore


class Identity(Curvature):
    """H + lambda I := I: influence is the plain gradient dot product; damping has no effect."""

    kind = "identity"

    @classmethod
    def found(cls, store: GradientStore, progress: Progress | None) -> Self:
        return cls(store.layers, len(store))

    @classmethod
    def without_rows(cls, layers: dict[str, tuple[int, int]]) -> Factor:
        """The factor of rows of these layers, name -> (k_out, k_in), wherever they are."""
        found = cls(layers, 0)
        found.means = dict.fromkeys(layers, 1.0)
        return found.factorize()

    def diagonal(self, block: str) -> Tensor:
        return torch.ones(sum(self.widths(block)), dtype=torch.float32, device="cpu")

    def damped(self, block: str, added: float) -> Solver:
        return SpectralSolver(block, None, self.diagonal(block), 0.0)


class Diagonal(SummedCurvature):
    """H = diag(mean g^2).

    Attributes:
        squares: Block name -> mean over rows of g^2, [d] fp64.
    """

    kind = "diagonal"

    def __init__(self, layers: dict[str, tuple[int, int]], rows: int, squares: dict[str, Tensor]) -> None:
        super().__init__(layers, rows)
        self.squares = squares

    @classmethod
    def empty(cls, store: GradientStore, rows: int | None = None) -> RowSums:
        return SquareSums(cls.columns(store.layers))

    @classmethod
    def of_sums(cls, store: GradientStore, sums: dict[str, Tensor], progress: Progress | None) -> Self:
        return cls(store.layers, len(store), {name: total / len(store) for name, total in sums.items()})

    def diagonal(self, block: str) -> Tensor:
        return self.squares[block]

    def damped(self, block: str, added: float) -> Solver:
        return SpectralSolver(block, None, self.squares[block], added)
