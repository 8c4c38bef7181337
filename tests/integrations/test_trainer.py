"""Hugging Face's Trainer as the loop that logs."""

import copy

import pytest
import torch
from integrations import tiny_lm

import logra_kernels as lk
from logra_kernels.errors import LograError
from logra_kernels.integrations.causal_lm import Batch, loss_sum
from logra_kernels.integrations.trainer import logging_trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
N = 7


class Rows(torch.utils.data.Dataset):
    """Sequences of unequal lengths, with names and sources."""

    def __init__(self, count: int = N) -> None:
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(5, 10, (count,), generator=generator).tolist()
        self.tokens = [torch.randint(3, 300, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int):
        return {"id": f"row{i}", "source": f"s{i % 2}", "input_ids": self.tokens[i]}

    def batch(self) -> Batch:
        longest = max(map(len, self.tokens))
        mask = torch.stack([(torch.arange(longest) < len(t)).long() for t in self.tokens])
        tokens = torch.stack([torch.nn.functional.pad(t, (0, longest - len(t))) for t in self.tokens])
        return Batch(tokens, mask, tokens.masked_fill(mask == 0, -100))


def arguments(place, **settings):
    return transformers.TrainingArguments(
        output_dir=str(place),
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )


def padding():
    tokenizer = tiny_lm.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return transformers.DataCollatorWithPadding(tokenizer)


def logged(run, model, place, data, base=None, **options):
    """What Trainer's own arguments would do is turned off: epochs, shuffling, learning, checkpoints."""
    settings = options.pop("settings", {})
    made = logging_trainer(run, base, **options)
    made(model=model, args=arguments(place, **settings), train_dataset=data, data_collator=padding()).train()


def first(data):
    batch = data.batch()
    return Batch(batch.input_ids[:1], batch.attention_mask[:1], batch.labels[:1])


def exact_rows(model, projection, data):
    whole = copy.deepcopy(model).eval()
    with lk.capture(whole, projection) as taps:
        loss_sum(whole, data.batch()).backward()
    return taps.rows()


SETTINGS = [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"dataloader_num_workers": 2}]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_come_in_the_datasets_order(tmp_path, settings, freeze):
    model, data, projection = tiny_lm.model(), Rows(), lk.Projection(rank=4)
    exact, before = exact_rows(model, projection, data), copy.deepcopy(model.state_dict())
    with lk.Run(tmp_path / "s", model, projection=projection, freeze=freeze) as run:
        logged(run, model, tmp_path / "out", data, columns=["source"], settings={"save_steps": 1, **settings})
        assert run.commit().ids == [f"row{i}" for i in range(N)]
        assert run.store.columns == {"source": [f"s{i % 2}" for i in range(N)]}
        torch.testing.assert_close(run.store.read(0, N), exact, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_observed_numbered_and_gone_on_with(tmp_path):
    model, data = tiny_lm.model(), Rows()
    seen = []

    def loss(model, inputs):
        seen.append(len(inputs["input_ids"]))
        return loss_sum(model, Batch(inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"]))

    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=4, kind="pca"), curvature="kfac") as run:
        logged(run, model, tmp_path / "out", data, observe=True)
        assert not run.learning
        with lk.Run(tmp_path / "by-hand", model, projection=lk.Projection(rank=4, kind="pca")) as other:
            with other.observe(weights=data.batch().attention_mask):
                loss_sum(model, data.batch()).backward()
            with other.query(["q"]) as a, run.query(["q"]) as b:
                loss_sum(model, first(data)).backward()
            torch.testing.assert_close(a.rows, b.rows, rtol=1e-3, atol=1e-3)  # padding was left out
        logged(run, model, tmp_path / "out", data, ids=None, loss=loss, settings={"max_steps": 2})
        assert run.commit().ids == ["0", "1", "2", "3"]
        assert seen == [2, 2]
    with lk.Run(tmp_path / "s", model, curvature="kfac") as run:
        logged(run, model, tmp_path / "out", data, ids=None, loss=loss)
        assert run.commit().ids == [str(i) for i in range(N)]
        assert seen == [2, 2, 2, 1]  # what was committed is passed over
        assert run.scores(run.stored(["0"]))[0, 0] > 0


def test_datasets_whose_columns_the_model_does_not_know(tmp_path):
    datasets = pytest.importorskip("datasets")
    model, data, projection = tiny_lm.model(), Rows(), lk.Projection(rank=4)
    table = datasets.Dataset.from_list(
        [{**data[i], "input_ids": data.tokens[i].tolist(), "extra": i} for i in range(N)]
    )

    class Own(transformers.Trainer):
        pass

    with lk.Run(tmp_path / "s", model, projection=projection) as run:
        assert issubclass(logging_trainer(run, Own), Own)
        logged(run, model, tmp_path / "out", table, Own, columns=["extra"])
        assert run.commit().columns == {"extra": list(range(N))}
        torch.testing.assert_close(run.store.read(0, N), exact_rows(model, projection, data), rtol=1e-4, atol=1e-4)


def test_a_field_that_rows_lack_is_named(tmp_path):
    model = tiny_lm.model()
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=4)) as run:
        with pytest.raises(LograError, match="no field 'name'; it has"):
            logged(run, model, tmp_path / "out", Rows(), ids="name")
        assert not lk.GradientStore.exists(tmp_path / "s")


SMALL = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def opt():
    widths = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 32}
    config = transformers.OPTConfig(**SMALL, **widths, num_hidden_layers=1, num_attention_heads=2)
    return transformers.OPTForCausalLM(config)


def t5():
    widths = {"d_model": 16, "d_kv": 8, "d_ff": 24}
    config = transformers.T5Config(**SMALL, **widths, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def bert():
    widths = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
    config = transformers.BertConfig(**SMALL, **widths, num_hidden_layers=1, num_attention_heads=2)
    return transformers.BertForMaskedLM(config)


def reconstruction(model, inputs):
    """Of an encoder-decoder whose target is the first tokens of its input."""
    labels = inputs["input_ids"][:, :4].contiguous()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize(("make", "loss"), [(opt, None), (t5, reconstruction)])
def test_models_that_flatten_positions_and_encoder_decoders(tmp_path, make, loss):
    torch.manual_seed(0)
    model, data, options = make().eval(), Rows(), {} if loss is None else {"loss": loss}
    projection = lk.Projection(rank=3, kind="pca")
    with lk.Run(tmp_path / "s", model, projection=projection) as run:
        logged(run, model, tmp_path / "out", data, observe=True, **options)
        logged(run, model, tmp_path / "out", data, **options)
        run.commit()
        assert run.store.ids == [f"row{i}" for i in range(N)]
        tokens = data.tokens[4][None]
        batch = Batch(tokens, torch.ones_like(tokens), tokens)
        with run.query(["q"], sequence_length=tokens.shape[1]) as query:
            if loss is None:
                loss_sum(model, batch).backward()
            else:
                loss(model, {"input_ids": tokens, "attention_mask": batch.attention_mask}).backward()
        exact = query.rows[0]
        assert exact.abs().max() > 0
        torch.testing.assert_close(run.store.read(4, 5)[0], exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("make", [t5, bert])
def test_the_default_loss_of_a_model_it_is_not_of_is_refused(tmp_path, make):
    model = make()
    with lk.Run(tmp_path / "s", model) as run, pytest.raises(LograError, match=f"a {type(model).__name__} does not"):
        logged(run, model, tmp_path / "out", Rows())
    assert not (tmp_path / "s").exists()
