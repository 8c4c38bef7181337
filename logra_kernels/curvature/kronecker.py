"""Kronecker-factored curvatures: H is taken to be diagonal in a basis U_out (x) U_in of each layer's gradient matrix.

From the stored rows alone, with G [k_out, k_in] a row's layer:

    L = mean G G^T,  R = mean G^T G,  H ~ L (x) R / trace(L)      exact when H is a Kronecker product
    corrected: in the eigenbasis of L (x) R, s[o,i] = mean (U_out^T G U_in)[o,i]^2      (George et al. 2018, EKFAC)

L and R are sums over rows, kept and gone on from as rows come and go. The corrected eigenvalues are a sum in a basis
that moves with the rows, so they are taken anew, in one pass. L and R are what Shampoo keeps (Gupta et al. 2018); KFAC
takes the same two factors over positions instead of over whole samples (Martens & Grosse 2015).
"""

from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature.solver import KroneckerSolver, Solver
from logra_kernels.curvature.statistics import Curvature, KeptCurvature, blocks_of
from logra_kernels.curvature.summed import SummedCurvature
from logra_kernels.curvature.sums import Progress, RowSums, SideSums
from logra_kernels.store import GradientStore, sum_over_ranks


class Rotated(Curvature):
    """H = (U_out (x) U_in) diag(values) (U_out (x) U_in)^T for each layer.

    Attributes:
        bases: Layer name -> (U_out [k_out, k_out], U_in [k_in, k_in]) fp64, eigenvectors in columns.
        values: Layer name -> eigenvalues in that basis, [k_out, k_in] fp64.
    """

    joins = False

    def __init__(
        self,
        layers: dict[str, tuple[int, int]],
        rows: int,
        bases: dict[str, tuple[Tensor, Tensor]],
        values: dict[str, Tensor],
    ) -> None:
        super().__init__(layers, rows)
        # copies: BLAS rounds by layout and alignment, and a basis read from a file must give the bits of a new one
        self.bases = {name: (_copy(u_out), _copy(u_in)) for name, (u_out, u_in) in bases.items()}
        self.values = values

    def diagonal(self, block: str) -> Tensor:
        return self.values[block].flatten()

    def damped(self, block: str, added: float) -> Solver:
        return KroneckerSolver(block, *self.bases[block], self.values[block], added)


class KeptRotated(Rotated, KeptCurvature):
    """One whose bases and values are kept."""

    @classmethod
    def restore(cls, store: GradientStore, tensors: dict[str, Tensor]) -> Self:
        bases = {name: (tensors[f"{name}/out"], tensors[f"{name}/in"]) for name in store.layers}
        return cls(store.layers, len(store), bases, {name: tensors[f"{name}/values"] for name in store.layers})

    def state(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for name, (u_out, u_in) in self.bases.items():
            kept |= {f"{name}/out": u_out, f"{name}/in": u_in, f"{name}/values": self.values[name]}
        return kept


class Kronecker(Rotated, SummedCurvature):
    """H ~ L (x) R / trace(L), from the rows."""

    kind = "kronecker"

    @classmethod
    def empty(cls, store: GradientStore, rows: int | None = None) -> RowSums:
        return SideSums(store.layers, store.slices)

    @classmethod
    def of_sums(cls, store: GradientStore, sums: dict[str, Tensor], progress: Progress | None) -> Self:
        bases, values = {}, {}
        for name in store.layers:
            (s_out, u_out), (s_in, u_in) = (
                torch.linalg.eigh(sums[f"{name}/{side}"] / len(store)) for side in ("out", "in")
            )
            bases[name] = u_out, u_in
            trace = s_out.sum().clamp_min(torch.finfo(torch.float64).tiny)
            values[name] = s_out.clamp_min(0)[:, None] * s_in.clamp_min(0)[None, :] / trace
        return cls(store.layers, len(store), bases, values)


class CorrectedKronecker(KeptRotated):
    """The same basis with the eigenvalues that the rows really have in it: the best diagonal in Frobenius norm."""

    kind = "corrected-kronecker"

    @classmethod
    def measure(cls, store: GradientStore, progress: Progress | None) -> Self:
        bases = Kronecker.of(store).bases
        return cls(store.layers, len(store), bases, corrected_values(store, bases, progress))


def _copy(basis: Tensor) -> Tensor:
    return basis.clone(memory_format=torch.contiguous_format)


def corrected_values(
    store: GradientStore, bases: dict[str, tuple[Tensor, Tensor]], progress: Progress | None
) -> dict[str, Tensor]:
    """s[o,i] = mean over rows of (U_out^T G U_in)[o,i]^2 for every layer, [k_out, k_in] fp64, in one streaming pass."""
    values = {name: torch.zeros(shape, dtype=torch.float64, device="cpu") for name, shape in store.layers.items()}
    for layers in blocks_of(store, store.slices, progress):
        for name, rows in layers.items():
            u_out, u_in = bases[name]
            turned = u_out.T @ rows.double().unflatten(1, store.layers[name]) @ u_in
            values[name] += turned.square().sum(0) / len(store)
    sum_over_ranks(store, values.values())
    return values
