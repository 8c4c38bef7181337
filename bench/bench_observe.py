"""What observing costs on top of the model's own forward and backward, and what the learned directions are worth.

    python bench/bench_observe.py [--rounds 8]

The Llama-shaped model of bench_logging, all 56 linears of its layers, a random batch of 8 x 256 tokens a step. Three
providers take turns: the plain step; a step that is observed, a run's way (`Taps.covariances` of whole sides: second
moments up to 1024 features, sketches beyond); and hooks that sum the whole second moments by torch's products, which
is what a sketch stands for. A run's first batch, whose directions come from nothing, is timed apart, and so is solving
for the factors. Before any timing the directions of the widest sides are held against the exact eigenvectors of what
the hooks summed: `least_energy` is the least share of theirs that the learned ones capture. Random weights and tokens
have flat spectra (some 64th eigenvalue is two thirds of the first); on the flattest activations of the trained model in
tests/test_sketch.py it is 0.998 and more.

Prints a table and writes bench/results.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from bench_logging import EVERY_LINEAR, RANK, keep_heap, make_model, median_error, step
from logging_peers import targets
from torch import Tensor, nn

import logra_kernels as lk
from logra_kernels.nn import Covariances
from logra_kernels.projection import SideSpectrum

ROUNDS, BATCHES, LEAST_ENERGY = 8, 4, 0.9


class Moments:
    """x^T x and dy^T dy of every layer, by torch's products."""

    def __init__(self, model: nn.Module) -> None:
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.layers = targets(model, EVERY_LINEAR)
        self.handles: list = []

    def attach(self) -> None:
        for name, layer in self.layers.items():
            self.handles.append(layer.register_forward_hook(lambda m, args, y, name=name: self._tap(name, args[0], y)))

    def _tap(self, name: str, x: Tensor, y: Tensor) -> None:
        self._add(name, "in", x)
        y.register_hook(lambda dy: self._add(name, "out", dy))

    def _add(self, name: str, side: str, rows: Tensor) -> None:
        rows = rows.detach().flatten(0, 1)
        if (name, side) in self.sums:
            self.sums[name, side].addmm_(rows.T, rows)
        else:
            self.sums[name, side] = rows.T @ rows

    def run(self, take: Callable[[], None]) -> None:
        self.attach()
        take()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def least_energy(spectra: dict[tuple[str, str], SideSpectrum], exact: Moments) -> float:
    """Of the widest sides: the energy that the learned directions capture, over that of as many eigenvectors."""
    widest = max(side.factor.shape[1] for side in spectra.values())
    shares = []
    for key in [key for key, side in spectra.items() if side.factor.shape[1] == widest][::5]:
        c, p = exact.sums[key].double(), spectra[key].factor.double()
        shares.append(float((p @ c * p).sum() / torch.linalg.eigvalsh(c)[-len(p) :].sum()))
    return min(shares)


def measure(rounds: int) -> list[dict]:
    keep_heap()
    model, _ = make_model()
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 8192, (8, 256), generator=draw) for _ in range(BATCHES)]
    taps = lk.capture(model, lk.Projection(RANK), include=[f"*{part}*" for part in EVERY_LINEAR])

    def observe(ids: Tensor, into: Covariances | None) -> Covariances:
        with taps, taps.covariances(into, ("in", "out"), rank=RANK) as seen:
            taps.reset(len(ids))
            step(model, ids)
        return seen

    exact, seen = Moments(model), None
    for ids in batches:
        exact.run(lambda ids=ids: step(model, ids))
        seen = observe(ids, seen)
    assert seen is not None
    energy = least_energy(seen.spectra(), exact)
    assert energy >= LEAST_ENERGY, energy
    took: dict[str, list[float]] = {"plain": [], "first": [], "observed": [], "moments": []}
    calls: dict[str, Callable[[Tensor], object]] = {
        "plain": lambda ids: step(model, ids),
        "first": lambda ids: observe(ids, None),
        "observed": lambda ids: observe(ids, seen),
        "moments": lambda ids: exact.run(lambda: step(model, ids)),
    }
    names = list(calls)
    for turn in range(rounds):
        for at in range(len(names)):
            name = names[(at + turn) % len(names)]
            took[name].append(seconds(partial(calls[name], batches[turn % BATCHES])))
    rows: list[dict] = []
    for name, times in took.items():
        ratios = [mine / plain for mine, plain in zip(times, took["plain"], strict=True)]
        rows.append(
            {
                "provider": name,
                "median_ms": round(statistics.median(times) * 1e3, 1),
                "time_ratio_median": round(statistics.median(ratios), 3),
                "time_ratio_error": round(median_error(ratios), 3),
            }
        )
    solve = min(seconds(seen.spectra) for _ in range(3))
    rows.append({"provider": "solving", "median_ms": round(solve * 1e3, 1), "least_energy": round(energy, 4)})
    return rows


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    torch.set_num_threads(2)
    parser = argparse.ArgumentParser(description="Time of an observed step over that of the plain one.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    from machine import commit, cpu_model
    from record import RESULTS, slug, text

    facts = {"op": "observe", "machine": cpu_model(), "commit": commit(), "torch": torch.__version__}
    facts |= {"shape": "llama 8x512, 56 linears, k=64, 8x256", "dtype": "fp32", "threads": 2, "rounds": asked.rounds}
    contents = text({**facts, "rows": measure(asked.rounds)})
    print(contents)
    (RESULTS / f"observe-{slug(cpu_model())}.json").write_text(contents)


if __name__ == "__main__":
    main()
