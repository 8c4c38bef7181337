"""What a tap costs where its layer costs nothing: forward and backward of Linear(8, 8) on one position, on the CPU.

The three are timed in turn, round by round; "nothing" is an autograd Function that only passes y and dy on, the least
that any tap made of one can cost here.
"""

import time

import torch
from torch import Tensor, nn

import logra_kernels as lk

STEPS, ROUNDS = 200, 15


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return dy


def measure() -> dict[str, float]:
    """name -> microseconds of a step, the best round's."""
    x = torch.randn(1, 1, 8)
    untapped, passed, tapped = (nn.Linear(8, 8) for _ in range(3))
    passed.register_forward_hook(lambda module, args, y: Nothing.apply(y))
    taps = lk.capture(tapped, lk.Projection(rank=4))
    best: dict[str, float] = {}
    with taps:
        for _ in range(ROUNDS):
            for name, layer in (("untapped", untapped), ("nothing", passed), ("tapped", tapped)):
                begun = time.perf_counter()
                for _ in range(STEPS):
                    layer(x).sum().backward()
                took = (time.perf_counter() - begun) / STEPS * 1e6
                best[name] = min(took, best.get(name, took))
    want = ROUNDS * STEPS * x[0].new_ones(8)[:, None] * x[0]
    p_in, p_out = taps.factors[""]
    torch.testing.assert_close(taps.grads[""][0], p_out @ want @ p_in.T, rtol=1e-3, atol=1e-3)
    return best


def bench_tap(benchmark) -> None:
    best = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update({f"{name}_us": round(us, 1) for name, us in best.items()})
    benchmark.extra_info["tap_us"] = round(best["tapped"] - best["untapped"], 1)
    print({name: benchmark.extra_info[name] for name in benchmark.extra_info})
