"""Scores by layer and by group of layers. The parts add up to the whole score, whatever the curvature.

S[q,z] = sum over layers l of (H^-1 g_q)_l . g_z,l
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from logra_kernels.curvature import Factor, Groups, matching
from logra_kernels.influence.score import adjustment, block_bytes, check_solved
from logra_kernels.influence.statistics import check_mask
from logra_kernels.influence.whitening import WhitenedFactor
from logra_kernels.ops import score_block
from logra_kernels.store import GradientStore, sum_over_ranks

REST = "other layers"


def layer_groups(layers: Sequence[str], groups: Groups | None) -> dict[str, list[str]]:
    """Group name -> its layers.

    Args:
        layers: All of the store's.
        groups: {name: [glob patterns on layer names]}, or a list of patterns that are their groups' names; None makes
            every layer a group. Layers of no group make up the group "other layers", so that the parts add up.

    Raises:
        ValueError: A pattern matches no layer, or two groups share a layer.
    """
    if groups is None:
        return {name: [name] for name in layers}
    found = matching(layers, groups)
    owned = {name for names in found.values() for name in names}
    rest = [name for name in layers if name not in owned]
    return {**found, REST: rest} if rest else found


def group_scores(
    store: GradientStore,
    solved: Tensor,
    groups: Groups | None = None,
    mode: str = "dot",
    statistics: Mapping[str, Tensor] | None = None,
    *,
    factor: Factor | None = None,
    rows: Tensor | None = None,
) -> dict[str, Tensor]:
    """Each group's part of every score, group -> [Q, N] fp32, in one pass; the parts add up to `scores`.

    Args:
        store, solved, mode, statistics, rows: As in `scores`.
        groups: As in `layer_groups`.
        factor: The factorised curvature; needed for mode "l2", whose self-influence is split over layers too.

    Raises:
        ValueError: As in `scores` and `layer_groups`, or no factor for mode "l2".
    """
    check_solved(solved, store.dim)
    scale, shift = adjustment(mode, statistics, len(store))
    if rows is not None:
        check_mask(rows, len(store))
    slices = store.slices
    chosen = {group: _spans([slices[n] for n in names]) for group, names in layer_groups(list(slices), groups).items()}
    device = solved.device
    found = {group: torch.zeros(len(solved), len(store), device=device, dtype=torch.float32) for group in chosen}
    for start, block in store.blocks(block_bytes(store, len(solved))):
        part = slice(start, start + len(block))
        own = None if shift is None else _own(block, factor)
        for group, spans in chosen.items():
            for span in spans:
                found[group][:, part] += score_block(solved[:, span], block[:, span].to(device))
                if own is not None:
                    found[group][:, part] -= 0.5 * own[:, span].sum(1).to(device)
    sum_over_ranks(store, found.values())
    for value in found.values():
        if scale is not None:
            value *= scale.to(device)
        if rows is not None:
            value[:, ~rows.to(device)] = torch.nan
    return found


def separate_scores(
    solved: Tensor,
    rows: Tensor,
    factor: Factor,
    groups: Mapping[str, Sequence[slice]],
    mode: str = "dot",
) -> dict[str, Tensor]:
    """Rows in memory scored by each group of layers as if it were the whole model, group -> [Q, N] fp32.

    Unlike the parts of `group_scores` these do not add up: groups may share layers, and what "relatif" divides by is
    the group's own self-influence.

    Args:
        solved: The queries after the curvature's solve, [Q, D].
        rows: [N, D].
        factor: The curvature.
        groups: Name -> its layers' columns.
        mode: "dot", "relatif" or "l2".

    Raises:
        ValueError: Sizes do not fit, another mode, or NaN in the queries.
    """
    check_solved(solved, rows.shape[1])
    own = {} if mode == "dot" else separate_self_influence(rows, factor, groups)
    found = {}
    for group, parts in groups.items():
        value = torch.zeros(len(solved), len(rows), device=solved.device, dtype=torch.float32)
        for span in _spans(list(parts)):
            value += score_block(solved[:, span], rows[:, span])
        scale, shift = adjustment(mode, {"self_influence": own[group]} if group in own else {}, len(rows))
        value = value if scale is None else value * scale
        found[group] = value if shift is None else value + shift
    return found


def separate_self_influence(rows: Tensor, factor: Factor, groups: Mapping[str, Sequence[slice]]) -> dict[str, Tensor]:
    """g^T (H + lambda I)^-1 g of rows in memory by each group of layers as `separate_scores` has them, group -> [N]
    fp32."""
    own = _own(rows, factor)
    return {
        group: torch.stack([own[:, part].sum(1) for part in parts]).sum(0).float() for group, parts in groups.items()
    }


def _spans(parts: list[slice]) -> list[slice]:
    """The same columns with neighbours joined."""
    joined: list[slice] = []
    for part in parts:
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        joined.append(part)
    return joined


def layer_scores(
    store: GradientStore,
    solved: Tensor,
    indices: Tensor,
    mode: str = "dot",
    statistics: Mapping[str, Tensor] | None = None,
    *,
    factor: Factor | None = None,
) -> dict[str, Tensor]:
    """Each layer's part of the scores of chosen rows: layer name -> [Q, k] fp32, for `indices` [Q, k]."""
    device, indices, solved = solved.device, indices.cpu(), solved.cpu()
    scale, shift = adjustment(mode, statistics, len(store))
    wanted, where = indices.unique(return_inverse=True)
    rows = torch.cat([store.read(i, i + 1) for i in wanted.tolist()])
    own = None if shift is None else _own(rows, factor)
    found = {}
    for name, part in store.slices.items():
        value = torch.einsum("qd,qkd->qk", solved[:, part].float(), rows[:, part][where])
        value = value if own is None else value - 0.5 * own[:, part].sum(1).float()[where]
        found[name] = (value if scale is None else value * scale[indices]).to(device)
    return found


def _own(rows: Tensor, factor: Factor | None) -> Tensor:
    """g * (H^-1 g), [n, D] fp64, whose sums over layers' columns are their parts of the self-influence."""
    if factor is None:
        raise ValueError("influence: the parts of mode 'l2' need the factorised curvature")
    return factor.parts(rows) if isinstance(factor, WhitenedFactor) else factor.solve(rows).double() * rows
