"""LogIX's patch of a Lightning module and Trainer, of `lightning.pytorch` or `pytorch_lightning`.

`passes` says what is as in LogIX 0.1.1 and what is not. Of this patch, besides:

    - every pass is a fit of one epoch, whatever `max_epochs` says, which ends LogIX's passes early; `max_steps` is the
      number of batches in each of them;
    - callbacks that save, stop, or change weights are left out, where LogIX's Trainer fails beside them, and gradients
      are neither clipped nor accumulated;
    - without a data_id_extractor, ids are hashes of the samples in a batch's first tensor; LogIX hashes the batch's
      parts as if they were samples;
    - several devices are refused, and one is the default.

Data is gone over in the order of the loader: give one that does not shuffle.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from logra_kernels.compat.logix.analysis import Result
from logra_kernels.compat.logix.passes import Arguments, Passes
from logra_kernels.compat.logix.utils import DataIDGenerator
from logra_kernels.errors import LograError

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
LEFT_OUT = [
    "BaseFinetuning",
    "BatchSizeFinder",
    "Checkpoint",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelPruning",
    "StochasticWeightAveraging",
    "WeightAveraging",
]
OFF = {  # what a pass has no use for
    "accumulate_grad_batches": 1,
    "enable_checkpointing": False,
    "gradient_clip_val": None,
    "limit_val_batches": 0,
    "logger": False,
    "max_epochs": 1,
    "min_epochs": None,
    "min_steps": None,
    "num_sanity_val_steps": 0,
}


@dataclass
class LogIXArguments(Arguments):
    """What `patch` is given.

    Args:
        project, config, lora, hessian, save, initialize_from_log, name_filter, type_filter, log_batch_size,
        log_num_workers: As in `passes.Arguments`.
        influence_damping, influence_mode: As `compute_influence_all` takes them.
        model_key: The module's attribute that is watched.
    """

    influence_damping: float | None = None
    influence_mode: str = "dot"
    model_key: str = "model"

    def scoring(self) -> dict[str, Any]:
        return {"mode": self.influence_mode, "damping": self.influence_damping}


def patch(
    module_cls: type,
    trainer_cls: type,
    logix_args: LogIXArguments,
    data_id_extractor: Callable[[Any], Sequence[str]] | None = None,
    mask_extractor: Callable[[Any], Tensor] | None = None,
) -> tuple[type, type]:
    """A Lightning module and a Trainer that log the module's training data, or ask about it, in place of training.

        LogIXModule, LogIXTrainer = patch(Module, Trainer, LogIXArguments(...), data_id_extractor)
        module, trainer = LogIXModule(), LogIXTrainer()
        trainer.extract_log(module, train_loader)
        scores = trainer.influence(module, test_loader)

    `extract_log` logs the data in as many passes as `LogIXScheduler` has and finalizes; so does `fit`. `influence`
    returns the scores of the data, as queries, on the logged rows: "src_ids" (Q), "tgt_ids" (N) and "influence" [Q, N]
    fp32. `self_influence` returns "src_ids" and "influence" [Q]. All take what Trainer's `fit` does. The session is
    `trainer.logix`. `training_step`'s loss is taken as it is: it should be a sum over the batch.

    Args:
        module_cls: A LightningModule.
        trainer_cls: A Trainer of the same package.
        logix_args: For both.
        data_id_extractor: A batch's ids, one a sample; default hashes.
        mask_extractor: A batch's mask, [N, T], 0 at padding.

    Raises:
        ValueError: `trainer_cls` is no Lightning Trainer, or arguments have unknown values.
        LograError: As `LogIX`; by the module, it has no attribute `model_key`; by the trainer, several devices, and
            what `LogIX.initialize_from_log` raises.
    """
    callbacks_of = importlib.import_module(f"{_package(trainer_cls)}.callbacks")
    left_out = tuple(getattr(callbacks_of, name) for name in LEFT_OUT if hasattr(callbacks_of, name))
    passes = Passes(logix_args)
    ids_of = data_id_extractor or _Hashes()

    def kept(callbacks: Any) -> list[Any]:
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks] if callbacks else []
        return [callback for callback in callbacks if not isinstance(callback, left_out)]

    class PassCallback(callbacks_of.Callback):  # type: ignore[name-defined]
        """Puts each batch through the session, and ends with the first epoch."""

        def on_fit_start(self, trainer, pl_module):
            trainer.strategy.lr_scheduler_configs = []  # some want metrics of a validation

        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.eval()
            passes.begin()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.training:  # by a hook of its own
                pl_module.eval()
            passes.logix.start(ids_of(batch), None if mask_extractor is None else mask_extractor(batch))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            pl_module.zero_grad(set_to_none=True)  # of modules that call their optimizers by hand

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            passes.logix.end()
            pl_module.zero_grad(set_to_none=True)
            passes.after_batch()

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

        def on_exception(self, trainer, pl_module, exception):
            passes.logix._drop()

    class PatchedModule(module_cls):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.logix_args = logix_args
            model = getattr(self, logix_args.model_key, None)
            if not isinstance(model, nn.Module):
                raise LograError(
                    f"patch: {module_cls.__name__} has no model as attribute {logix_args.model_key!r}; name it by"
                    " LogIXArguments(model_key=)"
                )
            passes.watch(model)

        @property
        def logix(self) -> Any:
            return passes.logix

        def configure_callbacks(self) -> list[Any]:
            return kept(super().configure_callbacks())

        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
        ) -> None:
            if optimizer_closure is not None:  # forward and backward, and no step
                optimizer_closure()

        def backward(self, loss: Tensor, *args: Any, **settings: Any) -> None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            super().backward(loss if scaler is None else loss / scaler.get_scale(), *args, **settings)

    class PatchedTrainer(trainer_cls):
        def __init__(self, **settings: Any) -> None:
            steps = settings.pop("max_steps", -1)
            quick = int(settings.pop("fast_dev_run", False))
            if steps > 0 or quick:
                settings["limit_train_batches"] = quick or steps
            callbacks = [*kept(settings.pop("callbacks", None)), PassCallback()]
            super().__init__(**{"devices": 1} | settings | OFF, callbacks=callbacks)
            if self.world_size > 1:
                raise LograError(
                    f"patch: {self.world_size} devices log with logra_kernels.DistributedRun; use devices=1"
                )
            self.logix, self.logix_args = passes.logix, logix_args

        def fit(self, model: Any, *args: Any, **settings: Any) -> None:
            self.extract_log(model, *args, **settings)

        def extract_log(self, model: Any, *args: Any, **settings: Any) -> None:
            passes.extract(lambda: self._go_over(model, *args, **settings))

        def influence(self, model: Any, *args: Any, **settings: Any) -> Result:
            return passes.influence(lambda: self._go_over(model, *args, **settings))

        def self_influence(self, model: Any, *args: Any, **settings: Any) -> Result:
            return passes.self_influence(lambda: self._go_over(model, *args, **settings))

        def _go_over(self, model: Any, *args: Any, **settings: Any) -> None:
            if not isinstance(model, PatchedModule):
                raise LograError(f"patch: fit the module's patched class, not a {type(model).__name__}")
            self.fit_loop.max_epochs = self.current_epoch + 1  # those of earlier passes count
            with _modes(model):
                super().fit(model, *args, **settings)

    return PatchedModule, PatchedTrainer


def _package(trainer_cls: type) -> str:
    for parent in trainer_cls.__mro__:
        for package in PACKAGES:
            if parent.__module__.startswith(package + "."):
                return package
    raise ValueError(f"patch: {trainer_cls.__name__} is no Trainer of {' or '.join(PACKAGES)}")


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """Each part goes back to training where it was."""
    before = [(part, part.training) for part in model.modules()]
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


class _Hashes:
    """Ids of the samples in a batch's first tensor."""

    def __init__(self) -> None:
        self._hash = DataIDGenerator()

    def __call__(self, batch: Any) -> list[str]:
        first = batch
        while isinstance(first, Mapping | list | tuple) and first:
            first = next(iter(first.values() if isinstance(first, Mapping) else first))
        if not isinstance(first, Tensor):
            raise LograError("patch: a batch does not begin with a tensor to make ids of; give a data_id_extractor")
        return self._hash(first)
