"""The curvatures that need no matrix: the identity, and the diagonal of the raw Fisher."""

from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature.damping import Damping
from logra_kernels.curvature.solver import Solver, SpectralSolver
from logra_kernels.curvature.statistics import KeptCurvature, Progress, blocks_of
from logra_kernels.store import GradientStore, sum_over_ranks


class Identity(KeptCurvature):
    """H + lambda I := I: influence is the plain gradient dot product; damping has no effect."""

    kind = "identity"

    @classmethod
    def measure(cls, store: GradientStore, progress: Progress | None) -> Self:
        return cls(store.layers, len(store))

    @classmethod
    def restore(cls, store: GradientStore, tensors: dict[str, Tensor]) -> Self:
        return cls(store.layers, len(store))

    def state(self) -> dict[str, Tensor]:
        return {}

    def solver(self, layer: str, damping: Damping) -> Solver:
        k_out, k_in = self.layers[layer]
        return SpectralSolver(layer, None, torch.ones(k_out * k_in), 0.0)


class Diagonal(KeptCurvature):
    """H = diag(mean g^2).

    Attributes:
        squares: Layer name -> mean over rows of g^2, [d] fp64.
    """

    kind = "diagonal"

    def __init__(self, layers: dict[str, tuple[int, int]], rows: int, squares: dict[str, Tensor]) -> None:
        super().__init__(layers, rows)
        self.squares = squares

    @classmethod
    def measure(cls, store: GradientStore, progress: Progress | None) -> Self:
        squares = {name: torch.zeros(o * i, dtype=torch.float64) for name, (o, i) in store.layers.items()}
        for layers in blocks_of(store, progress):
            for name, rows in layers.items():
                squares[name] += rows.double().square().sum(0) / len(store)
        sum_over_ranks(store, squares.values())
        return cls(store.layers, len(store), squares)

    @classmethod
    def restore(cls, store: GradientStore, tensors: dict[str, Tensor]) -> Self:
        return cls(store.layers, len(store), tensors)

    def state(self) -> dict[str, Tensor]:
        return self.squares

    def solver(self, layer: str, damping: Damping) -> Solver:
        values = self.squares[layer]
        return SpectralSolver(layer, None, values, damping.value(layer, float(values.mean())))
