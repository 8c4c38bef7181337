"""Scores over several runs: checkpoints of one training (TracIn) or independent models and projections (TRAK).

    tracin     S[q,z] = sum_c w_c g_q,c . g_z,c                         (Pruthi et al. 2020, with w_c the learning rate)
    ensemble   S[q,z] = mean_c S_c[q,z],  error = std / sqrt(C)         (Park et al. 2023, section 3)

Every run has a store of its own; rows are matched by their ids, whatever order each store has them in. One member's
scores are in memory at a time, beside the sums.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logra_kernels.curvature import Damping
from logra_kernels.errors import LograError
from logra_kernels.influence import TopK
from logra_kernels.session.analysis import Analysis
from logra_kernels.session.query import Query

Members = Sequence[tuple[Analysis, Query]]


@dataclass(frozen=True)
class Ensemble:
    """Scores over members.

    Attributes:
        mean: [Q, N] fp32.
        standard_error: Of the mean over members, [Q, N] fp32; None for one member.
        ids: The rows', in the first member's order.
        query_ids: The queries'.
    """

    mean: Tensor
    standard_error: Tensor | None
    ids: list[str]
    query_ids: list[str]

    def topk(self, k: int = 10, *, largest: bool = True) -> TopK:
        """The k rows of highest (or lowest) mean score on each query; `indices` count in the first member's order."""
        return TopK.of(self.mean, self.ids, k, largest=largest)


def tracin(
    members: Members,
    weights: Sequence[float] | None = None,
    *,
    precondition: bool = False,
    damping: float | Damping | None = None,
) -> Tensor:
    """The weighted sum of the members' dot scores, [Q, N] fp32, rows in the first member's order.

    Args:
        members: (run, query) of each checkpoint: the same rows and queries, by id.
        weights: One a member, the learning rate around that checkpoint; default 1.
        precondition: Put each run's curvature between the gradients; TracIn itself has none.
        damping: Of that curvature.

    Raises:
        ValueError: No members, or not one weight for each.
        LograError: Rows or queries are not the same.
    """
    if weights is not None and len(weights) != len(members):
        raise ValueError(f"tracin: {len(weights)} weights for {len(members)} runs; give one for each")
    total: Tensor | None = None
    for i, (run, query, order) in enumerate(_aligned("tracin", members)):
        query.check(run.store.dim)
        scores = run.scores(query, "dot", damping) if precondition else run.store.score(query.rows)
        part = scores[:, order] * (1.0 if weights is None else weights[i])
        total = part if total is None else total + part
    assert total is not None
    return total


def member_scores(members: Members, mode: str = "dot", *, damping: float | Damping | None = None) -> Iterator[Tensor]:
    """Each member's scores [Q, N] fp32, rows in the first member's order; a list of them gives `value` its error bars.

    Args, Raises: As in `ensemble`.
    """
    for run, query, order in _aligned("ensemble", members):
        yield run.scores(query, mode, damping)[:, order]


def ensemble(members: Members, mode: str = "dot", *, damping: float | Damping | None = None) -> Ensemble:
    """Mean and standard error of the members' scores.

    Args:
        members: (run, query) of each projection seed or independently trained model: the same rows and queries, by id.
        mode, damping: As in `Run.scores`.

    Raises:
        ValueError: No members.
        LograError: Rows or queries are not the same.
    """
    mean = spread = torch.empty(0, dtype=torch.float32, device="cpu")
    count = 0
    for scores in member_scores(members, mode, damping=damping):
        scores = scores.double()
        count += 1
        if count == 1:
            mean, spread = scores, torch.zeros_like(scores)
            continue
        before = scores - mean  # Welford: no second pass, no cancellation
        mean = mean + before / count
        spread += before * (scores - mean)
    error = (spread / (count - 1) / count).sqrt().float() if count > 1 else None
    run, query = members[0]
    return Ensemble(mean.float(), error, run.store.ids, list(query.ids))


def _aligned(name: str, members: Members) -> Iterator[tuple[Analysis, Query, Tensor]]:
    """Each member with the order that brings its rows into the first one's."""
    if not members:
        raise ValueError(f"{name}: give at least one (run, query)")
    first = members[0]
    ids = first[0].commit().ids
    for run, query in members:
        if query.ids != first[1].ids:
            raise LograError(
                f"{name}: the queries of {run.store.path} are {query.ids}, not {first[1].ids}; ask the same"
            )
        order = run.commit().numbers_of(ids)
        if len(run.store) != len(ids) or bool((order < 0).any()):
            differ = set(run.store.ids) ^ set(ids)
            raise LograError(
                f"{name}: {first[0].store.path} and {run.store.path} hold different rows: {len(differ)} ids are in one"
                f" only, {min(differ)!r} for one; log the same rows in both"
            )
        yield run, query, order
