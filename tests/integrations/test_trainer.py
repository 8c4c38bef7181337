"""Hugging Face's Trainer with a run in its training step: the ten lines that a user writes."""

import copy

import pytest
import torch
from integrations import tiny_lm

import logra_kernels as lk
from logra_kernels.integrations.causal_lm import Batch, loss_sum

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int, length: int) -> None:
        self.tokens = torch.randint(3, 300, (count, length))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int):
        return {"id": str(i), "input_ids": self.tokens[i]}


def collate(rows):
    return {"id": [row["id"] for row in rows], "input_ids": torch.stack([row["input_ids"] for row in rows])}


class LoggingTrainer(transformers.Trainer):
    def __init__(self, run: lk.Run, **settings) -> None:
        super().__init__(**settings)
        self.run = run

    def training_step(self, model, inputs, num_items_in_batch=None):
        tokens = self._prepare_inputs(inputs)["input_ids"]
        model.eval()
        with self.run.log(inputs["id"]):
            loss = loss_sum(model, Batch(tokens, torch.ones_like(tokens), tokens))
            loss.backward()  # not accelerator.backward, which divides by the accumulation steps
        return loss.detach()


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_rows_of_a_trainer(tmp_path, settings):
    model, data = tiny_lm.model(), Rows(6, 9)
    whole, batch = copy.deepcopy(model).eval(), Batch(data.tokens, torch.ones_like(data.tokens), data.tokens)
    projection = lk.Projection(rank=4)
    with lk.capture(whole, projection) as taps:
        loss_sum(whole, batch).backward()
    with lk.Run(tmp_path / "s", model, projection=projection) as run:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            num_train_epochs=1,
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        LoggingTrainer(run, model=model, args=arguments, train_dataset=data, data_collator=collate).train()
    order = [int(i) for i in run.store.ids]
    assert sorted(order) == list(range(6))
    torch.testing.assert_close(run.store.read(0, 6), taps.rows()[order], rtol=1e-4, atol=1e-4)
