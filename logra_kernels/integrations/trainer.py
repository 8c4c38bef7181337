"""Hugging Face's Trainer as the loop that logs into a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels.errors import LograError
from logra_kernels.integrations.causal_lm import IGNORED, Batch, loss_sum
from logra_kernels.one_pass import one_pass_trainer
from logra_kernels.run import Run
from logra_kernels.session import row_ids

FIELDS, ROWS = "logra_kernels fields", "logra_kernels rows"  # names that no model takes
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def next_token_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """`causal_lm.loss_sum` of "input_ids" [N, T], with "attention_mask" and "labels" where there are some."""
    tokens = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else mask
    labels = inputs.get("labels")
    labels = tokens.masked_fill(mask == 0, IGNORED) if labels is None else labels
    return loss_sum(model, Batch(tokens, mask, labels))


def logging_trainer(
    run: Run,
    base: type | None = None,
    *,
    ids: str | None = "id",
    columns: Sequence[str] = (),
    loss: Loss = next_token_loss,
    observe: bool = False,
) -> type:
    """A `transformers.Trainer` whose `train()` is one pass over the training data that logs its rows into a run.

        trainer = logging_trainer(run)(model=model, args=arguments, train_dataset=data)
        trainer.train()
        run.finalize()

    Rows are stored in the dataset's order, batches that are committed already are passed over, the model is in eval
    mode, no weight changes and no checkpoint is written. Of the arguments, batch size, data loading, devices and mixed
    precision count, and epochs, gradient accumulation, optimizer and saving do not.

    Args:
        run: Of the same model.
        base: The class to derive from; default `transformers.Trainer`.
        ids: The dataset's field with each row's id, which neither model nor collator needs to know; None numbers the
            rows "0", "1", ...
        columns: Fields that are stored as columns of the rows.
        loss: Of the model and a collated batch, the sum over samples and positions. The default is a causal language
            model's.
        observe: `Run.observe` the data in place of logging it; positions whose "attention_mask" is 0 do not count, but
            in an encoder-decoder, whose mask does not tell of the decoder's positions.

    Raises:
        LograError: transformers is not installed; by the class, the default loss is meant for a masked language model
            or an encoder-decoder; by `train`, rows lack a field, or are to be numbered by several processes.
    """
    fields = [*([] if ids is None or observe else [ids]), *([] if observe else columns)]
    one_pass: Any = one_pass_trainer(base, "logging_trainer")

    class LoggingTrainer(one_pass):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            if ids is None and not observe and self.args.world_size > 1:
                raise LograError("logging_trainer: several processes cannot number rows; give ids= a field of the data")
            if loss is next_token_loss:
                self._check_causal()
            self._numbered = 0
            self.data_collator: Any = _Collator(self.data_collator, fields, self._taken())

        def _check_causal(self) -> None:
            from transformers.models.auto import modeling_auto

            masked = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
            masked -= set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
            found = [type(module).__name__ for module in self.model.modules()]
            other = next((name for name in found if name in masked), found[0] if self._encodes_and_decodes() else None)
            if other is not None:
                raise LograError(
                    f"logging_trainer: a {other} does not predict each next token of its input, which the default loss"
                    " is of: give loss=, the sum of the samples' losses of (model, batch)"
                )

        def _encodes_and_decodes(self) -> bool:
            return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

        def train(self, *args: Any, **settings: Any) -> Any:
            self._numbered = 0
            return super().train(*args, **settings)

        def _set_signature_columns_if_needed(self) -> None:
            self._taken()
            self._signature_columns += [name for name in fields if name not in self._signature_columns]

        def _taken(self) -> list[str]:
            """What the model takes."""
            super()._set_signature_columns_if_needed()
            return list(self._signature_columns)

        def log_batch(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
            kept = inputs.pop(FIELDS)
            batch = self._prepare_inputs(inputs)
            first, self._numbered = self._numbered, self._numbered + kept[ROWS]
            names = [str(i) for i in range(first, self._numbered)] if ids is None else row_ids("log", kept.get(ids, ()))
            if not observe and run.committed(names):
                return torch.zeros((), dtype=torch.float32, device=self.args.device)
            with self._gathering(names, kept, batch):
                with self.compute_loss_context_manager():
                    value = loss(model, batch)
                value.backward()  # not accelerator.backward, which divides by the accumulation steps
            return value

        def _gathering(
            self, names: list[str], kept: Mapping[str, Any], batch: Mapping[str, Any]
        ) -> AbstractContextManager[None]:
            tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
            length = None  # for models that flatten samples and positions, as OPT does
            if self._encodes_and_decodes():
                mask = None
            elif isinstance(tokens, Tensor) and tokens.dim() == 2:
                length, mask = tokens.shape[1], torch.ones_like(tokens) if mask is None else mask
            if observe:
                return run.observe(weights=None if mask is None else mask.bool(), sequence_length=length)
            return run.log(names, {name: kept[name] for name in columns} or None, sequence_length=length)

    return LoggingTrainer


class _Collator:
    """Another one beside which chosen fields of the rows come through as lists."""

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]], fields: list[str], taken: list[str]) -> None:
        self._collate, self._fields = collate, fields
        self._own = {name for name in fields if name not in taken}  # the other collator need not know them

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        kept: dict[str, Any] = {name: [_plain(row, name) for row in rows] for name in self._fields}
        batch = self._collate([{name: row[name] for name in row if name not in self._own} for row in rows])
        return {**batch, FIELDS: {ROWS: len(rows), **kept}}


def _plain(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise LograError(f"logging_trainer: a row has no field {name!r}; it has {', '.join(map(str, row))}")
    value = row[name]
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
