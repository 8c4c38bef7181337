"""KFAC and EKFAC: the Kronecker basis of the activations' and the output gradients' covariances over positions.

    A = mean_t (P_in x)(P_in x)^T,  B = mean_t (P_out dy)(P_out dy)^T,  H ~ (positions / samples) B (x) A
    EKFAC: eigenvalues mean over rows of (U_out^T G U_in)^2 in the same basis

(Martens & Grosse 2015; George et al. 2018; Grosse et al. 2023.) Positions are treated as independent, KFAC's expand
setting (Eschenhagen et al. 2023).

With P = identity these are the unprojected KFAC and EKFAC.
"""

from typing import Self

import torch
import xxhash
from torch import Tensor

from logra_kernels.curvature.kronecker import KeptRotated, corrected_values
from logra_kernels.curvature.statistics import unobserved
from logra_kernels.curvature.sums import Progress
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore, keep_observed, observed

COVARIANCES = "covariances"


def keep_covariances(
    store: GradientStore, sums: dict[str, tuple[Tensor, Tensor]], positions: dict[str, int], samples: int
) -> None:
    """Keep sums over positions beside the store, in place of earlier ones.

    Args:
        store: The store whose layers and projection they belong to.
        sums: Layer name -> (A [k_in, k_in], B [k_out, k_out]), sums of outer products.
        positions: Layer name -> how many positions were summed over.
        samples: How many samples these came from.
    """
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in sums.items():
        tensors |= {
            f"{name}/in": a,
            f"{name}/out": b,
            f"{name}/count": torch.tensor([positions[name], samples], device="cpu"),
        }
    keep_observed(store, COVARIANCES, tensors)


def _covariances(store: GradientStore) -> tuple[dict[str, Tensor], str]:
    kept = observed(store, COVARIANCES)
    if kept is None:
        raise LograError(
            f"curvature: {store.path} has no covariances, which KFAC and EKFAC need: run forward and backward of some"
            " training batches inside `with run.observe():` first"
        )
    return kept


class KFAC(KeptRotated):
    """H ~ (positions / samples) B (x) A."""

    kind = "kfac"

    @classmethod
    def key(cls, store: GradientStore) -> str:
        return xxhash.xxh3_128(f"{store.content_hash} {_covariances(store)[1]}".encode()).hexdigest()

    @classmethod
    def measure(cls, store: GradientStore, progress: Progress | None) -> Self:
        kept, _ = _covariances(store)
        bases, values = {}, {}
        for name in store.layers:
            positions, samples = kept[f"{name}/count"].tolist()
            (s_out, u_out), (s_in, u_in) = (
                torch.linalg.eigh(kept[f"{name}/{side}"].double() / max(positions, 1)) for side in ("out", "in")
            )
            bases[name] = u_out, u_in
            values[name] = s_out.clamp_min(0)[:, None] * s_in.clamp_min(0)[None, :] * (positions / samples)
        return cls(store.layers, len(store), bases, values)

    def unmeasured(self, layer: str) -> str:
        return unobserved(layer, "observe")


class EKFAC(KFAC):
    """KFAC's basis with the eigenvalues that the stored rows have in it."""

    kind = "ekfac"

    @classmethod
    def measure(cls, store: GradientStore, progress: Progress | None) -> Self:
        bases = KFAC.measure(store, None).bases
        return cls(store.layers, len(store), bases, corrected_values(store, bases, progress))
