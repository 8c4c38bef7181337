"""The linear datamodeling score (Park et al. 2023, definition 2.3).

LDS(q) = Spearman over subsets S of ( sum_{n in S} score[q, n],  - loss of models trained on S at q )
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .truth import Truth


def ranks(values: Tensor) -> Tensor:
    """Rank of every entry along the last dimension, ties averaged, fp64."""
    ordered, back, counts = [], [], []
    for row in values.reshape(-1, values.shape[-1]):
        unique, inverse, count = row.unique(return_inverse=True, return_counts=True)
        ordered.append(unique), back.append(inverse), counts.append(count)
    found = [
        (count.cumsum(0).double() - (count.double() - 1) / 2)[inverse]
        for inverse, count in zip(back, counts, strict=True)
    ]
    return torch.stack(found).reshape(values.shape)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation along the last dimension; 0 where one side is constant."""
    a, b = (r - r.mean(-1, keepdim=True) for r in (ranks(a), ranks(b)))
    size = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(size > 0, (a * b).sum(-1) / size, 0.0)


def lds(scores: Tensor, truth: Truth, measure: str = "loss") -> Tensor:
    """LDS of each query, [Q] fp64.

    Args:
        scores: [Q, N]; positive where training on the row helps the query.
        measure: "loss" or "margin", averaged over each subset's seeds.
    """
    measured = -truth.loss.mean(1) if measure == "loss" else truth.margin.mean(1)
    return spearman(scores.double() @ truth.member.T.double(), measured.T)


def ceiling(truth: Truth) -> Tensor:
    """How well one seed's losses agree with the mean of the others', mean over seeds, [Q]."""
    seeds = truth.loss.shape[1]
    if seeds < 2:
        return torch.full(truth.loss.shape[2:], torch.nan, dtype=torch.float64)
    each = []
    for s in range(seeds):
        others = torch.cat([truth.loss[:, :s], truth.loss[:, s + 1 :]], 1).mean(1)
        each.append(spearman(truth.loss[:, s].T, others.T))
    return torch.stack(each).mean(0)


@dataclass(frozen=True)
class Estimate:
    """A mean over models and queries with the standard errors of both, and of the two together."""

    mean: float
    se_models: float
    se_queries: float

    @property
    def se(self) -> float:
        return (self.se_models**2 + self.se_queries**2) ** 0.5


def estimate(values: Tensor) -> Estimate:
    """Of values [models, Q]: an LDS, or a difference of two methods' LDS (paired, so the queries' spread drops out)."""

    def error(means: Tensor) -> float:
        return float(means.std() / len(means) ** 0.5) if len(means) > 1 else 0.0

    return Estimate(float(values.mean()), error(values.mean(1)), error(values.mean(0)))
