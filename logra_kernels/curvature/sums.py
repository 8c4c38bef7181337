"""Running sums over rows, in an order that does not depend on how the rows come.

Rows are summed in panels of `PANEL`, counted from the first row: each sum is ((panel 0 + panel 1) + ...) + the rows
left over, whatever the batches or blocks were. So the sums of logging and those of a pass over the store are equal to
the bit; and a kernel that is given a whole panel runs at the rate of a matrix product.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature.blocks import Columns, width_of
from logra_kernels.ops import accumulate_gram

PANEL = 256

Progress = Callable[[int], None]


class RowSums(ABC):
    """A sum over rows of some function of the row, for every block of a curvature.

    Args:
        shapes: Name -> shape of its sum.
        dtype: Of the sums, fp32 or fp64; fp64 also multiplies in fp64.

    Attributes:
        sums: Name -> the sum over all whole panels, on the rows' device.
        removed: How many rows were taken out of them again.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.shapes = dict(shapes)
        self.dtype = dtype
        self.sums: dict[str, Tensor] = {}
        self.removed = 0
        self._whole = 0
        self._panel: Tensor | None = None
        self._filled = 0

    def restore(self, sums: dict[str, Tensor], rows: int, removed: int = 0) -> None:
        """Go on from earlier sums over so many rows; they are added to in place."""
        self.sums, self._whole, self.removed = sums, rows, removed

    @property
    def whole(self) -> int:
        """How many rows `sums` holds."""
        return self._whole

    @property
    def rows(self) -> int:
        """How many rows were added, those of the last, unfinished panel included."""
        return self._whole + self._filled

    def to(self, device: torch.device) -> Self:
        """These sums, moved to where rows of that device are added."""
        self.sums = {name: total.to(device) for name, total in self.sums.items()}
        self._panel = None if self._panel is None else self._panel.to(device)
        return self

    def add(self, rows: Tensor) -> None:
        """Add rows [n, D], in the dtype in which they are stored."""
        if not self.sums:
            self.sums = self._zeros(rows.device)
        start = 0
        while start < len(rows):
            taken = rows[start : start + PANEL - self._filled]
            start += len(taken)
            if len(taken) == PANEL:
                self._sum(taken, self.sums)
            else:
                if self._panel is None:
                    self._panel = rows.new_empty(PANEL, rows.shape[1])
                self._panel[self._filled : self._filled + len(taken)] = taken
                self._filled += len(taken)
                if self._filled < PANEL:
                    return
                self._filled = 0
                self._sum(self._panel, self.sums)
            self._whole += PANEL

    def total(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The sums over all rows, as new tensors; of some names on request."""
        sums = self.sums or self._zeros(torch.device("cpu"))
        found = {name: sums[name].clone() for name in (sums if names is None else names)}
        if self._filled and self._panel is not None:
            self._sum(self._panel[: self._filled], found)
        return found

    def remove(self, rows: Tensor) -> None:
        """Take rows [n, D] out again that `sums` holds, up to rounding."""
        out = self._zeros(rows.device)
        self._sum(rows, out)
        for name, total in self.sums.items():
            total -= out[name]
        self._whole -= len(rows)
        self.removed += len(rows)

    def traces(self) -> dict[str, float]:
        """Name -> the trace of its sum, or its total where it is a diagonal."""
        diagonals = {name: total.diagonal() if total.dim() == 2 else total for name, total in self.sums.items()}
        return {name: float(diagonal.double().sum()) for name, diagonal in diagonals.items()}

    def _zeros(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.zeros(shape, dtype=self.dtype, device=device) for name, shape in self.shapes.items()}

    @abstractmethod
    def _sum(self, panel: Tensor, sums: dict[str, Tensor]) -> None:
        """Add what a panel of rows [n, D] has to each of `sums`."""


class GramSums(RowSums):
    """sum over rows of g g^T for every block, [d, d], symmetric.

    Args:
        parts: Block name -> its columns of a row.
        dtype: As in `RowSums`.
    """

    def __init__(self, parts: Mapping[str, Columns], dtype: torch.dtype = torch.float32) -> None:
        super().__init__({name: (width_of(part),) * 2 for name, part in parts.items()}, dtype)
        self._parts = dict(parts)

    def _sum(self, panel: Tensor, sums: dict[str, Tensor]) -> None:
        panel = panel.double() if self.dtype == torch.float64 else panel
        for name, total in sums.items():
            accumulate_gram(panel[:, self._parts[name]], total)


class SquareSums(RowSums):
    """sum over rows of g^2 for every block, [d] fp64; arguments as those of `GramSums`."""

    def __init__(self, parts: Mapping[str, Columns]) -> None:
        super().__init__({name: (width_of(part),) for name, part in parts.items()}, torch.float64)
        self._parts = dict(parts)

    def _sum(self, panel: Tensor, sums: dict[str, Tensor]) -> None:
        for name, total in sums.items():
            total += panel[:, self._parts[name]].double().square().sum(0)


class SideSums(RowSums):
    """sum over rows of G G^T as "<layer>/out" [k_out, k_out] and of G^T G as "<layer>/in" [k_in, k_in], fp64.

    Args:
        layers: Layer name -> (k_out, k_in).
        parts: Layer name -> its columns of a row.
    """

    def __init__(self, layers: Mapping[str, tuple[int, int]], parts: Mapping[str, Columns]) -> None:
        sides = {name: {"out": k_out, "in": k_in} for name, (k_out, k_in) in layers.items()}
        shapes = {f"{name}/{side}": (k, k) for name, both in sides.items() for side, k in both.items()}
        super().__init__(shapes, torch.float64)
        self._layers, self._parts = dict(layers), dict(parts)

    def _sum(self, panel: Tensor, sums: dict[str, Tensor]) -> None:
        for name, shape in self._layers.items():
            g = panel[:, self._parts[name]].double().unflatten(1, shape)
            sums[f"{name}/out"] += torch.einsum("noi,npi->op", g, g)
            sums[f"{name}/in"] += torch.einsum("noi,noj->ij", g, g)
