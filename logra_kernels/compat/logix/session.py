"""LogIX: the session object of LogIX's users, on top of `Run`.

What is as in LogIX 0.1.1: names, arguments, ids, log and result layouts, scores (`analysis` says where they differ),
damping, the hash of `DataIDGenerator`, the factors' distribution. What is not:

    - the model stays as it is: no LoRA modules, layers keep their names, nothing stays frozen;
    - random factors come from a seed, so that every session has the same ones; a side's rank is min(rank, its width),
      where LogIX takes the least of the rank and both widths for both;
    - "pca" is PCA: without covariances to learn it from it is refused, where LogIX draws at random;
    - rows are kept in a `GradientStore`, and a rerun goes on where an interrupted one stopped; ids are strings, and one
      that comes again gets "#2" behind it;
    - `finalize` and `eval` end the gathering: what comes after are queries, until `setup` or `save(True)`;
    - a mask leaves positions out of covariances; gradients need the loss to do so (ignore_index), as in LogIX;
    - activations, output gradients, means and variances are not logged; there is no `state`.

Every other layer of `capture`'s can be watched too (convolutions of any kind, Hugging Face's Conv1D). For top-k of
stores larger than memory, reports and more, `session` is the `Run` beneath.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from logra_kernels.compat.logix.analysis import InfluenceFunction, Result
from logra_kernels.compat.logix.config import Config, LoggingConfig, LoRAConfig
from logra_kernels.compat.logix.logs import GRAD, LogDataset, loader_of
from logra_kernels.compat.logix.lora import read_factors, write_factors
from logra_kernels.compat.logix.options import Options
from logra_kernels.compat.logix.project import Project
from logra_kernels.compat.logix.utils import Log, get_world_size, names_of
from logra_kernels.errors import LograError
from logra_kernels.projection import Projection
from logra_kernels.run import Run


class LogIX:
    """Logs a model's gradients and asks whose they are; `with run(data_id=...):` around forward and backward.

    Args:
        project: Names a directory below the configuration's root_dir.
        config: A YAML file with LogIX's keys, its contents as a dict, or None for the defaults.
        logging_config: In place of the configuration's part.

    Attributes:
        influence: `analysis.InfluenceFunction`.

    Raises:
        ValueError: Unknown configuration keys or values.
        LograError: The configuration cannot be read, or there are several processes.
    """

    def __init__(
        self,
        project: str,
        config: str | os.PathLike | Mapping[str, Any] | Config | None = None,
        logging_config: LoggingConfig | None = None,
    ) -> None:
        if get_world_size() > 1:
            raise LograError("logix: several processes log with logra_kernels.DistributedRun; see its docstring")
        self.config = Config.of(project, config)
        if logging_config is not None:
            self.config.logging = logging_config
        self._project = Project(self.config)
        self.influence = InfluenceFunction(self._project)
        self._options = Options()
        self._save, self._gathering = False, True
        self._filters: tuple[Sequence[type] | None, Sequence[str] | None] = (None, None)
        self._next: tuple[list[str], Tensor | None, bool] | None = None
        self._batch: ExitStack | None = None
        self._ids: list[str] = []
        self._log: dict[str, dict[str, Tensor]] | None = None

    @property
    def project(self) -> str:
        return self.config.project

    @property
    def log_dir(self) -> str:
        return self.config.log_dir

    @property
    def model(self) -> nn.Module | None:
        return self._project.model

    @property
    def session(self) -> Run:
        """The `Run` that logs, with curvature "raw" and damping `Damping(0.1)`.

        Raises:
            LograError: No model is watched.
        """
        return self._project.run

    # --- what is logged ---

    def watch(
        self, model: nn.Module, type_filter: Sequence[type] | None = None, name_filter: Sequence[str] | None = None
    ) -> None:
        """Choose the layers to log; again for the same model, more of them.

        Args:
            model: Stays as it is.
            type_filter: Module classes; default linear and convolution layers.
            name_filter: Parts of module names, one of which a layer's name must have; default as before, or all.

        Raises:
            ValueError: The filters match nothing.
        """
        filters = type_filter or self._filters[0], name_filter or self._filters[1]
        self._project.watch(model, *filters, anew=False)
        self._filters = filters

    def add_lora(
        self,
        watch: bool = True,
        clear: bool = True,
        type_filter: Sequence[type] | None = None,
        name_filter: Sequence[str] | None = None,
        lora_path: str | os.PathLike | None = None,
        lora_config: LoRAConfig | None = None,
    ) -> None:
        """Project gradients from now on, and forget the statistics gathered so far.

        Args:
            watch, clear: Taken and not needed: the layers stay watched, and statistics of other factors have no use.
            type_filter, name_filter: Watch only these layers.
            lora_path: Take the factors that this project's directory keeps (`save_lora`, or LogIX's own).
            lora_config: In place of the configuration's part.

        Raises:
            LograError: No model is watched; init is "pca" and no covariances were gathered; no factors at the path.
        """
        self.config.lora = lora = lora_config or self.config.lora
        if self.model is None:
            raise LograError("add_lora: no model is watched; call watch(model) first")
        projection = None if lora_path is None else read_factors(lora_path)
        if projection is None and lora.init == "random":
            projection = Projection(lora.rank, "kaiming", lora.seed)
        elif projection is None:
            if "kfac" not in self._project.statistics:
                raise LograError(
                    "add_lora: init 'pca' is learned from covariances: log some batches with"
                    " setup({'forward': ['covariance'], 'backward': ['covariance']}) before, or use init 'random'"
                )
            projection = self._project.run.learn_projection(lora.rank)
        if type_filter or name_filter:
            self._project.watch(self.model, type_filter, name_filter, anew=True)
        self._project.project(projection)

    def setup(self, log_option_kwargs: Mapping[str, Any]) -> None:
        """Say what the batches to come are for, in either dialect (`compat.logix.options`).

        "log" of "grad" logs gradients, "covariance" of "grad" makes "raw" the curvature, "covariance" of "forward" and
        "backward" gathers KFAC's (and what PCA is learned from), "corrected_eigval" of "grad" makes it EKFAC.

        Raises:
            ValueError: An unknown key or plugin, or one that cannot be had; it says what to use instead.
        """
        self._options = options = Options.of(log_option_kwargs)
        self._gathering = True
        if options.save is not None:
            self._save = options.save

    def save(self, enable: bool = True) -> None:
        """Store the gradients of the batches to come, or stop doing so."""
        self._save = enable
        self._gathering = self._gathering or enable

    def eval(self) -> None:
        """The batches to come are queries: nothing of them is stored or gathered."""
        self._save = self._gathering = False

    # --- a batch ---

    def __call__(self, data_id: Iterable[Any], mask: Tensor | None = None, save: bool = False) -> "LogIX":
        """Begin a batch by `with run(data_id=...):`.

        Args:
            data_id: One id a sample: strings, numbers, or tensors, which are hashed.
            mask: [N, T], 0 at padding.
            save: Store this batch's gradients, whatever `save()` said.
        """
        self._next = names_of(data_id), mask, save
        return self

    def __enter__(self) -> "LogIX":
        if self._next is None:
            raise LograError("logix: begin a batch with `with run(data_id=...):`")
        (names, mask, save), self._next = self._next, None
        self._begin(names, mask, save)
        return self

    def __exit__(self, *exc: Any) -> None:
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.__exit__(*exc)

    def start(self, data_id: Iterable[Any], mask: Tensor | None = None) -> None:
        """Begin a batch, without a `with` statement; `end` ends it."""
        self._begin(names_of(data_id), mask, False)

    def end(self, save: bool = False) -> None:
        """End the batch that `start` began.

        Raises:
            LograError: There is none, or `save` is asked for so late.
        """
        if self._batch is None:
            raise LograError("logix: end() without start()")
        if save and not self._saves(False):
            self._drop()
            raise LograError("logix: end(save=True) comes too late; call save(True) before start()")
        self.__exit__(None, None, None)

    def log(self, data_id: Iterable[Any], mask: Tensor | None = None) -> None:
        """Not had here.

        Raises:
            LograError: Always; it says what to use.
        """
        raise LograError("logix: log() is not had here; put `with run(data_id=...):` around forward and backward")

    def watch_activation(self, tensor_dict: Mapping[str, Tensor]) -> None:
        """Not had here.

        Raises:
            LograError: Always; it says what to use.
        """
        raise LograError("logix: only gradients of layers are logged; take tensors with tensor.register_hook")

    def get_log(self, copy: bool = False) -> Log:
        """(ids, {layer: {"grad": [N, k_out, k_in]}}) of the last batch, or of this one after its backward.

        Raises:
            LograError: There was none, or it only gathered covariances.
        """
        log = self._gradients() if self._batch is not None else self._log
        if log is None:
            raise LograError(
                "get_log: no gradients were logged; run forward and backward inside `with run(data_id=...):`, after"
                " setup({'grad': ['log']}) and eval()"
            )
        if copy:
            log = {name: {GRAD: part[GRAD].clone()} for name, part in log.items()}
        return list(self._ids), log

    def _saves(self, this_batch: bool) -> bool:
        """Whether a batch's rows are stored: also where a curvature is to be made of them."""
        options = self._options
        asked = this_batch or (self._save and options.log)
        return asked or (self._gathering and options.curvature is not None)

    def _begin(self, names: list[str], mask: Tensor | None, save: bool) -> None:
        if self._batch is not None:
            self._drop()
            raise LograError("logix: a batch was begun inside of another; end it first")
        self._ids, self._log = names, None
        mask = None if mask is None or bool(mask.bool().all()) else mask.bool()
        batch = ExitStack()
        batch.enter_context(self._logging(names, mask, save))
        self._batch = batch

    @contextmanager
    def _logging(self, names: list[str], mask: Tensor | None, save: bool) -> Iterator[None]:
        project, options = self._project, self._options
        observe = options.observe and self._gathering
        if self._saves(save):
            with project.log(names, mask, observe) as self._ids:
                yield
                self._log = self._gradients()
            if self._gathering and options.curvature is not None:
                project.statistics.add(options.curvature)
        elif observe:
            with project.observe(mask):
                yield
        else:
            with project.run.query(names):
                yield
                self._log = self._gradients()

    def _gradients(self) -> dict[str, dict[str, Tensor]]:
        return {name: {GRAD: grad} for name, grad in self._project.run.taps.grads.items()}

    def _drop(self) -> None:
        """Leave the open batch as if an error had come up in it."""
        given_up = LograError("logix: the batch was given up")
        self.__exit__(LograError, given_up, None)

    # --- after logging ---

    def finalize(self) -> None:
        """Commit every stored row; the batches to come are queries, until `save(True)` or `setup`.

        Raises:
            StoreError: The disk refuses; what was committed stays.
        """
        self._project.keep()
        self.eval()

    def clear(self) -> None:
        """Forget what is watched and what was gathered. Stored rows stay."""
        self._project.close()
        self._project.model = None
        self._log = None

    def build_log_dataset(self, flatten: bool = False) -> LogDataset:
        """The stored rows as a dataset of (id, {layer: {"grad": [k_out, k_in]}}), or (id, [D]) with `flatten`.

        Raises:
            StoreError: There are none.
        """
        return LogDataset(self._project.commit().path, flatten)

    def build_log_dataloader(
        self, batch_size: int = 16, num_workers: int = 0, pin_memory: bool = False, flatten: bool = False
    ) -> DataLoader:
        """The stored rows as logs, in their order. `compute_influence_all` takes it for the rows, and streams them.

        Raises:
            StoreError: There are none.
        """
        return loader_of(self._project.commit().path, batch_size, num_workers, pin_memory, flatten)

    def compute_influence(self, src_log: Log, tgt_log: Log, *args: Any, **options: Any) -> Result:
        """`InfluenceFunction.compute_influence`."""
        return self.influence.compute_influence(src_log, tgt_log, *args, **options)

    def compute_influence_all(
        self,
        src_log: Log | None = None,
        loader: Iterable[Log] | None = None,
        mode: str = "dot",
        precondition: bool = True,
        hessian: str = "auto",
        influence_groups: Sequence[str] | None = None,
        damping: float | None = None,
    ) -> Result:
        """`InfluenceFunction.compute_influence_all`, by default of the last log on all stored rows."""
        return self.influence.compute_influence_all(
            self.get_log() if src_log is None else src_log,
            self.build_log_dataloader() if loader is None else loader,
            mode=mode,
            precondition=precondition,
            hessian=hessian,
            influence_groups=influence_groups,
            damping=damping,
        )

    def compute_self_influence(self, src_log: Log | None = None, *args: Any, **options: Any) -> Result:
        """`InfluenceFunction.compute_self_influence`, by default of the last log."""
        return self.influence.compute_self_influence(self.get_log() if src_log is None else src_log, *args, **options)

    def save_lora(self) -> None:
        """Write the factors as LogIX does, for `add_lora(lora_path=)`; a store has its own already.

        Raises:
            LograError: Gradients are not projected.
        """
        write_factors(self.log_dir, self.session.taps.factors)

    def initialize_from_log(
        self, state_path: str | os.PathLike | None = None, lora_path: str | os.PathLike | None = None
    ) -> None:
        """Go on with a project that was logged before: its rows, layers, factors and statistics. `watch` comes first.

        Args:
            state_path: The directory; default the project's own.
            lora_path: Taken and not needed: a store has its factors.

        Raises:
            LograError: There are no rows, or LogIX itself wrote them.
            StoreMismatch: They are of another model.
        """
        self._project.open(self.log_dir if state_path is None else state_path)

    def get_logging_config(self) -> LoggingConfig:
        return self.config.logging

    def set_logging_config(self, logging_config: LoggingConfig) -> None:
        self.config.logging = logging_config

    def get_lora_config(self) -> LoRAConfig:
        return self.config.lora

    def set_lora_config(self, lora_config: LoRAConfig) -> None:
        self.config.lora = lora_config

    def _add_lora(self, init: str) -> None:
        self.add_lora(lora_config=replace(self.config.lora, init=init))
