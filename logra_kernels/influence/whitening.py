"""Rows whitened by a curvature: w = (H + lambda I)^-1/2 g, and the answers that a store of them gives."""

import torch
from torch import Tensor

from logra_kernels.curvature import Curvature, Damping, Factor
from logra_kernels.curvature.blocks import columns_of
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore, Whitening


def whitening_of(curvature: Curvature, damping: float | Damping | None = None) -> Whitening:
    """The map that whitens the rows which the curvature is of, for `store.quantize`.

    Args:
        curvature: Of a store with raw rows.
        damping: As in `Curvature.factorize`.

    Raises:
        LograError: As there, or a block of the curvature has several layers, or a layer's gradients are too small.
    """
    joined = [block for block, layers in curvature.members.items() if layers != [block]]
    if joined:
        raise LograError(f"whitening: block {joined[0]!r} has several layers; rows are whitened layer by layer")
    chosen = Damping.of(damping, curvature.spread)
    solvers = {layer: curvature.solver(layer, chosen) for layer in curvature.layers}
    maps = {
        layer: solver.power(torch.eye(solver.width, dtype=solver.dtype, device="cpu"), -0.5).float().contiguous()
        for layer, solver in solvers.items()
    }
    small = next((layer for layer, one in maps.items() if not bool(one.isfinite().all())), None)
    if small is not None:
        raise LograError(f"whitening: the gradients of layer {small!r} are so small that its map overflows fp32")
    factor = Factor(solvers, columns_of(curvature.layers, curvature.members), f"{curvature.kind} {curvature.hash}")
    return Whitening(maps, {"curvature": curvature.kind, "damping": str(chosen), "factor": factor.hash})


class WhitenedFactor(Factor):
    """The curvature that a store's rows are whitened by: what is solved for is raw, what is measured is whitened."""

    def __init__(self, store: GradientStore, whitening: Whitening) -> None:
        super().__init__({}, {}, whitening.digest, store.content_hash)
        self._whitening = whitening

    def solve(self, rows: Tensor) -> Tensor:
        """(H + lambda I)^-1 applied to every raw row; [Q, D] -> [Q, D] fp32."""
        return self._whitening.solve(rows)

    def solve_toward_stored(self, rows: Tensor) -> Tensor:
        """What raw rows must be for their products with stored rows to be influences, [Q, D] -> [Q, D] fp32."""
        return self._whitening.apply(rows)

    def whiten(self, rows: Tensor) -> Tensor:
        return self._whitening.apply(rows)

    def quadratic(self, rows: Tensor) -> Tensor:
        """g^T (H + lambda I)^-1 g of every stored row, [N, D] -> [N] fp64."""
        return self.parts(rows).sum(1)

    def parts(self, rows: Tensor) -> Tensor:
        """`quadratic` before the sum over columns, [N, D] fp64."""
        return rows.double().square()


def whitened_factor(store: GradientStore, kind: str, damping: float | Damping | None) -> WhitenedFactor | None:
    """The factor of a store with whitened rows; None of one with raw rows.

    Args:
        kind, damping: What is asked for.

    Raises:
        LograError: The rows are whitened by another curvature or damping.
    """
    whitening = store.whitening
    if whitening is None:
        return None
    asked = {"curvature": kind} | ({} if damping is None else {"damping": str(Damping.of(damping))})
    differs = [f"{name} {whitening.facts[name]}" for name in asked if asked[name] != whitening.facts[name]]
    if differs:
        wanted = ", ".join(f"{name} {value}" for name, value in asked.items())
        raise LograError(
            f"the rows of {store.path} are whitened by {', '.join(differs)}, and {wanted} was asked for;"
            " ask with theirs, or ask the store that they were made from"
        )
    return WhitenedFactor(store, whitening)
