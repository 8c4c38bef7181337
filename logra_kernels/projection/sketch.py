"""C's leading eigenvectors from one pass, for sides too wide for a [d, d] matrix: Nystrom's approximation, turned
towards them again and again.

    Y [l, d] = V C,   V [l, d] some directions, l = 5/2 k,   C ~ S^T S,   S = (V C V^T)^(-1/2) Y
    V := the eigenvectors of S^T S,   Y := V S^T S      whenever the rows since the last time are a quarter of all

Rows cost two products, R V^T and its transpose by R, and a turn is a step of the power method, which as many rows of
new data go into as it takes to be worth it (Tropp et al. 2017, for C from V C; Hardt & Price 2014, for the steps).
With directions that are drawn and never turned, Nystrom's captures 79 to 95 % of the energy of the k leading
eigenvectors of a trained model's activations, whose spectra fall slowly; turned ones capture 99 to 100 %. V is kept in
bf16, since any directions do.
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
_FIRST = 2  # how often the first batch is gone over before it counts
_NONE = 1e-12  # an eigenvalue below so much of the largest is rounding
EXACT = 1024  # sides up to here have their whole C, 4 MB


def moment(dim: int, rank: int, device: torch.device, dtype: torch.dtype) -> Moment:
    """C of a side whose `rank` leading eigenvectors are wanted: whole where that is small, else a sketch."""
    if dim <= max(EXACT, 3 * rank):
        return SecondMoment.zeros(dim, device, dtype)
    return SketchedMoment(dim, rank, device, dtype)


class SketchedMoment(Moment):
    """The sketch, of 15/4 k d numbers of 4 bytes for k of 26 and more.

    Args:
        dim: d.
        rank: k, the most eigenvectors that will be asked for.
    """

    def __init__(self, dim: int, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        self.dim, self.rank, self.device, self.dtype = dim, rank, device, dtype
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        size = min(max(5 * rank // 2, _FEWEST), dim)
        self._v = torch.zeros(size, dim, dtype=torch.bfloat16, device=device)
        self._y = torch.zeros(size, dim, dtype=dtype, device=device)
        self._all = self._since = 0  # rows; and those of them since the last turn

    def add(self, rows: Tensor) -> None:
        self.squares += torch.linalg.vector_norm(rows).double() ** 2
        if not self.isfinite() or not len(rows):
            return
        since = self._since + len(rows) if self._all else 0
        self._take(rows)
        self._since = since
        if self._since * _TURN >= self._all:
            self._turn()

    def _take(self, rows: Tensor) -> None:
        if not self._all:
            self._begin(rows)
        self._sum(rows)
        self._all += len(rows)

    def _begin(self, rows: Tensor) -> None:
        """Directions that suit the first rows: what `_FIRST` steps of the power method make of random ones."""
        self._draw(0)
        for _ in range(_FIRST):
            self._sum(rows)
            self._turn()
            self._y.zero_()

    def _blocks(self, size: int = _FINE) -> Iterator[slice]:
        for start in range(0, self.dim, size):
            yield slice(start, start + size)

    def _draw(self, first: int) -> None:
        """Draw the directions from `first` on."""
        drawn = torch.Generator(self.device).manual_seed(first)
        for direction in self._v[first:]:
            direction.normal_(std=self.dim**-0.5, generator=drawn)

    def _sum(self, rows: Tensor) -> None:
        """Y += V R^T R."""
        seen = rows.new_zeros(len(rows), len(self._v))
        for at in self._blocks(_BLOCK):
            seen.addmm_(rows[:, at], self._v[:, at].to(rows.dtype).T)
        for at in self._blocks(_BLOCK):
            self._y[:, at].addmm_(seen.T, rows[:, at])

    def _turned(self) -> tuple[Tensor, Tensor]:
        """(A [m, l], s [m]) on the CPU: A Y are the eigenvectors of S^T S times s, the roots of their eigenvalues."""
        size = len(self._v)
        core = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        gram = torch.zeros_like(core)
        for at in self._blocks():
            y = self._y[:, at].double()
            core.addmm_(y, self._v[:, at].double().T)
            gram.addmm_(y, y.T)
        core, gram = core.cpu(), gram.cpu()
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        found = values > _NONE * values[-1]
        half = vectors[:, found] / values[found].sqrt()
        values, vectors = torch.linalg.eigh(half.T @ gram @ half)
        found = values > _NONE * values[-1:]
        return (half @ vectors[:, found].flip(1)).T, values[found].flip(0).sqrt()

    def _turn(self) -> None:
        a, roots = (one.to(self.device) for one in self._turned())
        found = len(roots)
        core = torch.zeros(len(self._v), found, dtype=torch.float64, device=self.device)
        self._draw(found)
        for at in self._blocks():
            s = a @ self._y[:, at].double()
            self._v[:found, at] = (s / roots[:, None]).to(self._v.dtype)
            self._y[:found, at] = s.to(self.dtype)
            core.addmm_(self._v[:, at].double(), s.T)
        for at in self._blocks():
            self._y[:, at] = (core @ self._y[:found, at].double()).to(self.dtype)
        self._since = 0

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
        a = a.to(self.device)
        for at in self._blocks():
            into[: len(a), at] = (a @ self._y[:, at].double()).to(self.dtype)

    def join(self, parts: Sequence[Tensor]) -> None:
        rows, squares = parts
        self.squares += squares
        self._take(rows)
        self._turn()

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
