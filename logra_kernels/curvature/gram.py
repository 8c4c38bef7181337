"""Running sums of g g^T, layer by layer, in an order that does not depend on how the rows come.

Rows are summed in panels of `PANEL`, counted from the first row: each sum is ((panel 0 + panel 1) + ...) + the rows
left over, whatever the batches or blocks were. So the sums of logging and those of a pass over the store are equal to
the bit; and a kernel that is given a whole panel runs at the rate of a matrix product.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from logra_kernels.ops import accumulate_gram

PANEL = 256


class GramSums:
    """sum over rows of g_l g_l^T for every layer l.

    Args:
        parts: Layer name -> its columns of a row.
        dtype: Of the sums, fp32 or fp64; fp64 also multiplies in fp64.
        sums: Earlier sums, [d, d] each, to go on from; they are added to in place.
        rows: How many rows these hold.
        removed: How many rows were taken out of them again.

    Attributes:
        sums: Layer name -> the sum over all whole panels, [d, d], symmetric, on the rows' device.
    """

    def __init__(
        self,
        parts: Mapping[str, slice],
        dtype: torch.dtype = torch.float32,
        sums: dict[str, Tensor] | None = None,
        rows: int = 0,
        removed: int = 0,
    ) -> None:
        self._parts = dict(parts)
        self.dtype = dtype
        self.removed = removed
        self.sums = sums if sums is not None else {}
        self._whole = rows
        self._panel: Tensor | None = None
        self._filled = 0

    @property
    def whole(self) -> int:
        """How many rows `sums` holds."""
        return self._whole

    @property
    def rows(self) -> int:
        """How many rows were added, those of the last, unfinished panel included."""
        return self._whole + self._filled

    def add(self, rows: Tensor) -> None:
        """Add rows [n, D], in the dtype in which they are stored."""
        if not self.sums:
            self.sums = {
                name: torch.zeros(part.stop - part.start, part.stop - part.start, dtype=self.dtype, device=rows.device)
                for name, part in self._parts.items()
            }
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
        """The sums over all rows, as new tensors; of some layers on request."""
        found = {name: self.sums[name].clone() for name in (self.sums if names is None else names)}
        if self._filled and self._panel is not None:
            self._sum(self._panel[: self._filled], found)
        return found

    def remove(self, rows: Tensor) -> None:
        """Take rows [n, D] out again that `sums` holds, up to rounding."""
        out = {name: torch.zeros_like(total) for name, total in self.sums.items()}
        self._sum(rows, out)
        for name, total in self.sums.items():
            total -= out[name]
        self._whole -= len(rows)
        self.removed += len(rows)

    def _sum(self, panel: Tensor, sums: dict[str, Tensor]) -> None:
        panel = panel.double() if self.dtype == torch.float64 else panel
        for name, total in sums.items():
            accumulate_gram(panel[:, self._parts[name]], total)
