"""LogIX's patch of Hugging Face's Trainer, for transformers 5.

`passes` says what is as in LogIX 0.1.1 and what is not. Of this patch, besides:

    - it takes what the patched class takes, and `tokenizer=` for `processing_class=`; LogIX's passes its arguments by
      position, and fails with transformers >= 4.46;
    - data is gone over in its order, and once for `influence`; LogIX's is shuffled, and asked about as often as the
      scheduler has passes;
    - a causal language model's loss passes over each sample's first label, which is not counted in the sum's scale
      either; LogIX counts it, and with `label_key="input_ids"` padding too: the rows of a batch with T labels a sample
      are T / (T - 1) as large, and with padding more, so that rows of different batches compare wrongly;
    - several processes, and several GPUs in one, are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels.compat.logix.analysis import Result
from logra_kernels.compat.logix.passes import Arguments, Passes
from logra_kernels.compat.logix.utils import DataIDGenerator
from logra_kernels.errors import LograError
from logra_kernels.one_pass import one_pass_trainer

DATA_IDS = ("detokenize", "hash")
LABELS = "labels"  # by this name transformers' models and Trainer take them


@dataclass
class LogIXArguments(Arguments):
    """What `patch_trainer`'s trainers are given beside Trainer's arguments.

    Args:
        project, config, lora, hessian, save, initialize_from_log, name_filter, type_filter, log_batch_size,
        log_num_workers: As in `passes.Arguments`.
        input_key, label_key, attention_key: Fields of a batch: what ids are made of, labels, and the mask.
        influence_damping, influence_mode, influence_groups: As `compute_influence_all` takes them.
        data_id: "detokenize", ids are the inputs' texts, or "hash", as `DataIDGenerator` makes them; the hash is of the
            collated row, padding and all, so pad to one length. Texts that come again get "#2" behind them.
        ignore_idx: The label that the loss does not count.

    Raises:
        ValueError: Another data_id.
    """

    input_key: str = "input_ids"
    influence_damping: float | None = None
    influence_mode: str = "dot"
    influence_groups: list[str] | None = None
    label_key: str = "labels"
    attention_key: str = "attention_mask"
    data_id: str = "detokenize"
    ignore_idx: int = -100

    def __post_init__(self) -> None:
        if self.data_id not in DATA_IDS:
            raise ValueError(f"LogIXArguments: data_id is {self.data_id!r}; it must be one of {', '.join(DATA_IDS)}")

    def scoring(self) -> dict[str, Any]:
        return {
            "mode": self.influence_mode,
            "damping": self.influence_damping,
            "influence_groups": self.influence_groups,
        }


def patch_trainer(TrainerClass: type) -> type:
    """A Trainer that logs its training data, or asks about it, in place of training.

        trainer = patch_trainer(Trainer)(logix_args=LogIXArguments(...), model=model, train_dataset=data)
        trainer.extract_log()
        scores = trainer.influence()

    `extract_log()` logs the data in as many passes as `LogIXScheduler` has and finalizes; so does `train()`.
    `influence()` returns the scores of the data, as queries, on the logged rows: "src_ids" (Q), "tgt_ids" (N) and
    "influence" [Q, N] fp32, or with groups {group: [Q, N]}. `self_influence()` returns "src_ids" and "influence" [Q].
    All three pass their arguments on to Trainer's `train`; what it returns does not come back. The session is
    `trainer.logix`.

    The loss, by `compute_loss` without `num_items_in_batch`, must be a mean over the labels that are not `ignore_idx`.
    `get_data_id(inputs)` and `get_sum_scale(inputs)` may be overridden.

    Args:
        TrainerClass: `transformers.Trainer`, or one derived from it.

    Raises:
        LograError: transformers is not installed; by the trainer, what `LogIX` and `LogIX.initialize_from_log` raise,
            several GPUs, or a batch without inputs or labels by those keys.
    """
    base: Any = one_pass_trainer(TrainerClass, "patch_trainer")

    class PatchedTrainer(base):
        def __init__(self, logix_args: LogIXArguments, *args: Any, tokenizer: Any = None, **settings: Any) -> None:
            if tokenizer is not None:
                if settings.get("processing_class") is not None:
                    raise ValueError("patch_trainer: tokenizer= and processing_class= are the same; give one of them")
                settings["processing_class"] = tokenizer
            self.logix_args = logix_args
            self._passes = Passes(logix_args)
            self.logix = self._passes.logix
            self.data_id_generator = DataIDGenerator()
            self._passes_over: bool | None = None
            super().__init__(*args, **settings)
            self.model_init = None  # train() would put another model in the place of the watched one
            self._passes.watch(self.model)

        def train(self, *args: Any, **settings: Any) -> None:
            self.extract_log(*args, **settings)

        def extract_log(self, *args: Any, **settings: Any) -> None:
            self._passes.extract(lambda: self._go_over(*args, **settings))

        def influence(self, *args: Any, **settings: Any) -> Result:
            return self._passes.influence(lambda: self._go_over(*args, **settings))

        def self_influence(self, *args: Any, **settings: Any) -> Result:
            return self._passes.self_influence(lambda: self._go_over(*args, **settings))

        def _go_over(self, *args: Any, **settings: Any) -> None:
            self._passes.begin()
            super().train(*args, **settings)

        def log_batch(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
            batch = self._prepare_inputs(inputs)
            names, scale = self.get_data_id(batch), self.get_sum_scale(batch)
            with self.logix(data_id=names, mask=batch.get(self.logix_args.attention_key)):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, dict(batch))
                (loss * scale).backward()  # not accelerator.backward, which divides by the accumulation steps
            self._passes.after_batch()
            return loss

        def get_data_id(self, inputs: Mapping[str, Any]) -> list[str]:
            tokens = _field(inputs, self.logix_args.input_key, "input_key")
            if self.logix_args.data_id == "hash":
                return self.data_id_generator(tokens)
            if self.processing_class is None:
                raise LograError('patch_trainer: data_id "detokenize" needs tokenizer=; or use data_id "hash"')
            return self.processing_class.batch_decode(tokens, skip_special_tokens=True)

        def get_sum_scale(self, inputs: Mapping[str, Any]) -> int:
            """How many labels of a batch its loss is the mean over."""
            key = self.logix_args.label_key
            if key == self.logix_args.input_key and LABELS in inputs:
                key = LABELS
            labels = _field(inputs, key, "label_key")
            counted = labels != self.logix_args.ignore_idx
            if labels.dim() == 2 and not labels.is_floating_point() and self._shifted(inputs, key, counted):
                counted = counted[:, 1:]
            return int(counted.sum().item())

        def _shifted(self, inputs: Mapping[str, Any], key: str, counted: Tensor) -> bool:
            """Whether the loss passes over each sample's first label, as that of next tokens does."""
            if key == self.logix_args.input_key:
                return True
            if self._passes_over is None and bool(counted[:, 0].any()):
                self._passes_over = not any(self._counts_first(inputs, key, label) for label in (0, 1))
            return bool(self._passes_over)

        @torch.no_grad()
        def _counts_first(self, inputs: Mapping[str, Any], key: str, label: int) -> bool:
            only = torch.full_like(inputs[key], self.logix_args.ignore_idx)
            only[:, 0] = label
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, {**inputs, key: only})
            return bool(loss.isfinite() & (loss != 0))  # else it is a mean of nothing

    return PatchedTrainer


def _field(inputs: Mapping[str, Any], key: str, argument: str) -> Tensor:
    if inputs.get(key) is None:
        raise LograError(f"patch_trainer: a batch has no {key!r}; {argument}= must be one of {', '.join(inputs)}")
    return inputs[key]
