"""The scores that kronfluence 1.0.1 computed on the same model and data (bench/peer_kronfluence.py made the file)."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import logra_kernels as lk
from logra_kernels.curvature import Damping

PEER = json.loads(Path(__file__).with_name("kronfluence.json").read_text())
CASES = {f"{case['strategy']}, damping {case['damping']}": case for case in PEER["scores"]}
QUERIES = len(PEER["scores"][0]["values"])


@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_peers(tmp_path, name):
    case = CASES[name]
    weights = {key: torch.tensor(value) for key, value in PEER["model"].items()}
    (hidden, d_in), (d_out, _) = weights["0.weight"].shape, weights["2.weight"].shape
    model = nn.Sequential(nn.Linear(d_in, hidden), nn.Tanh(), nn.Linear(hidden, d_out))
    model.load_state_dict(weights)
    x, y = torch.tensor(PEER["x"]), torch.tensor(PEER["y"])
    rows = slice(0, len(x) - QUERIES)
    options = {"projection": lk.Projection(kind="identity"), "bias": True, "curvature": case["strategy"]}
    with lk.Run(tmp_path / "s", model, **options) as run:
        with run.observe():
            F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
        with run.log([str(i) for i in range(rows.stop)]):
            F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
        with run.query([f"q{i}" for i in range(QUERIES)]) as query:
            F.cross_entropy(model(x[rows.stop :]), y[rows.stop :], reduction="sum").backward()
        got = run.scores(query, damping=Damping(0.1) if case["damping"] is None else case["damping"])
    exact = torch.tensor(case["values"])
    correlation = torch.corrcoef(torch.stack([got.flatten(), exact.flatten()]).double())[0, 1]
    assert correlation >= 0.9999
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())
