"""A curvature that can be solved with: per layer the Cholesky factor of H + lambda I, never an inverse.

solve(g) = (H + lambda I)^-1 g        quadratic(g) = g^T (H + lambda I)^-1 g = |L^-1 g|^2, L L^T = H + lambda I
"""

import torch
from torch import Tensor

from logra_kernels.errors import LograError

RELATIVE_DAMPING = 0.1  # of the mean eigenvalue (Choe et al. 2024, appendix; Grosse et al. 2023)


class Factor:
    """Factorised block-diagonal curvature, one block a layer, in fp64.

    Args:
        blocks: Layer name -> H, [d, d], in the order of the rows' columns.
        damping: lambda, absolute and the same for every layer; None for 0.1 x each layer's mean eigenvalue, trace / d.

    Raises:
        LograError: A layer's gradients are all zero, or H + lambda I is not positive definite, or damping is negative.
    """

    def __init__(self, blocks: dict[str, Tensor], damping: float | None = None) -> None:
        if damping is not None and damping < 0:
            raise LograError(f"curvature: damping is {damping}; it must not be negative")
        self.damping: dict[str, float] = {}
        self._lower: dict[str, Tensor] = {}
        for name, block in blocks.items():
            h = block.double()
            mean_eigenvalue = float(h.diagonal().mean())
            if mean_eigenvalue == 0.0:
                raise LograError(f"curvature: all stored gradients of layer {name!r} are zero; exclude it")
            added = RELATIVE_DAMPING * mean_eigenvalue if damping is None else damping
            lower, failed = torch.linalg.cholesky_ex(h + added * torch.eye(len(h), dtype=h.dtype, device=h.device))
            if failed:
                raise LograError(
                    f"curvature: H + {added:g} I of layer {name!r} is not positive definite; use a larger damping"
                )
            self.damping[name], self._lower[name] = added, lower

    def solve(self, rows: Tensor) -> Tensor:
        """(H + lambda I)^-1 applied to every row; [Q, D] -> [Q, D] fp32."""
        parts = [torch.cholesky_solve(part.T, lower).T for part, lower in self._split(rows)]
        return torch.cat(parts, dim=1).float()

    def quadratic(self, rows: Tensor) -> Tensor:
        """g^T (H + lambda I)^-1 g of every row, summed over layers; [N, D] -> [N] fp64."""
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for part, lower in self._split(rows):
            total += torch.linalg.solve_triangular(lower, part.T, upper=False).square().sum(0)
        return total

    def _split(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        widths = [len(lower) for lower in self._lower.values()]
        if rows.dim() != 2 or rows.shape[1] != sum(widths):
            raise ValueError(f"curvature: rows {tuple(rows.shape)} must be [N, {sum(widths)}]")
        parts = rows.split(widths, dim=1)
        return [
            (part.to(lower.device).double(), lower) for part, lower in zip(parts, self._lower.values(), strict=True)
        ]
