"""The registry: every method of a study by name, each a function of one checkpoint that gives scores [Q, N]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .curvature import Block, influence
from .gradients import Case


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        curvature: See `curvature`; "kfac-sampled" and "ekfac-sampled" take their statistics from labels drawn from
            the model in place of the true ones.
        projection: "none", "pca", or a random kind of `lk.Projection`.
        k: Rank of both sides; 0 with "none".
        damping: As a multiple of a mean eigenvalue; 0 for the identity.
        whole: Whether that mean is the unprojected layer's.
        alpha: The raw Fisher's share in a shrunk one.
        mode: "dot"; "relatif" divides by the root of the row's self-influence.
    """

    curvature: str
    projection: str
    k: int = 0
    damping: float = 0.1
    whole: bool = False
    alpha: float = 1.0
    mode: str = "dot"

    @property
    def name(self) -> str:
        parts = [self.curvature if self.alpha == 1.0 else f"{self.curvature}({self.alpha:g})", self.projection]
        if self.k:
            parts[-1] += str(self.k)
        if self.curvature != "identity":
            parts.append(f"{self.damping:g}{'w' if self.whole else ''}")
        if self.mode != "dot":
            parts.append(self.mode)
        return "/".join(parts)

    def __call__(self, case: Case) -> Tensor:
        total: Tensor | None = None
        own_total: Tensor | None = None
        relatif = self.mode == "relatif"
        curvature = self.curvature.removesuffix("-sampled")
        for block in self.blocks(case).values():
            scores, own = influence(block, curvature, self.damping, self.whole, self.alpha, own=relatif)
            total = scores if total is None else total + scores
            if own is not None:
                own_total = own if own_total is None else own_total + own
        assert total is not None
        if own_total is None:
            return total
        return total * torch.where(own_total > 0, own_total.rsqrt(), 0.0)

    def blocks(self, case: Case) -> dict[str, Block]:
        if self.projection == "none":
            return case.whole(sampled=self.curvature.endswith("-sampled"))
        return case.pca(self.k) if self.projection == "pca" else case.random(self.projection, self.k)


def registry() -> dict[str, Method]:
    """Every method, by name, those that share a projection side by side."""
    found = [Method("identity", "none"), Method("identity", "none", mode="relatif")]
    found += [Method("raw", "none", damping=d) for d in (0.1, 1, 10, 100)]
    for curvature in ("kfac", "ekfac", "kfac-sampled", "ekfac-sampled"):
        found += [Method(curvature, "none", damping=d) for d in (0.01, 0.1, 1, 10)]
    found += [Method("ekfac", "none", damping=0.1, mode="relatif")]
    for k in (16, 64):
        found += [method for kind in ("orthonormal", "pca") for method in _subspace(kind, k)]
        for kind in ("gaussian", "rademacher"):
            found += [Method("identity", kind, k)]
            found += [Method("raw", kind, k, damping=d) for d in (0.1, 1)]
            found += [Method("shrunk-kfac", kind, k, damping=0.1, alpha=0.5)]
    for kind in ("orthonormal", "pca"):
        found += [Method("raw", kind, 128, damping=0.1), Method("ekfac", kind, 128, damping=0.1)]
        found += [Method("shrunk-kfac", kind, 128, damping=0.1, alpha=0.5)]
    found += [Method("shrunk-kfac", "pca", 128, damping=1, whole=True, alpha=0.5)]
    return {method.name: method for method in found}


def _subspace(kind: str, k: int) -> list[Method]:
    found = [Method("identity", kind, k)]
    found += [Method("raw", kind, k, damping=d) for d in (0.01, 0.1, 1, 10)]
    for curvature in ("kfac", "ekfac", "shampoo", "eshampoo", "diagonal"):
        found += [Method(curvature, kind, k, damping=d) for d in (0.01, 0.1, 1)]
    found += [Method("shrunk-kfac", kind, k, damping=d, alpha=0.5) for d in (0.01, 0.03, 0.1, 0.3, 1)]
    found += [Method("shrunk-kfac", kind, k, damping=0.1, alpha=a) for a in (0.1, 0.3, 0.7, 0.9)]
    found += [Method("shrunk-shampoo", kind, k, damping=d, alpha=0.5) for d in (0.03, 0.1, 0.3)]
    found += [Method(c, kind, k, damping=0.1, alpha=0.5) for c in ("shrunk-ekfac", "shrunk-eshampoo")]
    for curvature, alpha in (("raw", 1.0), ("ekfac", 1.0), ("shrunk-kfac", 0.5)):
        found.append(Method(curvature, kind, k, damping=0.1, alpha=alpha, mode="relatif"))
    if kind == "pca":  # a random orthonormal subspace has the whole space's mean already
        for curvature in ("raw", "kfac", "ekfac"):
            found += [Method(curvature, kind, k, damping=d, whole=True) for d in (0.1, 1, 10)]
        found += [Method("shrunk-kfac", kind, k, damping=d, whole=True, alpha=0.5) for d in (0.1, 0.3, 1, 3, 10)]
        found += [Method("shrunk-kfac", kind, k, damping=1, whole=True, alpha=a) for a in (0.3, 0.7)]
        found += [Method(c, kind, k, damping=1, whole=True, alpha=0.5) for c in ("shrunk-shampoo", "shrunk-ekfac")]
    return found
