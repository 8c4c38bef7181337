"""The uncentred second moment of one side of a layer, C = sum over rows of r r^T, and its leading eigenvectors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from logra_kernels.ops import accumulate_gram
from logra_kernels.projection.normal import normals


class Moment(ABC):
    """C of rows [R, dim] that come batch by batch.

    Attributes:
        dim: Length of a row.
        device, dtype: Of the sums.
    """

    dim: int
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """C += sum over rows of r r^T; rows [R, dim] in the moment's dtype."""

    @abstractmethod
    def trace(self) -> float:
        """Sum over rows of |r|^2."""

    @abstractmethod
    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        """(eigenvectors [k, dim], orthonormal rows, largest first; their eigenvalues [k] fp64), on the CPU."""

    @property
    @abstractmethod
    def parts(self) -> list[Tensor]:
        """All that it knows, for another's `join`."""

    @abstractmethod
    def join(self, parts: Sequence[Tensor]) -> None:
        """Add what another moment of the same rows' length saw: its `parts`, on this one's device."""

    @abstractmethod
    def isfinite(self) -> bool:
        """Whether no row held NaN or infinity."""

    @property
    @abstractmethod
    def numbers(self) -> list[Tensor]:
        """All that it holds, as it is."""

    def equals(self, other: "Moment") -> bool:
        """Whether the other holds the same numbers, bit by bit."""
        pairs = zip(self.numbers, other.numbers, strict=False)
        return type(self) is type(other) and all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in pairs
        )


class SecondMoment(Moment):
    """C itself.

    Attributes:
        matrix: [dim, dim] fp32, or fp64 for an fp64 model.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.dim, self.device, self.dtype = len(matrix), matrix.device, matrix.dtype

    @classmethod
    def zeros(cls, dim: int, device: torch.device, dtype: torch.dtype) -> "SecondMoment":
        return cls(torch.zeros(dim, dim, device=device, dtype=dtype))

    def add(self, rows: Tensor) -> None:
        accumulate_gram(rows, self.matrix)

    def trace(self) -> float:
        return float(self.matrix.diagonal().double().sum())

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        if not self.trace():  # no row reached the layer: any directions are as good, spread over all features
            drawn = torch.stack([normals(f"moment/{i}", self.dim, torch.device("cpu")) for i in range(k)])
            return torch.linalg.qr(drawn.T).Q.T, torch.zeros(k, dtype=torch.float64, device="cpu")
        values, vectors = torch.linalg.eigh(self.matrix.double().cpu())
        order = torch.arange(self.dim - 1, self.dim - 1 - k, -1, device="cpu")
        return vectors.T[order], values[order].clamp_min(0)

    @property
    def parts(self) -> list[Tensor]:
        return [self.matrix]

    numbers = parts

    def join(self, parts: Sequence[Tensor]) -> None:
        self.matrix += parts[0]

    def isfinite(self) -> bool:
        return bool(self.matrix.isfinite().all())
