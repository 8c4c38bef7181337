"""LogIX's patched Trainer on top of a run: against LogIX 0.1.1's scores and one-sample autograd."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from compat.classifier import Classifier, rows_of
from integrations import tiny_lm
from torch import nn

import logra_kernels.compat.logix as logix
from logra_kernels.compat.logix import passes
from logra_kernels.compat.logix.huggingface import LogIXArguments, patch_trainer
from logra_kernels.compat.logix.utils import DataIDGenerator, merge_logs
from logra_kernels.errors import LograError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
# by hand: LogIX's log of 10 rows by its patched Trainer, with what it needs to run under transformers 5: keywords for
# positions, `training_step`'s third argument, `use_apex`, a sequential sampler, torch.load(weights_only=False)
PEER = Path(__file__).parent / "scored_by_logix" / "trainer"
RANK, N, Q = 3, 10, 6


def arguments(place, **settings):
    return transformers.TrainingArguments(
        output_dir=str(place / "out"),
        per_device_train_batch_size=settings.pop("batch", 4),
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )


def trainer(place, model, data, base=transformers.Trainer, settings=(), more=(), **options):
    options = {"lora": True, "hessian": "raw", "save": "grad", "data_id": "hash"} | options
    lora = {"rank": RANK, "init": options.pop("init", "random")}
    given = LogIXArguments(project="p", config={"root_dir": str(place), "lora": lora}, **options)
    return patch_trainer(base)(
        **{"data_collator": transformers.default_data_collator} | dict(more),
        logix_args=given,
        model=model,
        args=arguments(place, **dict(settings)),
        train_dataset=data,
    )


def classifier(seed=0):
    torch.manual_seed(seed)
    return Classifier()


def test_scores_are_those_of_logix(tmp_path):
    peer = dict(np.load(PEER / "expected.npz"))
    model = Classifier()
    model.load_state_dict({k.removeprefix("model/"): torch.from_numpy(v) for k, v in peer.items() if "model/" in k})
    made = trainer(tmp_path, model, rows_of(N, 1), name_filter=["hidden", "head"], lora=False)
    made.logix.add_lora(lora_path=PEER)
    made.extract_log()
    for mode in ("dot", "cosine"):
        asking = trainer(
            tmp_path, model, rows_of(Q, 2), initialize_from_log=True, influence_mode=mode, influence_damping=0.05
        )
        got = asking.influence()
        assert got["src_ids"] == peer["src_ids"].tolist()
        assert got["tgt_ids"] == peer["tgt_ids"].tolist()
        torch.testing.assert_close(got["influence"], torch.from_numpy(peer[mode]), rtol=1e-4, atol=1e-5)


def language_model(rows=N):
    """(model, rows of unequal lengths, loss of logits and labels)."""
    generator = torch.Generator().manual_seed(5)
    data = []
    for length in torch.randint(4, 10, (rows,), generator=generator).tolist():
        tokens = torch.randint(3, 300, (length,), generator=generator)
        data.append({"input_ids": tokens.tolist(), "attention_mask": [1] * length})
    return tiny_lm.model(), data


def padding():
    tokenizer = tiny_lm.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)


SMALL = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 10}


def bert(kind):
    torch.manual_seed(0)
    return kind(transformers.BertConfig(**SMALL, max_position_embeddings=16, num_labels=4))


def labelled(labels):
    return [{k: v for k, v in row.items() if k != "labels"} | labels(i) for i, row in enumerate(rows_of(N, 1))]


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 12, "d_kv": 6, "d_ff": 10, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # its own, not the embedding's
    return model


def tokens(i):
    labels = (torch.arange(8) * (i + 3)) % 3
    return {"labels": torch.where(torch.arange(8) < 3 + i % 5, labels, -100)}


MODELS = {
    "next tokens": (language_model, padding),
    "next tokens, labels by input_ids": (language_model, padding),
    "sequences": (lambda: (bert(transformers.BertForSequenceClassification), rows_of(N, 1)), None),
    "tokens": (lambda: (bert(transformers.BertForTokenClassification), labelled(tokens)), None),
    "seq2seq": (lambda: (t5(), labelled(tokens)), None),
}


def summed(model, batch, shifted):
    """Each sample's loss, of its logits, as a sum over labels."""
    labels = batch.pop("labels")
    if isinstance(model, transformers.T5ForConditionalGeneration):
        batch["decoder_input_ids"] = model._shift_right(labels)
    logits = model(**batch).logits
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")


SETTINGS = [{"batch": 1}, {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_steps": 1}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_rows_are_gradients_of_the_summed_loss(tmp_path, kind, settings):
    make, collator = MODELS[kind]
    model, data = make()
    collate = transformers.default_data_collator if collator is None else collator()
    options = {"label_key": "input_ids"} if "input_ids" in kind else {}
    made = trainer(
        tmp_path, model, data, lora=False, hessian="none", settings=settings, more={"data_collator": collate}, **options
    )
    made.extract_log()
    log = merge_logs(list(made.logix.build_log_dataloader()))[1]
    assert len(log) > 5
    layers = [model.get_submodule(name).weight for name in log]
    model.eval()
    for i, row in enumerate(data):
        exact = torch.autograd.grad(summed(model, collate([row]), "next" in kind), layers)
        for (name, part), grad in zip(log.items(), exact, strict=True):
            torch.testing.assert_close(part["grad"][i], grad, rtol=1e-4, atol=1e-5, msg=name)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("lora", [True, False])
def test_no_weight_changes(tmp_path, lora):
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9, weight_decay=1)
    for more in ({}, {"optimizers": (optimizer, None)}):
        made = trainer(
            tmp_path, model, rows_of(N, 1), lora=lora, settings={"learning_rate": 1, "weight_decay": 1}, more=more
        )
        made.train()
        made.influence()
        made.self_influence()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("init", "hessian"), [("random", "none"), ("random", "raw"), ("pca", "kfac"), ("pca", "ekfac")]
)
def test_scores_are_the_sessions(tmp_path, init, hessian):
    """Passes, order, ids and arguments, against the session driven by hand."""
    model, data, asked = classifier(), rows_of(N, 1), rows_of(Q, 2)
    made = trainer(tmp_path / "a", model, data, hessian=hessian, init=init)
    made.extract_log()
    run = logix.LogIX("p", {"root_dir": str(tmp_path / "b"), "lora": {"rank": RANK}})
    run.watch(model)

    def batches(rows):
        for start in range(0, len(rows), 4):
            batch = transformers.default_data_collator(rows[start : start + 4])
            with run(data_id=DataIDGenerator()(batch["input_ids"]), mask=batch["attention_mask"]):
                (model(**batch)["loss"] * len(batch["labels"])).backward()
            yield run

    for _ in logix.LogIXScheduler(run, lora=init, hessian=hessian, save="grad"):
        assert len(list(batches(data))) == 3
        run.finalize()
    log = merge_logs([run.get_log(copy=True) for _ in batches(asked)])
    exact = {"hessian": "none" if hessian == "none" else "auto"}
    asking = trainer(tmp_path / "a", model, asked, hessian=hessian, init=init)
    for mode, damping in (("dot", 0.3), ("cosine", None), ("l2", 0.3)):
        asking.logix_args.influence_mode, asking.logix_args.influence_damping = mode, damping
        got, wanted = asking.influence(), run.compute_influence_all(log, mode=mode, damping=damping, **exact)
        assert got["src_ids"] == wanted["src_ids"] == DataIDGenerator()([row["input_ids"] for row in asked])
        assert got["tgt_ids"] == wanted["tgt_ids"] == DataIDGenerator()([row["input_ids"] for row in data])
        scale = float(wanted["influence"].abs().max())
        torch.testing.assert_close(got["influence"], wanted["influence"], rtol=1e-4, atol=1e-5 * scale)
    own = asking.self_influence()
    assert own is asking.logix.influence.get_self_influence_scores()
    assert own["src_ids"] == wanted["src_ids"]
    other = run.compute_self_influence(log, damping=0.3, **exact)["influence"]
    torch.testing.assert_close(own["influence"], other, rtol=1e-4, atol=1e-6)


def test_groups_and_many_queries(tmp_path, monkeypatch):
    made = trainer(tmp_path, classifier(), rows_of(N, 1), influence_groups=["hidden", "head"])
    made.extract_log()
    whole, own = made.influence(), made.self_influence()
    assert list(whole["influence"]) == list(own["influence"]) == ["total", "hidden", "head"]
    parts = whole["influence"]["hidden"] + whole["influence"]["head"]
    torch.testing.assert_close(parts, whole["influence"]["total"])
    torch.testing.assert_close(own["influence"]["total"], whole["influence"]["total"].diagonal())
    monkeypatch.setattr(passes, "HELD", 1)  # scored batch by batch
    again = made.influence()
    assert again["src_ids"] == whole["src_ids"]
    torch.testing.assert_close(again["influence"]["head"], whole["influence"]["head"])
    made.logix_args.influence_groups = None
    assert made.influence()["influence"].shape == (N, N)


def test_the_next_trainer_goes_on(tmp_path):
    model, data = classifier(), rows_of(N, 1)
    for settings in ({"initialize_from_log": True}, {}):
        empty = trainer(tmp_path, model, data, **settings)
        with pytest.raises(LograError, match="has no logged rows"):
            empty.influence()
    with pytest.raises(LograError, match="has no logged rows"):
        trainer(tmp_path, model, data, initialize_from_log=True).extract_log()

    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if self.armed:
                raise KeyboardInterrupt

    stops = Stops()
    stops.armed = True
    made = trainer(tmp_path, model, data, more={"callbacks": [stops]})
    with pytest.raises(KeyboardInterrupt):
        made.extract_log()
    stops.armed = False
    for _ in range(2):
        made.extract_log()
        scores = made.influence()
        assert scores["tgt_ids"] == scores["src_ids"] == DataIDGenerator()([row["input_ids"] for row in data])
    for settings in ({"initialize_from_log": True}, {}, {"lora": "none"}):
        asking = trainer(tmp_path, model, data, **settings)
        for _ in range(2):
            torch.testing.assert_close(asking.influence()["influence"], scores["influence"])
    more = trainer(tmp_path, model, rows_of(4, 9), initialize_from_log=True)
    more.extract_log()
    assert len(more.logix.build_log_dataset()) == N + 4


def test_tokens_as_ids(tmp_path):
    model, data = language_model()
    data[3] = data[1]
    tokenizer = padding().tokenizer
    options = {"data_id": "detokenize", "save": "grad", "hessian": "none"}
    made = trainer(tmp_path, model, data, more={"tokenizer": tokenizer, "data_collator": padding()}, **options)
    assert made.processing_class is tokenizer
    with pytest.warns(UserWarning, match="came before"):
        made.extract_log()
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in data]
    scores = made.influence()
    assert scores["src_ids"] == texts
    assert scores["tgt_ids"] == [*texts[:3], texts[1] + "#2", *texts[4:]]
    with pytest.raises(ValueError, match="give one of them"):
        trainer(tmp_path, model, data, more={"tokenizer": tokenizer, "processing_class": tokenizer})
    bare = trainer(tmp_path, model, data, more={"data_collator": padding()}, data_id="detokenize")
    with pytest.raises(LograError, match="needs tokenizer="):
        bare.extract_log()


def test_what_trainer_takes_is_taken(tmp_path):
    """Positions, classes with losses of their own, and a model that is made by the trainer."""
    data, seen = rows_of(N, 1), []

    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            seen.append(len(inputs["labels"]))
            return super().compute_loss(model, inputs, return_outputs)

    options = {"lora": True, "hessian": "raw", "save": "grad", "data_id": "hash"}
    config = {"lora": {"rank": RANK}}
    args, collate = arguments(tmp_path), transformers.default_data_collator

    def rows(place, base, *taken, **settings):
        given = LogIXArguments("p", {"root_dir": str(tmp_path / place), **config}, **options)
        made = patch_trainer(base)(given, *taken, **settings)
        assert isinstance(made, base)
        made.extract_log()
        return made.logix.session.store.read(0, N)

    exact = rows("a", Own, classifier(), args, collate, data)
    assert seen == [4, 4, 2]
    made_by = {"model_init": lambda: classifier(), "args": args, "data_collator": collate, "train_dataset": data}
    torch.testing.assert_close(rows("b", transformers.Trainer, **made_by), exact)

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"], labels)

    by_function = {**made_by, "compute_loss_func": loss}
    torch.testing.assert_close(rows("c", transformers.Trainer, **by_function), exact)


def test_what_is_refused(tmp_path, monkeypatch):
    model, data = classifier(), rows_of(N, 1)
    for options, message in (
        ({"data_id": "index"}, "data_id is 'index'"),
        ({"hessian": "fisher"}, "hessian is 'fisher'"),
        ({"lora": "svd"}, "lora is 'svd'"),
        ({"name_filter": ["mlp"]}, "no layers with 'mlp'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, model, data, **options)
    for options in ({"input_key": "tokens"}, {"label_key": "label"}):
        with pytest.raises(
            LograError, match=f"no '{next(iter(options.values()))}'; {next(iter(options))}= must be one"
        ):
            trainer(tmp_path, model, data, **options).extract_log()
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(LograError, match="over 2 GPUs"):
        trainer(tmp_path, model, data)
