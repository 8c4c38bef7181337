"""The raw Fisher shrunk towards a Kronecker product: H = alpha F + (1 - alpha) L (x) R / trace(L).

F is unbiased but, with fewer rows than its d (d + 1) / 2 numbers, far too certain of the directions it has seen and
blind to the others; the Kronecker product knows every direction but assumes a structure. Their mean is the classical
remedy (Ledoit & Wolf 2004), with a structured target in place of the identity. Both come from the stored rows alone.
"""

from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature.damping import Damping
from logra_kernels.curvature.fisher import RawFisher
from logra_kernels.curvature.kronecker import Kronecker
from logra_kernels.curvature.solver import CholeskySolver, KroneckerSolver, Solver, SpectralSolver
from logra_kernels.curvature.statistics import Curvature, Progress
from logra_kernels.store import GradientStore

ALPHA = 0.5


class PreconditionedSolver(Solver):
    """(K + V V^T)^-1 for a K that is solved with and a V of few columns, [d, n], which span the stored rows.

    With T = K^-1/2:  K + V V^T = T^-1 (I + T V (T V)^T) T^-T, and the middle is spectral with n known eigenvectors.
    """

    def __init__(self, layer: str, outer: KroneckerSolver, columns: Tensor) -> None:
        self.width, self.damping = outer.width, outer.damping
        self._outer = outer
        self._span = torch.linalg.qr(columns).Q
        rows = outer.power(columns.T, -0.5)
        values, left = torch.linalg.eigh(rows @ rows.T)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        vectors = rows.T @ (left[:, kept] / values[kept].sqrt())
        self._inner = SpectralSolver(layer, vectors, values[kept], 1.0)

    def power(self, rows: Tensor, exponent: float) -> Tensor:
        inside = self._inner.power(self._outer.power(rows, -0.5), exponent)
        # K^-1/2 is symmetric here, and any square root serves for -0.5
        return inside if exponent == -0.5 else self._outer.power(inside, -0.5)

    def toward_stored(self, rows: Tensor) -> Tensor:
        return (self.power(rows, -1) @ self._span) @ self._span.T

    def quadratic(self, rows: Tensor) -> Tensor:
        return self._inner.quadratic(self._outer.power(rows, -0.5))


class Shrunk(Curvature):
    """alpha F + (1 - alpha) L (x) R / trace(L), alpha = 1/2.

    Attributes:
        fisher, kronecker: The two parts, each kept beside the store by itself.
    """

    kind = "shrunk"

    def __init__(self, fisher: RawFisher, kronecker: Kronecker) -> None:
        super().__init__(fisher.layers, fisher.rows)
        self.fisher = fisher
        self.kronecker = kronecker

    @classmethod
    def found(cls, store: GradientStore, progress: Progress | None) -> Self:
        return cls(RawFisher.of(store, progress), Kronecker.of(store))

    def solver(self, layer: str, damping: Damping) -> Solver:
        (u_out, u_in), values = self.kronecker.bases[layer], (1 - ALPHA) * self.kronecker.values[layer]
        if layer in self.fisher.blocks:
            left, right = (u_out * values.sum(1)) @ u_out.T, (u_in * values.sum(0)) @ u_in.T
            total = values.sum().clamp_min(torch.finfo(torch.float64).tiny)
            h = ALPHA * self.fisher.blocks[layer].double() + torch.kron(left, right) / total
            return CholeskySolver(layer, h, damping.value(layer, float(h.diagonal().mean())))
        rows = self.fisher.thin[layer].double() * (ALPHA / self.rows) ** 0.5
        mean_eigenvalue = float(values.mean()) + float(rows.square().sum()) / rows.shape[1]
        outer = KroneckerSolver(layer, u_out, u_in, values, damping.value(layer, mean_eigenvalue))
        return PreconditionedSolver(layer, outer, rows.T)
