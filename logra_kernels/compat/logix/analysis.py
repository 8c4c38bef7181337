"""LogIX's InfluenceFunction: scores of logs against logs, or against all stored rows.

    dot      s = g_src^T (H + lambda I)^-1 g_tgt
    cosine   s / sqrt(g_tgt^T (H + lambda I)^-1 g_tgt)        l-RelatIF
    l2       s - g_tgt^T (H + lambda I)^-1 g_tgt / 2

lambda is `damping`, or 0.1 times each layer's own mean eigenvalue. LogIX 0.1.1 differs in these:

    - its first damping stays for "raw", its EKFAC adds the damping again at every call, and its KFAC takes the first
      layer's default for all layers;
    - its KFAC divides sums over positions by the samples, or, given a mask, by the positions, which multiplies H by a
      constant; here H ~ (positions / samples) B (x) A, an estimate of the Fisher itself;
    - without preconditioning, its "cosine" and "l2" go on using H for the target's part;
    - rows without gradient score 0 here, NaN there.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from logra_kernels import influence
from logra_kernels.compat.logix.logs import Layers, nested, rows_of, stored_by
from logra_kernels.compat.logix.project import Project
from logra_kernels.compat.logix.utils import Log
from logra_kernels.curvature import Factor
from logra_kernels.store import GradientStore

MODES = {"dot": "dot", "cosine": "relatif", "l2": "l2"}
TOTAL = "total"
Result = dict[str, Any]


class InfluenceFunction:
    """What `LogIX.influence` is.

    Attributes:
        influence_scores: Results of `compute_influence_all(save=True)`, of all queries so far.
        self_influence_scores: Of a patched trainer's last `self_influence`.
    """

    def __init__(self, project: Project) -> None:
        self._project = project
        self.influence_scores: Result = {}
        self.self_influence_scores: Result = {}

    def get_influence_scores(self) -> Result:
        return self.influence_scores

    def get_self_influence_scores(self) -> Result:
        return self.self_influence_scores

    def precondition(self, src_log: Log, damping: float | None = None, hessian: str = "auto") -> Log:
        """(H + lambda I)^-1 g of every row of a log, as a log."""
        ids, rows = rows_of(src_log, self._project.layers)
        factor = self._project.factor(self._project.curvature(hessian, True), damping)
        return ids, nested(factor.solve(rows), self._project.layers)

    def compute_influence(
        self,
        src_log: Log,
        tgt_log: Log,
        mode: str = "dot",
        precondition: bool = True,
        hessian: str = "auto",
        influence_groups: Sequence[str] | None = None,
        damping: float | None = None,
    ) -> Result:
        """Influence of a log's rows on another's.

        Args:
            src_log: The queries, Q of them, as `get_log` gives them.
            tgt_log: The training rows, N of them.
            mode: "dot", "cosine" or "l2".
            precondition: False leaves H out.
            hessian: "raw", "kfac" (EKFAC where corrected eigenvalues were set up), "ekfac", "none", or "auto": by what
                was set up.
            influence_groups: Parts of layer names; each group is scored by its layers alone, as "total" is by all.
            damping: lambda.

        Returns:
            "src_ids", "tgt_ids" and "influence": [Q, N] fp32 on the CPU, or with groups {group: [Q, N]}.

        Raises:
            ValueError: An unknown mode or hessian, a group that matches no layer, a log of other layers.
            LograError: H is singular, or what it is made of was not logged.
        """
        kind = self._project.curvature(hessian, precondition)
        src_ids, queries = rows_of(src_log, self._project.layers)
        factor = self._project.factor(kind, damping)
        found = self._pairs(factor, factor.solve(queries), tgt_log, _mode(mode), influence_groups)
        return {"src_ids": src_ids, **found}

    def compute_influence_all(
        self,
        src_log: Log,
        loader: Iterable[Log],
        mode: str = "dot",
        precondition: bool = True,
        save: bool = False,
        hessian: str = "auto",
        influence_groups: Sequence[str] | None = None,
        damping: float | None = None,
    ) -> Result:
        """Influence of all rows of a loader; one from `build_log_dataloader` is scored in a streaming pass.

        Args:
            src_log, mode, precondition, hessian, influence_groups, damping: As in `compute_influence`.
            loader: Gives logs.
            save: Keep the result in `influence_scores` as well, beside earlier ones.

        Returns, raises:
            As `compute_influence`.
        """
        kind, inner = self._project.curvature(hessian, precondition), _mode(mode)
        src_ids, queries = rows_of(src_log, self._project.layers)
        store = stored_by(loader)
        if store is not None and influence_groups is None:
            found = self._stored(store, queries, kind, inner, damping)
        else:
            factor = self._project.factor(kind, damping)
            solved = factor.solve(queries)
            logs = loader if store is None else _blocks(store)
            found = _joined([self._pairs(factor, solved, log, inner, influence_groups) for log in logs])
        result = {"src_ids": src_ids, **found}
        if save:
            self.influence_scores = _more_queries(self.influence_scores, result)
        return result

    def compute_self_influence(
        self,
        src_log: Log,
        precondition: bool = True,
        hessian: str = "auto",
        influence_groups: Sequence[str] | None = None,
        damping: float | None = None,
    ) -> Result:
        """g^T (H + lambda I)^-1 g of a log's rows: "src_ids" and "influence", [N] or {group: [N]}.

        Args, raises:
            As `compute_influence`.
        """
        kind = self._project.curvature(hessian, precondition)
        ids, rows = rows_of(src_log, self._project.layers)
        factor = self._project.factor(kind, damping)
        if influence_groups is None:
            return {"src_ids": ids, "influence": factor.quadratic(rows).float()}
        groups = _columns(self._project.layers, influence_groups)
        return {"src_ids": ids, "influence": influence.separate_self_influence(rows, factor, groups)}

    def _stored(self, store: GradientStore, queries: Tensor, kind: str, mode: str, damping: float | None) -> Result:
        solved = self._project.solved(kind, store)
        queries = solved.factor(store, damping).solve_toward_stored(queries)
        own = solved.statistics(store, influence.NEEDS[mode], damping)
        return {"tgt_ids": store.ids, "influence": influence.scores(store, queries, mode, own)}

    def _pairs(self, factor: Factor, solved: Tensor, log: Log, mode: str, groups: Sequence[str] | None) -> Result:
        ids, rows = rows_of(log, self._project.layers)
        columns = _columns(self._project.layers, groups or ())
        scores = influence.separate_scores(solved, rows, factor, columns, mode)
        return {"tgt_ids": ids, "influence": scores[TOTAL] if groups is None else scores}


def _mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"logix: mode is {mode!r}; it must be one of {', '.join(MODES)}")
    return MODES[mode]


def _columns(layers: Layers, groups: Sequence[str]) -> dict[str, list[slice]]:
    """Group -> its layers' columns, "total" first."""
    at, slices = 0, {}
    for name, (k_out, k_in) in layers.items():
        slices[name] = slice(at, at := at + k_out * k_in)
    found = {TOTAL: list(slices.values())}
    for group in groups:
        found[group] = [part for name, part in slices.items() if group in name]
        if not found[group]:
            raise ValueError(f"logix: the influence group {group!r} is in no layer's name: {', '.join(layers)}")
    return found


def _blocks(store: GradientStore) -> Iterator[Log]:
    for start, rows in store.blocks():
        yield store.ids_of(torch.arange(start, start + len(rows), device="cpu")), rows


def _joined(results: Sequence[Result]) -> Result:
    """Of one batch of targets after another."""
    if not results:
        raise ValueError("logix: the loader gives no logs, so there is nothing to score")
    ids = [name for result in results for name in result["tgt_ids"]]
    return {"tgt_ids": ids, "influence": _cat([result["influence"] for result in results], 1)}


def joined_queries(results: Sequence[Result]) -> Result:
    """Self-influences of one batch after another."""
    if not results:
        return {}
    ids = [name for result in results for name in result["src_ids"]]
    return {"src_ids": ids, "influence": _cat([result["influence"] for result in results], 0)}


def _more_queries(before: Result, result: Result) -> Result:
    if not before:
        return dict(result)
    if before["tgt_ids"] != result["tgt_ids"]:
        raise ValueError("logix: the saved scores are of other rows than these; take get_influence_scores() before")
    influences = _cat([before["influence"], result["influence"]], 0)
    return {**result, "src_ids": before["src_ids"] + result["src_ids"], "influence": influences}


def _cat(parts: Sequence[Any], dim: int) -> Any:
    if isinstance(parts[0], dict):
        return {key: torch.cat([part[key] for part in parts], dim) for key in parts[0]}
    return torch.cat(list(parts), dim)
