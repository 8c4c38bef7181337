"""Proves on this machine that each backend of each op computes what the op's formula says.

Fresh random inputs, an fp64 answer computed beside them, and the rule of the tests: an error of at most twice that of
the naive composition in the same dtype, plus a few units in the last place. An answer of zeros fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from logra_kernels import ops
from logra_kernels.ops._check import accumulator_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Check:
    """One backend of one op in one dtype. Errors are relative to the answer's largest entry; None if it did not run."""

    op: str
    backend: str
    device: str
    dtype: str
    error: float | None
    allowed: float | None
    status: str  # "ok", "FAIL" or "not here"
    why: str = ""

    @property
    def failed(self) -> bool:
        return self.status == "FAIL"


def run(seed: int | None = None) -> list[Check]:
    """Check every backend of every op on every device type of this machine; some seconds.

    Args:
        seed: For the random inputs; None draws a fresh one. Each failing check names the seed that repeats it.
    """
    seed = torch.Generator().seed() if seed is None else seed
    checks = []
    for backend in ops.backends():
        if not backend.available:
            checks.append(Check(backend.op, backend.name, backend.device, "", None, None, "not here", backend.why))
            continue
        checks.extend(_check(backend, dtype, seed) for dtype in DTYPES)
    return checks


def render(checks: list[Check]) -> str:
    """The checks as a plain table, with a line below that counts them."""
    header = ("op", "backend", "device", "dtype", "relative error", "allowed", "")
    rows = [header, *(_cells(check) for check in checks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]
    count = {status: sum(check.status == status for check in checks) for status in ("ok", "FAIL", "not here")}
    return "\n".join([*lines, "", f"{count['ok']} ok, {count['FAIL']} failed, {count['not here']} not here"])


def _cells(check: Check) -> tuple[str, ...]:
    numbers = ("" if number is None else f"{number:.1e}" for number in (check.error, check.allowed))
    verdict = f"{check.status}: {check.why}" if check.why else check.status
    return check.op, check.backend, check.device, check.dtype, *numbers, verdict


def _check(backend: ops.Backend, dtype: torch.dtype, seed: int) -> Check:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(backend.device, dtype)

    error = allowed = None
    try:
        got, exact, naive = _CASES[backend.op](draw, backend.name)
        scale = exact.abs().max().item()
        error = (got.double() - exact).abs().max().item() / scale
        floor = 1e-13 if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
        allowed = 2 * (naive.double() - exact).abs().max().item() / scale + floor
        why = "" if error <= allowed else "wrong numbers" if got.any() else "all zeros"  # NaN is not <= anything
    except Exception as raised:  # whatever a broken backend throws is its result here
        why = f"{type(raised).__name__}: {raised}".partition("\n")[0]
    status = "FAIL" if why else "ok"
    name = str(dtype).removeprefix("torch.")
    return Check(backend.op, backend.name, backend.device, name, error, allowed, status, why and f"{why} (seed {seed})")


Answers = tuple[Tensor, Tensor, Tensor]  # the backend's, in fp64, and the naive composition's in the same dtype


def _project_rows(draw: Callable[..., Tensor], backend: str) -> Answers:
    x, p = draw(3, 37, 150), draw(21, 150)
    return ops.project_rows(x, p, backend=backend), x.double() @ p.double().T, x @ p.T


def _project_grad(draw: Callable[..., Tensor], backend: str) -> Answers:
    """Ragged and weighted, the general form."""
    x, dy, p_in, p_out = draw(75, 40), draw(75, 56), draw(20, 40), draw(17, 56)
    weights = draw(75).to(accumulator_dtype(x.dtype)).clamp_min(0)
    cuts = [0, 3, 3, 44, 75]

    def composed(x: Tensor, dy: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
        a, b = (x @ p_in.T).to(accumulator_dtype(x.dtype)), (dy @ p_out.T) * weights[:, None]
        return torch.stack([b[i:j].T @ a[i:j] for i, j in pairwise(cuts)])

    got = ops.project_grad(x, dy, p_in, p_out, torch.tensor(cuts, device=x.device), weights, backend=backend)
    return got, composed(x.double(), dy.double(), p_in.double(), p_out.double()), composed(x, dy, p_in, p_out)


def _accumulate_gram(draw: Callable[..., Tensor], backend: str) -> Answers:
    g = draw(75, 90)
    earlier = g.new_ones((90, 90), dtype=accumulator_dtype(g.dtype))
    got = earlier.clone()
    ops.accumulate_gram(g, got, backend=backend)
    return got, earlier.double() + g.double().T @ g.double(), earlier + (g.T @ g).to(earlier.dtype)


def _quantize_rows(draw: Callable[..., Tensor], backend: str) -> Answers:
    g = draw(5, 300)
    got, naive = (ops.quantize_rows(g, "int4", backend=each) for each in (backend, "reference"))
    back, naive_back = (ops.dequantize_rows(rows, backend="reference") for rows in (got, naive))
    return back, g.double(), naive_back


def _dequantize_rows(draw: Callable[..., Tensor], backend: str) -> Answers:
    rows = ops.quantize_rows(draw(5, 256), "int8", backend="reference")
    assert rows.scales is not None
    exact = rows.codes.double() * rows.scales.double().repeat_interleave(128, dim=1)
    return ops.dequantize_rows(rows, backend=backend), exact, rows.codes * rows.scales.repeat_interleave(128, dim=1)


def _score_block(draw: Callable[..., Tensor], backend: str) -> Answers:
    queries, rows = draw(5, 300), draw(90, 300)
    return ops.score_block(queries, rows, backend=backend), queries.double() @ rows.double().T, queries @ rows.T


def _score_topk(draw: Callable[..., Tensor], backend: str) -> Answers:
    """The values, and beside them the true scores of the rows that are named."""
    queries, rows = draw(5, 300), draw(90, 300)
    row_scale = draw(90).to(accumulator_dtype(rows.dtype)).abs() + 0.5
    values, index = ops.score_topk(queries, rows, 7, row_scale, backend=backend)
    exact, naive = queries.double() @ rows.double().T * row_scale, (queries @ rows.T) * row_scale
    best, naive_best = exact.topk(7), naive.topk(7)
    return (
        torch.cat([values.double(), exact.gather(1, index)]),
        torch.cat([best.values] * 2),
        torch.cat([naive_best.values.double(), exact.gather(1, naive_best.indices)]),
    )


def _factor_rows(draw: Callable[..., Tensor], backend: str) -> Answers:
    """What is left of rows of two strong factors and some noise, [N]: least where the factors are the best ones."""
    layers = [(20, 24)]
    left, right = (torch.linalg.qr(draw(2, d, 2).double()).Q for d in layers[0])
    rows = (left @ right.mT + 0.01 * draw(2, 20, 24).double()).flatten(1).to(draw(1).dtype)

    def left_over(rows: Tensor, backend: str) -> Tensor:
        rebuilt = ops.rebuild_rows(ops.factor_rows(rows, layers, 2, backend=backend), layers, 2)
        return torch.linalg.vector_norm(rows.double() - rebuilt.double(), dim=1)

    return left_over(rows, backend), left_over(rows.double(), "reference"), left_over(rows, "reference")


def _score_factored(draw: Callable[..., Tensor], backend: str) -> Answers:
    layers = [(12, 20), (10, 6)]
    queries, factors = draw(5, 300), draw(90, 2 * 48)
    got = ops.score_factored(queries, factors, layers, 2, backend=backend)
    exact, naive = (
        q @ ops.rebuild_rows(f, layers, 2).to(q.dtype).T
        for q, f in ((queries.double(), factors.double()), (queries, factors))
    )
    return got, exact, naive


_CASES = {
    "project_rows": _project_rows,
    "project_grad": _project_grad,
    "accumulate_gram": _accumulate_gram,
    "quantize_rows": _quantize_rows,
    "dequantize_rows": _dequantize_rows,
    "score_block": _score_block,
    "score_topk": _score_topk,
    "factor_rows": _factor_rows,
    "score_factored": _score_factored,
}
