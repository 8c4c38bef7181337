"""The raw Fisher cut to its r largest eigenvalues: H ~ V diag(s) V^T, solved with by the Woodbury identity (LoRIF).

    (H + lambda I)^-1 g = V (1 / (s + lambda) - 1 / lambda) V^T g + g / lambda

V and s are the truncated singular vectors and squared singular values / N of a layer's rows (LoRIF, arXiv 2601.21929),
found by a randomised subspace iteration that streams over the store: the first pass and every further one multiply the
basis with H and orthonormalise it, the last takes the eigenvalues in it (Halko, Martinsson & Tropp 2011, algorithms 4.4
and 5.3). Memory is D r numbers where H itself has d^2 a block. lambda is relative to the true trace, of all directions.

It is no sum over rows: appended or deleted rows have it made anew.
"""

from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature.blocks import width_of
from logra_kernels.curvature.solver import Solver, SpectralSolver
from logra_kernels.curvature.statistics import KeptCurvature, blocks_of
from logra_kernels.curvature.sums import Progress
from logra_kernels.store import GradientStore, sum_over_ranks

_MORE = 16  # columns beside the r that are asked for, which the iteration needs to find those well


class LowRank(KeptCurvature):
    """H ~ V diag(s) V^T.

    Attributes:
        rank: r of every block; one with fewer rows or dims has as many as these.
        passes: Over the store, at least 2; more find close eigenvalues better.
        vectors: Block name -> V, [d, r] fp64.
        values: Block name -> s, [r] fp64, ascending.
        diagonals: Block name -> that of the whole H, [d] fp64.
    """

    kind = "lowrank"
    rank = 128
    passes = 2

    def __init__(self, layers: dict[str, tuple[int, int]], rows: int, tensors: dict[str, Tensor]) -> None:
        super().__init__(layers, rows)
        self.vectors, self.values, self.diagonals = (
            {name: tensors[f"{name}/{what}"] for name in self.members} for what in ("vectors", "values", "diagonal")
        )

    @classmethod
    def of_rank(cls, rank: int, passes: int = 2) -> type["LowRank"]:
        """This curvature at another rank or with more passes, to be given to `Run(curvature=...)`.

        Raises:
            ValueError: rank < 1 or passes < 2.
        """
        if rank < 1 or passes < 2:
            raise ValueError(f"LowRank: rank is {rank} and passes {passes}; they must be at least 1 and 2")
        return type("LowRank", (cls,), {"rank": rank, "passes": passes, "kind": f"lowrank-{rank}-{passes}"})

    @classmethod
    def measure(cls, store: GradientStore, progress: Progress | None) -> Self:
        generator = torch.Generator().manual_seed(0)
        parts, bases, diagonals = cls.columns(store.layers), {}, {}
        for name, part in parts.items():
            d = width_of(part)
            columns = min(cls.rank + _MORE, d, len(store))
            bases[name] = torch.randn(d, columns, generator=generator, dtype=torch.float64, device="cpu")
            diagonals[name] = torch.zeros(d, dtype=torch.float64, device="cpu")
        for turn in range(cls.passes - 1):
            images = {name: torch.zeros_like(basis) for name, basis in bases.items()}
            for blocks in blocks_of(store, parts, progress if turn == 0 else None):
                for name, rows in blocks.items():
                    wide = rows.double()
                    images[name].addmm_(wide.T, wide @ bases[name])
                    if turn == 0:
                        diagonals[name] += wide.square().sum(0) / len(store)
            sum_over_ranks(store, [*images.values(), *(diagonals.values() if turn == 0 else ())])
            bases = {name: torch.linalg.qr(image).Q for name, image in images.items()}
        inside = {name: basis.new_zeros(basis.shape[1], basis.shape[1]) for name, basis in bases.items()}
        for blocks in blocks_of(store, parts, None):
            for name, rows in blocks.items():
                turned = rows.double() @ bases[name]
                inside[name].addmm_(turned.T, turned, alpha=1 / len(store))
        sum_over_ranks(store, inside.values())
        tensors: dict[str, Tensor] = {}
        for name, basis in bases.items():
            values, vectors = torch.linalg.eigh(inside[name])
            tensors[f"{name}/vectors"] = basis @ vectors[:, -cls.rank :]
            tensors |= {f"{name}/values": values[-cls.rank :].clamp_min(0), f"{name}/diagonal": diagonals[name]}
        return cls(store.layers, len(store), tensors)

    @classmethod
    def restore(cls, store: GradientStore, tensors: dict[str, Tensor]) -> Self:
        return cls(store.layers, len(store), tensors)

    def state(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for name, vectors in self.vectors.items():
            kept |= {f"{name}/vectors": vectors, f"{name}/values": self.values[name]}
            kept[f"{name}/diagonal"] = self.diagonals[name]
        return kept

    def diagonal(self, block: str) -> Tensor:
        return self.diagonals[block]

    def damped(self, block: str, added: float) -> Solver:
        vectors = self.vectors[block]
        return SpectralSolver(block, vectors, self.values[block], added, spanning=vectors.shape[1] >= self.rows)
