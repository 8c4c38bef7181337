"""What a tap costs where its layer costs nothing: forward and backward of Linear(8, 8) on one position, on the CPU.

All are timed in turn, round by round: a layer that learns and a frozen one whose input gets a gradient, each untapped
and tapped, and one behind an autograd Function that only passes y and dy on, the least that any tap made of one costs.
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
    x, active = torch.randn(1, 1, 8), torch.randn(1, 1, 8, requires_grad=True)
    untapped, passed, tapped = (nn.Linear(8, 8) for _ in range(3))
    frozen, frozen_tapped = (nn.Linear(8, 8).requires_grad_(False) for _ in range(2))
    passed.register_forward_hook(lambda module, args, y: Nothing.apply(y))
    cases = {
        "untapped": (untapped, x),
        "nothing": (passed, x),
        "tapped": (tapped, x),
        "frozen": (frozen, active),
        "frozen tapped": (frozen_tapped, active),
    }
    best: dict[str, float] = {}
    both = [lk.capture(layer, lk.Projection(rank=4)) for layer in (tapped, frozen_tapped)]
    with both[0], both[1]:
        for taps, (layer, at) in zip(both, (cases["tapped"], cases["frozen tapped"]), strict=True):
            layer(at).sum().backward()
            taps.reset()  # the first batch alone is searched for uses of a weight outside of its layer
        for _ in range(ROUNDS):
            for name, (layer, at) in cases.items():
                begun = time.perf_counter()
                for _ in range(STEPS):
                    layer(at).sum().backward()
                took = (time.perf_counter() - begun) / STEPS * 1e6
                best[name] = min(took, best.get(name, took))
    for taps, at in zip(both, (x, active.detach()), strict=True):
        want = ROUNDS * STEPS * at[0].new_ones(8)[:, None] * at[0]
        p_in, p_out = taps.factors[""]
        torch.testing.assert_close(taps.grads[""][0], p_out @ want @ p_in.T, rtol=1e-3, atol=1e-3)
    return best


def bench_tap(benchmark) -> None:
    best = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update({f"{name.replace(' ', '_')}_us": round(us, 1) for name, us in best.items()})
    benchmark.extra_info["tap_us"] = round(best["tapped"] - best["untapped"], 1)
    benchmark.extra_info["frozen_tap_us"] = round(best["frozen tapped"] - best["frozen"], 1)
    print({name: benchmark.extra_info[name] for name in benchmark.extra_info})
