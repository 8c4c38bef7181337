"""A layer's gradients of many samples, [N, d_out, d_in], as they are or as the two factors of each.

An MLP has one position a sample, so a whole gradient dy (x) x is never formed; both forms offer the same products, and
every curvature is written once for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """Gradients g [N, d_out, d_in] as they are."""

    g: Tensor

    def __len__(self) -> int:
        return len(self.g)

    @property
    def shape(self) -> tuple[int, int]:
        return self.g.shape[1], self.g.shape[2]

    def rotate(self, q_out: Tensor, q_in: Tensor) -> Dense:
        """Q_out^T g Q_in."""
        return Dense(q_out.T @ self.g @ q_in)

    def gram(self, other: Dense, weight: Tensor | None = None) -> Tensor:
        """sum over i, j of weight[i, j] g[n, i, j] other[m, i, j], [N, M] fp64."""
        left = self.g if weight is None else self.g * weight.to(self.g.dtype)
        return (left.flatten(1) @ other.g.flatten(1).T).double()

    def square(self) -> Tensor:
        """Mean over samples of g^2, [d_out, d_in] fp64."""
        return self.g.double().square().mean(0)

    def norms(self, weight: Tensor) -> Tensor:
        """sum of weight g^2 for every sample, [N] fp64."""
        return (self.g.square().flatten(1) @ weight.flatten().to(self.g.dtype)).double()

    def sides(self) -> tuple[Tensor, Tensor]:
        """mean g g^T [d_out, d_out] and mean g^T g [d_in, d_in], fp64: all that rows alone can say about the sides."""
        g = self.g
        return (
            torch.einsum("nij,nkj->ik", g, g).double() / len(g),
            torch.einsum("nij,nik->jk", g, g).double() / len(g),
        )

    def dense(self) -> Tensor:
        return self.g


@dataclass(frozen=True)
class Outer:
    """Gradients dy (x) x, dy [N, d_out] and x [N, d_in]."""

    dy: Tensor
    x: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, int]:
        return self.dy.shape[1], self.x.shape[1]

    def rotate(self, q_out: Tensor, q_in: Tensor) -> Outer:
        return Outer(self.dy @ q_out, self.x @ q_in)

    def gram(self, other: Outer, weight: Tensor | None = None) -> Tensor:
        if weight is None:
            return (self.dy.double() @ other.dy.T.double()) * (self.x.double() @ other.x.T.double())
        found = torch.empty(len(self), len(other), dtype=torch.float64)
        weight = weight.to(self.x.dtype)
        for n, (dy, x) in enumerate(zip(self.dy, self.x, strict=True)):
            found[n] = ((other.dy @ (weight * dy[:, None] * x)) * other.x).sum(1)
        return found

    def square(self) -> Tensor:
        return self.dy.double().square().T @ self.x.double().square() / len(self)

    def norms(self, weight: Tensor) -> Tensor:
        return ((self.dy.square() @ weight.to(self.x.dtype)) * self.x.square()).sum(1).double()

    def sides(self) -> tuple[Tensor, Tensor]:
        dy, x = self.dy.double(), self.x.double()
        return (dy * x.square().sum(1, keepdim=True)).T @ dy / len(x), (
            x * dy.square().sum(1, keepdim=True)
        ).T @ x / len(x)

    def dense(self) -> Tensor:
        return self.dy[:, :, None] * self.x[:, None, :]
