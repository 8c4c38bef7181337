"""A store's rows with a search index: two-stage search for those who wait for the answer."""

from torch import Tensor

from logra_kernels.store.reading import coarse
from logra_kernels.store.reading.stored import StoredRows


class SearchedRows(StoredRows):
    """The part of `GradientStore` that searches."""

    _index: tuple[str, coarse.CoarseIndex] | None = None  # under the content_hash it belongs to

    def build_index(
        self,
        dims: int | None = None,
        dtype: str = "bf16",
        *,
        k: int | None = None,
        queries: Tensor | None = None,
        row_scale: Tensor | None = None,
        seed: int = 0,
    ) -> coarse.IndexInfo:
        """Make the index that `search` needs, and measure how much of the exact answer it finds.

        It pays where a pass over the rows takes too long to wait for: rows much longer than `dims`, and many of them.

        Args:
            dims: Numbers in a short row; by default 2,048, or a quarter of D where that is less.
            dtype: Of the short rows, as in `create`.
            k: The recall is of the k best rows; by default min(100, N / 10), at least 1: of all N rows it would always
                be 1.
            queries: [Q, D], preconditioned as later ones will be; by default 32 stored rows ask.
            row_scale: As later searches will have it, [N].
            seed: Of the random signs and groups.

        Returns:
            What it is, with the recall for shortlists of k, 2k, 4k, ... rows.

        Raises:
            StoreError: An argument is wrong, there are no rows, or the disk refuses.
        """
        return coarse.build(self, dims, dtype, seed, k, queries, row_scale)

    @property
    def index(self) -> coarse.IndexInfo:
        """What is known of the search index of the rows as they are.

        Raises:
            StoreError: There is none, or it is of other rows.
        """
        return self._coarse().info

    def search(
        self,
        queries: Tensor,
        k: int,
        row_scale: Tensor | None = None,
        largest: bool = True,
        *,
        shortlist: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`topk` in two stages: the index names a shortlist for each query, and only these rows are read and scored.

        Values are exact; a row that is among the k best may be missed, as seldom as `index.recall` says of the highest
        scores. The lowest are found as well as they stand out.

        Args:
            queries, k, row_scale, largest: As in `topk`.
            shortlist: Rows for each query; by default what the index was measured to need.

        Returns:
            As `topk`.

        Raises:
            StoreError: No index, or one of other rows; sizes do not fit; a row is damaged.
        """
        return coarse.search(self._current(), self._coarse(), queries, k, row_scale, largest, shortlist)

    def _coarse(self) -> coarse.CoarseIndex:
        if self._index is None or self._index[0] != self.content_hash:
            self._index = self.content_hash, coarse.load(self)
        return self._index[1]
