"""LogIX's patch of Lightning on top of a run: against LogIX 0.1.1's scores and one-sample autograd."""

import copy
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import logra_kernels.compat.logix as logix
from logra_kernels.compat.logix.lightning import LogIXArguments, patch
from logra_kernels.compat.logix.utils import DataIDGenerator, merge_logs
from logra_kernels.errors import LograError

pytest.importorskip("lightning")
PEER = Path(__file__).parent / "scored_by_logix" / "lightning"  # by hand: LogIX's log of 10 rows, damping 0.05
RANK, N, Q = 3, 10, 6
PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:pytorch_lightning")


@pytest.fixture(params=PACKAGES)
def L(request):  # noqa: N802
    return importlib.import_module(request.param)


def module_of(L, dropout=0.0, optimizer=torch.optim.AdamW, **learning):
    class Module(L.LightningModule):
        def __init__(self, width=6, *, classes=5):
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Linear(7, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, classes)
            )

        def training_step(self, batch, batch_idx):
            x, y = batch[:2]
            loss = nn.functional.cross_entropy(self.model(x), y, reduction="sum")
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            made = optimizer(self.parameters(), **{"lr": 1.0, "weight_decay": 0.5} | learning)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(made)
            return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    return Module


def loader_of(n, seed, batch=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 7, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 5, (n,), generator=generator)), batch_size=batch)


def ids_of(loader):
    return DataIDGenerator()(loader.dataset.tensors[0])


def patched(place, module, L, settings=(), extractors=(), **options):
    """(module, trainer) with arguments of their own."""
    options = {"lora": True, "hessian": "raw", "save": "grad"} | options
    lora = {"rank": RANK, "init": options.pop("init", "random")}
    given = LogIXArguments(project="p", config={"root_dir": str(place), "lora": lora}, **options)
    LogIXModule, LogIXTrainer = patch(module, L.Trainer, given, **dict(extractors))
    return LogIXModule(), LogIXTrainer(default_root_dir=str(place), **QUIET | dict(settings))


def test_scores_are_those_of_logix(tmp_path, L):
    peer = dict(np.load(PEER / "expected.npz"))

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))
            self.load_state_dict(
                {k.removeprefix("model/"): torch.from_numpy(v) for k, v in peer.items() if k.startswith("model/")}
            )

        training_step = module_of(L).training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1)

    module, trainer = patched(tmp_path, Module, L, lora=False)
    trainer.logix.add_lora(lora_path=PEER)
    trainer.extract_log(module, loader_of(N, 1))
    for mode in ("dot", "cosine"):
        options = {"initialize_from_log": True, "influence_mode": mode, "influence_damping": 0.05}
        module, trainer = patched(tmp_path, Module, L, **options)
        got = trainer.influence(module, loader_of(Q, 2))
        assert got["src_ids"] == peer["src_ids"].tolist()
        assert got["tgt_ids"] == peer["tgt_ids"].tolist()
        torch.testing.assert_close(got["influence"], torch.from_numpy(peer[mode]), rtol=1e-4, atol=1e-5)


SETTINGS = [
    {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01, "max_epochs": 1},
    {"max_epochs": 3, "min_epochs": 2, "num_sanity_val_steps": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("lora", [True, False])
def test_rows_are_gradients_and_nothing_else_changes(tmp_path, L, settings, lora):
    """Dropout, statistics of batch norms, weights, modes, checkpoints, callbacks that save or stop."""
    callbacks = [
        L.callbacks.ModelCheckpoint(tmp_path / "kept", save_last=True),
        L.callbacks.EarlyStopping("val_loss"),
        L.callbacks.StochasticWeightAveraging(1e-2),
    ]
    module, trainer = patched(
        tmp_path, module_of(L, dropout=0.5), L, {**settings, "callbacks": callbacks}, lora=lora, hessian="ekfac"
    )
    assert (module.hparams.width, module.hparams.classes) == (6, 5)
    module.model[2].eval()
    before, modes = copy.deepcopy(module.state_dict()), [part.training for part in module.modules()]
    data = loader_of(N, 1)
    trainer.fit(module, data, loader_of(Q, 2))
    assert trainer.logix.build_log_dataset().data_id_list == ids_of(data)
    assert not (tmp_path / "kept").exists()
    assert not list(tmp_path.rglob("*.ckpt"))
    trainer.influence(module, data)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    model, log = module.model.eval(), merge_logs(list(trainer.logix.build_log_dataloader()))[1]
    assert list(log) == ["0", "4"]
    for i, (x, y) in enumerate(data.dataset):
        loss = nn.functional.cross_entropy(model(x[None]), y[None], reduction="sum")
        for name, part in log.items():
            (exact,) = torch.autograd.grad(loss, model.get_submodule(name).weight, retain_graph=True)
            p_in, p_out = trainer.logix.session.taps.factors[name]
            exact = exact if p_in is None else p_out @ exact @ p_in.T
            torch.testing.assert_close(part["grad"][i], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hessian", ["none", "raw", "kfac", "ekfac"])
def test_scores_are_the_sessions(tmp_path, hessian):
    L = importlib.import_module(PACKAGES[0])
    init = "pca" if "kfac" in hessian else "random"
    data, asked = loader_of(N, 1), loader_of(Q, 2)
    module, trainer = patched(tmp_path / "a", module_of(L), L, hessian=hessian, init=init)
    trainer.extract_log(module, data)
    run, model = logix.LogIX("p", {"root_dir": str(tmp_path / "b"), "lora": {"rank": RANK}}), module.model.eval()
    run.watch(model)

    def batches(loader):
        for x, y in loader:
            with run(data_id=DataIDGenerator()(x)):
                nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
            yield run

    for _ in logix.LogIXScheduler(run, lora=init, hessian=hessian, save="grad"):
        assert len(list(batches(data))) == 3
        run.finalize()
    log = merge_logs([run.get_log(copy=True) for _ in batches(asked)])
    exact = {"hessian": "none" if hessian == "none" else "auto"}
    for mode, damping in (("cosine", None), ("l2", 0.3)):
        wanted = run.compute_influence_all(log, mode=mode, damping=damping, **exact)
        trainer.logix_args.influence_mode, trainer.logix_args.influence_damping = mode, damping
        got = trainer.influence(module, asked)
        assert got["src_ids"] == wanted["src_ids"] == ids_of(asked)
        assert got["tgt_ids"] == wanted["tgt_ids"] == ids_of(data)
        scale = float(wanted["influence"].abs().max())
        torch.testing.assert_close(got["influence"], wanted["influence"], rtol=1e-4, atol=1e-5 * scale)
    own = trainer.self_influence(module, asked)
    other = run.compute_self_influence(log, damping=0.3, **exact)["influence"]
    assert own["src_ids"] == ids_of(asked)
    torch.testing.assert_close(own["influence"], other, rtol=1e-4, atol=1e-6)
    for options in ({"initialize_from_log": True}, {}):
        module, trainer = patched(
            tmp_path / "a",
            module_of(L),
            L,
            hessian=hessian,
            init=init,
            influence_mode="l2",
            influence_damping=0.3,
            **options,
        )
        again = trainer.influence(module, asked)
        torch.testing.assert_close(again["influence"], got["influence"], rtol=1e-4, atol=1e-5 * scale)


def test_a_pass_has_as_many_batches_as_asked(tmp_path, L):
    for settings in ({"max_steps": 2}, {"limit_train_batches": 2}, {"fast_dev_run": 2}):
        place = tmp_path / next(iter(settings))
        module, trainer = patched(place, module_of(L), L, settings, hessian="ekfac")
        data = loader_of(N, 1)
        for _ in range(2):  # the second goes over the same rows
            trainer.extract_log(module, data)
        scores = trainer.influence(module, data)
        assert scores["src_ids"] == scores["tgt_ids"] == ids_of(data)[:8]


def test_modules_that_optimise_by_hand(tmp_path, L):
    class ByHand(module_of(L)):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def on_train_epoch_start(self):
            self.train()

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

        def configure_callbacks(self):
            return L.callbacks.EarlyStopping("val_loss")

    data, found = loader_of(N, 1), []
    for kind in (ByHand, module_of(L)):
        module, trainer = patched(tmp_path / kind.__name__, kind, L)
        before = copy.deepcopy(module.state_dict())
        trainer.extract_log(module, data)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        found.append(trainer.logix.session.store.read(0, N))
    assert torch.equal(*found)


def test_ids_and_masks_of_batches(tmp_path, L):
    class Tokens(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(
                self.net(batch["x"]).flatten(0, 1), batch["y"].flatten(), reduction="sum"
            )

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1)

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 4, 7, generator=generator), torch.randint(0, 5, (N, 4), generator=generator)
    mask = torch.ones(N, 4, dtype=torch.int64)
    mask[::2, 2:] = 0
    y[mask == 0] = -100
    found = []
    for place, changed in (("a", x), ("b", torch.where(mask[..., None] == 0, 9.0, x))):
        rows = [{"x": changed[i], "y": y[i], "mask": mask[i], "name": f"row{i}"} for i in range(N)]
        extractors = {"data_id_extractor": lambda batch: batch["name"], "mask_extractor": lambda batch: batch["mask"]}
        module, trainer = patched(
            tmp_path / place, Tokens, L, extractors=extractors, hessian="kfac", init="pca", model_key="net"
        )
        trainer.extract_log(module, DataLoader(rows, batch_size=4))
        scores = trainer.influence(module, DataLoader(rows[1::2], batch_size=4))
        assert scores["src_ids"] == [f"row{i}" for i in range(1, N, 2)]
        found.append(scores["influence"].abs())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    module, trainer = patched(tmp_path / "c", Tokens, L, model_key="net")
    trainer.extract_log(module, DataLoader(rows, batch_size=4))
    assert trainer.logix.build_log_dataset().data_id_list == DataIDGenerator()([row["x"] for row in rows])
    module, trainer = patched(tmp_path / "d", Tokens, L, model_key="net")
    with pytest.raises(LograError, match="give a data_id_extractor"):
        trainer.extract_log(module, DataLoader([{"name": "a"}]))


def test_a_scalers_factor_is_taken_out_again(tmp_path, L):
    class Scaled(L.plugins.precision.Precision):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def pre_backward(self, tensor, module):
            return super().pre_backward(self.scaler.scale(tensor), module)

    found = []
    for place, settings in (("a", {}), ("b", {"plugins": [Scaled()]})):
        module, trainer = patched(tmp_path / place, module_of(L), L, settings)
        trainer.extract_log(module, loader_of(N, 1))
        found.append(trainer.logix.session.store.read(0, N))
    torch.testing.assert_close(*found)


def test_what_is_refused(tmp_path, L, monkeypatch):
    module = module_of(L)
    with pytest.raises(ValueError, match="is no Trainer of lightning"):
        patch(module, nn.Module, LogIXArguments(config=None))
    with pytest.raises(ValueError, match="hessian is 'fisher'"):
        patched(tmp_path, module, L, hessian="fisher")
    with pytest.raises(LograError, match="no model as attribute 'net'"):
        patched(tmp_path, module, L, model_key="net")
    made, trainer = patched(tmp_path, module, L)
    with pytest.raises(LograError, match="fit the module's patched class, not a Module"):
        trainer.extract_log(module(), loader_of(N, 1))
    with pytest.raises(LograError, match="has no logged rows"):
        trainer.influence(made, loader_of(N, 1))
    with pytest.raises(LograError, match="2 devices"):
        patched(tmp_path, module, L, {"devices": 2})

    class Fails(module):
        broken = True

        def training_step(self, batch, batch_idx):
            if batch_idx and self.broken:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    made, trainer = patched(tmp_path, Fails, L)
    with pytest.raises(ZeroDivisionError):
        trainer.extract_log(made, loader_of(N, 1))
    made.broken = False
    trainer.extract_log(made, loader_of(N, 1))
    assert trainer.logix.build_log_dataset().data_id_list == ids_of(loader_of(N, 1))
