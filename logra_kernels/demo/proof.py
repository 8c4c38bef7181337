"""The proof: train again without the rows that the scores name, and without as many others.

The method is the brittleness test of the LoGra paper (section 4.1), with random removal as the control.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from logra_kernels.demo import queries
from logra_kernels.demo.model import Settings, new_model, train

_POLL_SECONDS = 0.5
_steps_done: Any = None


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


def per_token(model: nn.Module, tokenizer: Any, asked: Sequence[queries.Question], max_length: int) -> list[float]:
    """Loss of every query in nats a token."""
    nll, tokens = queries.losses(model, queries.encode(tokenizer, asked, max_length))
    return (nll / tokens).tolist()


def retrain(
    arms: Mapping[str, frozenset[int]],
    texts: Sequence[str],
    tokenizer: Any,
    settings: Settings,
    asked: Sequence[queries.Question],
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Train once an arm without its rows; arm -> loss of every query in nats a token.

    Each training has one thread, as the first one had, so that only the rows differ; the arms share the cores.

    Args:
        arms: Name -> numbers of the rows to leave out.
        texts, tokenizer, settings: Of the first training.
        asked: The queries.
        on_progress: Called now and then with the number of steps done since the last call.
    """
    # Fresh processes: a fork after OpenMP has started threads may hang.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    workers = max(1, min(len(arms), _cores()))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(counter,))
    try:
        work = {name: pool.submit(_train, texts, tokenizer, settings, rows, asked) for name, rows in arms.items()}
        _watch(list(work.values()), counter, on_progress)
        return {name: future.result() for name, future in work.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _watch(work: Sequence[Future], counter: Any, on_progress: Callable[[int], None] | None) -> None:
    """Report steps until all work is done, or some has failed."""
    seen = 0
    while True:
        done, waiting = wait(work, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
        if on_progress is not None and counter.value > seen:
            on_progress(counter.value - seen)
            seen = counter.value
        if not waiting or any(future.exception() for future in done):
            return


def _start(counter: Any) -> None:
    """Set up a worker process."""
    global _steps_done
    _steps_done = counter
    torch.set_num_threads(1)


def _train(
    texts: Sequence[str],
    tokenizer: Any,
    settings: Settings,
    removed: frozenset[int],
    asked: Sequence[queries.Question],
) -> list[float]:
    """One arm, in a worker process."""

    def count(loss: float) -> None:
        with _steps_done.get_lock():
            _steps_done.value += 1

    model = new_model(settings, tokenizer)
    train(model, tokenizer, texts, settings, removed=removed, on_step=count)
    return per_token(model, tokenizer, asked, settings.max_length)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
