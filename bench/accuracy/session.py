"""The package as its users have it: a `Run` with a store on disk, asked for its scores."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

import logra_kernels as lk
from logra_kernels.influence import row_mask
from logra_kernels.run import Query

from .gradients import Case
from .setting import Setting


@dataclass(frozen=True)
class Session:
    """One row of the table.

    Attributes:
        curvature: Of `Run`; "default" leaves it to the run.
        projection: A kind of `lk.Projection`, with a comma between those of P_in and P_out; "default" likewise.
        k: Its rank; 0 with "identity".
        damping: "default", a multiple of the mean eigenvalue of the block ("0.1") or of the whole layer ("1w").
        observed: How many training rows are observed before the first is logged.
        sharing: Of `Run.observe`.
        mode: Of `Run.scores`.
        rows: "all", or the filter that leaves outliers out: "l2<0.99" keeps the rows below that quantile of the norm,
            "l2/l1<0.99" of its ratio to the L1 norm (Choe et al. 2024, appendix F.2); others score 0.
    """

    curvature: str = "default"
    projection: str = "default"
    k: int = 64
    damping: str = "default"
    observed: int = 0
    sharing: str = "expand"
    mode: str = "dot"
    rows: str = "all"

    @property
    def name(self) -> str:
        parts = [f"run:{self.curvature}", f"{self.projection}{self.k or ''}", self.damping]
        parts += [f"seen{self.observed}"] if self.observed else []
        said = (self.sharing, self.mode, self.rows)
        return "/".join(parts + [part for part in said if part not in ("expand", "dot", "all")])

    def __call__(self, case: Case) -> Tensor:
        made = (self.curvature, self.projection, self.k, self.damping, self.observed, self.sharing)
        run, query = case.last(made, lambda: self._asked(case))  # several sessions ask it in turn
        kept = None
        if self.rows != "all":
            what, quantile = self.rows.split("<")
            statistics = run.statistics()
            value = statistics.l2 if what == "l2" else statistics.l2_over_l1
            kept = row_mask(value, quantile=float(quantile))
        return run.scores(query, self.mode, rows=kept).nan_to_num(0.0)

    def _asked(self, case: Case) -> tuple[lk.Run, Query]:
        observed = (self.observed, self.sharing)
        store = case.once(("store", self.projection, self.k, *observed), lambda: self._log(case))
        options = {} if self.curvature == "default" else {"curvature": self.curvature}
        run = lk.Run(Path(store.name) / "store", case.model, damping=self._damping(), **options)
        with run, run.query([f"q{i}" for i in range(len(case.data.query_x))]) as query:
            _backward(case, case.data.query_x, case.data.query_y)
        return run, query

    def _damping(self) -> lk.Damping | None:
        if self.damping == "default":
            return None
        times = float(self.damping.removesuffix("w"))
        return lk.Damping(whole=times) if self.damping.endswith("w") else lk.Damping(relative=times)

    def _log(self, case: Case) -> tempfile.TemporaryDirectory:
        folder = tempfile.TemporaryDirectory(prefix="logra-accuracy-")
        x, y = case.data.x, case.data.y
        projection = None
        if self.projection != "default":
            kinds = self.projection.split(",")
            projection = lk.Projection(self.k or 1, kinds[0] if len(kinds) == 1 else tuple(kinds), seed=case.index)
        with lk.Run(Path(folder.name) / "store", case.model, projection=projection) as run:
            if self.observed:
                sample = np.random.Generator(np.random.PCG64(case.index)).permutation(len(x))[: self.observed]
                with run.observe(sharing=self.sharing):
                    _backward(case, x[sample], y[sample])
            for start in range(0, len(x), 200):
                part = slice(start, start + 200)
                with run.log([f"row{i}" for i in range(len(x))[part]]):
                    _backward(case, x[part], y[part])
        return folder


def _backward(case: Case, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(case.model(x), y, reduction="sum").backward()


def registry(setting: Setting) -> dict[str, Session]:
    """Every session of a study, by name, those that share a store side by side."""
    found = _one_position(setting.train) if setting.positions is None else _shared(setting.train)
    return {session.name: session for session in found}


def _shared(rows: int) -> list[Session]:
    """Covariances over positions and over samples, for the projection and for the curvature."""
    found = [Session(curvature, "orthonormal", 8) for curvature in ("identity", "raw", "shrunk")]
    for sharing in ("expand", "reduce"):
        seen = {"observed": rows, "sharing": sharing}
        found += [Session(c, "identity", 0, damping=d, **seen) for c in ("kfac", "ekfac") for d in ("0.1", "1")]
        for k in (4, 8, 16):
            found += [Session(c, "pca", k, **seen) for c in ("raw", "shrunk", "kfac", "ekfac")]
            found += [Session(c, "pca", k, damping="0.1", **seen) for c in ("raw", "shrunk", "kfac", "ekfac")]
        found += [Session("shrunk", "pca", 8, observed=256, sharing=sharing)]
    return found


def _one_position(rows: int) -> list[Session]:
    found = [Session(), Session("raw", "orthonormal", damping="0.1")]  # without a look at the data; the paper's
    found += [Session("shrunk", "orthonormal", damping=d) for d in ("0.3", "1")]
    found += [Session("shrunk", kind, 16) for kind in ("orthonormal", "gaussian", "kaiming", "mask", "sjlt")]
    found += [Session(observed=seen) for seen in (64, 256, rows)]
    found += [Session(observed=rows, mode="relatif")]
    found += [Session(observed=rows, rows=f) for f in ("l2<0.99", "l2<0.95", "l2/l1<0.99", "l2/l1<0.95")]
    found += [Session("shrunk", "pca", damping=d, observed=rows) for d in ("0.1", "2w", "3w")]
    found += [Session("raw", "pca", damping="0.1", observed=rows)]
    found += [Session(c, "pca", observed=rows) for c in ("kronecker", "corrected-kronecker", "kfac", "ekfac")]
    return [*found, Session("shrunk", "pca", 16, observed=rows)]
