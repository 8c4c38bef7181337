"""Value of data by provider: scores summed over each provider's rows, as a table that adds up.

    value(P) = sum over queries q, rows z of P of S[q,z]

This is the first-order value: influence predicts that a set of rows is worth the sum of its rows, and in such an
additive game the Shapley value of a provider, its Banzhaf value and its leave-one-out value are all this sum. It knows
nothing of how rows replace or need each other: two providers of the same text get the full value each.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logra_kernels.errors import LograError
from logra_kernels.influence.statistics import check_mask


@dataclass(frozen=True)
class Value:
    """One provider's line.

    Attributes:
        source: Its name.
        rows: How many rows are its.
        value: Sum of their scores over all queries.
        per_row: value / rows.
        share: value / total; beyond 0..1 where others' values are negative, NaN where the total is 0.
        positive_share: Its rows' positive part of the positive mass: a row's score summed over the queries, where that
            is above 0. Between 0 and 1, and adds up to 1 (NaN where no row is positive).
        error: Standard error of `value` over the score matrices (projection seeds); None for one matrix.
    """

    source: Hashable
    rows: int
    value: float
    per_row: float
    share: float
    positive_share: float
    error: float | None


@dataclass(frozen=True)
class ValueTable:
    """Providers by value, highest first.

    Attributes:
        lines: One for each provider.
        total: Sum over all rows and queries, taken from the scores themselves, not from the lines.
        by_query: Each provider's value for each query, [P, Q] fp64, in the lines' order.
    """

    lines: list[Value]
    total: float
    by_query: Tensor

    @property
    def residual(self) -> float:
        """total - sum of the lines' values: 0 but for rounding (Shapley's efficiency)."""
        return self.total - sum(line.value for line in self.lines)

    def check(self) -> None:
        """Raise LograError unless the lines add up to the total, to 1e-9 of their absolute sum."""
        size = sum(abs(line.value) for line in self.lines)
        if not abs(self.residual) <= 1e-9 * max(size, abs(self.total)):
            raise LograError(f"value: the lines add up to {self.total - self.residual:g}, not to {self.total:g}")

    def __str__(self) -> str:
        width = max([6, *(len(str(line.source)) for line in self.lines)])
        head = (
            f"{'source':<{width}} {'rows':>8} {'value':>12} {'error':>10} {'per row':>12} {'share':>8} {'positive':>9}"
        )
        text = [head]
        for line in self.lines:
            error = "" if line.error is None else f"{line.error:.3g}"
            text.append(
                f"{line.source!s:<{width}} {line.rows:>8} {line.value:>12.5g} {error:>10} {line.per_row:>12.5g}"
                f" {line.share:>8.1%} {line.positive_share:>9.1%}"
            )
        return "\n".join([*text, f"{'total':<{width}} {sum(n.rows for n in self.lines):>8} {self.total:>12.5g}"])


def value(scores: Tensor | Sequence[Tensor], sources: Sequence[Hashable], *, rows: Tensor | None = None) -> ValueTable:
    """The value of each provider's rows to the queries.

    Args:
        scores: [Q, N]; or several, from runs that differ in the projection's seed only, whose mean is taken and whose
            spread gives the error bars. Mode "dot" is the one whose sums mean a change of loss.
        sources: Whose row each is, N names.
        rows: A bool mask [N]: the rows to count, for scores that left some out.

    Raises:
        ValueError: Sizes do not fit, or a counted score is NaN.
    """
    matrices = [scores] if isinstance(scores, Tensor) else list(scores)
    if not matrices or any(s.dim() != 2 or s.shape != matrices[0].shape for s in matrices):
        raise ValueError(f"value: scores {[tuple(s.shape) for s in matrices]} must be [Q, N], all of one size")
    count = matrices[0].shape[1]
    if len(sources) != count:
        raise ValueError(f"value: {len(sources)} sources for {count} scored rows; give one for each row")
    keep = torch.ones(count, dtype=torch.bool, device="cpu") if rows is None else rows
    check_mask(keep, count)
    kept = torch.stack([s[:, keep].double().cpu() for s in matrices])  # [R, Q, n]
    if not bool(kept.isfinite().all()):
        raise ValueError("value: scores hold NaN or infinity; for rows that were left out give the same mask as rows=")
    owners = [source for source, one in zip(sources, keep.tolist(), strict=True) if one]
    number = {source: i for i, source in enumerate(dict.fromkeys(owners))}
    where = torch.tensor([number[source] for source in owners], device="cpu")
    by_seed = kept.new_zeros(len(kept), kept.shape[1], len(number)).index_add_(2, where, kept)  # [R, Q, P]
    row_mean = kept.mean(0).sum(0)
    positive = torch.zeros(len(number), dtype=torch.float64, device="cpu").index_add_(0, where, row_mean.clamp_min(0))
    values, sizes, total = by_seed.sum(1), where.bincount(minlength=len(number)), float(row_mean.sum())
    error = values.std(0) / len(values) ** 0.5 if len(values) > 1 else None
    mass, worth = float(positive.sum()), values.mean(0)
    lines = [
        Value(
            source,
            int(sizes[i]),
            float(worth[i]),
            float(worth[i]) / int(sizes[i]),
            float(worth[i]) / total if total else float("nan"),
            float(positive[i]) / mass if mass else float("nan"),
            None if error is None else float(error[i]),
        )
        for source, i in number.items()
    ]
    order = sorted(range(len(lines)), key=lambda i: (-lines[i].value, str(lines[i].source)))
    table = ValueTable([lines[i] for i in order], total, by_seed.mean(0).T[order])
    table.check()
    return table
