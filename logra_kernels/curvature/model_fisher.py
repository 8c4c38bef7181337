"""The Fisher under the model's own predictions: H = mean of g g^T over gradients with labels from the model.

For a softmax cross-entropy it is the generalised Gauss-Newton matrix, which is the Hessian of a linear model (Martens
2020), and what influence functions ask for; the raw Fisher, of the true labels, is another matrix wherever the model
fits its data well. It is not the stored rows' but that of gradients which `Run.observe_fisher` sees.
"""

from typing import Self

import xxhash
from torch import Tensor

from logra_kernels.curvature.damping import Damping
from logra_kernels.curvature.gram import GramSums
from logra_kernels.curvature.setting import setting_of
from logra_kernels.curvature.solver import CholeskySolver, Solver
from logra_kernels.curvature.statistics import Curvature, Progress
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore

_SIDECAR = "model-fisher"


def keep_model_fisher(store: GradientStore, sums: GramSums) -> None:
    """Keep sums over observed gradients beside the store whose layers and projection they share, for `ModelFisher`."""
    totals = {name: total.cpu() for name, total in sums.total().items()}
    digest = xxhash.xxh3_128()
    for total in totals.values():
        digest.update(total.numpy().tobytes())
    facts = {"gradients": sums.rows, "hash": digest.hexdigest()}
    store.sidecar_write(_SIDECAR, totals, facts, key=setting_of(store))


def _kept(store: GradientStore) -> tuple[dict[str, Tensor], dict]:
    kept = store.sidecar_read(_SIDECAR, key=setting_of(store))
    if kept is None:
        raise LograError(
            f"curvature: {store.path} has no Fisher of the model's own predictions: run forward and backward of"
            " training batches, with labels that the model predicts, inside `with run.observe_fisher():` first"
        )
    return kept


class ModelFisher(Curvature):
    """H = mean over observed gradients of g g^T.

    Attributes:
        blocks: Layer name -> H, [d, d] fp32.
    """

    kind = "fisher"

    def __init__(self, layers: dict[str, tuple[int, int]], rows: int, blocks: dict[str, Tensor]) -> None:
        super().__init__(layers, rows)
        self.blocks = blocks

    @classmethod
    def key(cls, store: GradientStore) -> str:
        return xxhash.xxh3_128(f"{store.content_hash} {_kept(store)[1]['hash']}".encode()).hexdigest()

    @classmethod
    def found(cls, store: GradientStore, progress: Progress | None) -> Self:
        sums, facts = _kept(store)
        return cls(store.layers, len(store), {name: sums[name] / facts["gradients"] for name in store.layers})

    def solver(self, layer: str, damping: Damping) -> Solver:
        h = self.blocks[layer]
        return CholeskySolver(layer, h, damping.value(layer, float(h.double().diagonal().mean())))
