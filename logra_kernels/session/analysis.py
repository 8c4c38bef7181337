"""What can be asked of a run whose rows are logged. `Run` adds how they are."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from logra_kernels import influence
from logra_kernels.curvature import Damping, Factor
from logra_kernels.errors import LograError
from logra_kernels.nn import Taps, TokenShares
from logra_kernels.session import sensitivity
from logra_kernels.session.query import Query
from logra_kernels.session.row_ids import row_ids
from logra_kernels.session.solved import Solved
from logra_kernels.session.verify import Loss, Verification, verify
from logra_kernels.store import GradientStore, IndexInfo


class Analysis(ABC):
    """Scores, ranks, tokens, values and checks of a run.

    `mode` is everywhere one of "dot", "relatif" (l-RelatIF), "theta-relatif" and "l2"; the formulas are in
    `logra_kernels.influence.score`. `damping` is a number (absolute), a `Damping`, or None for the run's own. `rows` is
    a bool mask [N] over the stored rows, from `influence.row_mask` or the user's own.
    """

    model: nn.Module
    taps: Taps
    _solved: Solved

    @property
    @abstractmethod
    def store(self) -> GradientStore: ...

    @abstractmethod
    def commit(self) -> GradientStore:
        """Commit every row logged so far; the store, which shows them."""

    @abstractmethod
    def _tapped(
        self,
        samples: int | None,
        weights: Tensor | None,
        offsets: Tensor | None = None,
        sequence_length: int | str | None = None,
    ) -> AbstractContextManager[None]: ...

    def _asked(
        self, query: Query, mode: str, damping: float | Damping | None
    ) -> tuple[Factor, Tensor, dict[str, Tensor]]:
        """The factor, the query after its solve [Q, D] on its device, the statistics that the mode needs."""
        if mode not in influence.MODES:
            raise ValueError(f"influence: mode is {mode!r}; it must be one of {', '.join(influence.MODES)}")
        store = self.commit()
        query.check(store.dim)
        factor = self._solved.factor(store, damping)
        own = self._solved.statistics(store, influence.NEEDS[mode], damping)
        return factor, factor.solve_toward_stored(query.rows.cpu()).to(query.rows.device), own

    def self_influence(self, damping: float | Damping | None = None) -> Tensor:
        """g^T (H + lambda I)^-1 g of every stored row, [N] fp32."""
        return self._solved.statistics(self.commit(), ("self_influence",), damping)["self_influence"]

    def statistics(self, damping: float | Damping | None = None) -> influence.RowStatistics:
        """Self-influence and gradient norms of every stored row, from one pass at the most.

        With them outliers are left out: `run.topk(query, rows=influence.row_mask(s.l2_over_l1, quantile=0.99))`.
        """
        return influence.RowStatistics(
            **self._solved.statistics(self.commit(), ("self_influence", "l2", "l1"), damping)
        )

    def scores(
        self,
        query: Query,
        mode: str = "dot",
        damping: float | Damping | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Influence of every stored row on every query, [Q, N] fp32; positive = training on the row lowers the loss.

        Args:
            query: From `query`, or `stored`.
            mode, damping, rows: See the class; rows that are left out score NaN.

        Raises:
            ValueError: The query does not fit the store or holds NaN; an unknown mode; a mask of another size.
            LograError: The curvature is singular at this damping, or a layer's gradients are too small for it.
        """
        _, solved, own = self._asked(query, mode, damping)
        return influence.scores(self.store, solved, mode, own, rows=rows)

    def topk(
        self,
        query: Query,
        k: int = 10,
        mode: str = "relatif",
        damping: float | Damping | None = None,
        *,
        largest: bool = True,
        layers: bool = False,
        rows: Tensor | None = None,
        search: str = "exact",
        query_format: str | None = None,
    ) -> influence.TopK:
        """The k stored rows of highest influence on each query, streamed in bounded memory.

        Args:
            query, mode, damping: As in `scores`.
            k: At least 1.
            largest: False for the rows of lowest influence (training on them raises the query's loss).
            layers: Also give each layer's part of the scores.
            rows: Rows that are left out are never among the k.
            search: "index" reads only the rows that the store's index shortlists; see `build_index`.
            query_format: "int8" for the fastest exact search of rows with scales, "fp32" for the finest; `score_block`.

        Raises:
            ValueError, LograError: As in `scores`; or there is no index of the rows as they are.
        """
        factor, solved, own = self._asked(query, mode, damping)
        top = influence.topk(
            self.store, solved, k, mode, own, largest=largest, rows=rows, search=search, query_format=query_format
        )
        if not layers:
            return top
        parts = influence.layer_scores(self.store, solved, top.indices, mode, own, factor=factor)
        return influence.TopK(top.values, top.indices, top.ids, parts)

    def build_index(
        self,
        dims: int | None = None,
        dtype: str = "bf16",
        k: int | None = None,
        mode: str = "relatif",
        damping: float | Damping | None = None,
        *,
        samples: int = 32,
        seed: int = 0,
    ) -> IndexInfo:
        """Make the index of `topk(search="index")`; its recall is measured with stored rows that ask as queries do.

        Args:
            dims, dtype, k, seed: As in `GradientStore.build_index`.
            mode, damping: That searches will use; any other works too, at a recall that was not measured. Not "l2".
            samples: How many stored rows ask.

        Raises:
            ValueError, LograError: As in `scores`, or an argument does not fit.
        """
        store = self.commit()
        chosen = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed), device="cpu")[:samples]
        _, solved, own = self._asked(self.stored(store.ids_of(chosen)), mode, damping)
        scale, shift = influence.adjustment(mode, own, len(store))
        if shift is not None:
            raise ValueError(f"build_index: mode {mode!r} cannot be searched by an index; use another")
        return store.build_index(dims, dtype, k=k, queries=solved, row_scale=scale, seed=seed)

    def extremes(
        self,
        query: Query,
        k: int = 10,
        mode: str = "relatif",
        damping: float | Damping | None = None,
        *,
        rows: Tensor | None = None,
    ) -> tuple[influence.TopK, influence.TopK]:
        """(proponents, opponents): the k highest and the k lowest rows of each query in the same pass, as `topk`."""
        _, solved, own = self._asked(query, mode, damping)
        return influence.extremes(self.store, solved, k, mode, own, rows=rows)

    def group_scores(
        self,
        query: Query,
        groups: influence.Groups | None = None,
        mode: str = "dot",
        damping: float | Damping | None = None,
        *,
        rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Each group of layers' part of every score, group -> [Q, N] fp32, in one pass; the parts add up to `scores`.

        Args:
            query, mode, damping, rows: As in `scores`.
            groups: {name: [glob patterns on layer names]}, or a list of patterns that are their groups' names; None for
                every layer by itself. Layers of no group make up "other layers".

        Raises:
            ValueError: A pattern matches no layer, two groups share a layer, or as in `scores`.
        """
        factor, solved, own = self._asked(query, mode, damping)
        return influence.group_scores(self.store, solved, groups, mode, own, factor=factor, rows=rows)

    def stored(self, ids: Sequence[str]) -> Query:
        """Stored rows as a query, by their ids: to ask rows about rows, or a query's tokens about rows.

        Raises:
            LograError: No such row.
        """
        ids = row_ids("stored", ids)
        numbers = self.commit().numbers_of(ids).tolist()
        absent = [name for name, number in zip(ids, numbers, strict=True) if number < 0]
        if absent:
            raise LograError(f"the store {self.store.path} has no row {absent[0]!r}; see store.ids")
        parts = [self.store.read(number, number + 1) for number in numbers]
        rows = torch.cat(parts) if parts else torch.empty(0, self.store.dim, dtype=torch.float32, device="cpu")
        return Query(ids, rows if self.store.whitening is None else self.store.whitening.undo(rows))

    @contextmanager
    def tokens(
        self,
        query: Query,
        damping: float | Damping | None = None,
        weights: Tensor | None = None,
        *,
        sequence_length: int | str | None = None,
    ) -> Iterator[TokenShares]:
        """Share out scores over positions: forward and backward of the rows in question, [N, T] tokens, go inside.

        With `run.tokens(query)` around training rows, `shares` [Q, N, T] are every train position's parts of the dot
        scores; summed over T they are the scores (to the rounding of the stored rows); divided by the root of a row's
        self-influence, its parts of l-RelatIF. Around the query's own batch
        with `run.tokens(run.stored(ids))`, they are every query position's parts.

        Args:
            query, damping: As in `scores`.
            weights: A factor for each position, [N, T], the one that was logged with. Documents packed in token rows
                need no limits here: the shares of a document's positions add up to its score.
            sequence_length: As in `observe`.

        Raises:
            ValueError: A layer's part cannot be shared out (experts); the message names it. `shares` raises it where
                layers have other positions than others have, as an encoder's and a decoder's, or those behind a
                pooling: `TokenShares.of` gives the shares of some.
            LograError: A layer received no gradient.
        """
        factor, _, _ = self._asked(query, "dot", damping)
        with (
            self._tapped(None, weights, None, sequence_length),
            self.taps.tokens(factor.solve(query.rows.cpu())) as tokens,
        ):
            yield tokens
            tokens.check()

    def value(
        self,
        query: Query,
        column: str = "source",
        damping: float | Damping | None = None,
        *,
        rows: Tensor | None = None,
    ) -> influence.ValueTable:
        """What each provider's rows are worth to the queries: dot scores summed by a column of the store.

        Args:
            query, damping, rows: As in `scores`.
            column: The store's column that names the provider of each row.

        Raises:
            ValueError: No such column, or as in `scores`.
        """
        columns = self.commit().columns
        if column not in columns:
            raise ValueError(f"value: the store has no column {column!r}; it has {', '.join(columns) or 'none'}")
        return influence.value(self.scores(query, "dot", damping, rows=rows), columns[column], rows=rows)

    def damping_sensitivity(
        self,
        query: Query,
        dampings: Sequence[float | Damping | None],
        k: int = 10,
        mode: str = "relatif",
        *,
        reference: float | Damping | None = None,
    ) -> sensitivity.Sensitivity:
        """How far the answer changes with the damping: top-k overlap and rank correlation with the reference's.

        Args:
            query, mode: As in `scores`.
            dampings: At least one.
            k: Of the overlap.
            reference: The damping to compare with; None for the default.

        Raises:
            ValueError: No dampings, k < 1, or as in `scores`.
        """
        if not dampings:
            raise ValueError("damping_sensitivity: give at least one damping")
        base = self.scores(query, mode, reference)
        others = [self.scores(query, mode, damping) for damping in dampings]
        return sensitivity.compare(base, others, k, list(dampings), reference)

    def verify(
        self,
        loss: Loss,
        samples: int = 4,
        *,
        rtol: float | None = None,
        offsets: Tensor | None = None,
        sequence_length: int | str | None = None,
    ) -> Verification:
        """Check model, loss and filters: are captured gradients those of each sample alone? Nothing is logged.

            report = run.verify(lambda part: loss_sum(model(x[part]), y[part]), samples=4)
            print(report)

        Found and said in words: a loss that is a mean over the batch or its positions, dropout, batch norm in train
        mode, samples that are mixed or not in dimension 0, layers without gradient, weights used outside their layer.

        Args:
            loss: Given `slice(a, b)`, the loss of these samples of the user's own batch, as one tensor; called with the
                whole `slice(0, samples)` and with every sample alone.
            samples: At least 2.
            rtol: Largest relative difference that passes; default 1e-3, 0.1 for 16-bit weights and autocast.
            offsets: Where the loss packs the samples `slice(0, samples)` into token rows: their limits, as in
                `Run.log`. Found is then also whether documents see each other.
            sequence_length: As in `Run.log`, for a model that flattens samples and positions.

        Raises:
            ValueError: samples < 2, or `offsets` do not cut as many.
        """
        return verify(self.model, self.taps, loss, samples, rtol, offsets, sequence_length)
