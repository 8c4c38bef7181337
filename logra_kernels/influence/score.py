"""Influence of every stored row on a query, streamed from the store.

    dot        I(z, q) = g_q^T (H + lambda I)^-1 g_z                                     (Koh & Liang 2017)
    relatif    I(z, q) / sqrt(I(z, z)), l-RelatIF, so that loud outliers do not win every query  (Barshan et al. 2020)

Gradients are of the loss: a positive score says that training on the row lowers the query's loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from logra_kernels.store import GradientStore

MODES = ("dot", "relatif")


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


def row_scale(mode: str, self_influence: Tensor | None) -> Tensor | None:
    """What each row's dot score is multiplied by, [N] fp32; a row without gradient scores 0 in every mode."""
    if mode not in MODES:
        raise ValueError(f"influence: mode is {mode!r}; it must be one of {', '.join(MODES)}")
    if mode == "dot":
        return None
    if self_influence is None:
        raise ValueError("influence: mode 'relatif' needs the rows' self-influence")
    return torch.where(self_influence > 0, self_influence.rsqrt(), 0.0)


def scores(store: GradientStore, solved: Tensor, mode: str = "dot", self_influence: Tensor | None = None) -> Tensor:
    """Every row's influence on every query, [Q, N] fp32.

    Args:
        store: N rows.
        solved: The queries after the curvature's solve, [Q, D].
        mode: "dot" or "relatif".
        self_influence: Of every row, [N]; needed for "relatif".
    """
    scale = row_scale(mode, self_influence)
    found = store.score(solved)
    return found if scale is None else found * scale


def topk(
    store: GradientStore,
    solved: Tensor,
    k: int,
    mode: str = "relatif",
    self_influence: Tensor | None = None,
    *,
    largest: bool = True,
    layers: bool = False,
) -> TopK:
    """The k rows with the highest (or lowest) influence on each query, in one streaming pass and bounded memory.

    Args:
        store, solved, mode, self_influence: As in `scores`.
        k: At least 1; min(k, N) rows come back.
        largest: False for the lowest scores.
        layers: Also give each layer's part of the scores.
    """
    scale = row_scale(mode, self_influence)
    values, indices = store.topk(solved, k, row_scale=scale, largest=largest)
    ids = store.ids
    parts = layer_scores(store, solved, indices, scale) if layers else None
    return TopK(values, indices, [[ids[i] for i in row] for row in indices.tolist()], parts)


def layer_scores(
    store: GradientStore, solved: Tensor, indices: Tensor, scale: Tensor | None = None
) -> dict[str, Tensor]:
    """Each layer's part of the scores of chosen rows: layer name -> [Q, k] fp32, for `indices` [Q, k]."""
    wanted, where = indices.unique(return_inverse=True)
    rows = torch.cat([store.read(i, i + 1) for i in wanted.tolist()])
    found = {}
    for name, part in store.slices.items():
        picked = rows[:, part][where]  # [Q, k, d]
        found[name] = torch.einsum("qd,qkd->qk", solved[:, part].float(), picked)
    return found if scale is None else {name: value * scale[indices] for name, value in found.items()}
