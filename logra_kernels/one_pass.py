"""Hugging Face's Trainer as a loop and no more: its data, batches, devices and autocast, and no training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from logra_kernels.errors import LograError


def one_pass_trainer(base: type | None, caller: str) -> type:
    """A `transformers.Trainer` whose `train()` goes once over the training data, in its order.

    A class derived from it says in `log_batch(model, inputs)` what to do with a collated batch, `backward` included; it
    returns the loss. The model is in eval mode, no optimizer is made, no weight changes and no checkpoint is written.

    Args:
        base: The class to derive from; default `transformers.Trainer`.
        caller: Named in errors.

    Raises:
        LograError: transformers is not installed; when the trainer is made, it would use several devices.
    """
    try:
        from transformers import Trainer, TrainerCallback
    except ImportError:
        raise LograError(f"{caller} needs transformers: pip install 'logra-kernels[hf]'") from None

    class OnePass(TrainerCallback):
        """Ends with the first epoch, and saves nothing."""

        def on_step_end(self, args, state, control, **_):
            control.should_save = control.should_evaluate = False

        def on_epoch_end(self, args, state, control, **_):
            control.should_save = control.should_evaluate = False
            control.should_training_stop = True

    class OnePassTrainer(base or Trainer):  # type: ignore[misc]
        log_batch: Callable[[nn.Module, dict[str, Any]], Tensor]

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            if self.args.n_gpu > 1:
                raise LograError(
                    f"{caller}: Trainer would spread each batch over {self.args.n_gpu} GPUs; let it see one, by"
                    " CUDA_VISIBLE_DEVICES"
                )
            self.add_callback(OnePass())

        def create_optimizer(self, *args: Any, **settings: Any) -> Any:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # which prepare a model only with an optimizer
                return super().create_optimizer(*args, **settings)
            self.optimizer: Any = _Idle()  # also in place of one that steps in backward hooks, or for a GradScaler
            return self.optimizer

        def create_scheduler(self, *args: Any, **settings: Any) -> Any:
            self.lr_scheduler: Any = _Idle()
            return self.lr_scheduler

        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

        def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
            model.eval()
            loss = self.log_batch(model, inputs)
            model.zero_grad(set_to_none=True)
            return loss.detach()

    return OnePassTrainer


class _Idle:
    """What Trainer asks of an optimizer and a schedule."""

    def step(self, *_: Any) -> None:
        pass

    def zero_grad(self, *_: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def get_last_lr(self) -> list[float]:
        return [0.0]
