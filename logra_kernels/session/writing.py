"""What a run does with its store: it makes it at the first row, appends, commits and deletes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from logra_kernels.curvature import CURVATURES
from logra_kernels.errors import LograError, StoreError
from logra_kernels.session.analysis import Analysis
from logra_kernels.session.fisher_sums import FisherSums
from logra_kernels.session.observation import Observation
from logra_kernels.session.row_ids import row_ids
from logra_kernels.session.settings import Settings
from logra_kernels.session.skipped_rows import SkippedRows
from logra_kernels.session.window import Window
from logra_kernels.store import GradientStore, sidecars_of


class Writing(Analysis):
    """The half of a run that holds the store; `Run` brings the rows."""

    path: str
    fingerprints: dict[str, str]
    _settings: Settings
    _observation: Observation
    _fisher: FisherSums
    _skipped: SkippedRows
    _store: GradientStore | None
    _rows_per_shard: int | None
    _writing = False
    _window: Window | None = None

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
        """Whether all these rows are safely in the store, or were skipped or deleted: a rerun may pass over them."""
        names = set(row_ids("committed", ids))
        return self._store is not None and self._store.taken([*names - self._skipped.among(names)])

    @contextmanager
    def ordered(self, ids: Sequence[str]) -> Iterator[None]:
        """Store the rows that are logged inside in the order of `ids`, in whatever batches they come.

            with run.ordered(ids):  # of some hundred rows
                for batch in batches_of_like_length:
                    with run.log(batch["id"]):
                        loss_sum(model(batch["x"]), batch["y"]).backward()

        They wait in memory, n x D numbers, and are stored when it ends; those of batches that are `committed` need not
        come. Left by an exception, it stores those before the first that has not come. For a rerun to end in the same
        bytes, the batches must be the same.

        Args:
            ids: Of n rows.

        Raises:
            ValueError: An id is there twice.
            LograError: It is inside another one; on leaving, a row has not come.
            StoreError: As in `log`; on leaving, rows are refused, and then none of them is stored.
        """
        if self._window is not None:
            raise LograError("ordered: it is inside another one; leave that first")
        self._window = window = Window(ids)
        try:
            yield
        finally:
            self._window = None
            held = window.take(self.committed)
            if held is not None:
                self._append(*held)
        window.check(self.committed)

    @property
    def skipped(self) -> list[str]:
        """Ids of the rows that `log(nonfinite="skip")` left out, in this session and earlier ones."""
        return list(self._skipped.ids)

    def _append(self, rows: Tensor, ids: list[str], columns: dict[str, list] | None) -> None:
        store = self._writer()
        new = store.append(rows, ids, columns, skip_committed=True)
        self._fisher.add(store, rows[len(rows) - new :])
        self._solved.forget()

    def _writer(self) -> GradientStore:
        if self._store is None:
            self._store = GradientStore.create(
                self.path,
                self.taps.layers,
                self._settings.format.name,
                block=self._settings.format.block,
                rank_c=self._settings.rank_c,
                projection=self.taps.projection.to_dict(),
                fingerprints=self.fingerprints,
                rows_per_shard=self._rows_per_shard,
                meta=self._settings.meta,
                sidecars=sidecars_of(self.taps.projection),
            )
            self._observation.keep(self._store)  # before the rows, so that a run that is killed and goes on has them
        elif not self._writing:
            self._store = GradientStore.open(self.path, mode="append")
        if not self._writing:
            self._fisher.begin(self._store)
        self._writing = True
        return self._store

    def commit(self) -> GradientStore:
        """Commit every row logged so far; the store, which shows them."""
        if self._writing:
            self.store.close()
            self._store, self._writing = GradientStore.open(self.path), False
            self._observation.keep(self._store)
            self._fisher.keep(self._store)
        return self.store

    def delete(self, ids: Sequence[str]) -> int:
        """Take rows out of the store, and out of the curvatures beside it that are sums over rows; how many were there.

        What `observe` and `observe_fisher` gathered is no sum over stored rows, and stays. Low rank curvature and
        corrected eigenvalues are computed anew when they are next asked for.

        Raises:
            StoreError: Ids that the store does not have, or the disk refuses.
        """
        ids = row_ids("delete", ids)
        before = self.commit()
        with GradientStore.open(self.path, mode="append") as writer:
            deleted = writer.delete(ids)
        gone = sorted(number for number in before.numbers_of(list(set(ids))).tolist() if number >= 0)
        self._store = GradientStore.open(self.path)
        for kind in {*CURVATURES.values(), self._solved.kind}:
            kind.downdate(before, self._store, gone)
        self._solved.forget()
        return deleted
