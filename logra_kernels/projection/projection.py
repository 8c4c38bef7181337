"""The factors P_in and P_out that a layer's gradient is projected with (Choe et al. 2024, section 3.1).

A random factor depends on nothing but the projection's settings, the layer's name and the side, so every device, rank
and process has the same one, and the settings in a store's manifest are enough to have it again. A learned one (PCA)
is kept with the store, which knows it by its hash.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from logra_kernels.errors import LograError
from logra_kernels.projection.draw import DRAWN, GENERATOR, draw
from logra_kernels.projection.learned import SIDES, Learned, SideSpectrum

KINDS = (*DRAWN, "identity", "pca")


@dataclass(frozen=True)
class Projection:
    """How each layer's gradient is projected.

    Args:
        rank: k_in and k_out of every layer; a side narrower than this keeps its full width.
        kind: A random one, "orthonormal" (P P^T = I), "gaussian", "rademacher", "kaiming" (LogIX's), "mask" or "sjlt"
            (FactGraSS's), as `projection.draw` defines them. "pca": the leading eigenvectors of the side's uncentred
            covariance over positions (section 3.2), which `Run.observe` learns from a sample of the data. "identity"
            projects nothing, for small models and oracles; it ignores `rank`. A pair gives each side its own: (kind of
            P_in, kind of P_out).
        seed: Another seed gives independent random factors.
        nonzeros: Entries of every column of an "sjlt" factor.
        learned: The factors of "pca" sides, once they are known; of at most `rank` rows.

    Raises:
        ValueError: Unknown kind, rank < 1, or nonzeros not in 1 .. rank.
    """

    rank: int = 64
    kind: str | tuple[str, str] = "orthonormal"
    seed: int = 0
    nonzeros: int = 1
    learned: Learned | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.kind, list):
            object.__setattr__(self, "kind", tuple(self.kind))
        if isinstance(self.kind, tuple):
            if len(self.kind) != 2:
                raise ValueError(f"Projection: kind is {self.kind!r}; it must be one kind, or those of P_in and P_out")
            if self.kind[0] == self.kind[1]:
                object.__setattr__(self, "kind", self.kind[0])
        for kind in self.kinds.values():
            if kind not in KINDS:
                raise ValueError(f"Projection: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        if self.rank < 1:
            raise ValueError(f"Projection: rank is {self.rank}; it must be at least 1")
        if not 1 <= self.nonzeros <= self.rank:
            raise ValueError(f"Projection: nonzeros is {self.nonzeros}; it must be from 1 to the rank, {self.rank}")

    @property
    def kinds(self) -> dict[str, str]:
        """Side -> its kind."""
        return dict(zip(SIDES, self.kind if isinstance(self.kind, tuple) else (self.kind,) * 2, strict=True))

    @property
    def learns(self) -> tuple[str, ...]:
        """The sides whose factors must still be learned from data."""
        return () if self.learned is not None else tuple(side for side, kind in self.kinds.items() if kind == "pca")

    def learn(
        self, sides: Mapping[tuple[str, str], SideSpectrum], dtypes: Mapping[str, torch.dtype] | None = None
    ) -> "Projection":
        """The same projection with the factors of its "pca" sides.

        Args:
            sides: What was learned.
            dtypes: Layer name -> that of the numbers its factors meet: bf16 and fp16 have them rounded. Default fp32.
        """
        return replace(self, learned=Learned.of(sides, dtypes or {}))

    def drawn(self) -> "Projection":
        """The same with random orthonormal factors in place of those that must still be learned."""
        if not self.learns:
            return self
        p_in, p_out = ("orthonormal" if kind == "pca" else kind for kind in self.kinds.values())
        return replace(self, kind=(p_in, p_out))

    def width(self, dim: int, side: str) -> int:
        """k for a side of `dim` features; a learned factor may have fewer rows."""
        return dim if self.kinds[side] == "identity" else min(self.rank, dim)

    def factor(self, name: str, side: str, dim: int, device: torch.device | str = "cpu") -> Tensor | None:
        """The factor [k, dim] for the layer `name`, in fp32 or the 16 bits it was learned in; None for the identity.

        Args:
            name: The layer's name in the model.
            side: "in" or "out".
            dim: d_in or d_out.
            device: Where it is wanted, and made where that gives the same bits.

        Raises:
            LograError: It is learned from data, and was not, or not for this layer.
        """
        kind = self.kinds[side]
        if kind == "identity":
            return None
        if kind != "pca":
            k = self.width(dim, side)
            return draw(kind, self.seed, name, side, k, dim, self.nonzeros, torch.device(device))
        if self.learned is None:
            raise LograError(
                "Projection: kind 'pca' is learned from data: run forward and backward of some training batches inside"
                " `with run.observe():` before the first row is logged"
            )
        found = self.learned.get((name, side))
        if found is None or found.shape[1] != dim or len(found) > self.width(dim, side):
            has = "none" if found is None else str(tuple(found.shape))
            raise LograError(
                f"Projection: the factors were learned for other layers: {name!r} needs P_{side}"
                f" {(self.width(dim, side), dim)} and there is {has}; observe this model's layers"
            )
        return found.to(device)

    def to_dict(self) -> dict[str, object]:
        """What a store records; `from_dict` gives the projection again."""
        kind = list(self.kind) if isinstance(self.kind, tuple) else self.kind
        spec: dict[str, object] = {"rank": self.rank, "kind": kind, "seed": self.seed, "generator": GENERATOR}
        if "sjlt" in self.kinds.values():
            spec["nonzeros"] = self.nonzeros
        return spec if self.learned is None else {**spec, "factors": self.learned.digest}

    @classmethod
    def from_dict(cls, spec: dict, learned: Learned | None = None) -> "Projection":
        """The projection of a store.

        Args:
            spec: From `to_dict`.
            learned: The factors that it names, if it names some.

        Raises:
            ValueError: Another generator's numbers, or other factors than those it names.
        """
        if spec.get("generator") != GENERATOR:
            raise ValueError(
                f"Projection: this store's factors are of generator {spec.get('generator')}, this release draws"
                f" generator {GENERATOR}; use the release that wrote the store"
            )
        if spec.get("factors") != (None if learned is None else learned.digest):
            raise ValueError("Projection: the learned factors are not those that the store was logged with")
        return cls(spec["rank"], spec["kind"], spec["seed"], spec.get("nonzeros", 1), learned)
