"""The raw projected Fisher: H = mean over stored rows of g g^T, per layer (Choe et al. 2024, section 3.1)."""

from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature.blocks import width_of
from logra_kernels.curvature.solver import CholeskySolver, Solver, SpectralSolver
from logra_kernels.curvature.statistics import thin_rows
from logra_kernels.curvature.summed import SummedCurvature
from logra_kernels.curvature.sums import GramSums, Progress
from logra_kernels.store import GradientStore


class RawFisher(SummedCurvature):
    """Second moment of each block's projected gradients.

    A block with at least as many rows as dims is kept as H, [d, d]. One with fewer is kept as its rows, and solved with
    by the eigenvectors that the N x N products of the rows give (the dual, or Woodbury, form): exact, and cheaper.

    Attributes:
        blocks: Block name -> H, [d, d], symmetric; of the blocks with at least as many rows as dims.
        thin: Block name -> rows [N, d] fp32; of the others.
    """

    kind = "raw"
    dtype = torch.float32  # that sums are kept and products taken in

    def __init__(
        self, layers: dict[str, tuple[int, int]], rows: int, blocks: dict[str, Tensor], thin: dict[str, Tensor]
    ) -> None:
        super().__init__(layers, rows)
        self.blocks = blocks
        self.thin = thin

    @classmethod
    def empty(cls, store: GradientStore, rows: int | None = None) -> GramSums:
        columns = cls.columns(store.layers)
        return GramSums({b: part for b, part in columns.items() if rows is None or width_of(part) <= rows}, cls.dtype)

    @classmethod
    def of_sums(cls, store: GradientStore, sums: dict[str, Tensor], progress: Progress | None) -> Self:
        blocks = {name: total.div_(len(store)) for name, total in sums.items()}
        missing = {name: part for name, part in cls.columns(store.layers).items() if name not in blocks}
        return cls(store.layers, len(store), blocks, thin_rows(store, missing, None if blocks else progress))

    def least(self, block: str) -> float:
        return torch.finfo(self.dtype).tiny if block in self.blocks else 0.0

    def diagonal(self, block: str) -> Tensor:
        if block in self.blocks:
            return self.blocks[block].diagonal()
        return self.thin[block].double().square().sum(0) / self.rows

    def damped(self, block: str, added: float) -> Solver:
        if block in self.blocks:
            return CholeskySolver(block, self.blocks[block], added)
        rows = self.thin[block].double() / self.rows**0.5
        values, left = torch.linalg.eigh(rows @ rows.T)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        vectors = rows.T @ (left[:, kept] / values[kept].sqrt())
        return SpectralSolver(block, vectors, values[kept], added, spanning=True)


class RawFisher64(RawFisher):
    """The same with products, sums and solves in fp64."""

    kind = "raw-fp64"
    dtype = torch.float64
    exact = True
