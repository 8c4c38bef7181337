"""How long and by which clock a bench measures."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch


def synced() -> float:
    """Host clock after the device has caught up; pytest-benchmark reads it before and after each round."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


TIMED = pytest.mark.benchmark(timer=synced, min_rounds=5, max_time=0.3, warmup=True, warmup_iterations=2)


def in_turn(
    calls: dict[str, Callable[[], object]],
    rounds: int = 40,
    before: Callable[[], object] = lambda: None,
    seconds: float = float("inf"),
) -> dict[str, float]:
    """The median time of each call, all taking turns: on a shared machine what is timed apart is not comparable.

    Args:
        before: What is done before each, untimed.
        seconds: After which no more rounds begin, but for the first five.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = synced() + seconds
    for taken in range(rounds):
        if taken >= 5 and synced() > end:
            break
        for name, call in calls.items():
            before()
            begun = synced()
            call()
            times[name].append(synced() - begun)
    return {name: statistics.median(took) for name, took in times.items()}
