"""How much an answer hangs on the damping: the same question at several dampings, without training anything again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logra_kernels.curvature import Damping


@dataclass(frozen=True)
class Sensitivity:
    """Agreement of each damping's scores with those at the reference damping.

    Attributes:
        dampings: The S dampings asked for.
        reference: What they are compared with.
        overlap: Share of the k best rows that both have, [S, Q] fp64.
        correlation: Spearman's rank correlation over all rows, [S, Q] fp64.
    """

    dampings: list[float | Damping | None]
    reference: float | Damping | None
    overlap: Tensor
    correlation: Tensor

    def __str__(self) -> str:
        lines = [f"{'damping':>28} {'top-k overlap':>14} {'rank correlation':>17}"]
        for damping, overlap, rho in zip(self.dampings, self.overlap, self.correlation, strict=True):
            name = "default" if damping is None else str(damping)
            lines.append(f"{name:>28} {float(overlap.mean()):>14.2f} {float(rho.mean()):>17.3f}")
        return "\n".join(lines)


def compare(
    reference: Tensor, others: Sequence[Tensor], k: int, dampings: list, base: float | Damping | None
) -> Sensitivity:
    """`reference` and each of `others` are scores [Q, N]."""
    if k < 1:
        raise ValueError(f"damping_sensitivity: k is {k}; it must be at least 1")
    k = min(k, reference.shape[1])
    best = [set(row) for row in reference.topk(k, dim=1).indices.tolist()]
    overlap = [
        [len(best[q] & set(row)) / k for q, row in enumerate(other.topk(k, dim=1).indices.tolist())] for other in others
    ]
    rho = torch.stack([spearman(reference, other) for other in others])
    return Sensitivity(dampings, base, torch.tensor(overlap, dtype=torch.float64, device="cpu"), rho)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of each row of a with that of b, [Q, N] -> [Q] fp64; ties have their mean rank."""
    x, y = (_ranks(v) for v in (a, b))
    x, y = (v - v.mean(1, keepdim=True) for v in (x, y))
    return (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()


def _ranks(values: Tensor) -> Tensor:
    ranks = []
    for row in values.double().cpu():
        _, where, counts = row.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0).double() - (counts - 1) / 2)[where])
    return torch.stack(ranks)
