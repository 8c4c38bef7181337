"""A whole curvature that can be solved with: one solver a layer, side by side as the rows' columns are.

solve(g) = (H + lambda I)^-1 g        quadratic(g) = g^T (H + lambda I)^-1 g        whiten(g) = (H + lambda I)^-1/2 g
"""

import json

import torch
import xxhash
from torch import Tensor

from logra_kernels.curvature.solver import Solver
from logra_kernels.store import GradientStore


class Factor:
    """Factorised block-diagonal curvature.

    Args:
        solvers: Layer name -> its solver, in the order of the rows' columns.
        curvature: Hash of what the curvature was computed from.
        rows: `content_hash` of the store it is of.

    Attributes:
        damping: Layer name -> the lambda that was added.
        hash: Of the curvature and every lambda: equal hashes give equal answers.
    """

    def __init__(self, solvers: dict[str, Solver], curvature: str = "", rows: str = "") -> None:
        self._solvers = solvers
        self._rows = rows
        self.damping = {name: solver.damping for name, solver in solvers.items()}
        facts = json.dumps([curvature, sorted(self.damping.items())])
        self.hash = xxhash.xxh3_128(facts.encode()).hexdigest()
        self._widths = [solver.width for solver in solvers.values()]

    def check(self, store: GradientStore) -> None:
        """Raise ValueError if this is the curvature of another store's rows."""
        if self._rows and self._rows != store.content_hash:
            raise ValueError(
                f"curvature: this factor is of other rows than {store.path} holds now; make it from this store"
            )

    def solve(self, rows: Tensor) -> Tensor:
        """(H + lambda I)^-1 applied to every row; [Q, D] -> [Q, D] fp32."""
        return torch.cat([solver.power(part, -1).float() for part, solver in self._split(rows)], dim=1)

    def solve_toward_stored(self, rows: Tensor) -> Tensor:
        """`solve`, to be multiplied with stored rows alone: less what no product with a stored row can see.

        With fewer rows than dims the products come out sharper by orders of magnitude in fp32.
        """
        return torch.cat([solver.toward_stored(part).float() for part, solver in self._split(rows)], dim=1)

    def whiten(self, rows: Tensor) -> Tensor:
        """(H + lambda I)^-1/2 applied to every row; [N, D] -> [N, D] fp32. Products of whitened rows are influences."""
        return torch.cat([solver.power(part, -0.5).float() for part, solver in self._split(rows)], dim=1)

    def quadratic(self, rows: Tensor) -> Tensor:
        """g^T (H + lambda I)^-1 g of every row, summed over layers; [N, D] -> [N] fp64."""
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for part, solver in self._split(rows):
            total += solver.quadratic(part)
        return total

    def _split(self, rows: Tensor) -> list[tuple[Tensor, Solver]]:
        if rows.dim() != 2 or rows.shape[1] != sum(self._widths):
            raise ValueError(f"curvature: rows {tuple(rows.shape)} must be [N, {sum(self._widths)}]")
        parts = rows.split(self._widths, dim=1)
        return [(part.to(solver.dtype), solver) for part, solver in zip(parts, self._solvers.values(), strict=True)]
