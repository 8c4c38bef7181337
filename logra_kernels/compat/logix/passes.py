"""What LogIX's patched trainers do, whoever's loop goes over the data: passes that log it, passes that ask about it.

Both differ from LogIX 0.1.1's in these:

    - the model is in eval mode throughout, no optimizer steps and no checkpoint is written; LogIX's Lightning module
      logs through dropout, and moves the statistics of batch norms;
    - gradient accumulation does not divide the gradients;
    - `self_influence` returns the scores, as `compute_self_influence` does, where LogIX returns None;
    - a second `influence` returns its own scores alone; LogIX's has the first one's before them;
    - `influence` without `extract_log` before it begins with `initialize_from_log`; LogIX's asks the stored rows with
      other random factors, and without a curvature;
    - `extract_log` may be called again, and goes on where it was interrupted; LogIX's scheduler is spent;
    - with `lora`, "pca" in the configuration is learned by a pass more; LogIX draws at random there;
    - stored rows are streamed, so that `log_batch_size` and `log_num_workers` have no use.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from logra_kernels.compat.logix.analysis import Result, joined_queries
from logra_kernels.compat.logix.config import Config
from logra_kernels.compat.logix.scheduler import LogIXScheduler
from logra_kernels.compat.logix.session import LogIX
from logra_kernels.compat.logix.utils import Log, merge_logs

HELD = 1 << 28  # bytes of queries between two readings of the stored rows


@dataclass
class Arguments(ABC):
    """What LogIX's arguments have in common.

    Args:
        project, config: As `LogIX` takes them.
        lora: Whether to project, as the configuration says; "random" and "pca" say how, and "none" is False.
        hessian, save: As `LogIXScheduler` takes them.
        initialize_from_log: Go on with what the project has logged before.
        name_filter, type_filter: As `LogIX.watch` takes them; empty for all.
        log_batch_size, log_num_workers: Taken and not needed.
    """

    project: str = "tmp_logix"
    config: str | os.PathLike | Mapping[str, Any] | Config | None = "config.yaml"
    lora: bool | str = False
    hessian: str = "none"
    save: str = "none"
    initialize_from_log: bool = False
    name_filter: list[str] = field(default_factory=list)
    type_filter: list[type[nn.Module]] = field(default_factory=list)
    log_batch_size: int = 16
    log_num_workers: int = 1

    @abstractmethod
    def scoring(self) -> dict[str, Any]:
        """Keywords of `InfluenceFunction.compute_influence_all`."""


class Passes:
    """A session whose batches come from somebody else's loop.

    The loop is a callable that goes over the data once. It calls `begin` when the model is on the device of the batches
    to come, and `after_batch` after every batch that it has put through the session.

    Args:
        arguments: Of the patch; those of scoring may change between calls.

    Attributes:
        logix: The session.

    Raises:
        ValueError: Arguments have unknown values.
        LograError: As `LogIX`.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.logix = LogIX(arguments.project, arguments.config)
        self._arguments = arguments
        self._model: nn.Module | None = None
        self._logged = self._opened = False
        self._due: Callable[[], Any] | None = None
        self._take: Callable[[Log], None] | None = None
        self._scheduler()  # raises early

    def watch(self, model: nn.Module) -> None:
        """Choose a model's layers.

        Raises:
            ValueError: The filters match nothing.
        """
        self._model = model
        self._logged = self._opened = False
        self.logix.watch(model, self._arguments.type_filter or None, self._arguments.name_filter or None)

    def extract(self, go_over: Callable[[], Any]) -> None:
        """Log the data, in as many passes as the scheduler has.

        Raises:
            LograError: There is nothing to initialize from.
        """
        if self._logged and self._model is not None:
            self.logix.clear()
            self.watch(self._model)
        scheduler = self._scheduler()

        def rows() -> None:
            self._logged = True
            next(scheduler)

        for _ in range(len(scheduler)):
            self._go_over(go_over, rows)
            self.logix.finalize()

    def influence(self, go_over: Callable[[], Any]) -> Result:
        """Scores of the data against the log, as `compute_influence_all` gives them."""
        held: list[Log] = []

        def score() -> None:
            if held:
                loader, options = self.logix.build_log_dataloader(), self._arguments.scoring()
                self.logix.influence.compute_influence_all(
                    merge_logs(held), loader, save=True, hessian=self._hessian(), **options
                )
                held.clear()

        def take(log: Log) -> None:
            held.append(log)
            if sum(part["grad"].nbytes for _, log in held for part in log.values()) >= HELD:
                score()

        self.logix.influence.influence_scores = {}
        self._ask(go_over, take)
        score()
        return self.logix.influence.get_influence_scores()

    def self_influence(self, go_over: Callable[[], Any]) -> Result:
        """Self-influence of the data, as `compute_self_influence` gives it."""
        results: list[Result] = []

        def take(log: Log) -> None:
            options = {name: value for name, value in self._arguments.scoring().items() if name != "mode"}
            results.append(self.logix.compute_self_influence(log, hessian=self._hessian(), **options))

        self._ask(go_over, take)
        self.logix.influence.self_influence_scores = joined_queries(results)
        return self.logix.influence.get_self_influence_scores()

    def begin(self) -> None:
        """Set the session up for the pass to come."""
        asked_first = self._take is not None and not self._logged
        if (self._arguments.initialize_from_log or asked_first) and not self._opened:
            self.logix.initialize_from_log()
            self._opened = True
        if self._due is not None:
            self._due()

    def after_batch(self) -> None:
        """Of what is asked, take the batch's log."""
        if self._take is not None:
            self._take(self.logix.get_log(copy=True))

    def _ask(self, go_over: Callable[[], Any], take: Callable[[Log], None]) -> None:
        def queries() -> None:
            self.logix.setup({"grad": ["log"]})
            self.logix.eval()

        self._take = take
        try:
            self._go_over(go_over, queries)
        finally:
            self._take = None

    def _go_over(self, go_over: Callable[[], Any], due: Callable[[], Any]) -> None:
        self._due = due
        try:
            go_over()
        finally:
            self._due = None

    def _scheduler(self) -> LogIXScheduler:
        lora = self._arguments.lora
        if isinstance(lora, bool):
            lora = self.logix.config.lora.init if lora else "none"
        if self._opened or self._arguments.initialize_from_log:  # rows come with their factors
            lora = "none"
        return LogIXScheduler(self.logix, lora, self._arguments.hessian, self._arguments.save)

    def _hessian(self) -> str:
        return "auto" if self.logix._project.statistics else self._arguments.hessian
