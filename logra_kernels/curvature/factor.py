"""A whole curvature that can be solved with: one solver a block, each for its columns of the rows.

solve(g) = (H + lambda I)^-1 g        quadratic(g) = g^T (H + lambda I)^-1 g        whiten(g) = (H + lambda I)^-1/2 g
"""

import json
from collections.abc import Callable, Iterator, Mapping

import torch
import xxhash
from torch import Tensor

from logra_kernels.curvature.blocks import Columns, width_of
from logra_kernels.curvature.solver import Solver
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore


class Factor:
    """Factorised block-diagonal curvature.

    Args:
        solvers: Block name -> its solver.
        columns: Block name -> its columns; every column of a row is in one block.
        curvature: Kind, and hash of what the curvature was computed from.
        rows: `content_hash` of the store it is of.

    Attributes:
        damping: Block name -> the lambda that was added.
        hash: Of the curvature and every lambda: equal hashes give equal answers.
    """

    def __init__(
        self, solvers: dict[str, Solver], columns: Mapping[str, Columns], curvature: str = "", rows: str = ""
    ) -> None:
        self._solvers, self._columns = solvers, dict(columns)
        self._rows = rows
        self.damping = {name: solver.damping for name, solver in solvers.items()}
        facts = json.dumps([curvature, sorted(self.damping.items())])
        self.hash = xxhash.xxh3_128(facts.encode()).hexdigest()
        self._dim = sum(width_of(part) for part in columns.values())

    def check(self, store: GradientStore) -> None:
        """Raise ValueError if this is the curvature of another store's rows."""
        if self._rows and self._rows != store.content_hash:
            raise ValueError(
                f"curvature: this factor is of other rows than {store.path} holds now; make it from this store"
            )

    def solve(self, rows: Tensor) -> Tensor:
        """(H + lambda I)^-1 applied to every row; [Q, D] -> [Q, D] fp32.

        Raises:
            LograError: A layer's gradients are so small that the result overflows.
        """
        return self._each(rows, lambda solver, part: solver.power(part, -1))

    def solve_toward_stored(self, rows: Tensor) -> Tensor:
        """`solve`, to be multiplied with stored rows alone: less what no product with a stored row can see.

        With fewer rows than dims the products come out sharper by orders of magnitude in fp32.
        """
        return self._each(rows, lambda solver, part: solver.toward_stored(part))

    def whiten(self, rows: Tensor) -> Tensor:
        """(H + lambda I)^-1/2 applied to every row; [N, D] -> [N, D] fp32. Products of whitened rows are influences."""
        return self._each(rows, lambda solver, part: solver.power(part, -0.5))

    def quadratic(self, rows: Tensor) -> Tensor:
        """g^T (H + lambda I)^-1 g of every row, summed over blocks; [N, D] -> [N] fp64."""
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for _, part, solver in self._split(rows):
            total += solver.quadratic(part)
        return total

    def _each(self, rows: Tensor, apply: Callable[[Solver, Tensor], Tensor]) -> Tensor:
        found = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        for columns, part, solver in self._split(rows):
            found[:, columns] = apply(solver, part).float()
        if not bool(found.isfinite().all()):
            self._explain(rows, found)
        return found

    def _explain(self, rows: Tensor, found: Tensor) -> None:
        """Raise LograError if a finite row was solved to infinity."""
        for name, columns in self._columns.items():
            bad = ~found[:, columns].isfinite().all(1)
            if bool((bad & rows[:, columns].isfinite().all(1)).any()):
                raise LograError(
                    f"curvature: with lambda {self.damping[name]:g} the solve for layer {name!r} overflows fp32: its"
                    " gradients are too small; use a larger damping, or log with the loss times a constant"
                )

    def _split(self, rows: Tensor) -> Iterator[tuple[Columns, Tensor, Solver]]:
        if rows.dim() != 2 or rows.shape[1] != self._dim:
            raise ValueError(f"curvature: rows {tuple(rows.shape)} must be [N, {self._dim}]")
        for name, solver in self._solvers.items():
            columns = self._columns[name]
            yield columns, rows[:, columns].to(solver.dtype), solver
