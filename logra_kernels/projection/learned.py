"""Factors that were learned from data (PCA): what a store must keep, since no seed gives them again.

P = the k leading eigenvectors of C = sum over positions of r r^T, as rows      (Choe et al. 2024, section 3.2)
spread = (trace(C) / d) / (trace(P C P^T) / k)      mean eigenvalue of the whole side over that of what P keeps

A factor that meets numbers of 16 bits is rounded to them once, when it is learned: it is P from then on, whatever dtype
a later model multiplies it in, and takes half the memory and half the file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from logra_kernels.projection.moment import Moment

SIDES = ("in", "out")
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SideSpectrum:
    """One side of a layer, as learned.

    Attributes:
        factor: P [k, d] fp32, orthonormal rows, largest eigenvalue first.
        values: Eigenvalues of C that belong to them, [k] fp64.
        spread: See the module; 1 where the rows' energy is spread evenly, below 1 where P keeps the most of it.
    """

    factor: Tensor
    values: Tensor
    spread: float

    @classmethod
    def of(cls, moment: Moment, k: int) -> "SideSpectrum":
        """The k leading directions of what was observed."""
        vectors, values = moment.leading(k)
        vectors *= torch.where(vectors.amax(1) >= -vectors.amin(1), 1, -1)[:, None]
        kept, whole = float(values.sum()) / k, moment.trace() / moment.dim
        spread = whole / kept if kept > 0 else 1.0
        return cls(vectors.float().contiguous(), values, spread)


def side_spectra(moments: Mapping[tuple[str, str], Moment], rank: int) -> dict[tuple[str, str], SideSpectrum]:
    """The `rank` leading directions of each side, or all of a narrower one.

    Moments of the same numbers, as those of the input that q, k and v share, are solved once: they give one object.
    """
    found: dict[tuple[str, str], SideSpectrum] = {}
    solved: dict[tuple[int, float], list[tuple[Moment, SideSpectrum]]] = {}
    for key, moment in moments.items():
        alike = solved.setdefault((moment.dim, moment.trace()), [])
        side = next((side for other, side in alike if moment.equals(other)), None)
        if side is None:
            side = SideSpectrum.of(moment, min(rank, moment.dim))
            alike.append((moment, side))
        found[key] = side
    return found


class Learned(Mapping[tuple[str, str], Tensor]):
    """(layer name, "in" or "out") -> P [k, d], of the sides that were learned; equal if the numbers are.

    They are kept in bf16 or fp16 where they come in it, in fp32 otherwise. Sides of the same numbers have one tensor,
    as the inputs of q, k and v do.

    Attributes:
        spread: Layer name -> the product of its learned sides' spreads.
    """

    def __init__(self, factors: Mapping[tuple[str, str], Tensor], spread: Mapping[str, float]) -> None:
        self._factors: dict[tuple[str, str], Tensor] = {}
        held: dict[bytes, Tensor] = {}
        for key, p in factors.items():
            p = (p if p.dtype in _HALF else p.float()).detach().cpu().contiguous()
            numbers = xxhash.xxh3_128(_bytes(p)).digest() + bytes(f"{p.dtype} {tuple(p.shape)}", "ascii")
            self._factors[key] = held.setdefault(numbers, p)
        self.spread = dict(spread)

    @classmethod
    def of(cls, sides: Mapping[tuple[str, str], SideSpectrum], dtypes: Mapping[str, torch.dtype]) -> "Learned":
        """What was learned, for layers whose factors meet numbers of these dtypes; fp32 where nothing is said."""
        spread: dict[str, float] = {}
        factors = {}
        for (name, end), side in sides.items():
            spread[name] = spread.get(name, 1.0) * side.spread
            dtype = dtypes.get(name)
            factors[name, end] = side.factor.to(dtype) if dtype in _HALF else side.factor
        return cls(factors, spread)

    def __getitem__(self, key: tuple[str, str]) -> Tensor:
        return self._factors[key]

    def __iter__(self):
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Learned) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """xxh3_128 (hex) of every name and number."""
        found = xxhash.xxh3_128(json.dumps(self.spread, sort_keys=True).encode())
        for name, tensor in sorted(self.state().items()):
            found.update(f"{name} {tuple(tensor.shape)} ".encode())
            found.update(_bytes(tensor))
        return found.hexdigest()

    def state(self) -> dict[str, Tensor]:
        """The factors as tensors by name, for a file."""
        return {f"{name}/{side}": p for (name, side), p in self._factors.items()}

    @classmethod
    def restore(cls, state: Mapping[str, Tensor], spread: Mapping[str, float]) -> "Learned":
        """Have it again from what `state` gave."""
        factors = {}
        for key, tensor in state.items():
            name, side = key.rsplit("/", 1)
            factors[name, side] = tensor
        return cls(factors, spread)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()
