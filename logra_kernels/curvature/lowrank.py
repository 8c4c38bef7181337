"""The raw Fisher cut to its r largest eigenvalues: H ~ V diag(s) V^T, solved with by the Woodbury identity (LoRIF).

    (H + lambda I)^-1 g = V (1 / (s + lambda) - 1 / lambda) V^T g + g / lambda

V and s are the truncated singular vectors and squared singular values / N of a layer's rows (LoRIF, arXiv 2601.21929),
found by a randomised subspace iteration that streams over the store: the first pass and every further one multiply the
basis with H and orthonormalise it, the last takes the eigenvalues in it (Halko, Martinsson & Tropp 2011, algorithms 4.4
and 5.3). Memory is D r numbers where H itself has d^2 a layer. lambda is relative to the true trace, of all directions.
"""

from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature.damping import Damping
from logra_kernels.curvature.solver import Solver, SpectralSolver
from logra_kernels.curvature.statistics import KeptCurvature, Progress, blocks_of
from logra_kernels.store import GradientStore, sum_over_ranks

_MORE = 16  # columns beside the r that are asked for, which the iteration needs to find those well


class LowRank(KeptCurvature):
    """H ~ V diag(s) V^T.

    Attributes:
        rank: r of every layer; one with fewer rows or dims has as many as these.
        passes: Over the store, at least 2; more find close eigenvalues better.
        vectors: Layer name -> V, [d, r] fp64.
        values: Layer name -> s, [r] fp64, ascending.
        means: Layer name -> trace(H) / d.
    """

    kind = "lowrank"
    rank = 128
    passes = 2

    def __init__(self, layers: dict[str, tuple[int, int]], rows: int, tensors: dict[str, Tensor]) -> None:
        super().__init__(layers, rows)
        self.vectors = {name: tensors[f"{name}/vectors"] for name in layers}
        self.values = {name: tensors[f"{name}/values"] for name in layers}
        self.means = {name: float(tensors[f"{name}/mean"]) for name in layers}

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
        bases, means = {}, {}
        for name, (k_out, k_in) in store.layers.items():
            d = k_out * k_in
            columns = min(cls.rank + _MORE, d, len(store))
            bases[name] = torch.randn(d, columns, generator=generator, dtype=torch.float64)
            means[name] = torch.zeros((), dtype=torch.float64)
        for turn in range(cls.passes - 1):
            images = {name: torch.zeros_like(basis) for name, basis in bases.items()}
            for layers in blocks_of(store, progress if turn == 0 else None):
                for name, rows in layers.items():
                    wide = rows.double()
                    images[name].addmm_(wide.T, wide @ bases[name])
                    if turn == 0:
                        means[name] += wide.square().sum() / (len(store) * len(bases[name]))
            sum_over_ranks(store, [*images.values(), *(means.values() if turn == 0 else ())])
            bases = {name: torch.linalg.qr(image).Q for name, image in images.items()}
        inside = {name: basis.new_zeros(basis.shape[1], basis.shape[1]) for name, basis in bases.items()}
        for layers in blocks_of(store, None):
            for name, rows in layers.items():
                turned = rows.double() @ bases[name]
                inside[name].addmm_(turned.T, turned, alpha=1 / len(store))
        sum_over_ranks(store, inside.values())
        tensors: dict[str, Tensor] = {}
        for name, basis in bases.items():
            values, vectors = torch.linalg.eigh(inside[name])
            tensors[f"{name}/vectors"] = basis @ vectors[:, -cls.rank :]
            tensors |= {f"{name}/values": values[-cls.rank :].clamp_min(0), f"{name}/mean": means[name]}
        return cls(store.layers, len(store), tensors)

    @classmethod
    def restore(cls, store: GradientStore, tensors: dict[str, Tensor]) -> Self:
        return cls(store.layers, len(store), tensors)

    def state(self) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for name, vectors in self.vectors.items():
            kept |= {f"{name}/vectors": vectors, f"{name}/values": self.values[name]}
            kept[f"{name}/mean"] = torch.tensor(self.means[name], dtype=torch.float64)
        return kept

    def solver(self, layer: str, damping: Damping) -> Solver:
        added = damping.value(layer, self.means[layer])
        vectors = self.vectors[layer]
        return SpectralSolver(layer, vectors, self.values[layer], added, spanning=vectors.shape[1] >= self.rows)
