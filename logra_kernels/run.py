"""Run: the session a user holds. Existing training code becomes data valuation by two `with` statements."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from logra_kernels.curvature import CURVATURES, Curvature, Damping, Groups, Progress
from logra_kernels.errors import LograError
from logra_kernels.nn import Taps, model_fingerprint
from logra_kernels.projection import Projection
from logra_kernels.session import (
    FisherSums,
    Observation,
    Query,
    Settings,
    SkippedRows,
    Solved,
    Writing,
    mode_problems,
    row_ids,
    unscaled,
    zero_layers,
)
from logra_kernels.store import GradientStore


class Run(Writing):
    """Log a model's training rows into a store once, then ask which of them made the model say something.

    Args:
        path: The store's directory. One that exists is opened, checked against the model and, by `log`, continued.
        model: Any module whose inputs hold the samples in dimension 0.
        include, exclude: Glob patterns on layer names, as in `capture`; default every layer that can be tapped, or the
            store's own layers where it exists.
        projection: Default the store's own where it exists, else of rank 64: "pca" of the batches that `observe` sees
            before the first row, or "orthonormal", at random, where it sees none.
        dtype: Of the stored rows: fp32, bf16, fp16, fp8, int8, int4, int2 or sign.
        block: Numbers of a layer that share a scale, for fp8 and below; default 128, or as the store has it.
        rank_c: Keep so many factors of each layer's G in place of all its numbers (`GradientStore.create`); default as
            the store has it, or all numbers.
        kinds, bias, projection_dtype: As in `capture`; default linear and convolution layers without bias, projected in
            the model's dtype, or as the store has them.
        shared_inputs: As in `capture`.
        rows_per_shard: How many rows a shard holds; default 64 MB worth, more of wide rows.
        fingerprints: More facts that queries must share with the store, as strings (tokenizer, loss, ...).
        freeze: Keep the weights from gathering gradients of their own inside `log` and `query`, which halves the
            backward's work; their `requires_grad` is put back on leaving.
        curvature: H's kind, one of `logra_kernels.curvature.CURVATURES` or a class of your own setting, as
            `curvature.LowRank.of_rank(512)`. The default, half the raw Fisher and half its
            Kronecker product, measured best (bench/results/accuracy-*.json): with fewer rows than dims the raw Fisher
            alone knows too few directions. The paper's is "raw", with damping `Damping(0.1)`.
        blocks: Layers that share a block of H, as {name: [glob patterns]} or a list of patterns that are each one
            block; d is then the sum of theirs. Every other layer is a block by itself. For identity, raw, raw-fp64,
            diagonal, shrunk, lowrank and fisher.
        fisher_while_logging: Sum the raw Fisher as rows are logged, so that no pass over the store is needed for it:
            the same bits, 4 d^2 bytes of memory a block of d numbers.
        statistics_device: Where Fishers are summed while batches go by: None, where the rows are, or "cpu", for those
            that outgrow the device; rows are copied out and summed while the next step runs.
        damping: Where a method is given none: a number (absolute), a `Damping`, or None for `Damping.of`'s default.

    Raises:
        ValueError: A filter matches no layer, an unknown curvature or statistics_device, or `blocks` that do not fit
            the layers or the curvature.
        StoreError: The store cannot be read.
        StoreMismatch: The store was made with other weights, layers, projection, dtype or facts.
    """

    _observes: type[Observation] = Observation

    def __init__(
        self,
        path: str | os.PathLike,
        model: nn.Module,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        projection: Projection | None = None,
        dtype: str | None = None,
        *,
        block: int | None = None,
        rank_c: int | None = None,
        kinds: Sequence[str] | None = None,
        bias: bool | None = None,
        projection_dtype: torch.dtype | None = None,
        shared_inputs: bool | None = None,
        rows_per_shard: int | None = None,
        fingerprints: dict[str, str] | None = None,
        freeze: bool = True,
        curvature: str | type[Curvature] = "shrunk",
        blocks: Groups | None = None,
        fisher_while_logging: bool = False,
        statistics_device: str | None = None,
        damping: float | Damping | None = None,
    ) -> None:
        if isinstance(curvature, str) and curvature not in CURVATURES:
            raise ValueError(f"Run: curvature is {curvature!r}; it must be one of {', '.join(CURVATURES)}")
        if statistics_device not in (None, "cpu"):
            raise ValueError(f"Run: statistics_device is {statistics_device!r}; it must be None or 'cpu'")
        self.path = os.fspath(path)
        self.model = model
        self._freeze = freeze
        self._rows_per_shard = rows_per_shard
        self._store = GradientStore.open(self.path) if GradientStore.exists(self.path) else None
        self._skipped = SkippedRows(self._store)
        self._settings = Settings.of(
            self._store,
            model,
            include=include,
            exclude=exclude,
            kinds=kinds,
            bias=bias,
            projection=projection,
            projection_dtype=projection_dtype,
            dtype=dtype,
            block=block,
            rank_c=rank_c,
        )
        self.taps: Taps = self._settings.capture(model, shared_inputs)
        self.fingerprints = {"model": model_fingerprint(model), **(fingerprints or {})}
        if self._store is not None:
            self._settings.check(self._store, self.taps.layers)
            self._store.check(self.fingerprints)
        kind = (CURVATURES[curvature] if isinstance(curvature, str) else curvature).joining(blocks or ())
        kind.columns(self.taps.layers)  # refuses blocks that do not fit
        self._solved = Solved(kind, damping)
        self._fisher = FisherSums(fisher_while_logging, kind, statistics_device is not None)
        self._observation = self._observes(self.taps, self._settings.projection, decided=self._store is not None)
        self.taps.attach()

    @property
    def learning(self) -> bool:
        """Whether the projection is still to be learned: `observe` must see a batch before the first row is logged."""
        return self._observation.learning

    def learn_projection(self, rank: int = 64) -> Projection:
        """PCA of what a run with `Projection(kind="identity")` has observed, for another run of the model.

        Raises:
            LograError: Nothing was observed, or it was projected.
        """
        return self._observation.learn(rank)

    @contextmanager
    def log(
        self,
        ids: Sequence[str],
        columns: dict[str, list] | None = None,
        weights: Tensor | None = None,
        offsets: Tensor | None = None,
        *,
        sequence_length: int | str | None = None,
        loss_scale: float = 1.0,
        nonfinite: str = "raise",
        observe: bool = False,
    ) -> Iterator[None]:
        """Store the projected gradients of a batch of training rows: forward and `loss.backward()` go inside.

        Args:
            ids: One a sample, in the batch's order: strings, or whole numbers (also a tensor of them), which become
                their digits; new to the store, or the very rows a rerun comes by again.
            columns: More facts of each row (source, text), one list each.
            weights: A factor for each position, [N, T], as in `Taps.reset`.
            offsets: Where token rows are packed with documents, their limits in the flattened positions, [N+1] int64,
                as in `Taps.reset`; every document is a row of the store.
            sequence_length: T, where the model flattens samples and positions for some layers, or "any" where it cuts
                them into windows (Swin, MobileViT), as in `Taps.reset`.
            loss_scale: What the loss was multiplied with, as `GradScaler.get_scale()`; rows are divided by it.
            nonfinite: What to do with samples whose gradient is NaN or infinite: "raise", and store nothing of the
                batch, or "skip": store the others, and record their ids (`Run.skipped`) with a warning that says how
                many. A rerun takes skipped rows for committed ones.
            observe: Let the same backward gather the covariances that `observe` does, at the projection as it is.

        Raises:
            ValueError: `offsets` do not fit the ids or the batch; ids of another kind; an unknown `nonfinite`.
            LograError: A layer received no gradient, or the projection is "pca" and nothing was observed.
            StoreError: A gradient is NaN or infinite (the ids are named) or too large for the dtype, an id is a
                duplicate, the disk is full; what was committed stays.
        """
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"log: nonfinite is {nonfinite!r}; it must be 'raise' or 'skip'")
        ids = row_ids("log", ids)
        self._observation.decide()
        with self._tapped(len(ids), weights, offsets, sequence_length), self._observation.beside(observe):
            yield
            rows = unscaled(self.taps.rows(), loss_scale)
            for problem in () if self._writing else zero_layers(self.taps):
                warnings.warn(f"log: {problem}", stacklevel=3)
        store = self._writer()
        if store.whitening is not None:
            rows = store.whitening.apply_new(rows)
        if nonfinite == "skip":
            rows, ids, columns = self._skipped.leave_out(store.path, rows, ids, columns)
        if self._window is None:
            self._append(rows, ids, columns)
        else:
            self._window.put(rows, ids, columns)

    @contextmanager
    def query(
        self,
        ids: Sequence[str],
        weights: Tensor | None = None,
        offsets: Tensor | None = None,
        *,
        sequence_length: int | str | None = None,
        loss_scale: float = 1.0,
    ) -> Iterator[Query]:
        """Gather the projected gradients of queries: forward and `loss.backward()` go inside.

        Args:
            ids: One a sample, as in `log`.
            weights, offsets, sequence_length, loss_scale: As in `log`.

        Raises:
            ValueError: `offsets` do not fit the ids or the batch; ids of another kind.
            LograError: A layer received no gradient, or a gradient is NaN or infinite.
        """
        query = Query(row_ids("query", ids))
        self._observation.decide()
        with self._tapped(len(query.ids), weights, offsets, sequence_length):
            yield query
            rows = unscaled(self.taps.rows(), loss_scale).float().cpu()
        bad = [i for i, row in zip(query.ids, rows, strict=True) if not row.isfinite().all()]
        if bad:
            raise LograError(f"query {bad[0]!r}: its gradient is NaN or infinite; check the model's loss on it")
        query.rows = rows

    @contextmanager
    def observe(
        self,
        weights: Tensor | None = None,
        offsets: Tensor | None = None,
        *,
        sequence_length: int | str | None = None,
        sharing: str = "expand",
    ) -> Iterator[None]:
        """Learn from a sample of the training data what rows alone cannot tell: forward and backward go inside.

        Before the first row is logged, a "pca" projection (or one that was left to the run) learns its factors from it.
        Before or after, it gathers the covariances that curvature "kfac" and "ekfac" are made of; a new session's first
        batch then replaces what earlier sessions observed.

        Args:
            weights: A factor for each position, [N, T]; positions of weight 0 (padding) do not count.
            offsets: As in `log`; with "expand" only.
            sequence_length: As in `log`; `weights` must then say how many samples there are.
            sharing: How the positions count that share a weight: "expand", each by itself, or "reduce", a sample's
                together (Eschenhagen et al. 2023). Measured, the projections are alike, and KFAC and EKFAC are far
                better with "expand" (bench/results/accuracy-patches.json).

        Raises:
            ValueError: `offsets` do not fit the batch, or "reduce" with documents packed in token rows.
            LograError: A layer received no gradient, or the covariances are NaN or infinite.
        """
        if offsets is not None and sharing == "reduce":
            raise ValueError('observe: sharing="reduce" needs one sample a token row; observe documents unpacked')
        with self._tapped(None, weights, offsets, sequence_length), self._observation.batch(sharing):
            yield
        self._solved.forget()
        if self._store is not None and not self._writing:
            self._observation.keep(self._store)

    @contextmanager
    def observe_fisher(
        self, weights: Tensor | None = None, offsets: Tensor | None = None, *, sequence_length: int | str | None = None
    ) -> Iterator[None]:
        """Sum the Fisher of the model's own predictions, for curvature "fisher": forward and backward go inside.

        Each sample's loss is that of a label drawn from what the model predicts; several draws sharpen it. Or, exactly,
        every one of C labels in turn with the loss times sqrt(C p(label)). The mean is over all gradients seen; a new
        session's first batch replaces what earlier sessions observed.

        Args:
            weights, offsets, sequence_length: As in `observe`.

        Raises:
            LograError: A layer received no gradient, or a gradient is NaN or infinite.
        """
        self._observation.decide()
        with self._tapped(None, weights, offsets, sequence_length):
            yield
            rows = self.taps.rows()
        self._fisher.observe(self.taps.layers, rows)
        self._solved.forget()
        if self._store is not None and not self._writing:
            self._fisher.keep(self._store)

    @contextmanager
    def _tapped(
        self,
        samples: int | None,
        weights: Tensor | None,
        offsets: Tensor | None = None,
        sequence_length: int | str | None = None,
    ) -> Iterator[None]:
        for problem in mode_problems(self.model):
            warnings.warn(f"Run: {problem}", stacklevel=4)
        self.taps.reset(samples, weights, offsets, sequence_length)
        learning = [p for p in self.model.parameters() if p.requires_grad] if self._freeze else []
        for p in learning:
            p.requires_grad_(False)
        self.taps.active = True
        try:
            with self.taps.watched():
                yield
        finally:
            self.taps.active = False
            self.taps.reset()
            for p in learning:
                p.requires_grad_(True)

    def finalize(self, progress: Progress | None = None) -> None:
        """Commit all rows, then compute and keep the curvature and every row's self-influence at the default damping.

        Args:
            progress: Called with numbers of rows, which add up to 2 N, or to less where results are kept already.
        """
        store = self.commit()
        self._solved.factor(store, progress=progress)
        self._solved.statistics(store, ("self_influence", "l2", "l1"), progress=progress)

    def close(self) -> None:
        """Commit what was logged and take the taps off the model. A `with` statement does it by itself."""
        self.taps.detach()
        if self._writing:
            self.commit()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exc) -> None:
        self.close()
