"""One block of stored rows against queries, and the best rows of a query while blocks come in row order.

Rows that are kept as factors are not rebuilt for it.
"""

import torch
from torch import Tensor

from logra_kernels.ops import EncodedRows, Scorer, TopK, score_factored
from logra_kernels.ops.score_topk import Ranked, RowBlocks, merge, nothing
from logra_kernels.store.encoding import laid_out
from logra_kernels.store.format import Manifest


class RowScorer:
    """Queries against any number of blocks of a store's rows.

    Args:
        queries: [Q, D]; they must not change meanwhile.
        query_format: As in `score_block`.

    Raises:
        ValueError: A query_format for rows that are kept as factors.
    """

    def __init__(self, manifest: Manifest, queries: Tensor, query_format: str | None = None) -> None:
        self._manifest, self._queries = manifest, queries
        self._dense = None
        if manifest.rank is None:
            self._dense = Scorer(laid_out(manifest, queries), query_format)
        elif query_format is not None:
            raise ValueError(f"query_format {query_format!r} is for dense rows with scales; leave it out for factors")

    def score(self, rows: EncodedRows, out: Tensor | None = None) -> Tensor:
        """[Q, n] fp32, written to `out` where it is given.

        Raises:
            ValueError: A query_format for rows that have no scales.
        """
        if self._dense is not None:
            return self._dense.score(rows, out)
        manifest = self._manifest
        assert manifest.rank is not None
        found = score_factored(self._queries, rows, manifest.sizes, manifest.rank, align=manifest.align)
        return found if out is None else out.copy_(found)


class Best:
    """The k best rows for each query while blocks come in row order, `count` rows at most.

    Raises:
        ValueError: A query_format for rows that have no scales or are kept as factors.
    """

    def __init__(
        self, manifest: Manifest, queries: Tensor, k: int, count: int, largest: bool, query_format: str | None = None
    ):
        self._queries, self._k, self._largest = queries, k, largest
        self._rows = 0
        self._dense = self._factored = None
        self._found: Ranked | None = None
        if manifest.rank is None:
            self._dense = TopK(laid_out(manifest, queries), k, count, largest=largest, query_format=query_format)
        else:
            self._factored = RowScorer(manifest, queries, query_format)

    def add(self, *blocks: tuple[EncodedRows, Tensor | None]) -> None:
        """The next blocks: rows and their factors [n]."""
        if self._dense is not None:
            return self._dense.add(*blocks)
        assert self._factored is not None
        for rows, scale in blocks:
            scores = self._factored.score(rows)
            values, index = self._of_scores(scores if scale is None else scores * scale)
            self._found = merge(self._found, (values, index + self._rows), self._k, self._largest)
            self._rows += len(rows)

    def add_all(self, blocks: RowBlocks, row_scale: Tensor | None) -> None:
        """The next blocks of dense rows, and the factors of all of them."""
        assert self._dense is not None
        self._dense.add_all(blocks, row_scale)

    def found(self) -> Ranked:
        """Row numbers count from the first row that was added."""
        if self._dense is not None:
            return self._dense.best()
        return nothing(self._queries) if self._found is None else self._found

    def _of_scores(self, scores: Tensor) -> Ranked:
        k = min(self._k, scores.shape[1])
        if not scores.numel():
            return scores[:, :k], torch.zeros_like(scores[:, :k], dtype=torch.int64)
        keys = scores if self._largest else -scores
        last = keys.topk(k, dim=1).values.amin(dim=1)  # NaN once one is kept, and then every row may be among the best
        index = torch.stack([_first(key, least, k) for key, least in zip(keys, last, strict=True)])
        return scores.gather(1, index), index


def _first(keys: Tensor, last: Tensor, k: int) -> Tensor:
    """Rows of the k greatest keys; only those that are not below the last of them are sorted."""
    rows = (~(keys < last)).nonzero().flatten()
    return rows[torch.sort(keys[rows], descending=True, stable=True).indices[:k]]
