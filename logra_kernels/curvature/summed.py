"""Curvatures that are sums over the stored rows: kept beside them, gone on from, and taken back."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

from torch import Tensor

from logra_kernels.curvature import kept_sums
from logra_kernels.curvature.statistics import Curvature
from logra_kernels.curvature.sums import Progress, RowSums
from logra_kernels.store import GradientStore, Share, sum_over_ranks


class SummedCurvature(Curvature):
    """The sums are gone on from when rows are appended, to the same bits as a pass over all of them gives (but those of
    several ranks, which are added up in another order); `downdate` takes deleted rows out."""

    @classmethod
    @abstractmethod
    def empty(cls, store: GradientStore, rows: int | None = None) -> RowSums:
        """Sums of no rows yet: all, or those that a store of so many rows is solved with."""

    @classmethod
    @abstractmethod
    def of_sums(cls, store: GradientStore, sums: dict[str, Tensor], progress: Progress | None) -> Self:
        """The curvature that the sums over all rows of the store make, which are its own to change."""

    @classmethod
    def found(cls, store: GradientStore, progress: Progress | None) -> Self:
        return cls.of_sums(store, cls.sums(store, len(store), progress).total(), progress)

    @classmethod
    def sums(cls, store: GradientStore, rows: int | None = None, progress: Progress | None = None) -> RowSums:
        """The sums over all rows of the store, `empty`'s for `rows`; from those kept, as far as they go, and kept."""
        sums = cls.empty(store, rows)
        if not len(store) or not sums.shapes:
            return sums
        current = kept_sums.load(store, f"sums-{cls.kind}", sums)
        if isinstance(store, Share):
            return sums if current else cls._over_ranks(store, rows, progress)
        kept_sums.advance(store, sums, None if current else progress)
        if not current:
            cls.keep(store, sums)
        return sums

    @classmethod
    def _over_ranks(cls, store: Share, rows: int | None, progress: Progress | None) -> RowSums:
        mine = cls.empty(store, rows)
        for _, block in store.blocks():
            mine.add(block)
            if progress is not None:
                progress(len(block))
        return cls._added_up(store, mine, rows)

    @classmethod
    def _added_up(cls, store: Share, mine: RowSums, rows: int | None) -> RowSums:
        total, whole = mine.total(), cls.empty(store, rows)
        sum_over_ranks(store, total.values())
        whole.restore(total, len(store))
        cls.keep(store, whole)
        return whole

    @classmethod
    def join(cls, mine: GradientStore, store: Share) -> None:
        """Keep beside a store that was merged of the ranks' own the sum of what is kept beside those; collective."""
        cls._added_up(store, cls.sums(mine, len(store)), len(store))

    @classmethod
    def keep(cls, store: GradientStore, sums: RowSums) -> None:
        """Keep sums over all rows of the store beside it; those that it is solved with."""
        kept_sums.save(store, f"sums-{cls.kind}", sums, cls.empty(store, len(store)).shapes)

    @classmethod
    def downdate(cls, before: GradientStore, after: GradientStore, gone: Sequence[int]) -> bool:
        """As `Curvature.downdate`. It errs by the rounding of the sums it is taken from, so it is done as long as less
        than a tenth of the rows has gone since they were summed, and no block loses half of its trace at once: then it
        stays within about twice the rounding of fresh sums, 1.2 times where rows are of a size."""
        sums = cls.empty(before, len(after))
        if not len(after) or not sums.shapes or not kept_sums.load(before, f"sums-{cls.kind}", sums):
            return False
        summed = [i for i in gone if i < sums.whole]
        if sums.removed + len(summed) > kept_sums.MOST_REMOVED * sums.whole:
            return False
        traces = sums.traces()
        for i in summed:
            sums.remove(before.read(i, i + 1).to(before.manifest.torch_dtype))
        if any(left < kept_sums.LEAST_LEFT * traces[name] for name, left in sums.traces().items()):
            return False
        kept_sums.advance(after, sums, None)
        cls.keep(after, sums)
        return True
