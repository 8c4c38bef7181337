"""Scores of kronfluence itself, for tests/curvature/test_peer.py to agree with.

    pip install --no-deps kronfluence==1.0.1 accelerate einops einconv opt-einsum psutil
    python bench/peer_kronfluence.py

Its requirements would bring torchvision, which it does not import, so the tests have its numbers and not itself. A
small classifier with biases, empirical Fisher (the labels of the data), every strategy at two dampings.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

TARGET = Path(__file__).parents[1] / "tests" / "curvature" / "kronfluence.json"
N, Q, WIDTHS = 60, 6, (8, 10, 4)


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(*WIDTHS[:2]), nn.Tanh(), nn.Linear(*WIDTHS[1:]))


def main() -> None:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    torch.manual_seed(0)
    model = make_model()
    x, y = torch.randn(N + Q, WIDTHS[0]), torch.randint(WIDTHS[-1], (N + Q,))
    made = {
        "kronfluence": version("kronfluence"),
        "torch": torch.__version__,
        "model": {name: value.tolist() for name, value in model.state_dict().items()},
        "x": x.tolist(),
        "y": y.tolist(),
        "scores": [],
    }
    train, query = TensorDataset(x[:N], y[:N]), TensorDataset(x[N:], y[N:])
    task = Classification()
    with tempfile.TemporaryDirectory() as out:
        tracked = prepare_model(model, task)
        analyzer = Analyzer("peer", tracked, task, cpu=True, disable_tqdm=True, output_dir=out)
        for strategy in ("identity", "diagonal", "kfac", "ekfac"):
            facts = FactorArguments(strategy=strategy, use_empirical_fisher=True)
            analyzer.fit_all_factors(strategy, train, per_device_batch_size=N, factor_args=facts)
            for damping in (None, 0.01):
                name = f"{strategy}-{damping}"
                analyzer.compute_pairwise_scores(
                    name, strategy, query, train, Q, per_device_train_batch_size=N,
                    score_args=ScoreArguments(damping_factor=damping),
                )  # fmt: skip
                scores = analyzer.load_pairwise_scores(name)["all_modules"]
                made["scores"].append({"strategy": strategy, "damping": damping, "values": scores.tolist()})
    TARGET.write_text(json.dumps(made) + "\n")
    print(f"{TARGET}: {len(made['scores'])} score matrices")


if __name__ == "__main__":
    main()
