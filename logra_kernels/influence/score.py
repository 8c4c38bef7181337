"""Influence of every stored row on a query, streamed from the store. With s = g_q^T (H + lambda I)^-1 g_z:

    dot            s                               (Koh & Liang 2017)
    relatif        s / sqrt(I(z, z))               l-RelatIF, LogIX's "cosine": loud outliers do not win every query
    theta-relatif  s / |(H + lambda I)^-1 g_z|     theta-RelatIF                    (both Barshan et al. 2020)
    l2             s - I(z, z) / 2                 the quadratic model's gain of a full step on z; LogIX's "l2"

Gradients are of the loss: a positive score says that training on the row lowers the query's loss. A row without
gradient scores 0 in every mode.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from logra_kernels.influence.statistics import check_mask, needed
from logra_kernels.store import GradientStore, RowScorer, gather_from_ranks

MODES = ("dot", "relatif", "theta-relatif", "l2")
NEEDS = {"dot": (), "relatif": ("self_influence",), "theta-relatif": ("solved_norm",), "l2": ("self_influence",)}
SEARCHES = ("exact", "index")
_BYTES = 64 << 20


@dataclass(frozen=True)
class TopK:
    """The best rows for each query, best first.

    Attributes:
        values: Scores, [Q, k] fp32.
        indices: Row numbers in the store, [Q, k] int64.
        ids: The rows' ids, one list of k a query.
        layers: Where asked for, layer name -> that layer's part of each score, [Q, k]; the parts add up to `values`.
    """

    values: Tensor
    indices: Tensor
    ids: list[list[str]]
    layers: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, scores: Tensor, ids: list[str], k: int, *, largest: bool = True) -> "TopK":
        """The k best columns of a score matrix [Q, N], an ensemble's say; ids [N]. NaN, a row left out, never wins."""
        if scores.dim() != 2 or scores.shape[1] != len(ids) or k < 1:
            raise ValueError(
                f"topk: scores {tuple(scores.shape)} must be [Q, {len(ids)}] for {len(ids)} ids, and k >= 1"
            )
        worst = -torch.inf if largest else torch.inf
        values, indices = _first(torch.where(scores.isnan(), worst, scores), k, largest)
        return cls(values, indices, _names(ids, indices))


def adjustment(mode: str, statistics: Mapping[str, Tensor] | None, count: int) -> tuple[Tensor | None, Tensor | None]:
    """(scale, shift), each [N] or None: a row's score in `mode` is scale * dot + shift.

    Raises:
        ValueError: An unknown mode, or the statistic it needs (`NEEDS`) is missing or not [N].
    """
    if mode not in MODES:
        raise ValueError(f"influence: mode is {mode!r}; it must be one of {', '.join(MODES)}")
    if mode == "dot":
        return None, None
    value = needed(statistics, NEEDS[mode][0], mode, count)
    if mode == "l2":
        return None, value * -0.5
    root = value if mode == "theta-relatif" else value.sqrt()
    inverse = root.reciprocal()
    return torch.where((value > 0) & inverse.isfinite(), inverse, 0.0), None  # infinite: below fp32's normal numbers


def check_solved(solved: Tensor, dim: int) -> None:
    """Raise ValueError unless `solved` is finite [Q, dim]."""
    if solved.dim() != 2 or solved.shape[1] != dim:
        raise ValueError(f"influence: queries {tuple(solved.shape)} must be [Q, {dim}], as long as the store's rows")
    if not bool(solved.isfinite().all()):
        bad = int((~solved.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"influence: query {bad} of {len(solved)} holds NaN or infinity; check the model's loss on it")


def scores(
    store: GradientStore,
    solved: Tensor,
    mode: str = "dot",
    statistics: Mapping[str, Tensor] | None = None,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """Every row's influence on every query, [Q, N] fp32.

    Args:
        store: N rows.
        solved: The queries after the curvature's solve, [Q, D].
        mode: One of `MODES`.
        statistics: `row_statistics` by name; those that `NEEDS` lists for the mode.
        rows: A bool mask [N]; the others' scores are NaN.

    Raises:
        ValueError: Sizes do not fit, an unknown mode, NaN in the queries, a mask that keeps nothing.
    """
    check_solved(solved, store.dim)
    scale, shift = adjustment(mode, statistics, len(store))
    found = store.score(solved)
    if scale is not None:
        found *= scale.to(found.device)
    if shift is not None:
        found += shift.to(found.device)
    if rows is not None:
        check_mask(rows, len(store))
        found[:, ~rows.to(found.device)] = torch.nan
    return found


def topk(
    store: GradientStore,
    solved: Tensor,
    k: int,
    mode: str = "relatif",
    statistics: Mapping[str, Tensor] | None = None,
    *,
    largest: bool = True,
    rows: Tensor | None = None,
    search: str = "exact",
    query_format: str | None = None,
) -> TopK:
    """The k rows with the highest (or lowest) influence on each query, in one streaming pass and bounded memory.

    Args:
        store, solved, mode, statistics: As in `scores`.
        k: At least 1; min(k, N) rows come back.
        largest: False for the lowest scores.
        rows: A bool mask [N]; the others are passed over.
        search: "index" reads and scores only a shortlist from the store's index, `GradientStore.search`.
        query_format: "int8" for the fastest exact search of rows with scales, "fp32" for the finest; `score_block`.

    Raises:
        ValueError: As in `scores`, k < 1, an index cannot serve this mode, a mask or a query_format, or the rows that.
        StoreError: There is no index, or one of other rows.
    """
    if search not in SEARCHES:
        raise ValueError(f"influence: search is {search!r}; it must be one of {', '.join(SEARCHES)}")
    scale, shift = adjustment(mode, statistics, len(store))
    if search == "index":
        if shift is not None or rows is not None or query_format is not None:
            raise ValueError(
                "influence: search='index' serves neither mode 'l2' nor a mask rows= nor query_format=; use 'exact'"
            )
        _check(store, solved, k, None)
        values, indices = store.search(solved, k, row_scale=scale, largest=largest)
        return TopK(values, indices, [store.ids_of(row) for row in indices])
    if shift is not None or rows is not None:
        return _ranked(store, solved, k, scale, shift, rows, (largest,), query_format)[0]
    _check(store, solved, k, rows)
    values, indices = store.topk(solved, k, row_scale=scale, largest=largest, query_format=query_format)
    return TopK(values, indices, [store.ids_of(row) for row in indices])


def extremes(
    store: GradientStore,
    solved: Tensor,
    k: int,
    mode: str = "relatif",
    statistics: Mapping[str, Tensor] | None = None,
    *,
    rows: Tensor | None = None,
) -> tuple[TopK, TopK]:
    """(proponents, opponents): the k highest and the k lowest scores of each query in the same pass; as in `topk`."""
    scale, shift = adjustment(mode, statistics, len(store))
    top, bottom = _ranked(store, solved, k, scale, shift, rows, (True, False))
    return top, bottom


def _check(store: GradientStore, solved: Tensor, k: int, rows: Tensor | None) -> None:
    check_solved(solved, store.dim)
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"influence: k is {k!r}; it must be a whole number, at least 1")
    if rows is not None:
        check_mask(rows, len(store))


def _ranked(
    store: GradientStore,
    solved: Tensor,
    k: int,
    scale: Tensor | None,
    shift: Tensor | None,
    rows: Tensor | None,
    ends: tuple[bool, ...],
    query_format: str | None = None,
) -> list[TopK]:
    """A `TopK` for each end asked for (True: largest), with scores adjusted and rows left out block by block."""
    _check(store, solved, k, rows)
    device, scores = solved.device, solved.new_zeros(len(solved), 0)
    best = [(scores, torch.zeros_like(scores, dtype=torch.int64)) for _ in ends]
    scorer = RowScorer(store.manifest, solved, query_format)
    for start, block in store.encoded_blocks(block_bytes(store, len(solved))):
        part = slice(start, start + len(block))
        index = (
            torch.arange(part.start, part.stop, device="cpu") if rows is None else rows[part].nonzero()[:, 0] + start
        )
        mine = (block if rows is None else block[rows[part]]).to(device)
        found = scorer.score(mine)
        found = found if scale is None else found * scale[index].to(device)
        found = found if shift is None else found + shift[index].to(device)
        for i, largest in enumerate(ends):
            values, order = _first(torch.cat([best[i][0], found], dim=1), k, largest)
            numbers = torch.cat([best[i][1], index.to(device).expand(len(solved), -1)], dim=1)
            best[i] = values, numbers.gather(1, order)
    tops = []
    for (values, numbers), largest in zip(best, ends, strict=True):
        values, numbers = gather_from_ranks(store, values, numbers)
        values, order = _first(values, k, largest)
        numbers = numbers.gather(1, order)
        tops.append(TopK(values, numbers, [store.ids_of(row) for row in numbers]))
    return tops


def _first(scores: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The k first of each row in order, ties by lower column."""
    order = torch.sort(scores if largest else -scores, dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), order


def _names(ids: list[str], indices: Tensor) -> list[list[str]]:
    return [[ids[i] for i in row] for row in indices.tolist()]


def block_bytes(store: GradientStore, queries: int) -> int:
    """Of rows in a block so that neither they nor their scores [Q, n] fp32 take more than 64 MB."""
    rows = max(1, _BYTES // (4 * max(queries, store.dim)))
    return rows * store.manifest.row_bytes
