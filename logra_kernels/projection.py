"""The factors P_in and P_out that a layer's gradient is projected with (Choe et al. 2024, section 3.1).

A factor depends on nothing but the projection's settings, the layer's name and the side: it is drawn on the host from
a counter-based generator (Philox) and then moved, so every device, rank and process has the same one, and the settings
in a store's manifest are enough to have it again.
"""

import hashlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

KINDS = ("orthonormal", "gaussian", "rademacher", "identity")
_GENERATOR = 1  # raised when the same settings would give other factors


@dataclass(frozen=True)
class Projection:
    """How each layer's gradient is projected.

    Args:
        rank: k_in and k_out of every layer; a side narrower than this keeps its full width.
        kind: "orthonormal" (rows orthonormal, P P^T = I), "gaussian" (N(0, 1/k)), "rademacher" (+-1/sqrt(k)); the last
            two have E[P^T P] = I. "identity" projects nothing, for small models and oracles; it ignores `rank`.
        seed: Another seed gives independent factors.

    Raises:
        ValueError: Unknown kind, or rank < 1.
    """

    rank: int = 64
    kind: str = "orthonormal"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Projection: kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.rank < 1:
            raise ValueError(f"Projection: rank is {self.rank}; it must be at least 1")

    def width(self, dim: int) -> int:
        """k for a side of `dim` features."""
        return dim if self.kind == "identity" else min(self.rank, dim)

    def factor(self, name: str, side: str, dim: int) -> Tensor | None:
        """The factor [k, dim] in fp32 on the CPU for the layer `name`; None for the identity.

        Args:
            name: The layer's name in the model.
            side: "in" or "out".
            dim: d_in or d_out.
        """
        if self.kind == "identity":
            return None
        k = self.width(dim)
        raw = _bits(f"{self.seed}/{name}/{side}", k * dim)
        if self.kind == "rademacher":
            p = np.where(raw >> np.uint64(63), 1.0, -1.0).reshape(k, dim) / np.sqrt(k)
        else:
            p = _normal(raw, _bits(f"{self.seed}/{name}/{side}/angle", k * dim)).reshape(k, dim) / np.sqrt(k)
        if self.kind == "orthonormal":
            q, r = np.linalg.qr(p.T)
            p = (q * np.sign(np.diag(r))).T  # the sign makes the factorisation unique
        return torch.from_numpy(np.ascontiguousarray(p, dtype=np.float32))

    def to_dict(self) -> dict[str, object]:
        """What a store records; `from_dict` gives the projection again."""
        return {**asdict(self), "generator": _GENERATOR}

    @classmethod
    def from_dict(cls, spec: dict) -> "Projection":
        if spec.get("generator") != _GENERATOR:
            raise ValueError(
                f"Projection: this store's factors are of generator {spec.get('generator')}, this release draws"
                f" generator {_GENERATOR}; use the release that wrote the store"
            )
        return cls(rank=spec["rank"], kind=spec["kind"], seed=spec["seed"])


def _bits(stream: str, count: int) -> np.ndarray:
    """`count` uint64 of the Philox stream that belongs to the name."""
    key = np.frombuffer(hashlib.sha256(stream.encode()).digest()[:16], dtype="<u8")
    return np.random.Philox(key=key.astype(np.uint64)).random_raw(count)


def _normal(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Box-Muller on two streams of uint64: NumPy promises its raw streams, but not its normal variates, for ever."""
    u, v = (((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53 for bits in (radius, angle))
    return np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)
