"""Seconds of a call on whatever device it runs: batches of calls between two waits for the device, taken in turn."""

import statistics
from collections.abc import Callable

import torch
from clock import synced

BATCH_SECONDS = 0.02  # that a batch of calls takes at least, beside which waiting for the device is nothing
ROUNDS = 5


def seconds_of(calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each call, in turn, so that what slows the machine slows all of them."""
    counts = {}
    for name, call in calls.items():
        call()
        begun = synced()
        call()
        counts[name] = max(1, round(BATCH_SECONDS / max(1e-9, synced() - begun)))
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begun = synced()
            for _ in range(counts[name]):
                call()
            took[name].append((synced() - begun) / counts[name])
    return {name: statistics.median(own) for name, own in took.items()}


def failed(row: dict, provider: str, error: Exception) -> dict:
    """The row of a provider that is wrong or fails: what it says in place of its times."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row | {"provider": provider, "error": f"{type(error).__name__}: {error}"[:300]}


def peak_beyond(call: Callable[[], object]) -> int | None:
    """Bytes of device memory at the call's peak beyond those before it; None where there is no device."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
