"""Query: the projected gradients that stored rows are asked about."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Query:
    """Projected gradients of queries: `rows` [Q, D] fp32 once the `with` is left, one for each id.

    Stored rows are scored where they are: on the CPU, or on a GPU that they were moved `to`.
    """

    ids: list[str]
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float32, device="cpu"))

    @classmethod
    def cat(cls, queries: "Sequence[Query]") -> "Query":
        """Several batches of queries as one."""
        return cls([i for query in queries for i in query.ids], torch.cat([query.rows for query in queries]))

    def to(self, device: torch.device | str) -> "Query":
        """The same queries on another device; stored rows then stream to it, which pays where queries are many."""
        return Query(self.ids, self.rows.to(device))

    def check(self, dim: int) -> None:
        """Raise ValueError unless there is one finite row of `dim` numbers for each id."""
        if self.rows.shape == (0, 0) and self.ids:
            raise ValueError(f"query {self.ids[0]!r} has no gradients yet: leave its `with` statement first")
        if self.rows.dim() != 2 or self.rows.shape != (len(self.ids), dim) or not self.rows.is_floating_point():
            raise ValueError(
                f"query: rows {tuple(self.rows.shape)} {self.rows.dtype} must be floating point"
                f" [{len(self.ids)}, {dim}]: one for each id, as long as the store's rows"
            )
        finite = self.rows.isfinite().all(1)
        if not bool(finite.all()):
            bad = self.ids[int((~finite).nonzero()[0])]
            raise ValueError(f"query {bad!r}: its gradient holds NaN or infinity; check the model's loss on it")
