"""What curvatures cost, each against the machine's own rate for the same work in the same run.

    python bench/bench_curvature.py              # measures and records; every number is checked before it is timed
    python bench/bench_curvature.py logging      # one part alone, printed: factorise, self_influence, fisher, logging

What is compared is timed in turn, round by round. A row gives medians, and its ratio also by the best round of each,
which other work on the machine disturbs the least.

factorise        Cholesky of a 4,096-wide block, damping included, against LAPACK's potrf in fp64 on the same matrix
self_influence   g^T (H + lambda I)^-1 g of every row of a store with one 4,096-wide layer, against one pass over
                 it that scores 4,096 queries; must-do flops are the N d^2 of the substitution
fisher           accumulating the Fisher of such rows eight at a time, as a logging step gives them, a row
logging          the same for 24 such layers, against the logging step of bench_logging that gives their rows
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import logra_kernels as lk
from logra_kernels.curvature import Damping, GramSums, RawFisher
from logra_kernels.curvature.solver import CholeskySolver
from logra_kernels.curvature.sums import PANEL
from logra_kernels.store import GradientStore

WIDTH, ROWS, BATCH = 4096, 4352, 8


@dataclass(frozen=True)
class Times:
    """Seconds of every round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def ms(self) -> float:
        return round(self.median * 1e3, 1)

    def over(self, other: "Times") -> dict[str, float]:
        """The ratio to another's, by medians and by the best rounds."""
        least = min(self.rounds) / min(other.rounds)
        return {"median": round(self.median / other.median, 4), "best": round(least, 4)}


def seconds(*runs: Callable[[], object], rounds: int = 5) -> list[Times]:
    """Of runs timed in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for own, run in zip(times, runs, strict=True):
            begun = time.perf_counter()
            run()
            own.append(time.perf_counter() - begun)
    return [Times(own) for own in times]


def make_store(path: Path) -> GradientStore:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.linspace(0, -3, WIDTH).exp()
    with GradientStore.create(path, {"layer": (64, 64)}) as writer:
        for start in range(0, ROWS, 256):
            rows = torch.randn(256, WIDTH, generator=generator) * spectrum
            writer.append(rows, [str(start + i) for i in range(256)])
    return GradientStore.open(path)


def factorise(h: torch.Tensor) -> dict:
    damping = 0.1 * float(h.diagonal().mean())
    damped = h.double()
    damped.diagonal().add_(damping)
    ours, lapack = seconds(lambda: CholeskySolver("layer", h, damping), lambda: torch.linalg.cholesky_ex(damped))
    return {
        "what": "factorise",
        "ours_ms": ours.ms,
        "lapack_ms": lapack.ms,
        "lapack_gflops": round(WIDTH**3 / 3 / lapack.median / 1e9, 1),
        "rate_of_lapack": lapack.over(ours),
    }


def self_influence(store: GradientStore, fisher: RawFisher) -> list[dict]:
    factor, exact = fisher.factorize(Damping(0.1)), fisher.factorize(Damping(0.1), exact=True)
    some = store.read(0, 256)
    true, queries = exact.quadratic(some), torch.randn(WIDTH, WIDTH)
    error = float(((factor.quadratic(some) - true).abs() / true).max())
    assert error < 3e-5, error
    a, b = torch.randn(1024, WIDTH), torch.randn(WIDTH, WIDTH)

    def whole(own):
        return [own.quadratic(rows) for _, rows in store.blocks()]

    fast, slow, scoring, gemm = seconds(
        lambda: whole(factor), lambda: whole(exact), lambda: store.score(queries), lambda: a @ b.T, rounds=3
    )
    rate = max(2 * len(a) * WIDTH**2 / gemm.median, 2 * ROWS * WIDTH**2 / scoring.median)
    rows = []
    for name, own in (("fp32 substitution", fast), ("fp64 substitution", slow)):
        rows.append(
            {
                "what": f"self_influence, {name}",
                "ours_ms": own.ms,
                "scoring_pass_ms": scoring.ms,
                "over_scoring_pass": own.over(scoring),
                "must_do_gflops": round(ROWS * WIDTH**2 / own.median / 1e9, 1),
                "fp32_gemm_gflops": round(rate / 1e9, 1),
                "rate_of_gemm": round(ROWS * WIDTH**2 / own.median / rate, 3),
                "largest_relative_error": error if own is fast else 0.0,
            }
        )
    return rows


def fisher_rows(rows: torch.Tensor) -> dict:
    parts = {"layer": slice(0, WIDTH)}

    def panels() -> GramSums:
        sums = GramSums(parts)
        for part in rows.split(BATCH):
            sums.add(part)
        return sums

    def by_batch() -> torch.Tensor:
        out = torch.zeros(WIDTH, WIDTH)
        for part in rows.split(BATCH):
            lk.accumulate_gram(part, out)
        return out

    torch.testing.assert_close(panels().total()["layer"], rows.T @ rows, rtol=1e-4, atol=1e-3)
    ours, naive = seconds(panels, by_batch, rounds=3)
    return {
        "what": "fisher",
        "ours_us_a_row": round(ours.median / len(rows) * 1e6, 1),
        "by_batch_us_a_row": round(naive.median / len(rows) * 1e6, 1),
        "must_do_gflops": round(len(rows) * WIDTH**2 / ours.median / 1e9, 1),
    }


def logging() -> dict:
    """What summing the Fisher of 24 layers of 4,096 numbers adds to a step of bench_logging, 8 rows at a time."""
    from bench_logging import BATCH, make_model, provider

    model, ids = make_model()
    step = provider("logra_kernels", model, ids).run
    grads = step()
    assert grads is not None
    rows = torch.cat([g.flatten(1) for g in grads.values()], dim=1)
    sums = GramSums({name: slice(i * WIDTH, (i + 1) * WIDTH) for i, name in enumerate(grads)})
    steps = PANEL // BATCH  # a whole panel, so that the products are counted

    def add() -> None:
        for _ in range(steps):
            sums.add(rows)

    add()
    own, plain = seconds(add, step)
    exact = rows[:, :WIDTH].double().T @ rows[:, :WIDTH].double() * (sums.rows // BATCH)
    got = sums.total()[next(iter(grads))].double()
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    a_step = Times([panel / steps for panel in own.rounds])
    return {
        "what": "fisher while logging, llama 8x512, 24 linears, k=64, 8x256",
        "step_ms": plain.ms,
        "fisher_ms_a_step": round(a_step.median * 1e3, 2),
        "adds": a_step.over(plain),
    }


PARTS = ("factorise", "self_influence", "fisher", "logging")


def measure(parts: Sequence[str]) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        if set(parts) & {"factorise", "self_influence", "fisher"}:
            store = make_store(Path(directory) / "store")
            fisher = RawFisher.of(store)
        if "factorise" in parts:
            rows.append(factorise(fisher.blocks["layer"]))
        if "self_influence" in parts:
            rows += self_influence(store, fisher)
        if "fisher" in parts:
            rows.append(fisher_rows(store.read(0, 512)))
    return [*rows, logging()] if "logging" in parts else rows


def main() -> None:
    from machine import commit, cpu_model
    from record import RESULTS, slug, text

    torch.set_num_threads(2)
    asked = sys.argv[1:]
    if unknown := set(asked) - set(PARTS):
        raise SystemExit(f"bench_curvature: {', '.join(sorted(unknown))}? the parts are {', '.join(PARTS)}")
    rows = measure(asked or PARTS)
    if asked:
        print(*rows, sep="\n")
        return
    facts = {"op": "curvature", "machine": cpu_model(), "commit": commit(), "torch": torch.__version__}
    facts |= {"shape": f"{ROWS} rows x {WIDTH}", "dtype": "fp32", "threads": torch.get_num_threads()}
    path = RESULTS / f"curvature-{slug(cpu_model())}.json"
    path.write_text(text({**facts, "rows": rows}))
    print(path.read_text())


if __name__ == "__main__":
    main()
