"""The raw Fisher shrunk towards a Kronecker product: H = alpha F + (1 - alpha) L (x) R / trace(L).

F is unbiased but, with fewer rows than its d (d + 1) / 2 numbers, far too certain of the directions it has seen and
blind to the others; the Kronecker product knows every direction but assumes a structure. Their mean is the classical
remedy (Ledoit & Wolf 2004), with a structured target in place of the identity. Both come from the stored rows alone.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature.fisher import RawFisher
from logra_kernels.curvature.kronecker import Kronecker
from logra_kernels.curvature.solver import CholeskySolver, KroneckerSolver, SideBySide, Solver, SpectralSolver
from logra_kernels.curvature.statistics import Curvature
from logra_kernels.curvature.sums import Progress
from logra_kernels.store import GradientStore

ALPHA = 0.5


class PreconditionedSolver(Solver):
    """(K + V V^T)^-1 for a K that is solved with and a V of few columns, [d, n], which span the stored rows.

    With T = K^-1/2:  K + V V^T = T^-1 (I + T V (T V)^T) T^-T, and the middle is spectral with n known eigenvectors.
    """

    def __init__(self, layer: str, outer: Solver, columns: Tensor) -> None:
        self.width, self.damping = outer.width, outer.damping
        self._outer = outer
        rows = outer.power(columns.T, -0.5)
        values, left = torch.linalg.eigh(rows @ rows.T)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        vectors = rows.T @ (left[:, kept] / values[kept].sqrt())
        self._inner = SpectralSolver(layer, vectors, values[kept], 1.0, spanning=True)

    def power(self, rows: Tensor, exponent: float) -> Tensor:
        inside = self._inner.power(self._outer.power(rows, -0.5), exponent)
        # K^-1/2 is symmetric here, and any square root serves for -0.5
        return inside if exponent == -0.5 else self._outer.power(inside, -0.5)

    def toward_stored(self, rows: Tensor) -> Tensor:
        # products with T^-T V are all that a stored row sees of the middle
        return self._outer.power(self._inner.toward_stored(self._outer.power(rows, -0.5)), -0.5)

    def quadratic(self, rows: Tensor) -> Tensor:
        return self._inner.quadratic(self._outer.power(rows, -0.5))


class Shrunk(Curvature):
    """alpha F + (1 - alpha) L (x) R / trace(L), alpha = 1/2. Where layers share a block, the second term is each one's.

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
        return cls(RawFisher.joining(cls.together).of(store, progress), Kronecker.of(store))

    @classmethod
    def downdate(cls, before: GradientStore, after: GradientStore, gone: Sequence[int]) -> bool:
        fisher = RawFisher.joining(cls.together).downdate(before, after, gone)
        return Kronecker.downdate(before, after, gone) and fisher

    def _targets(self, block: str) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        return [
            (layer, *self.kronecker.bases[layer], (1 - ALPHA) * self.kronecker.values[layer])
            for layer in self.members[block]
        ]

    def diagonal(self, block: str) -> Tensor:
        target = torch.cat([_diagonal(*own[1:]) for own in self._targets(block)])
        return target + ALPHA * self.fisher.diagonal(block).double()

    def damped(self, block: str, added: float) -> Solver:
        targets = self._targets(block)
        if block in self.fisher.blocks:
            h = ALPHA * self.fisher.blocks[block].double() + torch.block_diag(*[_dense(*own[1:]) for own in targets])
            return CholeskySolver(block, h, added)
        rows = self.fisher.thin[block].double() * (ALPHA / self.rows) ** 0.5
        outer = SideBySide([KroneckerSolver(*own, added) for own in targets])
        return PreconditionedSolver(block, outer, rows.T)


def _dense(u_out: Tensor, u_in: Tensor, values: Tensor) -> Tensor:
    """left (x) right of rank-one `values`, [d, d]."""
    left, right = (u_out * values.sum(1)) @ u_out.T, (u_in * values.sum(0)) @ u_in.T
    return torch.kron(left, right) / values.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _diagonal(u_out: Tensor, u_in: Tensor, values: Tensor) -> Tensor:
    """Its diagonal, [d]."""
    return (u_out.square() @ values @ u_in.square().T).flatten()
