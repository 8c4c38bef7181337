"""Every curvature of the studies, one layer at a time, by the textbook's formulas in fp64 where sizes allow.

    identity   H = I
    raw        H = mean g g^T                                                        (Choe et al. 2024, section 3.1)
    kfac       H = B (x) A, B = mean dy dy^T, A = mean x x^T                          (Martens & Grosse 2015)
    ekfac      H = Q diag(mean (Q^T g)^2) Q^T, Q = Q_B (x) Q_A                        (George et al. 2018)
    shampoo    H = L (x) R / tr L, L = mean g g^T, R = mean g^T g: from stored rows alone  (Gupta et al. 2018)
    eshampoo   ekfac's eigenvalues in shampoo's eigenvectors                          (Vyas et al. 2024)
    diagonal   H = diag(mean g^2)
    shrunk-c   H = alpha raw + (1 - alpha) c, c one of the above: fewer rows than dims leave the raw Fisher without
               an opinion on most directions, and the Kronecker one fills them (Ledoit & Wolf 2004, with its target)

Scores are g_q^T (H + lambda I)^-1 g_t. What is only known through N rows is solved in its N x N dual form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .rows import Dense, Outer


@dataclass
class Basis:
    """Gradients turned into Kronecker eigenvectors, where H is diagonal.

    Attributes:
        train, query: Rotated gradients.
        product: Eigenvalues of the Kronecker product itself, [d_out, d_in].
        corrected: Mean square of the gradients in each direction, [d_out, d_in].
    """

    train: Dense | Outer
    query: Dense | Outer
    product: Tensor
    corrected: Tensor


@dataclass
class Block:
    """One layer's gradients of the training rows and of the queries, with what is known about the layer's sides.

    Attributes:
        b, a: Second moments of the two sides, mean dy dy^T and mean x x^T, in these gradients' coordinates, fp64.
        whole_mean: Mean eigenvalue of the *unprojected* layer's B (x) A, tr B tr A / (d_out d_in), in these units.
        fisher: Gradients that the corrected eigenvalues are taken from, if not the training rows' own.
    """

    train: Dense | Outer
    query: Dense | Outer
    b: Tensor
    a: Tensor
    whole_mean: float
    fisher: Dense | Outer | None = None
    _weighted: dict = field(default_factory=dict)

    @cached_property
    def train_gram(self) -> Tensor:
        return self.train.gram(self.train)

    @cached_property
    def query_gram(self) -> Tensor:
        return self.query.gram(self.train)

    @cached_property
    def kronecker(self) -> Basis:
        """The eigenvectors of B and A."""
        return self._basis(self.b, self.a, 1.0)

    @cached_property
    def shampoo(self) -> Basis:
        """The eigenvectors of L and R."""
        left, right = self.train.sides()
        return self._basis(left, right, float(left.trace()))

    @cached_property
    def plain(self) -> Basis:
        """No rotation."""
        square = self.train.square()
        return Basis(self.train, self.query, square, square)

    def _basis(self, left: Tensor, right: Tensor, scale: float) -> Basis:
        (value_out, q_out), (value_in, q_in) = torch.linalg.eigh(left), torch.linalg.eigh(right)
        product = value_out.clamp(min=0)[:, None] * value_in.clamp(min=0) / scale
        turn = (q_out.float(), q_in.float())
        train = self.train.rotate(*turn)
        corrected = train.square() if self.fisher is None else self.fisher.rotate(*turn).square()
        return Basis(train, self.query.rotate(*turn), product, corrected)

    def weighted(self, name: str, weight: Tensor, key: object) -> tuple[Tensor, Tensor]:
        """The two Gram matrices, rows x rows and queries x rows, under a diagonal weight; the last one is kept."""
        if self._weighted.get("key") != (name, key):
            basis = getattr(self, name)
            train = basis.train.gram(basis.train, weight)
            self._weighted = {"key": (name, key), "grams": (train, basis.query.gram(basis.train, weight))}
        return self._weighted["grams"]


BASES = {"kfac": "kronecker", "ekfac": "kronecker", "shampoo": "shampoo", "eshampoo": "shampoo", "diagonal": "plain"}


def eigenvalues(block: Block, curvature: str) -> tuple[str, Tensor]:
    """The name of the basis in which a curvature is diagonal, and its eigenvalues there."""
    name = BASES[curvature]
    basis = getattr(block, name)
    return name, basis.product if curvature in ("kfac", "shampoo") else basis.corrected


def mean_eigenvalue(block: Block, curvature: str) -> float:
    """trace(H) / dim in the block's own space."""
    if curvature == "raw" or curvature.startswith("shrunk-"):
        return float(block.train.square().mean())
    return float(eigenvalues(block, curvature)[1].mean())


def influence(
    block: Block, curvature: str, damping: float, whole: bool, alpha: float = 1.0, own: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scores [Q, N] of one layer, and with `own` every row's self-influence [N].

    Args:
        curvature: One of the module's list; the shrunk ones take `alpha`.
        damping: As a multiple of the mean eigenvalue, of the block's own space or of the `whole` layer's.
    """
    if curvature == "identity":
        return block.query_gram, block.train.norms(torch.ones(block.train.shape)) if own else None
    lam = damping * (block.whole_mean if whole else mean_eigenvalue(block, curvature))
    if curvature == "raw":
        return _dual(block.train_gram, block.query_gram, lam, 1.0, own)
    if curvature.startswith("shrunk-"):
        name, values = eigenvalues(block, curvature.removeprefix("shrunk-"))
        weight = 1 / ((1 - alpha) * values + lam)
        train, query = block.weighted(name, weight, (curvature, alpha, lam))
        return _dual(train, query, 1.0, alpha, own)
    name, values = eigenvalues(block, curvature)
    basis, weight = getattr(block, name), 1 / (values + lam)
    return basis.query.gram(basis.train, weight), basis.train.norms(weight) if own else None


def _dual(train: Tensor, query: Tensor, lam: float, alpha: float, own: bool) -> tuple[Tensor, Tensor | None]:
    """q^T (alpha G^T G / N + lambda M)^-1 g by Woodbury, given the Gram matrices G M^-1 G^T and Q M^-1 G^T.

    (lambda M + alpha G^T G / N)^-1 G^T = M^-1 G^T (lambda I + alpha K / N)^-1, K = G M^-1 G^T.
    """
    n = len(train)
    system = train * (alpha / n)
    system.diagonal().add_(lam)
    lower = torch.linalg.cholesky(system)
    scores = torch.cholesky_solve(query.T, lower).T
    return scores, torch.cholesky_solve(train, lower).diagonal() if own else None
