"""The raw projected Fisher: H = mean over stored rows of g g^T, per layer (Choe et al. 2024, section 3.1)."""

from collections.abc import Collection, Sequence
from typing import Self

import torch
from torch import Tensor

from logra_kernels.curvature import kept_sums
from logra_kernels.curvature.damping import Damping
from logra_kernels.curvature.gram import GramSums
from logra_kernels.curvature.solver import CholeskySolver, Solver, SpectralSolver
from logra_kernels.curvature.statistics import Curvature, Progress
from logra_kernels.store import GradientStore, Share, sum_over_ranks


class RawFisher(Curvature):
    """Second moment of each layer's projected gradients.

    A layer with at least as many rows as dims is kept as H, [d, d]. One with fewer is kept as its rows, and solved with
    by the eigenvectors that the N x N products of the rows give (the dual, or Woodbury, form): exact, and cheaper.

    The sums are kept beside the store and gone on from when rows are appended, to the same bits as a pass over all of
    them gives; `downdate` takes deleted ones out.

    Attributes:
        blocks: Layer name -> H, [d, d], symmetric; of the layers with at least as many rows as dims.
        thin: Layer name -> rows [N, d] fp32; of the others.
    """

    kind = "raw"
    dtype = torch.float32  # that sums are kept and products taken in

    def __init__(
        self, layers: dict[str, tuple[int, int]], rows: int, blocks: dict[str, Tensor], thin: dict[str, Tensor]
    ) -> None:
        super().__init__(layers, rows)
        self.blocks = blocks
        self.thin = thin

    @classmethod
    def found(cls, store: GradientStore, progress: Progress | None) -> Self:
        wide = [name for name, part in store.slices.items() if part.stop - part.start <= len(store)]
        sums = cls.sums(store, wide, progress)
        return cls._from_sums(store, sums, progress if not wide else None)

    @classmethod
    def sums(
        cls, store: GradientStore, names: Collection[str] | None = None, progress: Progress | None = None
    ) -> GramSums:
        """The sums over all rows of the store, of these layers or all; from those kept, as far as they go, and kept."""
        parts = {name: part for name, part in store.slices.items() if names is None or name in names}
        if isinstance(store, Share):  # only this rank's rows, which nobody else could go on from
            widths = {name: part.stop - part.start for name, part in parts.items()}
            sums = GramSums(parts, cls.dtype, {name: torch.zeros(d, d, dtype=cls.dtype) for name, d in widths.items()})
            for _, rows in store.blocks():
                sums.add(rows)
            return sums
        sums, current = kept_sums.load(store, f"fisher-{cls.kind}", parts, cls.dtype)
        if len(store) and parts:
            kept_sums.advance(store, sums, None if current else progress)
            if not current:
                cls.keep(store, sums)
        return sums

    @classmethod
    def keep(cls, store: GradientStore, sums: GramSums) -> None:
        """Keep sums over all rows of the store beside it; those of layers with fewer rows than dims are left out."""
        kept_sums.save(store, f"fisher-{cls.kind}", sums)

    @classmethod
    def downdate(cls, before: GradientStore, after: GradientStore, gone: Sequence[int]) -> bool:
        """Take deleted rows out of what is kept; whether it was possible. If not, the next use sums all rows anew.

        A downdate errs by the rounding of the sums it is taken from, so it is done as long as less than a tenth of
        the rows has gone since they were summed: then it stays within 1.2 times the rounding of fresh sums.

        Args:
            before: The store as it was, opened for reading.
            after: The store without the rows.
            gone: Their numbers in `before`, ascending.
        """
        name = f"fisher-{cls.kind}"
        parts = {layer: part for layer, part in before.slices.items() if part.stop - part.start <= len(after)}
        sums, current = kept_sums.load(before, name, parts, cls.dtype)
        summed = [i for i in gone if i < sums.whole]
        if not current or not parts or sums.removed + len(summed) > kept_sums.MOST_REMOVED * sums.whole:
            return False
        for i in summed:
            sums.remove(before.read(i, i + 1).to(before.manifest.torch_dtype))
        kept_sums.advance(after, sums, None)
        cls.keep(after, sums)
        return True

    @classmethod
    def _from_sums(cls, store: GradientStore, sums: GramSums, progress: Progress | None) -> Self:
        blocks = sums.total()
        sum_over_ranks(store, blocks.values())
        for block in blocks.values():
            block /= len(store)
        missing = [name for name in store.layers if name not in blocks]
        parts: dict[str, list[Tensor]] = {name: [] for name in missing}
        if missing:
            for _, rows in store.every_block() if isinstance(store, Share) else store.blocks():
                for name in missing:
                    parts[name].append(rows[:, store.slices[name]].float())
                if progress is not None:
                    progress(len(rows))
        return cls(store.layers, len(store), blocks, {name: torch.cat(rows) for name, rows in parts.items()})

    def solver(self, layer: str, damping: Damping) -> Solver:
        if layer in self.blocks:
            h = self.blocks[layer]
            return CholeskySolver(layer, h, damping.value(layer, float(h.double().diagonal().mean())))
        rows = self.thin[layer].double() / self.rows**0.5
        added = damping.value(layer, float(rows.square().sum()) / rows.shape[1])
        values, left = torch.linalg.eigh(rows @ rows.T)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        vectors = rows.T @ (left[:, kept] / values[kept].sqrt())
        return SpectralSolver(layer, vectors, values[kept], added, spanning=True)


class RawFisher64(RawFisher):
    """The same with products and sums in fp64."""

    kind = "raw-fp64"
    dtype = torch.float64
