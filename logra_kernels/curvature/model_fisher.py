"""The Fisher under the model's own predictions: H = mean of g g^T over gradients with labels from the model.

For a softmax cross-entropy it is the generalised Gauss-Newton matrix, which is the Hessian of a linear model (Martens
2020), and what influence functions ask for; the raw Fisher, of the true labels, is another matrix wherever the model
fits its data well. It is not the stored rows' but that of gradients which `Run.observe_fisher` sees.
"""

from collections.abc import Mapping
from typing import Self

import torch
import xxhash
from torch import Tensor

from logra_kernels.curvature.blocks import width_of
from logra_kernels.curvature.solver import CholeskySolver, Solver, Spanned
from logra_kernels.curvature.statistics import Curvature, thin_rows, unobserved
from logra_kernels.curvature.sums import GramSums, Progress, RowSums
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore, keep_observed, observed

_COUNT = "/gradients"


class ModelFisher(Curvature):
    """H = mean over observed gradients of g g^T.

    Attributes:
        blocks: Block name -> H, [d, d].
        thin: Block name -> the stored rows, [N, d] fp32; of the blocks with more dims than those.
    """

    kind = "fisher"
    dtype = torch.float32  # that sums are kept and products taken in

    def __init__(
        self, layers: dict[str, tuple[int, int]], rows: int, blocks: dict[str, Tensor], thin: dict[str, Tensor]
    ) -> None:
        super().__init__(layers, rows)
        self.blocks = blocks
        self.thin = thin

    @classmethod
    def sidecar(cls) -> str:
        """Name of what is kept of it beside the store."""
        return f"model-{cls.kind}"

    @classmethod
    def empty(cls, layers: Mapping[str, tuple[int, int]]) -> GramSums:
        """Sums over no gradients yet; layers: name -> (k_out, k_in)."""
        return GramSums(cls.columns(layers), cls.dtype)

    @classmethod
    def keep(cls, store: GradientStore, sums: RowSums) -> None:
        """Keep sums over observed gradients beside the store whose layers and projection they share."""
        keep_observed(store, cls.sidecar(), {**sums.total(), _COUNT: torch.tensor(sums.rows, device="cpu")})

    @classmethod
    def _kept(cls, store: GradientStore) -> tuple[dict[str, Tensor], str]:
        kept = observed(store, cls.sidecar())
        if kept is None:
            raise LograError(
                f"curvature: {store.path} has no Fisher of the model's own predictions: run forward and backward of"
                " training batches, with labels that the model predicts, inside `with run.observe_fisher():` first"
            )
        return kept

    @classmethod
    def key(cls, store: GradientStore) -> str:
        return xxhash.xxh3_128(f"{store.content_hash} {cls._kept(store)[1]}".encode()).hexdigest()

    @classmethod
    def found(cls, store: GradientStore, progress: Progress | None) -> Self:
        sums, _ = cls._kept(store)
        count, columns = int(sums[_COUNT]), cls.columns(store.layers)
        wide = {name: part for name, part in columns.items() if width_of(part) > len(store)}
        blocks = {name: sums[name] / count for name in columns}
        return cls(store.layers, len(store), blocks, thin_rows(store, wide))

    def least(self, block: str) -> float:
        return torch.finfo(self.dtype).tiny

    def diagonal(self, block: str) -> Tensor:
        return self.blocks[block].diagonal()

    def unmeasured(self, layer: str) -> str:
        return unobserved(layer, "observe_fisher")

    def damped(self, block: str, added: float) -> Solver:
        solver = CholeskySolver(block, self.blocks[block], added)
        return Spanned(solver, self.thin[block]) if block in self.thin else solver


class ModelFisher64(ModelFisher):
    """The same with products, sums and solves in fp64."""

    kind = "fisher-fp64"
    dtype = torch.float64
    exact = True
