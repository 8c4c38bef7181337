"""How long and by which clock a bench measures."""

import time

import pytest
import torch


def synced() -> float:
    """Host clock after the device has caught up; pytest-benchmark reads it before and after each round."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


TIMED = pytest.mark.benchmark(timer=synced, min_rounds=5, max_time=0.3, warmup=True, warmup_iterations=2)
