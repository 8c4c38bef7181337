"""Ground truth: what models trained on random half-size subsets lose on every query, kept in `.cache`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import ensemble
from .data import Data
from .setting import Setting

CACHE = Path(__file__).parent / ".cache"


@dataclass(frozen=True)
class Truth:
    """Retrained losses and the models that are scored.

    Attributes:
        member: Which rows each subset holds, [S, N] bool.
        loss, margin: Of each subset's models on each query, [S, seeds, Q] fp64.
        weights: The checkpoints, trained on all rows; see `ensemble.Weights`.
    """

    member: Tensor
    loss: Tensor
    margin: Tensor
    weights: ensemble.Weights


def truth(setting: Setting, data: Data, cache: Path | None = CACHE, progress=None) -> Truth:
    """Retrain, or read what was kept for the same setting; `cache=None` keeps nothing."""
    path = None if cache is None else cache / f"truth-{setting.study}-{setting.key}.pt"
    if path is not None and path.exists():
        return Truth(**torch.load(path))
    n = setting.train
    draw = np.random.Generator(np.random.PCG64(1))
    rows = np.stack([np.sort(draw.permutation(n)[: n // 2]) for _ in range(setting.subsets)])
    members = torch.from_numpy(rows).repeat_interleave(setting.seeds, 0)
    seeds = list(range(1000, 1000 + len(members)))
    retrained = ensemble.train(setting, data.x, data.y, members, seeds, progress)
    loss, margin = (
        value.unflatten(0, (setting.subsets, setting.seeds))
        for value in ensemble.outcome(retrained, data.query_x, data.query_y)
    )
    everyone = torch.arange(n).expand(setting.checkpoints, n)
    weights = ensemble.train(setting, data.x, data.y, everyone, list(range(setting.checkpoints)))
    member = torch.zeros(setting.subsets, n, dtype=torch.bool).scatter_(1, torch.from_numpy(rows), True)
    found = Truth(member, loss, margin, weights)
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        torch.save(vars(found), path)
    return found
