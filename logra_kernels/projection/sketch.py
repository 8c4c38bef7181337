"""C's leading eigenvectors from one pass, for sides too wide for a [d, d] matrix: a truncated SVD that goes on.

    S [l, d] with S^T S ~ C, l = 3 k:   S := the l leading rows of U^T [S; R], where [S; R] [S; R]^T = U diag(s^2) U^T

(Levy & Lindenbaum 2000; Ross et al. 2008, without the mean.) Spectra of activations fall too slowly for a sketch that
is drawn beforehand: on a trained model's MLPs Nystrom's captures 79 to 95 % of the energy of the k leading
eigenvectors, this one 99.5 to 100 %. S is rotated in place, so beside the batch only S and what is returned is held.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from logra_kernels.projection.moment import Moment, SecondMoment
from logra_kernels.projection.normal import normals

_BLOCK = 1024  # features that are turned at a time
_ROWS = 256  # that are taken in at a time, at least: each time costs an eigendecomposition
EXACT = 1024  # sides up to here have their whole C, 4 MB


def moment(dim: int, rank: int, device: torch.device, dtype: torch.dtype) -> Moment:
    """C of a side whose `rank` leading eigenvectors are wanted: whole where that is small, else a sketch."""
    if dim <= max(EXACT, 3 * rank):
        return SecondMoment.zeros(dim, device, dtype)
    return SketchedMoment(dim, rank, device, dtype)


class SketchedMoment(Moment):
    """The sketch. Another's S is a batch of rows like any other, which is how two are joined.

    Args:
        dim: d.
        rank: k, the most eigenvectors that will be asked for.
    """

    def __init__(self, dim: int, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        self.dim, self.rank, self.device, self.dtype = dim, rank, device, dtype
        self.rows = torch.zeros(min(3 * rank, dim), dim, dtype=dtype, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        self.squares += torch.linalg.vector_norm(rows).double() ** 2
        for part in rows.split(max(len(self.rows), _ROWS)):
            self._absorb(part)

    def _absorb(self, part: Tensor) -> None:
        s = self.rows
        cross = s @ part.T
        gram = torch.cat([torch.cat([s @ s.T, cross], 1), torch.cat([cross.T, part @ part.T], 1)]).double()
        if not bool(gram.isfinite().all()):
            return  # said by `isfinite`
        turn = torch.linalg.eigh(gram)[1].flip(1)[:, : len(s)].T.to(s.dtype)
        mine, new = turn[:, : len(s)].contiguous(), turn[:, len(s) :].contiguous()
        for start in range(0, self.dim, _BLOCK):
            at = slice(start, start + _BLOCK)
            s[:, at] = mine @ s[:, at] + new @ part[:, at]

    def trace(self) -> float:
        return float(self.squares)

    @property
    def parts(self) -> list[Tensor]:
        return [self.rows, self.squares]

    def join(self, parts: Sequence[Tensor]) -> None:
        rows, squares = parts
        self.squares += squares
        self._absorb(rows)

    def isfinite(self) -> bool:
        return bool(self.squares.isfinite())

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        if k > self.rank:
            raise ValueError(f"sketch: it was made for {self.rank} eigenvectors; {k} cannot be asked for")
        found = self.rows[:k].clone()
        size = torch.linalg.vector_norm(found, dim=1)
        for i in (size <= 1e-6 * size.max()).nonzero()[:, 0].tolist():  # fewer directions were seen than are asked for
            found[i] = normals(f"sketch/{i}", self.dim, self.device)
        found /= torch.linalg.vector_norm(found, dim=1, keepdim=True)
        for _ in range(2):  # the second time takes away what rounding left
            lower = torch.linalg.cholesky((found @ found.T).double())
            inverse = torch.linalg.solve_triangular(
                lower, torch.eye(k, dtype=lower.dtype, device=lower.device), upper=False
            )
            for start in range(0, self.dim, _BLOCK):
                at = slice(start, start + _BLOCK)
                found[:, at] = inverse.to(found.dtype) @ found[:, at]
        return found.cpu(), size.double().square().cpu()
