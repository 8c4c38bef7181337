"""One measured cell: an op, a provider, a shape and a dtype, checked against fp64 before it is timed."""

from collections.abc import Callable, Mapping

import pytest
import torch
from clock import in_turn
from machine import commit, cpu_model, triton_version
from tolerance import assert_as_good_as_naive
from torch import Tensor


def _copies(args: tuple, dtype: torch.dtype | None = None) -> tuple:
    """The arguments in memory of their own, as an op may write to one; floating point ones in `dtype` where given."""
    return tuple(
        a.to(dtype if a.is_floating_point() else None, copy=True) if isinstance(a, Tensor) else a for a in args
    )


@pytest.fixture
def cell(benchmark):
    """cell(op, shape, provider, providers, args, flops, bytes): check providers[provider](*args) and then time it.

    `providers` holds "naive", which gives the fp64 answer too. `bytes` is what must cross the memory bus at the least.
    On a CPU the others are timed in turn with it too.
    """

    def measure(
        op: str, shape: str, provider: str, providers: Mapping[str, Callable], args: tuple, flops: int, bytes: int
    ) -> None:
        naive, call = providers["naive"], providers[provider]
        exact = naive(*_copies(args, torch.float64))
        assert_as_good_as_naive(call(*_copies(args)), exact, naive(*_copies(args)))
        del exact
        dtype, device = str(args[0].dtype).removeprefix("torch."), args[0].device.type
        benchmark.group = f"{op} {shape} {dtype} {device}"
        benchmark.extra_info.update(
            op=op,
            provider=provider,
            shape=shape,
            dtype=dtype,
            device=device,
            threads=torch.get_num_threads(),
            flops=flops,
            bytes=bytes,
            machine=torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
            commit=commit(),
            torch=torch.__version__,
            triton=triton_version(),
        )
        if device == "cpu" and provider != "naive" and "interleaved" not in benchmark.extra_info:
            took = in_turn({"ours": lambda: call(*args), "naive": lambda: naive(*args)}, seconds=1.0)
            benchmark.extra_info["interleaved"] = {"naive": round(took["naive"] / took["ours"], 3)}
        benchmark(call, *args)

    return measure
