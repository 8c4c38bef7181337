"""What a curvature knows of the stored rows, layer by layer, gathered in streaming passes and kept beside the store."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

from torch import Tensor

from logra_kernels.curvature.damping import Damping
from logra_kernels.curvature.factor import Factor
from logra_kernels.curvature.solver import Solver
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore, spread_of

Progress = Callable[[int], None]


class Curvature(ABC):
    """Block-diagonal curvature of a store's rows. Made by `of`; `factorize` makes it ready to solve with.

    Attributes:
        kind: Its name in `CURVATURES`.
        layers: Layer name -> (k_out, k_in), in the order of the rows' columns.
        rows: How many rows it was taken over.
        spread: See `Damping.whole`; of the layers whose projection was learned.
        hash: Of everything it was computed from.
        content: `content_hash` of the store.
    """

    kind: str

    def __init__(self, layers: dict[str, tuple[int, int]], rows: int) -> None:
        self.layers = layers
        self.rows = rows
        self.spread: dict[str, float] = {}
        self.hash = ""
        self.content = ""

    @classmethod
    def of(cls, store: GradientStore, progress: Progress | None = None) -> Self:
        """The one kept beside the store if the rows are still the same, else computed from the rows and kept.

        Args:
            store: At least one row.
            progress: Called with the number of rows of each block done.

        Raises:
            LograError: The store is empty, or lacks what this kind needs besides rows.
        """
        if len(store) == 0:
            raise LograError(f"curvature: the store {store.path} has no rows; log some first")
        found = cls.found(store, progress)
        found.spread = spread_of(store)
        found.hash, found.content = cls.key(store), store.content_hash
        return found

    @classmethod
    def key(cls, store: GradientStore) -> str:
        """Hash (hex) of everything it is computed from."""
        return store.content_hash

    @classmethod
    @abstractmethod
    def found(cls, store: GradientStore, progress: Progress | None) -> Self:
        """What `of` gives, of a store that has rows."""

    @abstractmethod
    def solver(self, layer: str, damping: Damping) -> Solver:
        """One layer's solver."""

    def factorize(self, damping: float | Damping | None = None, *, exact: bool = False) -> Factor:
        """H + lambda I of every layer, ready to be solved with.

        Args:
            damping: A number is absolute; None is the default of `Damping.of`.
            exact: Solve in fp64 throughout; else wide dense blocks may in fp32, see `curvature.solver`.

        Raises:
            LograError: A layer's gradients are all zero, or H + lambda I is singular, or the damping is negative.
        """
        chosen = Damping.of(damping, self.spread)
        solvers = {layer: self.solver(layer, chosen) for layer in self.layers}
        for solver in solvers.values():
            solver.settle(exact)
        return Factor(solvers, self.hash, self.content)


class KeptCurvature(Curvature):
    """One whose numbers are computed in passes over the rows and kept beside them as long as the hash is theirs."""

    @classmethod
    def found(cls, store: GradientStore, progress: Progress | None) -> Self:
        key = cls.key(store)
        kept = store.sidecar_read(f"curvature-{cls.kind}", key=key)
        if kept is not None:
            return cls.restore(store, kept[0])
        found = cls.measure(store, progress)
        tensors = found.state()
        if tensors:
            store.sidecar_write(f"curvature-{cls.kind}", tensors, key=key)
        return found

    @classmethod
    @abstractmethod
    def measure(cls, store: GradientStore, progress: Progress | None) -> Self:
        """Compute it from the rows."""

    @classmethod
    @abstractmethod
    def restore(cls, store: GradientStore, tensors: dict[str, Tensor]) -> Self:
        """Have it again from what `state` gave."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What is worth keeping beside the store; nothing where there is nothing to compute."""


def blocks_of(store: GradientStore, progress: Progress | None):
    """(row block of one layer by name) over the whole store, telling progress after each block."""
    slices = store.slices
    for _, rows in store.blocks():
        yield {name: rows[:, part] for name, part in slices.items()}
        if progress is not None:
            progress(len(rows))
