"""C's leading eigenvectors from one pass, for sides too wide for a [d, d] matrix: Nystrom's approximation, whose
directions are turned towards the rows to come before these are summed.

    Y [l, d] = V C,   V [l, d] some directions, l = 7/3 k,   C ~ S^T S,   S = (V C V^T)^(-1/2) Y
    new rows R:   V := the leading eigenvectors of S^T S + R^T R, as far as V shows them,   Y := V S^T S      (a turn)
                  Y += V R^T R

Summing costs two products, R V^T and its transpose by R. A turn is a step of the power method and costs three, and
a small eigendecomposition; it comes when the rows since the last one are a quarter of all, ever more rarely (Tropp et
al. 2017, for C from V C; Hardt & Price 2014, for the steps). With directions that are drawn and never turned, Nystrom's
captures 79 to 95 % of the energy of the k leading eigenvectors of a trained model's activations, whose spectra fall
slowly; turned ones capture 99 to 100 %. V is kept in bf16, since any directions do.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from logra_kernels.projection.moment import Moment, SecondMoment
from logra_kernels.projection.normal import normals

_BLOCK = 2048  # features that are worked on at a time,
_FINE = 256  # and in fp64
_FEWEST = 64  # directions
_TURN = 4  # a turn comes when the rows since the last one are one in so many
_FIRST = 2  # turns for the first rows, whose directions are drawn
_NONE = 1e-9  # an eigenvalue below so much of the largest is rounding: Y's, which its root would make large
EXACT = 1024  # sides up to here have their whole C, 4 MB


def moment(dim: int, rank: int, device: torch.device, dtype: torch.dtype) -> Moment:
    """C of a side whose `rank` leading eigenvectors are wanted: whole where that is small, else a sketch."""
    if dim <= max(EXACT, 3 * rank):
        return SecondMoment.zeros(dim, device, dtype)
    return SketchedMoment(dim, rank, device, dtype)


class SketchedMoment(Moment):
    """The sketch: 7/2 k d numbers of 4 bytes for k of 28 and more, a third more while it turns.

    Args:
        dim: d.
        rank: k, the most eigenvectors that will be asked for.
    """

    def __init__(self, dim: int, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        self.dim, self.rank, self.device, self.dtype = dim, rank, device, dtype
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        size = min(max(7 * rank // 3, _FEWEST), dim)
        self._v = torch.zeros(size, dim, dtype=torch.bfloat16, device=device)
        self._y = torch.zeros(size, dim, dtype=dtype, device=device)
        self._all = self._since = 0  # rows; and those of them since the last turn

    def add(self, rows: Tensor) -> None:
        self.squares += torch.linalg.vector_norm(rows).double() ** 2
        if self.isfinite() and len(rows):
            self._take(rows)

    def _take(self, rows: Tensor) -> None:
        if not self._all:
            self._draw(self._v, 0)
        steps = 1 if self._all else _FIRST
        self._all += len(rows)
        self._since += len(rows)
        if self._since * _TURN >= self._all:
            self._since = 0
            for _ in range(steps):
                self._turn(rows)
        self._sum(rows, self._seen(rows))

    def _blocks(self, size: int = _FINE) -> Iterator[slice]:
        for start in range(0, self.dim, size):
            yield slice(start, start + size)

    def _draw(self, v: Tensor, first: int) -> None:
        """Draw the directions from `first` on."""
        drawn = torch.Generator(self.device).manual_seed(first)
        for direction in v[first:]:
            direction.normal_(std=self.dim**-0.5, generator=drawn)

    def _seen(self, rows: Tensor) -> Tensor:
        """R V^T."""
        seen = rows.new_zeros(len(rows), len(self._v))
        for at in self._blocks(_BLOCK):
            seen.addmm_(rows[:, at], self._v[:, at].to(rows.dtype).T)
        return seen

    def _sum(self, rows: Tensor, seen: Tensor, sign: int = 1) -> None:
        """Y += V R^T R, or -= where the sign is -1; `seen` is R V^T."""
        for at in self._blocks(_BLOCK):
            self._y[:, at].addmm_(seen.T, rows[:, at], alpha=sign)

    def _root(self) -> Tensor:
        """H [m, l] on the CPU with H Y = S."""
        core = torch.zeros(len(self._v), len(self._v), dtype=torch.float64, device=self.device)
        for at in self._blocks():
            core.addmm_(self._y[:, at].double(), self._v[:, at].double().T)
        core = core.cpu()
        core = (core + core.T) / 2
        lower, failed = torch.linalg.cholesky_ex(core)
        pivots = lower.diagonal().square()
        if not failed and bool(pivots.min() > _NONE * pivots.max()):
            return torch.linalg.solve_triangular(
                lower, torch.eye(len(core), dtype=core.dtype, device="cpu"), upper=False
            )
        values, vectors = torch.linalg.eigh(core)
        found = values > _NONE * values[-1]
        return (vectors[:, found] / values[found].sqrt()).T

    def _turned(self) -> tuple[Tensor, Tensor]:
        """(A [m, l], s [m]): A Y are the eigenvectors of S^T S times s, the roots of their eigenvalues."""
        root = self._root()
        gram = torch.zeros(len(self._v), len(self._v), dtype=torch.float64, device=self.device)
        for at in self._blocks():
            y = self._y[:, at].double()
            gram.addmm_(y, y.T)
        values, vectors = torch.linalg.eigh(root @ gram.cpu() @ root.T)
        found = values > _NONE * values[-1:]
        a, roots = vectors[:, found].flip(1).T @ root, values[found].flip(0).sqrt()
        return a.to(self.device), roots.to(self.device)

    def _turn(self, rows: Tensor) -> None:
        """V := the eigenvectors of S^T S + R^T R, as far as V shows them; Y := V S^T S."""
        before = self._root().to(self.device)
        seen = self._seen(rows)
        self._sum(rows, seen)
        a, roots = self._turned()
        v = torch.empty_like(self._v)
        for at in self._blocks():
            v[: len(a), at] = ((a @ self._y[:, at].double()) / roots[:, None]).to(v.dtype)
        self._draw(v, len(a))
        self._sum(rows, seen, -1)
        core = before.new_zeros(len(v), len(before))
        for at in self._blocks():
            core.addmm_(v[:, at].double(), (before @ self._y[:, at].double()).T)
        turn = core @ before
        for at in self._blocks():
            self._y[:, at] = (turn @ self._y[:, at].double()).to(self.dtype)
        self._v = v

    def trace(self) -> float:
        return float(self.squares)

    @property
    def parts(self) -> list[Tensor]:
        a, _ = self._turned()
        s = torch.zeros_like(self._y)
        self._directions(a, s)
        return [s, self.squares]

    @property
    def numbers(self) -> list[Tensor]:
        return [self._y, self._v, self.squares]

    def _directions(self, a: Tensor, into: Tensor) -> None:
        for at in self._blocks():
            into[: len(a), at] = (a @ self._y[:, at].double()).to(self.dtype)

    def join(self, parts: Sequence[Tensor]) -> None:
        rows, squares = parts
        self.squares += squares
        self._take(rows)

    def isfinite(self) -> bool:
        return bool(self.squares <= torch.finfo(self.dtype).max)  # and then Y is finite

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        if k > self.rank:
            raise ValueError(f"sketch: it was made for {self.rank} eigenvectors; {k} cannot be asked for")
        a, roots = (one[:k] for one in self._turned())
        found = torch.zeros(k, self.dim, dtype=self.dtype, device=self.device)
        self._directions(a, found)
        size = torch.linalg.vector_norm(found, dim=1)
        for i in (size <= 1e-6 * size.max()).nonzero()[:, 0].tolist():  # fewer directions were seen than are asked for
            found[i] = normals(f"sketch/{i}", self.dim, self.device)
        found /= torch.linalg.vector_norm(found, dim=1, keepdim=True)
        for _ in range(2):  # the second time takes away what rounding left
            lower = torch.linalg.cholesky((found @ found.T).double())
            inverse = torch.linalg.solve_triangular(
                lower, torch.eye(k, dtype=lower.dtype, device=lower.device), upper=False
            )
            for at in self._blocks():
                found[:, at] = inverse.to(found.dtype) @ found[:, at]
        values = torch.zeros(k, dtype=torch.float64, device="cpu")
        values[: len(roots)] = roots.square()
        return found.cpu(), values
