"""What is known of every stored row by itself: norms of its gradient, its self-influence, the length of H^-1 g.

    l1 = sum |g|    l2 = |g|    self_influence = g^T (H + lambda I)^-1 g    solved_norm = |(H + lambda I)^-1 g|

Each is computed once, together with whatever else is missing, in one streaming pass, and kept beside the store under
the hash of its rows; those that a curvature enters also under its kind and the hash of the factor: of everything the
curvature was computed from, and the damping that was in fact added.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from logra_kernels.curvature import Factor, Progress
from logra_kernels.curvature.damping import Damping
from logra_kernels.store import GradientStore, sum_over_ranks

NORMS = ("l2", "l1")
CURVED = ("self_influence", "solved_norm")
_NORMS_SIDECAR = "row-norms"


@dataclass(frozen=True)
class RowStatistics:
    """Of every stored row, [N] fp32 each, in the store's order.

    Attributes:
        self_influence: g^T (H + lambda I)^-1 g.
        l2, l1: Norms of the projected gradient.
    """

    self_influence: Tensor
    l2: Tensor
    l1: Tensor

    @property
    def l2_over_l1(self) -> Tensor:
        """|g|_2 / |g|_1, [N], between 1/sqrt(D) and 1; high where few entries carry the gradient, 0 for a zero row.

        The filter that Choe et al. 2024, appendix F.2, propose against outliers.
        """
        return torch.where(self.l1 > 0, self.l2 / self.l1, 0.0)


def row_statistics(
    store: GradientStore,
    factor: Factor | None,
    wanted: Collection[str],
    *,
    curvature: str = "raw",
    damping: "float | Damping | None" = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The wanted statistics of every row, name -> [N] fp32.

    Args:
        store: The rows.
        factor: Their factorised curvature; needed for "self_influence" and "solved_norm".
        wanted: Of "l2", "l1", "self_influence", "solved_norm".
        curvature: The curvature's kind, which names what is kept.
        damping: What the factor was made with; None for its default.
        progress: Called with the number of rows of each block done.

    Raises:
        ValueError: An unknown name, no factor where one is needed, or the factor is of another store's rows.
    """
    unknown = sorted(set(wanted) - {*NORMS, *CURVED})
    if unknown:
        raise ValueError(
            f"influence: row statistics {unknown} are unknown; they must be of {', '.join(NORMS + CURVED)}"
        )
    found: dict[str, Tensor] = {}
    norms = store.sidecar_read(_NORMS_SIDECAR)
    if norms is not None:
        found |= norms[0]
    added, suffix = "", ""
    if factor is not None:
        factor.check(store)
        added = factor.hash
        suffix = f"-{curvature}" if damping is None else f"-{curvature}-{added[:16]}"
    missing = []
    for name in CURVED:
        if name not in wanted:
            continue
        if factor is None:
            raise ValueError(f"influence: the row statistic {name!r} needs a factorised curvature")
        kept = store.sidecar_read(_sidecar(name, suffix))
        if kept is not None and kept[1].get("factor") == added:
            found[name] = kept[0][name]
        else:
            missing.append(name)
    if missing or (norms is None and not set(wanted).isdisjoint(NORMS)):
        computed = _stream(store, factor, missing, progress)
        if norms is None:
            store.sidecar_keep(_NORMS_SIDECAR, {name: computed[name] for name in NORMS})
        for name in missing:
            store.sidecar_keep(_sidecar(name, suffix), {name: computed[name]}, {"factor": added})
        found |= computed
    return {name: found[name] for name in wanted}


def _sidecar(name: str, suffix: str) -> str:
    return name.replace("_", "-") + suffix


def _stream(
    store: GradientStore, factor: Factor | None, curved: list[str], progress: Progress | None
) -> dict[str, Tensor]:
    found = {name: torch.zeros(len(store), dtype=torch.float32, device="cpu") for name in [*NORMS, *curved]}
    for start, rows in store.blocks():
        part = slice(start, start + len(rows))
        wide = rows.float() if store.whitening is None else store.whitening.undo(rows)
        found["l2"][part] = torch.linalg.vector_norm(wide, dim=1)
        found["l1"][part] = wide.abs().sum(1)  # pairwise sums; vector_norm(ord=1) adds one by one and loses digits
        if factor is not None and "self_influence" in curved:
            found["self_influence"][part] = factor.quadratic(rows).float()
        if factor is not None and "solved_norm" in curved:
            found["solved_norm"][part] = torch.linalg.vector_norm(factor.solve(wide), dim=1, dtype=torch.float64)
        if progress is not None:
            progress(len(rows))
    sum_over_ranks(store, found.values())
    return found


def self_influence(
    store: GradientStore,
    factor: Factor,
    damping: "float | Damping | None" = None,
    progress: Progress | None = None,
    *,
    curvature: str = "raw",
) -> Tensor:
    """I(z, z) of every row, [N] fp32; arguments as in `row_statistics`."""
    wanted = ("self_influence",)
    return row_statistics(store, factor, wanted, curvature=curvature, damping=damping, progress=progress)[wanted[0]]


def row_mask(
    values: Tensor,
    *,
    quantile: float | None = None,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Tensor:
    """Which rows to keep by one statistic, [N] bool; join several with `&`, and give the result as `rows=`.

    Args:
        values: Of every row, [N]: a norm, `l2_over_l1`, self-influence, or a count of tokens.
        quantile: Keep the rows up to this quantile: 0.99 leaves out the highest hundredth.
        at_most, at_least: Keep the rows within these values, themselves included.

    Raises:
        ValueError: `values` is not [N], a quantile outside 0..1, or nothing was asked.
    """
    if values.dim() != 1:
        raise ValueError(f"row_mask: values {tuple(values.shape)} must be [N], one for each row")
    if quantile is None and at_most is None and at_least is None:
        raise ValueError("row_mask: give quantile, at_most or at_least")
    keep = torch.ones(len(values), dtype=torch.bool, device="cpu")
    if quantile is not None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"row_mask: quantile is {quantile}; it must be between 0 and 1")
        last = max(0, int(quantile * (len(values) - 1) + 1e-9))
        keep &= values <= values.sort().values[last] if len(values) else keep
    if at_most is not None:
        keep &= values <= at_most
    if at_least is not None:
        keep &= values >= at_least
    return keep


def check_mask(rows: Tensor, count: int) -> None:
    """Raise ValueError unless `rows` is a mask over `count` rows that keeps one."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.bool or rows.shape != (count,):
        what = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"influence: rows is {what}; it must be a bool mask [{count}], one for each stored row")
    if not bool(rows.any()):
        raise ValueError("influence: the mask rows keeps no row; loosen the filter")


def needed(statistics: Mapping[str, Tensor] | None, name: str, mode: str, count: int) -> Tensor:
    """One statistic that a mode needs, checked."""
    value = (statistics or {}).get(name)
    if value is None or value.shape != (count,):
        got = "none" if value is None else f"{tuple(value.shape)}"
        raise ValueError(f"influence: mode {mode!r} needs {name} of every row, [{count}], and got {got}")
    return value
