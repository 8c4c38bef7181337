"""The proof: train again without the rows that the scores name, and without as many others.

The method is the brittleness test of the LoGra paper (section 4.1), with random removal as the control.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from logra_kernels.demo import queries
from logra_kernels.demo.model import Settings, new_model, train
from logra_kernels.integrations import causal_lm


@dataclass(frozen=True)
class Removal:
    """The rows that each arm leaves out: `top` of high score for some query, and as many `random` others."""

    top: frozenset[int]
    random: frozenset[int]

    @classmethod
    def draw(cls, top: Iterable[int], total: int, seed: int) -> "Removal":
        """Random rows out of those that are not top rows; fewer where not as many are left."""
        named = frozenset(top)
        others = np.setdiff1d(np.arange(total), np.fromiter(named, int, len(named)))
        drawn = np.random.default_rng([seed, 0x70_72_6F_6F_66]).permutation(others)[: len(named)]
        return cls(named, frozenset(drawn.tolist()))


def retrained_losses(
    texts: Sequence[str],
    tokenizer: Any,
    settings: Settings,
    removed: frozenset[int],
    asked: causal_lm.Batch,
    progress: Callable[..., Any] | None = None,
) -> list[float]:
    """Loss of every query, in nats a token, under a model trained without the rows `removed`."""
    model = new_model(settings, tokenizer)
    train(model, tokenizer, texts, settings, removed=removed, progress=progress)
    return per_token(model, asked)


def per_token(model: nn.Module, asked: causal_lm.Batch) -> list[float]:
    """Loss of every query in nats a token."""
    nll, tokens = queries.losses(model, asked)
    return (nll / tokens).tolist()
