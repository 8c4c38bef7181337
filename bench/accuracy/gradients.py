"""Per-sample gradients of one checkpoint: whole ones kept as their two factors, projected ones from `lk.capture`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import logra_kernels as lk

from . import ensemble
from .curvature import Block
from .data import Data
from .rows import Dense, Outer
from .setting import Setting


class Case:
    """One checkpoint and everything computed from it once."""

    def __init__(self, setting: Setting, data: Data, weights: ensemble.Weights, index: int) -> None:
        self.setting, self.data, self.index = setting, data, index
        self.model = ensemble.module(weights, index)
        self._kept: dict[Any, Any] = {}
        self._last: tuple[Any, Any] | None = None

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def last(self, key: Any, make: Callable[[], Any]) -> Any:
        """As `once`, of which only the last is kept."""
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = key, make()
        return self._last[1]

    def forget(self) -> None:
        """Drop what was computed for earlier methods."""
        self._kept.clear()
        self._last = None

    @cached_property
    def sides(self) -> dict[str, tuple[Outer, Outer]]:
        """Layer name -> whole gradients of the true labels' loss, of training rows and queries."""
        train = sides(self.model, self.data.x, self.data.y)
        query = sides(self.model, self.data.query_x, self.data.query_y)
        return {name: (train[name], query[name]) for name in train}

    @cached_property
    def sampled(self) -> dict[str, Outer]:
        """Whole gradients of the training rows with labels drawn from the model (the true Fisher's)."""
        generator = torch.Generator().manual_seed(self.index)
        with torch.no_grad():
            p = self.model(self.data.x).softmax(-1)
        draws = 4
        labels = torch.multinomial(p, draws, replacement=True, generator=generator)
        each = [sides(self.model, self.data.x, labels[:, i]) for i in range(draws)]
        return {
            name: Outer(torch.cat([e[name].dy for e in each]), torch.cat([e[name].x for e in each])) for name in each[0]
        }

    @cached_property
    def covariances(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name -> (B, A), uncentred second moments of dy and x over the training rows, fp64."""
        return {name: (second_moment(train.dy), second_moment(train.x)) for name, (train, _) in self.sides.items()}

    def whole(self, sampled: bool = False) -> dict[str, Block]:
        """Nothing projected; with `sampled`, curvature from labels that the model draws."""
        return self.once(("whole", sampled), lambda: self._whole(sampled))

    def _whole(self, sampled: bool) -> dict[str, Block]:
        blocks = {}
        for name, (train, query) in self.sides.items():
            fisher = self.sampled[name] if sampled else train
            b, a = second_moment(fisher.dy), self.covariances[name][1]
            mean = float(b.trace() * a.trace()) / (len(b) * len(a))
            blocks[name] = Block(train, query, b, a, mean, fisher if sampled else None)
        return blocks

    def random(self, kind: str, k: int) -> dict[str, Block]:
        """`lk.capture` with random factors; every checkpoint draws its own."""
        return self.once(("random", kind, k), lambda: self._captured(lk.Projection(k, kind, seed=self.index)))

    def _captured(self, projection: lk.Projection) -> dict[str, Block]:
        found = []
        for x, y in ((self.data.x, self.data.y), (self.data.query_x, self.data.query_y)):
            with lk.capture(self.model, projection) as taps:
                F.cross_entropy(self.model(x), y, reduction="sum").backward()
            found.append(taps.grads)
        return {name: self._block(name, *taps.factors[name], found[0][name], found[1][name]) for name in found[0]}

    def pca(self, k: int) -> dict[str, Block]:
        """`lk.capture` with the leading eigenvectors of the covariances (Choe et al. 2024, section 3.2)."""
        return self.once(("pca", k), lambda: self._captured(self._learned(k)))

    def _learned(self, k: int) -> lk.Projection:
        with lk.capture(self.model) as taps, taps.covariances(whole=("in", "out"), rank=k) as seen:
            F.cross_entropy(self.model(self.data.x), self.data.y, reduction="sum").backward()
        return lk.Projection(k, "pca").learn(seen.spectra())

    def _block(self, name: str, p_in: Tensor, p_out: Tensor, train: Tensor, query: Tensor) -> Block:
        b, a = self.covariances[name]
        p_in, p_out = p_in.double(), p_out.double()
        # |P|^2 / k: 1 for orthonormal rows; a scaled factor scales its coordinates' eigenvalues alike
        scale = float(p_in.square().sum() / len(p_in) * p_out.square().sum() / len(p_out))
        mean = scale * float(b.trace() * a.trace()) / (len(b) * len(a))
        return Block(Dense(train), Dense(query), p_out @ b @ p_out.T, p_in @ a @ p_in.T, mean)


def sides(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Outer]:
    """Layer name -> every sample's whole gradient of the summed loss, as its factors."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, y: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), y

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    loss = F.cross_entropy(model(x), y, reduction="sum")
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(loss, list(outputs.values()))
    return {name: Outer(dy, inputs[name]) for name, dy in zip(outputs, grads, strict=True)}


def second_moment(rows: Tensor) -> Tensor:
    """mean over rows of r r^T, fp64."""
    wide = rows.double()
    return wide.T @ wide / len(wide)
