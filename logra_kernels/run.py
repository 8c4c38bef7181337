"""Run: the session a user holds. Existing training code becomes data valuation by two `with` statements."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from logra_kernels import influence
from logra_kernels.curvature import Factor, RawFisher
from logra_kernels.errors import LograError, StoreError, StoreMismatch
from logra_kernels.nn import DEFAULT_KINDS, KINDS, Taps, capture, model_fingerprint
from logra_kernels.projection import Projection
from logra_kernels.store import GradientStore

Progress = Callable[[int], None]


@dataclass
class Query:
    """Projected gradients of queries: `rows` [Q, D] fp32 once the `with` is left, one for each id."""

    ids: list[str]
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @classmethod
    def cat(cls, queries: "Sequence[Query]") -> "Query":
        """Several batches of queries as one."""
        return cls([i for query in queries for i in query.ids], torch.cat([query.rows for query in queries]))


class Run:
    """Log a model's training rows into a store once, then ask which of them made the model say something.

    Args:
        path: The store's directory. One that exists is opened, checked against the model and, by `log`, continued.
        model: Any module whose inputs hold the samples in dimension 0.
        include, exclude: Glob patterns on layer names, as in `capture`; default every layer that can be tapped, or the
            store's own layers where it exists.
        projection: Default `Projection()`, or the store's own where it exists.
        dtype: Of the stored rows, "fp32" or "bf16".
        kinds, bias: As in `capture`; default linear and convolution layers without bias, or as the store has them.
        rows_per_shard: How many rows a shard holds; default about 64 MB worth.
        fingerprints: More facts that queries must share with the store, as strings (tokenizer, loss, ...).
        freeze: Keep the weights from gathering gradients of their own inside `log` and `query`, which halves the
            backward's work; their `requires_grad` is put back on leaving.

    Raises:
        ValueError: A filter matches no layer.
        StoreError: The store cannot be read.
        StoreMismatch: The store was made with other weights, layers, projection, dtype or facts.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        model: nn.Module,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        projection: Projection | None = None,
        dtype: str | None = None,
        *,
        kinds: Sequence[str] | None = None,
        bias: bool | None = None,
        rows_per_shard: int | None = None,
        fingerprints: dict[str, str] | None = None,
        freeze: bool = True,
    ) -> None:
        self.path = os.fspath(path)
        self.model = model
        self._freeze = freeze
        self._rows_per_shard = rows_per_shard
        self._writing = False
        self._store = GradientStore.open(self.path) if GradientStore.exists(self.path) else None
        if self._store is not None:
            projection = projection or Projection.from_dict(self._store.projection or {})
            bias = self._store.meta.get("bias", False) if bias is None else bias
            if include is None and exclude is None and kinds is None:
                include, kinds = list(self._store.layers), list(KINDS)
        self._dtype = dtype or (self._store.dtype if self._store is not None else "fp32")
        self._bias = bool(bias)
        self.taps: Taps = capture(model, projection, include, exclude, kinds=kinds or DEFAULT_KINDS, bias=self._bias)
        self.fingerprints = {"model": model_fingerprint(model), **(fingerprints or {})}
        if self._store is not None:
            self._check(self._store)
        self._curvature: RawFisher | None = None
        self._factors: dict[float | None, Factor] = {}
        self._self_influence: dict[float | None, Tensor] = {}
        self.taps.attach()

    def _check(self, store: GradientStore) -> None:
        differs = []
        if store.layers != self.taps.layers:
            differs.append(f"layers ({len(store.layers)} there, {len(self.taps.layers)} here)")
        if store.projection != self.taps.projection.to_dict():
            differs.append(f"projection ({store.projection} there, {self.taps.projection.to_dict()} here)")
        if store.meta.get("bias", False) != self._bias:
            differs.append(f"bias ({not self._bias} there, {self._bias} here)")
        if store.dtype != self._dtype:
            differs.append(f"dtype ({store.dtype} there, {self._dtype} here)")
        if differs:
            raise StoreMismatch(f"the store {self.path} was made with other settings: {'; '.join(differs)}")
        store.check(self.fingerprints)

    @property
    def store(self) -> GradientStore:
        """The store; its committed rows.

        Raises:
            StoreError: Nothing was logged yet.
        """
        if self._store is None:
            raise StoreError(f"no store at {self.path}: log training rows first")
        return self._store

    def committed(self, ids: Sequence[str]) -> bool:
        """Whether all these rows are safely in the store, so that a rerun may pass over their batch."""
        return self._store is not None and all(self._store.committed(i) for i in ids)

    @contextmanager
    def log(
        self, ids: Sequence[str], columns: dict[str, list] | None = None, weights: Tensor | None = None
    ) -> Iterator[None]:
        """Store the projected gradients of a batch of training rows: forward and `loss.backward()` go inside.

        Args:
            ids: One string a sample, in the batch's order; new to the store, or the very rows a rerun comes by again.
            columns: More facts of each row (source, text), one list each.
            weights: A factor for each position, [N, T], as in `Taps.reset`.

        Raises:
            LograError: A layer received no gradient.
            StoreError: A gradient is NaN or infinite, an id is a duplicate, the disk is full; what was committed stays.
        """
        ids = [str(i) for i in ids]
        with self._tapped(ids, weights):
            yield
            rows = self.taps.rows()
        self._writer().append(rows, ids, columns, skip_committed=True)
        self._forget()

    @contextmanager
    def query(self, ids: Sequence[str], weights: Tensor | None = None) -> Iterator[Query]:
        """Gather the projected gradients of queries: forward and `loss.backward()` go inside.

        Args:
            ids: One string a sample.
            weights: A factor for each position, [N, T].

        Raises:
            LograError: A layer received no gradient, or a gradient is NaN or infinite.
        """
        query = Query([str(i) for i in ids])
        with self._tapped(query.ids, weights):
            yield query
            rows = self.taps.rows().float().cpu()
        bad = [i for i, row in zip(query.ids, rows, strict=True) if not row.isfinite().all()]
        if bad:
            raise LograError(f"query {bad[0]!r}: its gradient is NaN or infinite; check the model's loss on it")
        query.rows = rows

    @contextmanager
    def _tapped(self, ids: list[str], weights: Tensor | None) -> Iterator[None]:
        if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 and m.training for m in self.model.modules()):
            warnings.warn("Run: dropout is on, so gradients are random; call model.eval() first", stacklevel=4)
        learning = [p for p in self.model.parameters() if p.requires_grad] if self._freeze else []
        for p in learning:
            p.requires_grad_(False)
        self.taps.reset(len(ids), weights)
        self.taps.active = True
        try:
            yield
        finally:
            self.taps.active = False
            self.taps.reset()
            for p in learning:
                p.requires_grad_(True)

    def _writer(self) -> GradientStore:
        if self._store is None:
            self._store = GradientStore.create(
                self.path,
                self.taps.layers,
                self._dtype,
                projection=self.taps.projection.to_dict(),
                fingerprints=self.fingerprints,
                rows_per_shard=self._rows_per_shard,
                meta={"bias": self._bias},
            )
        elif not self._writing:
            self._store = GradientStore.open(self.path, mode="append")
        self._writing = True
        return self._store

    def _forget(self) -> None:
        self._curvature = None
        self._factors.clear()
        self._self_influence.clear()

    def _commit(self) -> GradientStore:
        if self._writing:
            self.store.close()
            self._store, self._writing = GradientStore.open(self.path), False
        return self.store

    def finalize(self, progress: Progress | None = None) -> None:
        """Commit all rows, then compute and keep the curvature and every row's self-influence at the default damping.

        Args:
            progress: Called with numbers of rows, which add up to 2 N, or to less where results are kept already.
        """
        self._commit()
        self._solved(None, progress)
        self._row_self_influence(None, progress)

    def close(self) -> None:
        """Commit what was logged and take the taps off the model. A `with` statement does it by itself."""
        self.taps.detach()
        if self._writing:
            self._commit()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _solved(self, damping: float | None, progress: Progress | None = None) -> Factor:
        if damping not in self._factors:
            if self._curvature is None:
                self._curvature = RawFisher.of(self._commit(), progress)
            self._factors[damping] = self._curvature.factorize(damping)
        return self._factors[damping]

    def _row_self_influence(self, damping: float | None, progress: Progress | None = None) -> Tensor:
        if damping not in self._self_influence:
            factor = self._solved(damping)
            self._self_influence[damping] = influence.self_influence(self.store, factor, damping, progress)
        return self._self_influence[damping]

    def self_influence(self, damping: float | None = None) -> Tensor:
        """g^T (H + lambda I)^-1 g of every stored row, [N] fp32."""
        return self._row_self_influence(damping)

    def scores(self, query: Query, mode: str = "dot", damping: float | None = None) -> Tensor:
        """Influence of every stored row on every query, [Q, N] fp32; positive = training on the row lowers the loss.

        Args:
            query: From `query`.
            mode: "dot", or "relatif" (l-RelatIF).
            damping: lambda, absolute; None for 0.1 x each layer's mean eigenvalue.

        Raises:
            LograError: The curvature is singular at this damping, or a layer's gradients are all zero.
        """
        solved = self._solved(damping).solve(query.rows)
        return influence.scores(
            self.store, solved, mode, self._row_self_influence(damping) if mode == "relatif" else None
        )

    def topk(
        self,
        query: Query,
        k: int = 10,
        mode: str = "relatif",
        damping: float | None = None,
        *,
        largest: bool = True,
        layers: bool = False,
    ) -> influence.TopK:
        """The k stored rows of highest influence on each query, streamed in bounded memory.

        Args:
            query, mode, damping: As in `scores`.
            k: At least 1.
            largest: False for the rows of lowest influence (training on them raises the query's loss).
            layers: Also give each layer's part of the scores.
        """
        solved = self._solved(damping).solve(query.rows)
        own = self._row_self_influence(damping) if mode == "relatif" else None
        return influence.topk(self.store, solved, k, mode, own, largest=largest, layers=layers)
