"""The peers' own code on our checkpoints, run by an interpreter that has them: `--peers PYTHON`.

This file is both sides. Imported, it writes the checkpoint to an .npz, runs itself under the other interpreter once a
peer, and reads the scores; run as a script there, it needs nothing but numpy, torch and the one peer. It is written for
kronfluence 1.0, logix-ai 0.1 and traker 0.3 on the registry.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LIMIT = 900  # seconds for one peer on one checkpoint
MODULES = {"kronfluence": "kronfluence", "logix-ai": "logix", "traker": "trak"}


def scores(case, python: str | None, say) -> dict[str, tuple[Tensor, float]]:
    """Peer's method, "package:what", -> scores [Q, N] and seconds; a peer that is not there is said and left out."""
    found: dict[str, tuple[Tensor, float]] = {}
    if python is None:
        if case.index == 0:
            say("  peers: left out, no --peers interpreter given")
        return found
    for package, module in MODULES.items():
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
            say(f"  peers: {package} cannot be imported by {python}, left out")
            continue
        with tempfile.TemporaryDirectory() as folder:
            given, answer = Path(folder, "in.npz"), Path(folder, "out.npz")
            state = {f"w:{name}": value.detach().numpy() for name, value in case.model.state_dict().items()}
            data = {name: value.numpy() for name, value in vars(case.data).items()}
            np.savez(given, **data, **state)
            command = [python, str(Path(__file__).resolve()), package, str(given), str(answer)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            with open(Path(folder, "log.txt"), "w+") as log:
                try:
                    code = subprocess.run(
                        command, cwd=folder, env=environment, stdout=log, stderr=log, timeout=LIMIT, check=False
                    ).returncode
                except subprocess.TimeoutExpired:
                    say(f"  peers: {package} took more than {LIMIT} s, left out")
                    continue
                log.seek(0)
                if code:
                    say(f"  peers: {package} failed: {log.read().strip().splitlines()[-1]}")
                    continue
            with np.load(answer) as arrays:
                for what in arrays:
                    if what.endswith("|seconds"):
                        continue
                    name = f"{package}:{what}"
                    found[name] = torch.from_numpy(arrays[what]), float(arrays[f"{what}|seconds"])
                    say(f"  model {case.index} {name}")
    return found


def kronfluence(model: nn.Module, train: TensorDataset, query: TensorDataset):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch[0])
            labels = torch.distributions.Categorical(logits=logits.detach()).sample() if sample else batch[1]
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    task = Classification()
    analyzer = Analyzer("study", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=os.getcwd())
    for labels in ("sampled", "true"):
        began = time.perf_counter()
        factors = FactorArguments(strategy="ekfac", use_empirical_fisher=labels == "true")
        analyzer.fit_all_factors(labels, train, per_device_batch_size=500, factor_args=factors)
        fitted = time.perf_counter() - began
        for damping in (1e-8, None):
            began = time.perf_counter()
            name = f"ekfac-{labels}/{damping or '0.1 x mean'}"
            analyzer.compute_pairwise_scores(
                name.replace("/", "-"),
                labels,
                query,
                train,
                per_device_query_batch_size=50,
                per_device_train_batch_size=250,
                score_args=ScoreArguments(damping_factor=damping),
            )
            values = analyzer.load_pairwise_scores(name.replace("/", "-"))["all_modules"]
            yield name, values, fitted + time.perf_counter() - began


def logix_ai(model: nn.Module, train: TensorDataset, query: TensorDataset):
    import copy

    from logix import LogIX
    from logix.config import LoRAConfig
    from logix.statistic import Covariance

    for init in ("random", "pca"):
        began = time.perf_counter()
        torch.manual_seed(0)
        net = copy.deepcopy(model)
        run = LogIX(project=f"study-{init}")
        run.watch(net)
        run.set_lora_config(LoRAConfig(init=init, rank=64))

        def passes(rows: TensorDataset, net=net, run=run):
            for i, (x, y) in enumerate(DataLoader(rows, batch_size=100)):
                with run(data_id=[str(100 * i + j) for j in range(len(x))]):
                    net.zero_grad()
                    F.cross_entropy(net(x), y, reduction="sum").backward()
                yield run.get_log(copy=True)

        if init == "pca":
            run.setup({"forward": [Covariance], "backward": [Covariance]})
            for _ in passes(train):
                pass
            run.finalize()
        run.add_lora()
        run.setup({"grad": ["log", Covariance]})
        logs = list(passes(train))
        run.finalize()
        run.setup({"grad": ["log"]})
        found = []
        for asked in passes(query):
            parts = [run.influence.compute_influence(asked, log)["influence"] for log in logs]
            found.append(torch.cat(parts, dim=1))
        yield f"logra-raw-{init}64/0.1 x mean", torch.cat(found), time.perf_counter() - began


def traker(model: nn.Module, train: TensorDataset, query: TensorDataset):
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    dim = 512
    began = time.perf_counter()
    size = sum(p.numel() for p in model.parameters())
    tracker = TRAKer(
        model=model,
        task="image_classification",
        train_set_size=len(train),
        save_dir="trak",
        device="cpu",
        # its default projector for a CPU draws another matrix on every call
        projector=BasicProjector(size, dim, 0, ProjectionType.rademacher, "cpu", dtype=torch.float32),
        proj_dim=dim,
        use_half_precision=False,
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tracker.load_checkpoint(state, model_id=0)
    for batch in DataLoader(train, batch_size=250):
        tracker.featurize(batch, num_samples=len(batch[0]))
    mean = float(torch.as_tensor(np.asarray(tracker.saver.current_store["grads"])).square().sum() / dim)
    for damping, lam in (("0", 0.0), ("0.1 x mean", 0.1 * mean)):
        tracker.score_computer.lambda_reg = lam
        tracker.saver.model_ids[0]["is_finalized"] = 0
        tracker.finalize_features()
        tracker.start_scoring_checkpoint(damping, state, model_id=0, num_targets=len(query))
        for batch in DataLoader(query, batch_size=100):
            tracker.score(batch, num_samples=len(batch[0]))
        yield (
            f"trak{dim}/{damping}",
            torch.as_tensor(np.asarray(tracker.finalize_scores(damping))).T,
            time.perf_counter() - began,
        )


def _answer(package: str, given: str, answer: str) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with np.load(given) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    layers: list[nn.Module] = []
    for name, weight in tensors.items():
        if name.startswith("w:") and name.endswith(".weight"):
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.load_state_dict({"weight": weight, "bias": tensors[name.replace(".weight", ".bias")]})
            layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    train = TensorDataset(tensors["x"], tensors["y"])
    query = TensorDataset(tensors["query_x"], tensors["query_y"])
    run = {"kronfluence": kronfluence, "logix-ai": logix_ai, "traker": traker}[package]
    found: dict[str, np.ndarray] = {}
    for name, values, seconds in run(model, train, query):
        found[name], found[f"{name}|seconds"] = values.detach().float().numpy(), np.array(seconds)
    np.savez(answer, **found)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
