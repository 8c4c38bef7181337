"""One block of stored rows against queries, and the best rows of a query while blocks come in row order.

Rows that are kept as factors are not rebuilt for it.
"""

import torch
from torch import Tensor

from logra_kernels.ops import EncodedRows, score_block, score_factored, score_topk
from logra_kernels.store.format import Manifest

Ranked = tuple[Tensor, Tensor]  # values and row numbers [Q, k]: NaN first, then by score, then by row


def scores_of(manifest: Manifest, queries: Tensor, rows: EncodedRows, query_format: str | None = None) -> Tensor:
    """[Q, n]; `query_format` as in `score_block`.

    Raises:
        ValueError: A query_format for rows that have no scales or are kept as factors.
    """
    if manifest.rank is None:
        return score_block(queries, rows, query_format=query_format)
    if query_format is not None:
        raise ValueError(f"query_format {query_format!r} is for dense rows with scales; leave it out for factors")
    return score_factored(queries, rows, manifest.sizes, manifest.rank)


def topk_of(
    manifest: Manifest,
    queries: Tensor,
    rows: EncodedRows,
    k: int,
    row_scale: Tensor | None,
    largest: bool,
    query_format: str | None = None,
) -> Ranked:
    """The k best of a block, numbered within it."""
    if manifest.rank is None:
        return score_topk(queries, rows, k, row_scale, largest=largest, query_format=query_format)
    scores = scores_of(manifest, queries, rows, query_format)
    scores = scores if row_scale is None else scores * row_scale
    k = min(k, scores.shape[1])
    if not scores.numel():
        return scores[:, :k], torch.zeros_like(scores[:, :k], dtype=torch.int64)
    keys = scores if largest else -scores
    last = keys.topk(k, dim=1).values.amin(dim=1)  # NaN once one is kept, and then every row may be among the best
    index = torch.stack([_first(key, least, k) for key, least in zip(keys, last, strict=True)])
    return scores.gather(1, index), index


def _first(keys: Tensor, last: Tensor, k: int) -> Tensor:
    """Rows of the k greatest keys; only those that are not below the last of them are sorted."""
    rows = (~(keys < last)).nonzero().flatten()
    return rows[torch.sort(keys[rows], descending=True, stable=True).indices[:k]]


def merge(best: Ranked, block: Ranked, k: int, largest: bool) -> Ranked:
    """The k first of two sorted lists; `best` holds lower row numbers, so a stable sort keeps ties in row order."""
    values = torch.cat((best[0], block[0]), dim=1)
    index = torch.cat((best[1], block[1]), dim=1)
    order = torch.sort(values if largest else -values, dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), index.gather(1, order)
