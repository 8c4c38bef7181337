"""A store that the ranks of a process group read together: each streams its share of the rows, sums are made once.

Scale-out as torchrun starts it. Every rank calls the same functions in the same order; between two collectives each
works alone on rows [N r / R, N (r + 1) / R).
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from logra_kernels.ops import EncodedRows
from logra_kernels.store.reading.reader import BLOCK_BYTES
from logra_kernels.store.reading.scoring import Best, RowScorer
from logra_kernels.store.store import GradientStore


class Share(GradientStore):
    """A store opened for reading whose `blocks`, `encoded_blocks`, `score` and `topk` are this rank's part of the work.

    All else is as in the store itself, the number of rows too: `score` and `topk` give every rank the whole answer.
    Sums over `blocks` are completed by `sum_over_ranks`, lists by `gather_from_ranks`.

    Raises:
        StoreError: As `GradientStore.open`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(Path(path), None)
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()

    def _mine(self) -> tuple[int, int]:
        return len(self) * self._rank // self._ranks, len(self) * (self._rank + 1) // self._ranks

    def encoded_blocks(self, max_bytes: int | None = None) -> Iterator[tuple[int, EncodedRows]]:
        return self._current().encoded_blocks(max_bytes, *self._mine())

    def blocks(self, max_bytes: int | None = None) -> Iterator[tuple[int, Tensor]]:
        start, stop = self._mine()
        step = max(1, (max_bytes or BLOCK_BYTES) // (4 * self.dim))
        for first in range(start, stop, step):
            yield first, self.read(first, min(first + step, stop)).to(self.manifest.torch_dtype)

    def every_block(self) -> Iterator[tuple[int, Tensor]]:
        """`blocks` over the rows of all ranks."""
        return super().blocks()

    def score(
        self,
        queries: Tensor,
        row_scale: Tensor | None = None,
        *,
        max_bytes: int | None = None,
        query_format: str | None = None,
    ) -> Tensor:
        out = queries.new_zeros((len(queries), len(self)), dtype=torch.float32)
        scorer = RowScorer(self.manifest, queries, query_format)
        for first, rows in self.encoded_blocks(max_bytes):
            scorer.score(rows.to(queries.device), out[:, first : first + len(rows)])
        sum_over_ranks(self, [out])
        return out if row_scale is None else out.mul_(row_scale.to(out.device))

    def topk(
        self,
        queries: Tensor,
        k: int,
        row_scale: Tensor | None = None,
        largest: bool = True,
        *,
        max_bytes: int | None = None,
        query_format: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        start, stop = self._mine()
        best = Best(self.manifest, queries, k, stop - start, largest, query_format)
        for first, rows in self.encoded_blocks(max_bytes):
            scale = None if row_scale is None else row_scale[first : first + len(rows)].to(queries.device)
            best.add((rows.to(queries.device), scale))
        values, index = best.found()
        return _first(*gather_from_ranks(self, values, index + start), k, largest)

    def sidecar_write(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
    ) -> Path:
        """Rank 0 writes for all, once all have come here: one that is late must not find what it would have made with
        the others. They wait for it, so that every rank sees the same sidecars."""
        dist.barrier()
        try:
            if self._rank == 0:
                super().sidecar_write(name, tensors, metadata, key=key)
        finally:
            dist.barrier()
        return self.path


def sum_over_ranks(store: GradientStore, tensors: Iterable[Tensor]) -> None:
    """Add the ranks' tensors up in place, where the store is shared out; else nothing."""
    if isinstance(store, Share):
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather_from_ranks(store: GradientStore, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The ranks' lists [Q, k] side by side in rank order, where the store is shared out; else they themselves."""
    if not isinstance(store, Share):
        return values, index
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (values.cpu(), index.cpu()))
    lists = [torch.cat([part[i] for part in parts], dim=1) for i in (0, 1)]
    return lists[0].to(values.device), lists[1].to(index.device)


def _first(values: Tensor, index: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k first in order; ties keep their place, which is row order."""
    order = torch.sort(values if largest else -values, dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), index.gather(1, order)
