"""What a curvature knows of the stored rows, layer by layer, gathered in streaming passes and kept beside the store."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
import xxhash
from torch import Tensor

from logra_kernels.curvature.blocks import Columns, Groups, columns_of, members_of
from logra_kernels.curvature.damping import Damping
from logra_kernels.curvature.factor import Factor
from logra_kernels.curvature.solver import Solver, Without, ZeroSolver
from logra_kernels.curvature.sums import Progress
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore, Share, spread_of, zero_layers


class Curvature(ABC):
    """Block-diagonal curvature of a store's rows. Made by `of`; `factorize` makes it ready to solve with.

    Attributes:
        kind: Its name in `CURVATURES`; with a hash of `together` where layers share blocks.
        together: The layers that share a block, as `joining` was given them.
        joins: Whether layers can share a block.
        exact: Whether it is solved with in fp64 even where fp32 would do.
        layers: Layer name -> (k_out, k_in), in the order of the rows' columns.
        members: Block name -> its layers; a layer by itself is a block of its own name.
        rows: How many rows it was taken over.
        means: Layer name -> its mean eigenvalue.
        zero: The layers whose stored rows are all exactly zero (an expert that no token came to): they have no part in
            any score, so queries are solved to zero there, and they do not enter a block's damping.
        spread: See `Damping.whole`; of the layers whose projection was learned.
        hash: Of everything it was computed from.
        content: `content_hash` of the store.
    """

    kind: str
    together: ClassVar[Groups] = ()
    joins: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __init__(self, layers: dict[str, tuple[int, int]], rows: int) -> None:
        self.layers = layers
        self.members = members_of(list(layers), self.together)
        self.rows = rows
        self.means: dict[str, float] = {}
        self.zero: frozenset[str] = frozenset()
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
            LograError: The store is empty, or lacks what this kind needs besides rows; or a layer has gradients whose
                squares are too small to be summed, or none of those that were observed.
        """
        if len(store) == 0:
            raise LograError(f"curvature: the store {store.path} has no rows; log some first")
        found = cls.found(store, progress)
        found._measure_layers(store)
        found.spread = spread_of(store)
        found.hash, found.content = cls.key(store), store.content_hash
        return found

    @classmethod
    def joining(cls, groups: Groups) -> type[Self]:
        """This curvature with one block for each group of layers, to be given to `Run(curvature=...)`.

        Args:
            groups: {name: [glob patterns on layer names]}, or a list of patterns that are their blocks' names. Layers
                of no group stay blocks by themselves.

        Raises:
            ValueError: The kind is a Kronecker product of one layer's sides.
        """
        if not groups:
            return cls
        if not cls.joins:
            raise ValueError(
                f"curvature: {cls.kind!r} is a Kronecker product of one layer's sides, so layers cannot share a block;"
                " use identity, raw, raw-fp64, diagonal, shrunk, lowrank, fisher or fisher-fp64"
            )
        facts = dict(groups) if isinstance(groups, Mapping) else list(groups)
        tag = xxhash.xxh3_64(json.dumps(facts).encode()).hexdigest()
        return type(cls.__name__, (cls,), {"together": groups, "kind": f"{cls.kind}-{tag}"})

    @classmethod
    def columns(cls, layers: Mapping[str, tuple[int, int]]) -> dict[str, Columns]:
        """Block name -> its columns of rows that hold these layers, name -> (k_out, k_in).

        Raises:
            ValueError: The groups do not fit the layers.
        """
        return columns_of(layers, members_of(list(layers), cls.together))

    @classmethod
    def key(cls, store: GradientStore) -> str:
        """Hash (hex) of everything it is computed from."""
        return store.content_hash

    @classmethod
    @abstractmethod
    def found(cls, store: GradientStore, progress: Progress | None) -> Self:
        """What `of` gives, of a store that has rows."""

    @abstractmethod
    def diagonal(self, block: str) -> Tensor:
        """H's diagonal, [d], in any basis that keeps the block's layers apart."""

    @abstractmethod
    def damped(self, block: str, added: float) -> Solver:
        """The solver of H + `added` I of a block."""

    def least(self, block: str) -> float:
        """The smallest mean eigenvalue that a layer of the block can have without losing digits."""
        return 0.0

    def solver(self, block: str, damping: Damping) -> Solver:
        """One block's solver.

        Raises:
            LograError: H + lambda I is singular.
        """
        layers, widths = self.members[block], self.widths(block)
        if self.zero.issuperset(layers):
            return ZeroSolver(sum(widths))
        solver = self.damped(block, self.added(block, damping))
        if self.zero.isdisjoint(layers):
            return solver
        return Without(solver, [layer not in self.zero for layer in layers], widths)

    def _measure_layers(self, store: GradientStore) -> None:
        """Fill `means` and `zero`; a pass over the rows is made only where a layer's mean eigenvalue is all but 0."""
        doubtful = []
        for block, layers in self.members.items():
            parts = self.diagonal(block).double().split(self.widths(block))
            for layer, part in zip(layers, parts, strict=True):
                self.means[layer] = float(part.mean())
                if not self.means[layer] > self.least(block):
                    doubtful.append(layer)
        self.zero = frozenset(doubtful) & zero_layers(store) if doubtful else frozenset()
        bad = next((layer for layer in doubtful if layer not in self.zero), None)
        if bad is not None:
            raise LograError(self.unmeasured(bad))

    def unmeasured(self, layer: str) -> str:
        """What is wrong with a layer whose rows are not all zero and whose curvature is."""
        return (
            f"curvature: the gradients of layer {layer!r} are so small that their squares vanish in fp32; use curvature"
            " 'raw-fp64', 'kronecker' or 'lowrank', or log with the loss times a constant"
        )

    def widths(self, block: str) -> list[int]:
        """How many columns each of a block's layers has."""
        return [k_out * k_in for k_out, k_in in (self.layers[name] for name in self.members[block])]

    def added(self, block: str, damping: Damping) -> float:
        """lambda of a block: the mean over its columns of what each layer's own would be, of layers with gradients."""
        widths = dict(zip(self.members[block], self.widths(block), strict=True))
        own = {layer: width for layer, width in widths.items() if layer not in self.zero}
        total = sum(damping.value(layer, self.means[layer]) * width for layer, width in own.items())
        return total / sum(own.values())

    @classmethod
    def downdate(cls, before: GradientStore, after: GradientStore, gone: Sequence[int]) -> bool:
        """Take deleted rows out of what is kept; whether it was possible. If not, the next use computes it anew.

        Args:
            before: The store as it was, opened for reading.
            after: The store without the rows.
            gone: Their numbers in `before`, ascending.
        """
        return False

    def factorize(self, damping: float | Damping | None = None, *, exact: bool = False) -> Factor:
        """H + lambda I of every layer, ready to be solved with.

        Args:
            damping: A number is absolute; None is the default of `Damping.of`.
            exact: Solve in fp64 throughout; else wide dense blocks may in fp32, see `curvature.solver`.

        Raises:
            LograError: H + lambda I is singular, or the damping is negative.
        """
        chosen = Damping.of(damping, self.spread)
        solvers = {block: self.solver(block, chosen) for block in self.members}
        for solver in solvers.values():
            solver.settle(exact or self.exact)
        return Factor(solvers, columns_of(self.layers, self.members), f"{self.kind} {self.hash}", self.content)


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
            store.sidecar_keep(f"curvature-{cls.kind}", tensors, key=key)
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


def blocks_of(store: GradientStore, columns: Mapping[str, Columns], progress: Progress | None):
    """(row block of one curvature block by name) over the whole store, telling progress after each row block."""
    for _, rows in store.blocks():
        yield {name: rows[:, part] for name, part in columns.items()}
        if progress is not None:
            progress(len(rows))


def thin_rows(
    store: GradientStore, columns: Mapping[str, Columns], progress: Progress | None = None
) -> dict[str, Tensor]:
    """Block name -> all rows of the store (of all ranks, too), [N, d] fp32; for blocks with fewer rows than dims."""
    parts: dict[str, list[Tensor]] = {name: [] for name in columns}
    if parts:
        for _, rows in store.every_block() if isinstance(store, Share) else store.blocks():
            for name, part in columns.items():
                parts[name].append(rows[:, part].float())
            if progress is not None:
                progress(len(rows))
    return {name: torch.cat(rows) for name, rows in parts.items()}


def unobserved(layer: str, method: str) -> str:
    """What is wrong where the curvature is of gradients that were observed, and of this layer none, or only zeros."""
    return (
        f"curvature: the gradients of layer {layer!r} that were observed are zero, or vanish in fp32, and stored ones"
        f" are not; run batches that reach the layer inside `with run.{method}():`"
    )
