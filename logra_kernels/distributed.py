"""DistributedRun: one run of several processes, as torchrun starts them. No collective in the loop."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from logra_kernels.curvature import Progress
from logra_kernels.errors import LograError
from logra_kernels.run import Run
from logra_kernels.session import SharedObservation
from logra_kernels.store import GradientStore, Share, merge, projection_of


class DistributedRun(Run):
    """A `Run` whose rows every rank logs for itself, into a store of its own; `finalize` makes them one.

        dist.init_process_group("gloo")
        run = lk.DistributedRun("store/", model)
        for batch in this_ranks_batches:
            with run.log(ids=batch["id"]):
                loss_sum(model(batch["x"]), batch["y"]).backward()
        run.finalize()                   # on every rank
        top = run.topk(query, k=10)      # on every rank, with the same query; every rank has the answer

    Rank r writes `PATH.rank<r>`, on a file system that all ranks see. `finalize` merges these into PATH, whole shards
    by hard links, rank 0's rows first, and then the ranks read it together: each streams its share of the rows for
    curvature, self-influence and scores, and sums or top-k lists are joined once at the end. What is left is a plain
    store, that a `Run` in one process opens as well.

    Every rank observes batches of its own. A projection is learned from all of them, by the ranks together as each
    comes to its first row; what they observe for curvature is added up by `finalize`.

    Args:
        path, model, options: As `Run`'s, the same on every rank.

    Raises:
        LograError: There is no process group, or the store is finished already: open it with `Run`.
    """

    _observes = SharedObservation

    def __init__(self, path: str | os.PathLike, model: nn.Module, **options) -> None:
        if not dist.is_initialized():
            raise LograError("DistributedRun: there is no process group; call torch.distributed.init_process_group")
        self.whole = os.fspath(path).rstrip("/")
        if GradientStore.exists(self.whole):
            raise LograError(f"DistributedRun: the store {self.whole} is finished; open it with Run")
        mine = f"{self.whole}.rank{dist.get_rank()}"
        begun: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(begun, mine if GradientStore.exists(mine) else None)
        if mine not in begun and any(begun):  # a run that was killed before this rank's first row goes on
            options["projection"] = projection_of(GradientStore.open(next(path for path in begun if path)))
        super().__init__(mine, model, **options)

    def finalize(self, progress: Progress | None = None) -> None:
        """Commit every rank's rows and merge them, then curvature and self-influence as `Run.finalize`; on all ranks.

        Raises:
            LograError: A rank has no rows, or merging failed on rank 0.
        """
        if self.path != self.whole:
            self._observation.decide()  # where the others, who have rows, have been
            self._merge()
        super().finalize(progress)

    def _merge(self) -> None:
        mine = self.commit() if self._store is not None else None
        sources: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(sources, self.path if mine is not None and len(mine) else "")
        if mine is None or "" in sources:
            raise LograError(f"DistributedRun: rank {sources.index('')} has logged no rows; give every rank some")
        failed = [""]
        if dist.get_rank() == 0:
            try:
                merge(sources, self.whole).close()
            except LograError as error:
                failed[0] = str(error)
        dist.broadcast_object_list(failed)
        if failed[0]:
            raise LograError(f"DistributedRun: the ranks' stores cannot be merged: {failed[0]}")
        self.path = self.whole
        self._store = Share(Path(self.whole))
        self._fisher.join(mine, self._store)
        self._solved.forget()

    @contextmanager
    def observe(self, *args: Any, **options: Any) -> Iterator[None]:
        """As `Run.observe`, this rank's own batches; before `finalize`."""
        self._refuse_merged("observe more of")
        with super().observe(*args, **options):
            yield

    @contextmanager
    def observe_fisher(self, *args: Any, **options: Any) -> Iterator[None]:
        """As `Run.observe_fisher`, this rank's own batches; before `finalize`."""
        self._refuse_merged("observe more of")
        with super().observe_fisher(*args, **options):
            yield

    def _writer(self) -> GradientStore:
        self._refuse_merged("log more into")
        return super()._writer()

    def _refuse_merged(self, what: str) -> None:
        if self.path == self.whole:
            raise LograError(f"DistributedRun: the rows are merged; {what} {self.whole} with Run")
