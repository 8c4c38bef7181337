"""The raw projected Fisher: H = mean over stored rows of g g^T, per layer (Choe et al. 2024, section 3.1)."""

from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature.damping import Damping
from logra_kernels.curvature.solver import CholeskySolver, Solver, SpectralSolver
from logra_kernels.curvature.statistics import Curvature, Progress, blocks_of
from logra_kernels.ops import accumulate_gram
from logra_kernels.store import GradientStore


class RawFisher(Curvature):
    """Second moment of each layer's projected gradients.

    A layer with at least as many rows as dims is kept as H, [d, d]. One with fewer is kept as its rows, and solved with
    by the eigenvectors that the N x N products of the rows give (the dual, or Woodbury, form): exact, and cheaper.

    Attributes:
        blocks: Layer name -> H, [d, d] fp32, symmetric; of the layers with at least as many rows as dims.
        thin: Layer name -> rows [N, d] fp32; of the others.
    """

    kind = "raw"

    def __init__(
        self, layers: dict[str, tuple[int, int]], rows: int, blocks: dict[str, Tensor], thin: dict[str, Tensor]
    ) -> None:
        super().__init__(layers, rows)
        self.blocks = blocks
        self.thin = thin

    @classmethod
    def measure(cls, store: GradientStore, progress: Progress | None) -> Self:
        widths = {name: k_out * k_in for name, (k_out, k_in) in store.layers.items()}
        blocks = {name: torch.zeros(d, d) for name, d in widths.items() if d <= len(store)}
        parts: dict[str, list[Tensor]] = {name: [] for name in widths if name not in blocks}
        for layers in blocks_of(store, progress):
            for name, rows in layers.items():
                if name in blocks:
                    accumulate_gram(rows, blocks[name])
                else:
                    parts[name].append(rows.float())
        for block in blocks.values():
            block /= len(store)
        return cls(store.layers, len(store), blocks, {name: torch.cat(rows) for name, rows in parts.items()})

    @classmethod
    def restore(cls, store: GradientStore, tensors: dict[str, Tensor]) -> Self:
        missing = [name for name in store.layers if name not in tensors]
        thin = {
            name: torch.cat([rows[:, store.slices[name]].float() for _, rows in store.blocks()]) for name in missing
        }
        return cls(store.layers, len(store), {n: tensors[n] for n in store.layers if n in tensors}, thin)

    def state(self) -> dict[str, Tensor]:
        return self.blocks

    def solver(self, layer: str, damping: Damping) -> Solver:
        if layer in self.blocks:
            h = self.blocks[layer]
            return CholeskySolver(layer, h, damping.value(layer, float(h.double().diagonal().mean())))
        rows = self.thin[layer].double() / self.rows**0.5
        added = damping.value(layer, float(rows.square().sum()) / rows.shape[1])
        values, left = torch.linalg.eigh(rows @ rows.T)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        vectors = rows.T @ (left[:, kept] / values[kept].sqrt())
        return SpectralSolver(layer, vectors, values[kept], added, spanning=True)
