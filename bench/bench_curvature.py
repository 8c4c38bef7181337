"""What curvatures cost, each against the machine's own rate for the same work in the same run.

    python bench/bench_curvature.py        # measures and records; every number is checked before it is timed

factorise        Cholesky of a 4,096-wide block, damping included, against LAPACK's potrf in fp64 on the same matrix
self_influence   g^T (H + lambda I)^-1 g of every row of a store with one 4,096-wide layer, against one pass over
                 it that scores 4,096 queries; must-do flops are the N d^2 of the substitution
fisher           accumulating the Fisher of such rows eight at a time, as a logging step gives them, a row
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import logra_kernels as lk
from logra_kernels.curvature import Damping, GramSums, RawFisher
from logra_kernels.curvature.solver import CholeskySolver
from logra_kernels.store import GradientStore

WIDTH, ROWS, BATCH = 4096, 4352, 8


def seconds(*runs: Callable[[], object], rounds: int = 3) -> list[float]:
    """Medians of runs timed in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for own, run in zip(times, runs, strict=True):
            begun = time.perf_counter()
            run()
            own.append(time.perf_counter() - begun)
    return [statistics.median(own) for own in times]


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
        "ours_ms": round(ours * 1e3, 1),
        "lapack_ms": round(lapack * 1e3, 1),
        "lapack_gflops": round(WIDTH**3 / 3 / lapack / 1e9, 1),
        "rate_of_lapack": round(lapack / ours, 3),
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
        lambda: whole(factor), lambda: whole(exact), lambda: store.score(queries), lambda: a @ b.T, rounds=2
    )
    rate = 2 * len(a) * WIDTH**2 / gemm
    rate = max(rate, 2 * ROWS * WIDTH**2 / scoring)
    rows = []
    for name, own in (("fp32 substitution", fast), ("fp64 substitution", slow)):
        rows.append(
            {
                "what": f"self_influence, {name}",
                "ours_ms": round(own * 1e3, 1),
                "scoring_pass_ms": round(scoring * 1e3, 1),
                "over_scoring_pass": round(own / scoring, 3),
                "must_do_gflops": round(ROWS * WIDTH**2 / own / 1e9, 1),
                "fp32_gemm_gflops": round(rate / 1e9, 1),
                "rate_of_gemm": round(ROWS * WIDTH**2 / own / rate, 3),
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
    ours, naive = seconds(panels, by_batch, rounds=2)
    return {
        "what": "fisher",
        "ours_us_a_row": round(ours / len(rows) * 1e6, 1),
        "by_batch_us_a_row": round(naive / len(rows) * 1e6, 1),
        "must_do_gflops": round(len(rows) * WIDTH**2 / ours / 1e9, 1),
    }


def logging() -> dict:
    """What summing the Fisher of 24 layers of 4,096 numbers adds to a step of bench_logging, 8 rows at a time."""
    from bench_logging import BATCH, make_model, providers

    model, ids = make_model()
    step = providers(model, ids)["logra_kernels"]
    grads = step()
    rows = torch.cat([g.flatten(1) for g in grads.values()], dim=1)
    sums = GramSums({name: slice(i * WIDTH, (i + 1) * WIDTH) for i, name in enumerate(grads)})
    steps = 256 // BATCH  # a whole panel, so that the products are counted

    def add() -> None:
        for _ in range(steps):
            sums.add(rows)

    add()
    own, plain = seconds(add, step)
    return {
        "what": "fisher while logging, llama 8x512, 24 linears, k=64, 8x256",
        "step_ms": round(plain * 1e3, 1),
        "fisher_ms_a_step": round(own / steps * 1e3, 2),
        "adds": round(own / steps / plain, 4),
    }


def main() -> None:
    from machine import commit, cpu_model
    from record import RESULTS, slug, text

    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as directory:
        store = make_store(Path(directory) / "store")
        fisher = RawFisher.of(store)
        rows = [factorise(fisher.blocks["layer"]), *self_influence(store, fisher), fisher_rows(store.read(0, 512))]
    rows.append(logging())
    facts = {"op": "curvature", "machine": cpu_model(), "commit": commit(), "torch": torch.__version__}
    facts |= {"shape": f"{ROWS} rows x {WIDTH}", "dtype": "fp32", "threads": torch.get_num_threads()}
    path = RESULTS / f"curvature-{slug(cpu_model())}.json"
    path.write_text(text({**facts, "rows": rows}))
    print(path.read_text())


if __name__ == "__main__":
    main()
